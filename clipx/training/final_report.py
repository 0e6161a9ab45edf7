"""Final report of a run: a table of scores, the paths, and what to type next."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clipx.config.console import columns
from clipx.training.direction import Mode, is_better, mode_of
from clipx.weights.checkpoint import size_on_disk


class Best(NamedTuple):
    """The best value of a score."""

    value: float
    step: int


Bests = dict[str, Best]  # by tag

HEAD = ("metric", "value", "best", "at step")


def note_bests(bests: Bests, numbers: Mapping[str, float], step: int, mode: Mapping[str, Mode]) -> None:
    """Update the best value of each score.

    Args:
        bests: updated in place.
        numbers: by tag; scores start with ``val/``.
        step: of these numbers.
        mode: by tag, if the user set it; otherwise inferred from the tag.
    """
    for tag, value in numbers.items():
        before = bests[tag].value if tag in bests else None
        if tag.startswith("val/") and is_better(value, before, mode.get(tag) or mode_of(tag, None)):
            bests[tag] = Best(value, step)


def final_report(directory: Path, summary: Mapping[str, Any], bests: Bests, views: Sequence[str]) -> list[str]:
    """Lines logged when a run, or this process's part of it, ends.

    Args:
        directory: of the run.
        summary: of the run.
        bests: of its scores.
        views: how to look at its logs.
    """
    step, steps, minutes = summary["step"], summary["steps"], summary["seconds"] / 60
    return [
        f"{summary['state']} at step {step:,} of {steps:,} after {minutes:.1f} min",
        *score_table(summary["final"], bests, summary["best"].get("metric")),
        f"weights   {checkpoints_line(directory / 'checkpoints')}",
        *(f"view      {view}" for view in views),
        f"repeat    python -m clipx.train config={directory / 'config.yaml'} name=again",
    ]


def score_table(final: Mapping[str, float], bests: Bests, chosen: str | None) -> list[str]:
    """Lines of a table with the last and the best value of each score; empty without scores.

    Args:
        final: last value of each tag.
        bests: best value of each tag.
        chosen: tag that selects clip_best.pt; it is marked.
    """
    tags = [tag for tag in final if tag in bests]
    rows = [
        (f"{tag} *" if tag == chosen else tag, f"{final[tag]:.4g}", f"{bests[tag].value:.4g}", f"{bests[tag].step:,}")
        for tag in tags
    ]
    if not rows:
        return []
    return ["", *columns([HEAD, *rows], ">"), *(["* selects clip_best.pt"] if chosen in tags else []), ""]


def checkpoints_line(checkpoints: Path) -> str:
    """Path and total size of the checkpoints."""
    return f"{checkpoints}  ({size_on_disk(checkpoints) / 1e6:,.0f} MB)"
