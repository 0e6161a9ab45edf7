"""Arguments that are refused before anything is read: typed the obvious way, but not what a command takes."""

import re
from collections.abc import Sequence

from clipx.config import arguments
from clipx.errors import UserError

FLAGS = {
    "-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run", "-m", "--multirun", "-sc",
    "--shell-completion", "-i", "--info", "--experimental-rerun", *arguments.WITH_VALUE,
}  # fmt: skip

# settings of Hydra that take effect
OBEYED = (
    "run.dir", "sweep.dir", "sweep.subdir", "sweeper", "launcher", "callbacks", "mode", "searchpath", "job.name",
    "job.env_set", "job.env_copy", "job.config",
)  # fmt: skip
OBEYED_GROUPS = ("sweeper", "launcher", "callbacks")


def check_typed(given: Sequence[str]) -> None:
    """Refuse what Hydra would ignore, or explain badly.

    Args:
        given: the arguments of a command, without ``config=FILE``.

    Raises:
        UserError: one is mistyped; the message shows the right form.
    """
    options, overrides = arguments.parted(given)
    for before, option in zip(["", *options], options, strict=False):
        if before not in arguments.WITH_VALUE and option.partition("=")[0] not in FLAGS:
            check_dashes(option, given)
    for before, override in zip(["", *overrides], overrides, strict=False):
        check_form(override, before)
        check_hydra(override)
    check_once(overrides)


def check_dashes(option: str, given: Sequence[str]) -> None:
    """Keys have no dashes before them; those of argparse do."""
    name, _, value = option.lstrip("-").partition("=")
    following = given[given.index(option) + 1 :][:1]
    value = value or next((word for word in following if "=" not in word), "...")
    raise UserError(f"{option}: there is no such switch; a key has no dashes: {name.replace('-', '_')}={value}")


def check_form(override: str, before: str) -> None:
    """An override is KEY=VALUE, or ~KEY."""
    key, equals, value = override.partition("=")
    if not equals and not override.startswith("~"):
        right = re.sub(r"^(\w[\w.]*):\s*", r"\1=", override)
        raise UserError(f"{override!r} is not KEY=VALUE; " + (
            f"write {right}" if right != override else
            f"several values of {before.partition('=')[0]} are one list: "
            f"{before.partition('=')[0]}=[{before.partition('=')[2]},{override}]" if before else
            "--help lists the keys"))
    if value.endswith(",") and len(value) > 1:
        raise UserError(f"{override} ends in a comma; write {override.rstrip(',')}, or quote a comma that belongs to "
                        f"the value: \"{key}='{value}'\"")


def check_hydra(override: str, where: str = "") -> None:
    """A setting of Hydra's takes effect, or is refused; ``where`` is told, if it is not among the words."""
    key = arguments.key_of(override).lstrip("~").partition("@")[0]
    group = key.removeprefix("hydra/")
    setting = key.removeprefix("hydra.")
    ignored = group not in OBEYED_GROUPS if group != key else setting != key and not any(
        f"{setting}.".startswith(f"{known}.") for known in OBEYED
    )
    if ignored:
        raise UserError(f"{key}{where} has no effect in clipx: a run keeps its own log and config in its directory, "
                        "and paths are seen from where the command is typed; leave it out")


def check_once(overrides: Sequence[str]) -> None:
    """Each key stands once: the shell makes several arguments of a pattern in braces."""
    first: dict[str, str] = {}
    for override in overrides:
        key = arguments.key_of(override)
        if key in first:
            raise UserError(f"{key} is given twice, {first[key]} and {override}; give it once, and quote a pattern "
                            f"that the shell would expand: '{key}=DIR/{{00000..00001}}.tar'")
        first[key] = override
