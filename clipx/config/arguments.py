"""The words of a command line: made fit for Hydra's grammar, and turned into the name of a run's directory."""

import os
import re
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from clipx.config.meaning import PLACES, is_neutral
from clipx.config.runs import OUTPUTS

GROUPS = ("model", "data", "optim", "sched", "loss", "evals", "experiment", "source")
MOST_LETTERS = 120          # of a directory's name

# values that stay text where they look like numbers: names and paths
TEXT = {"name", "init_from", "resume", "run", "src", "out", "cache", "images", "texts", "search", "json"}
TEXT_OF_DATA = r"data\.(sources\.[^.]+\.)?(root|shards|val_shards|index_dir|cache)"

# Hydra's own log files are not used; conf/hydra/output/clipx.yaml has its directories
HYDRA = ["hydra/output=clipx", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
WITH_VALUE = {"--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c"}


def escape_arguments(words: Sequence[str], sweep: bool) -> list[str]:
    """The words, those quoted that Hydra's grammar rejects or would take for a sweep where there is none.

    Options come first: argparse wants all of the overrides in one row.
    """
    options, overrides = parted(words)
    return [*options, *(quoted(with_home(word), sweep) for word in overrides)]


def parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's options with their values, and the overrides."""
    options, overrides = [], []
    for before, word in zip(["", *words], words, strict=False):
        (options if word.startswith("-") or before in WITH_VALUE else overrides).append(word)
    return options, overrides


def quoted(word: str, sweep: bool) -> str:
    key, equals, value = word.partition("=")
    if not equals or fits_grammar(word, sweep):
        return word
    return f"{key}=" + ",".join(quoted_value(key, part, sweep) for part in (parts_of(value) if sweep else [value]))


def quoted_value(key: str, value: str, sweep: bool) -> str:
    """A value, quoted as a whole or, of a list, in those of its parts that Hydra's grammar rejects."""
    if fits_grammar(f"{key}={value}", sweep):
        return value
    if value.startswith("[") and value.endswith("]"):
        listed = f"[{','.join(quoted_value(key, part, sweep=False) for part in parts_of(value[1:-1]))}]"
        if fits_grammar(f"{key}={listed}", sweep):
            return listed
    return quote(value)


def parts_of(value: str) -> list[str]:
    """A value, cut at the commas that are not within brackets or braces."""
    parts, depth = [""], 0
    for letter in value:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts if depth == 0 else value.split(",")


def fits_grammar(word: str, sweep: bool) -> bool:
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    if override.is_sweep_override():
        return sweep
    if is_text(override.key_or_group):
        return not isinstance(override.value(), (int, float))
    option = override.key_or_group in GROUPS and word != "experiment=null"
    return not option or isinstance(override.value(), (str, list))      # model=5 names an option, too


def is_text(key: str) -> bool:
    """Whether a key's value stays as it is typed: 007 and 1e3 are names, too."""
    return key in TEXT or re.fullmatch(f"{TEXT_OF_DATA}|{PLACES}", key) is not None


def completion_line(line: str) -> str:
    """What the shell completes, without the words before the last that would stop Hydra from answering."""
    words = [*line.split(), *([""] if line.endswith(" ") else [])]
    kept = [word for before, word in zip(words, words[1:-1], strict=False) if before in WITH_VALUE
            or word.startswith("-") or (fits_grammar(word, sweep=True) and not word.startswith("config="))]
    return " ".join([*words[:1], *kept, *words[1:][-1:]])


def quote(value: str) -> str:
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)                  # backslashes count only before a quote
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def directory_name(words: Sequence[str]) -> str:
    """The words in the letters of a file name, later ones over earlier ones; with a hash where that loses anything."""
    by_key = {key_of(word): word for word in words}
    text = ",".join(sorted(word for key, word in by_key.items() if not is_neutral(key)))
    name = re.sub(r"[^\w.,=+~-]|^\.+$", "_", text)         # outputs/.. would be no directory of a run's
    if name != text or len(name) > MOST_LETTERS:
        name = f"{name[:MOST_LETTERS]}-{blake2b(text.encode(), digest_size=4).hexdigest()}"
    return name


def with_home(word: str) -> str:
    """Hydra makes its directories itself, and takes ~ for a name."""
    key, _, value = word.partition("=")
    return f"{key}={os.path.expanduser(value)}" if key in ("hydra.run.dir", "hydra.sweep.dir") else word


def key_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def run_directory(
    words: Sequence[str], name: str | None, swept: Sequence[str] | None = None, saved: Path | None = None
) -> Path:
    """Where a run lives: the same words find it again.

    Args:
        words: the overrides of the run.
        name: the key ``name``; in a sweep it names the sweep, and stands for the words that all jobs share.
        swept: keys that the sweep varies whose job the run is; None for a run alone.
        saved: the config file of another run that this one repeats.
    """
    if swept is not None:
        own = directory_name([word for word in words if not name or key_of(word) in swept])
        return OUTPUTS / "sweeps" / (directory_name([name]) if name else "sweep") / (own or "default")
    own = directory_name(words)
    if name:
        return OUTPUTS / directory_name([name])
    return OUTPUTS / (",".join(filter(None, [saved.parent.name if saved else "", own])) or "default")
