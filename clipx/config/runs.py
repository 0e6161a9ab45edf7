"""Runs by their names: those that are meant, and where there is no such run those that exist."""

from collections.abc import Iterator
from difflib import SequenceMatcher
from glob import glob
from pathlib import Path

from clipx.errors import UserError

OUTPUTS = Path("outputs")
MOST_NAMED = 5


def expand_runs(given: str | list[str]) -> dict[str, str]:
    """Runs, each with what heads its column: its name where that tells them apart.

    ``A,B`` and ``[A,B]`` are lists where Hydra has not read them as such, and no file has that name.
    """
    text = given if isinstance(given, str) else ",".join(given)
    parts = [text] if Path(text).exists() else listed(text.removeprefix("[").removesuffix("]"))
    runs = list(dict.fromkeys(path for run in parts for path in matching(run.strip())))
    names = [Path(run).name for run in runs]
    return dict(zip(runs, names if len(set(names)) == len(names) else runs, strict=True))


def listed(text: str) -> list[str]:
    """What stands between commas; a comma may belong to the name of a run, which are named by words of a command."""
    parts, found = text.split(","), []
    while parts:
        ends = (end for end in range(len(parts), 0, -1) if Path(",".join(parts[:end]).strip()).exists())
        end = next(ends, 1)
        found.append(",".join(parts[:end]))
        parts = parts[end:]
    return found


def matching(pattern: str) -> list[str]:
    """The runs that a pattern such as outputs/* stands for; what is no pattern as it is."""
    if Path(pattern).exists():
        return [pattern]
    return sorted(str(Path(path).parent) for path in glob(f"{pattern}/config.yaml")) or [pattern]


def check_exists(key: str, where: str) -> None:
    """
    Args:
        key: that gives ``where``.
        where: a run, weights in a file or a directory, or a name of open_clip's.

    Raises:
        UserError: nothing is there; the message names runs that are.
    """
    path = Path(where).expanduser()
    if not where.startswith("open_clip:") and not path.exists():
        raise UserError(f"{key}={where}: there is no such run, checkpoint or weights{suggest_runs(path)}")


def suggest_runs(path: Path) -> str:
    """The end of a message about a run or a checkpoint that is not there: some that are, those of like names first."""
    run = next((place.parent for place in (path, *path.parents) if place.name == "checkpoints"), path)
    there = {str(one): one.name for one in (*sorted(path.parent.glob("*.pt")), *nearby_runs(run)) if one != path}
    wanted = path.name if path.parent.is_dir() else run.name
    like = sorted(there, key=lambda one: -SequenceMatcher(None, there[one], wanted).ratio())
    if not like:
        return ""
    rest = f" and {len(like) - MOST_NAMED:,} more" if len(like) > MOST_NAMED else ""
    return f"; there {'is' if len(like) == 1 else 'are'} {', '.join(like[:MOST_NAMED])}{rest}"


def nearby_runs(run: Path) -> Iterator[Path]:
    """Those beside a path, those of outputs and those of its sweeps."""
    for pattern in (run.parent / "*", OUTPUTS / "*", OUTPUTS / "sweeps" / "*" / "*"):
        for config in sorted(glob(str(pattern / "config.yaml"))):
            yield Path(config).parent
