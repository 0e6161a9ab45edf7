"""TensorBoard beyond scalars: hyperparameters, the objective, and the layout of the charts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

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
    shown = {
        key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value) for key, value in row.items()
    }
    experiment, start, _ = hparams(shown, metrics)
    board._get_file_writer().add_summary(experiment)
    board._get_file_writer().add_summary(start)
    board.add_custom_scalars(LAYOUT)


def mark_finished(board: SummaryWriter) -> None:
    """Mark the run as finished."""
    board._get_file_writer().add_summary(hparams({}, {})[2])


def best_tag(tag: str) -> str:
    """The tag for the best value of ``tag``."""
    return f"best/{tag.removeprefix('val/')}"


def hparams_row(config: Mapping[str, Any], choices: Mapping[str, Any], varied: Sequence[str]) -> dict[str, Any]:
    """The hyperparameters that HPARAMS shows: those that the command varied, and the options of the other groups.

    The other groups share one column, as TensorBoard shows only the first five columns by default, in alphabetical
    order.

    Args:
        config: of the run, flattened.
        choices: by group.
        varied: keys or groups.
    """
    fixed = {group: option for group, option in choices.items() if group not in varied}
    every = {**config, **choices}
    groups = " ".join(map(format_choice, fixed.items()))
    return {"groups": groups, **{key: every[key] for key in varied if key in every}}


def format_choice(item: tuple[str, Any]) -> str:
    group, option = item
    return f"{group}={','.join(option) if isinstance(option, list) else option}"
