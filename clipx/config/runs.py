"""Find runs by name; if one does not exist, suggest those that do."""

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from glob import glob
from pathlib import Path

from clipx.errors import UserError

OUTPUTS = Path("outputs")
MAX_SUGGESTED = 5


def expand_runs(runs: str | list[str]) -> dict[str, str]:
    """The path of each run with its label: its name, or its path if names repeat.

    ``A,B`` and ``[A,B]`` are lists, unless a file has that name.
    """
    text = runs if isinstance(runs, str) else ",".join(runs)
    parts = [text] if Path(text).exists() else split_runs(text.removeprefix("[").removesuffix("]"))
    paths = list(dict.fromkeys(path for part in parts for path in glob_runs(part.strip())))
    names = [Path(path).name for path in paths]
    return dict(zip(paths, names if len(set(names)) == len(names) else paths, strict=True))


def split_runs(text: str) -> list[str]:
    """Split at commas, except those in the name of a run, which is built from arguments."""
    parts, found = text.split(","), []
    while parts:
        ends = (end for end in range(len(parts), 0, -1) if Path(",".join(parts[:end]).strip()).exists())
        end = next(ends, 1)
        found.append(",".join(parts[:end]))
        parts = parts[end:]
    return found


def glob_runs(pattern: str) -> list[str]:
    """The runs or checkpoints that match a pattern, outputs/* or A/checkpoints/*.pt; any other text unchanged."""
    if Path(pattern).exists():
        return [pattern]
    runs = sorted(str(Path(path).parent) for path in glob(f"{pattern}/config.yaml"))
    files = [path for path in glob(pattern) if path.endswith(".pt")]
    return runs or sorted(files, key=by_number) or [pattern]


def by_number(name: str) -> list[tuple[str, int]]:
    """Sort key of names with numbers: clip_step_9.pt is before clip_step_10.pt."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D+|^)(\d*)", name)]


def check_exists(key: str, where: str) -> None:
    """Check that a run or weights exist.

    Args:
        key: whose value is ``where``.
        where: a run, a file or directory of weights, or open_clip:NAME.

    Raises:
        UserError: it does not exist; the message suggests runs.
    """
    path = Path(where).expanduser()
    if not where.startswith("open_clip:") and not path.exists():
        raise UserError(f"{key}={where}: there is no such run, checkpoint or weights{suggest_runs(path)}")


def check_mix(mix: str | None, key: str, share: object) -> None:
    """Check that the weights to mix a run with exist, and that their share is given.

    Args:
        mix: a run or weights, or None.
        key: ``alpha`` or ``alphas``, whose value is ``share``.

    Raises:
        UserError: one is there without the other, or ``mix`` does not exist.
    """
    if mix is None and share is not None:
        raise UserError(f"{key}={share} has no effect without the weights to mix; add mix=WEIGHTS, or leave it out")
    if mix is not None and share in (None, []):
        example = "[0,0.25,0.5,0.75,1]" if key == "alphas" else "0.5"
        raise UserError(f"mix={mix} needs the share of run in the mixture; add {key}={example}")
    if mix is not None:
        check_exists("mix", mix)


def suggest_runs(path: Path) -> str:
    """The end of an error about a missing run or checkpoint: existing ones, similar names first."""
    run = next((parent.parent for parent in (path, *path.parents) if parent.name == "checkpoints"), path)
    names = {str(near): near.name for near in (*sorted(path.parent.glob("*.pt")), *nearby_runs(run)) if near != path}
    wanted = path.name if path.parent.is_dir() else run.name
    similar = sorted(names, key=lambda near: -SequenceMatcher(None, names[near], wanted).ratio())
    if not similar:
        return ""
    rest = f" and {len(similar) - MAX_SUGGESTED:,} more" if len(similar) > MAX_SUGGESTED else ""
    return f"; there {'is' if len(similar) == 1 else 'are'} {', '.join(similar[:MAX_SUGGESTED])}{rest}"


def nearby_runs(run: Path) -> Iterator[Path]:
    """The runs next to a path, in outputs/ and in its sweeps."""
    for pattern in (run.parent / "*", OUTPUTS / "*", OUTPUTS / "sweeps" / "*" / "*"):
        for config in sorted(glob(str(pattern / "config.yaml"))):
            yield Path(config).parent
