"""Weights & Biases, over the network or offline."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from typing import TYPE_CHECKING, Literal

import numpy as np

from clipx.errors import UserError, first_line
from clipx.track import TrackedRun, Tracker, best_tag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID_FILE = "wandb_id"  # in the run's directory: a resumed run goes on under its id


class WandB(Tracker):
    """Log to Weights & Biases; its files are in wandb/ of the run's directory.

    W&B keeps what it has: of steps after the checkpoint that a run resumes from, the first values stay and are not
    logged again.  Offline, a resumed run begins a new file with all steps up to the checkpoint, and the earlier one is
    deleted with its figures.

    Args:
        project: of W&B.
        entity: user or team; None for your default.
        group: of runs; None for the sweep's name.
        tags: of the run.
        mode: None for what WANDB_MODE says, else online.

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(
        self,
        project: str = "clipx",
        entity: str | None = None,
        group: str | None = None,
        tags: tuple[str, ...] = (),
        mode: Literal["online", "offline", "disabled"] | None = None,
    ):
        found = find_spec("wandb")
        if found is None or found.origin is None:  # without an origin: a folder of that name
            raise UserError('track=[wandb] needs wandb, which is not installed; pip install "clipx[wandb]"')
        self.project, self.entity, self.group, self.tags, self.mode = project, entity, group, [*tags], mode

    def start(self, run: TrackedRun) -> None:
        """
        Raises:
            UserError: W&B cannot be reached, or nobody is logged in.
        """
        import wandb

        found = run.directory / ID_FILE
        if not found.exists():
            found.write_text(token_hex(4), encoding="utf-8")
        is_job = run.directory.parent.parent.name == "sweeps"
        try:
            self.run = wandb.init(
                project=self.project,
                entity=self.entity,
                tags=self.tags,
                mode=self.mode,
                id=found.read_text(encoding="utf-8").strip(),
                name=run.directory.name,
                group=self.group or (run.directory.parent.name if is_job else None),
                config=dict(run.config),
                dir=run.directory,
                resume="allow",
                reinit="create_new",  # jobs of a sweep share a process
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"track=[wandb]: {first_line(error)}; log in with  wandb login  or WANDB_API_KEY, or set "
                "track.wandb.mode=offline"
            ) from error
        for row in run.rows:
            self.log(row)
        if self.run.offline:
            delete_others(Path(self.run.dir).parent, self.run.id)

    def log(self, row: Mapping[str, float]) -> None:
        if row["step"] >= self.run.step:  # W&B has the earlier ones
            self.run.log(dict(row), step=int(row["step"]))

    def best(self, tag: str, value: float, step: int) -> None:
        self.run.summary.update({best_tag(tag): value})

    def figure(self, tag: str, figure: "Figure", step: int) -> None:
        import wandb
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        if step >= self.run.step:
            canvas = FigureCanvasAgg(figure)  # drawn here, as wandb.Image(figure) needs pyplot
            canvas.draw()
            self.run.log({tag: wandb.Image(np.asarray(canvas.buffer_rgba()))}, step=step)

    def view(self) -> str:
        return f"wandb sync {Path(self.run.dir).parent}" if self.run.offline else self.run.url or ""

    def close(self, state: str) -> None:
        self.run.finish(exit_code=int(state == "failed"))


def delete_others(own: Path, run_id: str) -> None:
    """Delete what earlier processes of an offline run have left next to its own files."""
    for path in own.parent.glob(f"offline-run-*-{run_id}*"):
        if path.name != own.name:
            rmtree(path)
