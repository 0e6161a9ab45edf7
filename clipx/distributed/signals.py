"""Signals that ask a run to end: SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is closed) and SIGUSR1, which Slurm can
send before the time is up."""

import signal
from threading import current_thread, main_thread
from types import FrameType, TracebackType

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Signals:
    """Notes signals for the length of a ``with``; a second Ctrl-C ends the process at once.

    Attributes:
        patient: whether somebody looks at ``asked``; before that, signals do what they always do.
        last_words: whether an error that ends the ``with`` is to be told whatever comes: torchrun sends SIGTERM to all
            ranks as soon as one has ended.
        asked: the name of the first one; None where there was none.
    """

    patient: bool = False
    last_words: bool = False
    asked: str | None = None

    def __enter__(self) -> "Signals":
        asking = ASKING if current_thread() is main_thread() else ()        # Python lets no other thread handle them
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:           # nohup
            asking = tuple(number for number in asking if number != signal.SIGHUP)
        self.before = {number: signal.signal(number, self.note) for number in asking}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if error and self.last_words and number == signal.SIGTERM else handler)

    def note(self, number: int, _frame: FrameType | None) -> None:
        if not self.patient or (self.asked and number == signal.SIGINT):
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        self.asked = self.asked or signal.Signals(number).name
