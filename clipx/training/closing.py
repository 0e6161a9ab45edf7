"""What a run says at its end: its scores in a table, where things are, and what to type next."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipx.training.direction import Mode, is_better, mode_of

Bests = dict[str, tuple[float, int]]        # by tag: the best value, and its step

HEAD = ("metric", "value", "best", "at step")


def note_bests(bests: Bests, numbers: Mapping[str, float], step: int, mode: Mapping[str, Mode]) -> None:
    """Keep the best value of each score so far.

    Args:
        bests: is changed in place.
        numbers: by tag; scores are those of ``val/``.
        step: that they are of.
        mode: by tag, where the user has said which way a metric is better.
    """
    for tag, value in numbers.items():
        before = bests[tag][0] if tag in bests else None
        if tag.startswith("val/") and is_better(value, before, mode.get(tag) or mode_of(tag, None)):
            bests[tag] = value, step


def closing(directory: Path, summary: Mapping[str, Any], bests: Bests) -> list[str]:
    """The lines that end a run, or its part in this process."""
    step, steps, minutes = summary["step"], summary["steps"], summary["seconds"] / 60
    return [
        f"{summary['state']} at step {step:,} of {steps:,} after {minutes:.1f} min",
        *score_table(summary["final"], bests, summary["best"].get("metric")),
        f"weights   {weights(directory / 'checkpoints')}",
        f"look      tensorboard --logdir {directory}",
        f"repeat    python -m clipx.train config={directory / 'config.yaml'} name=again",
    ]


def score_table(final: Mapping[str, float], bests: Bests, chosen: str | None) -> list[str]:
    """Each score's last and best value, line by line; none where there are no scores.

    Args:
        final: the last value of each tag.
        bests: the best ones.
        chosen: the tag that clip_best.pt is best by; it is marked.
    """
    tags = [tag for tag in final if tag in bests]
    rows = [(f"{tag} *" if tag == chosen else tag, f"{final[tag]:.4g}", f"{bests[tag][0]:.4g}", f"{bests[tag][1]:,}")
            for tag in tags]
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    table = [f"{row[0]:<{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in
                                                zip(row[1:], widths[1:], strict=True)) for row in (HEAD, *rows)]
    return ["", *table, *(["* clip_best.pt is the best by this one"] if chosen in tags else []), ""]


def weights(checkpoints: Path) -> str:
    """Where the weights are, and how large all checkpoints are together."""
    size = sum(file.stat().st_size for file in checkpoints.glob("clip_*.pt"))
    return f"{checkpoints}  ({size / 1e6:,.0f} MB)"
