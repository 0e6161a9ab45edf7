"""Signals that stop a run: SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal was closed) and SIGUSR1, which Slurm can send
before a job's time limit."""

import signal
from threading import current_thread, main_thread
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Signals:
    """Record signals, as a context manager; a second Ctrl-C ends the process at once.

    Attributes:
        deferred: record signals; until it is set, signals have their usual effect.
        report_errors: ignore SIGTERM after an error, so that it is reported: torchrun sends SIGTERM to all ranks as
            soon as one has ended.
        received: name of the first signal, or None.
    """

    deferred: bool = False
    report_errors: bool = False
    received: str | None = None

    def __enter__(self) -> "Signals":
        numbers = STOP_SIGNALS if current_thread() is main_thread() else ()  # other threads cannot set handlers
        hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
        self.handlers: dict[int, Any] = {
            number: signal.signal(number, self.record)
            for number in numbers
            if not (number == signal.SIGHUP and hangup_ignored)
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.handlers.items():
            ignored = error and self.report_errors and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if ignored else handler)

    def record(self, number: int, _frame: FrameType | None) -> None:
        if not self.deferred or (self.received and number == signal.SIGINT):
            signal.signal(number, self.handlers[number])
            signal.raise_signal(number)
        self.received = self.received or signal.Signals(number).name
