"""What TensorBoard is told besides numbers: what a run varied, what it is judged by, which charts stand together."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

# the custom scalars: by question, by chart, which tags
LAYOUT = {
    "is it learning": {
        "loss: train and validation": ["Multiline", ["^train/loss$", "^val/loss$"]],
        "recall at 1: pictures to captions and back": ["Multiline", ["^val/[^/]+/(i2t|t2i)_r1$"]],
        "recall at 10: pictures to captions and back": ["Multiline", ["^val/[^/]+/(i2t|t2i)_r10$"]],
    },
    "is it healthy": {
        "cosine of pairs, and of what are none": ["Multiline", ["^health/(positive|negative)_cosine$"]],
        "directions that the embeddings span": ["Multiline", ["^health/(image|text)_rank$"]],
        "gradient norms": ["Multiline", ["^train/grad_norm$", "^health/grad_norm_(image|text)$"]],
        "scale of the logits": ["Multiline", ["^train/logit_scale$"]],
    },
    "is it fast": {
        "samples a second": ["Multiline", ["^train/samples_per_s$"]],
        "share of the time that waits for data": ["Multiline", ["^train/data_wait$"]],
    },
}

GLANCE = {      # tags that stand first, once more
    "train/loss": "1_learning_loss",
    "health/image_rank": "3_healthy_directions_of_the_images",
    "train/samples_per_s": "4_fast_samples_per_s",
}


def at_a_glance(numbers: Mapping[str, float], objective: str | None) -> dict[str, float]:
    """What answers, at the top of the first page: is it learning, is it healthy, is it fast."""
    names = {**GLANCE, objective: f"2_learning_{(objective or '').rpartition('/')[2]}"}
    return {f"at_a_glance/{name}": numbers[tag] for tag, name in names.items() if tag in numbers}


def introduce(board: SummaryWriter, row: Mapping[str, Any], objective: str | None) -> None:
    """Fill HPARAMS and lay the custom scalars out.

    The metrics are the last and the best objective, the last loss and the speed.  They are written into the run's own
    events; ``SummaryWriter.add_hparams`` would open a second run.

    Args:
        board: of the run.
        row: what stands in the run's row.
        objective: tag of the number that the run is judged by.
    """
    judged = [objective, best_tag(objective)] if objective else []
    metrics = dict.fromkeys([*judged, "train/loss", "train/samples_per_s"], 0)
    shown = {key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
             for key, value in row.items()}
    experiment, start, _ = hparams(shown, metrics)
    board._get_file_writer().add_summary(experiment)
    board._get_file_writer().add_summary(start)
    board.add_custom_scalars(LAYOUT)


def end(board: SummaryWriter) -> None:
    """Mark the run as finished."""
    board._get_file_writer().add_summary(hparams({}, {})[2])


def best_tag(tag: str) -> str:
    """Under what the best value of a tag is drawn."""
    return f"best/{tag.removeprefix('val/')}"


def row_of(config: Mapping[str, Any], choices: Mapping[str, Any], varied: Sequence[str]) -> dict[str, Any]:
    """What HPARAMS shows of a run: what its command has varied, and the options of the other groups.

    These share a column: of the first five, in the order of their names, TensorBoard shows the values unasked.

    Args:
        config: the run's, flat.
        choices: by group.
        varied: keys, or groups.
    """
    fixed = {group: option for group, option in choices.items() if group not in varied}
    every = {**config, **choices}
    return {"groups": " ".join(map(word, fixed.items())), **{key: every[key] for key in varied if key in every}}


def word(item: tuple[str, Any]) -> str:
    group, option = item
    return f"{group}={','.join(option) if isinstance(option, list) else option}"
