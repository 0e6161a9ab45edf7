"""TensorBoard: scalars, figures, hyperparameters, and the layout of the charts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from clipx.track import TrackedRun, Tracker, best_tag, shown, tags_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# custom scalars: question -> chart -> tags
LAYOUT = {
    "is it learning": {
        "loss: train and validation": ["Multiline", ["^train/loss$", "^val/loss$"]],
        "recall at 1: pictures to captions and back": ["Multiline", ["^val/[^/]+/(i2t|t2i)_r1$"]],
        "recall at 10: pictures to captions and back": ["Multiline", ["^val/[^/]+/(i2t|t2i)_r10$"]],
    },
    "is it healthy": {
        "cosine of pairs and of non-pairs": ["Multiline", ["^health/(positive|negative)_cosine$"]],
        "effective rank of the embeddings": ["Multiline", ["^health/(image|text)_rank$"]],
        "gradient norms": ["Multiline", ["^train/grad_norm$", "^health/grad_norm_(image|text)$"]],
        "scale of the logits": ["Multiline", ["^train/logit_scale$"]],
    },
    "is it fast": {
        "samples a second": ["Multiline", ["^train/samples_per_s$"]],
        "fraction of time spent waiting for data": ["Multiline", ["^train/data_wait$"]],
    },
}

GLANCE = {  # tags repeated at the top
    "train/loss": "1_learning_loss",
    "health/image_rank": "3_healthy_directions_of_the_images",
    "train/samples_per_s": "4_fast_samples_per_s",
}


class TensorBoard(Tracker):
    """Write the run's event file; TensorBoard hides the events of steps that a resumed run repeats."""

    def start(self, run: TrackedRun) -> None:
        self.directory, self.objective = run.directory, run.objective
        self.board = SummaryWriter(str(run.directory), purge_step=run.step + 1)
        config = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        self.board.add_text("config", f"```yaml\n{config}```", run.step)
        write_header(self.board, run.hparams, run.objective)

    def log(self, row: Mapping[str, float]) -> None:
        numbers = tags_of(row)
        for tag, value in {**numbers, **at_a_glance(numbers, self.objective)}.items():
            self.board.add_scalar(tag, value, int(row["step"]))

    def best(self, tag: str, value: float, step: int) -> None:
        self.board.add_scalar(best_tag(tag), value, step)

    def figure(self, tag: str, figure: "Figure", step: int) -> None:
        self.board.add_figure(tag, figure, step, close=False)

    def view(self) -> str:
        return f"tensorboard --logdir {self.directory}"

    def flush(self) -> None:
        self.board.flush()

    def close(self, state: str) -> None:
        if state == "finished":
            self.board._get_file_writer().add_summary(hparams({}, {})[2])
        self.board.close()


def at_a_glance(numbers: Mapping[str, float], objective: str | None) -> dict[str, float]:
    """Tags shown at the top of the first page: is it learning, is it healthy, is it fast."""
    names = {**GLANCE, **({objective: f"2_learning_{objective.rpartition('/')[2]}"} if objective else {})}
    return {f"at_a_glance/{name}": numbers[tag] for tag, name in names.items() if tag in numbers}


def write_header(board: SummaryWriter, row: Mapping[str, Any], objective: str | None) -> None:
    """Write HPARAMS and the layout of the custom scalars.

    The metrics are the last and the best objective, the last loss and the speed.  They go into the run's own event
    file; ``SummaryWriter.add_hparams`` would create a second run.

    Args:
        board: of the run.
        row: the run's hyperparameters.
        objective: tag of the metric that ranks the run.
    """
    ranked_by = [objective, best_tag(objective)] if objective else []
    metrics = dict.fromkeys([*ranked_by, "train/loss", "train/samples_per_s"], 0)
    experiment, start, _ = hparams(shown(row), metrics)
    board._get_file_writer().add_summary(experiment)
    board._get_file_writer().add_summary(start)
    board.add_custom_scalars(LAYOUT)
