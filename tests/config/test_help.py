"""The pages of --help, and shell completion."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_python

from clipx.config.arguments import GROUPS, completion_line
from clipx.config.help import help_page
from clipx.config.schema import EmbedConfig, EvaluateConfig, ExportConfig, PredictConfig, PrepareConfig, TrainConfig

SCHEMAS = {
    "train": TrainConfig,
    "check": TrainConfig,
    "bench": TrainConfig,
    "evaluate": EvaluateConfig,
    "embed": EmbedConfig,
    "prepare": PrepareConfig,
    "export": ExportConfig,
    "predict": PredictConfig,
}
OF_GROUPS = {
    "train": {*GROUPS} - {"source"},
    "check": {*GROUPS} - {"source"},
    "bench": {*GROUPS} - {"source"},
    "evaluate": {"data", "evals"},
    "embed": {"data"},
    "prepare": {"source"},
    "export": set(),
    "predict": set(),
}


def test_every_command_of_hydra_has_a_page() -> None:
    assert set(SCHEMAS) == {path.stem for path in (ROOT / "conf").glob("*.yaml")}


@pytest.mark.parametrize("command", SCHEMAS)
def test_a_page_has_an_example_and_every_key_with_its_default_and_what_it_is(command: str) -> None:
    page, text = help_page(command), (ROOT / f"conf/{command}.yaml").read_text()
    assert re.search(rf"^  python -m clipx\.{command} \S", page, re.MULTILINE)
    keys = set(yaml.safe_load(text)) - {"defaults", "hydra"}
    for key in keys | {field.name for field in fields(SCHEMAS[command])} - {*GROUPS, "choices", "varied"}:
        assert re.search(rf"^  {key}: \S.* # \S", page, re.MULTILINE), key


@pytest.mark.parametrize("command", SCHEMAS)
def test_a_page_has_every_option_of_every_group_with_what_it_is(command: str) -> None:
    page = help_page(command)
    assert {*re.findall(r"^  (\w+)=$", page, re.MULTILINE)} == OF_GROUPS[command]
    for group in OF_GROUPS[command]:
        options_text = re.search(rf"^  {group}=\n((?:  [ *] \S.*\n)+)", page, re.MULTILINE)[1]
        options = {line[4:].split()[0]: line[4:].split()[1:] for line in options_text.splitlines()}
        assert set(options) == {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} and all(options.values())


def test_the_defaults_are_marked_and_their_keys_shown() -> None:
    page = help_page("train")
    marked = re.findall(r"^  \* (\w+)", page, re.MULTILINE)
    assert marked == ["tiny", "emoji", "none", "adamw_paper", "warmup_cosine", "info_nce", "retrieval", "tensorboard"]
    assert [f"{key}={option}" for key, option in re.findall(r"^Keys of (\w+)=(\w+):", page, re.MULTILINE)] == [
        "model=tiny",
        "data=emoji",
        "optim=adamw_paper",
        "sched=warmup_cosine",
        "loss=info_nce",
        "evals=retrieval",
        "track=tensorboard",
    ]
    assert "  optim:\n    _target_: clipx.optim.adamw\n    _partial_: true\n    lr: 5e-4\n" in page


def test_the_options_that_are_given_are_shown_in_place_of_the_defaults(tmp_path: Path) -> None:
    page = help_page("train", ["data=coco", "evals=[naming,zero_shot]", "experiment=demo", "--help"])
    assert "Keys of data=shards:" in page and "    root: ${oc.env:CLIPX_DATA,data}/coco" in page
    assert "  evals.naming:\n" in page and "  evals.zero_shot:\n" in page and "evals.retrieval:" not in page
    assert "\n  batch_size: 128\n" in page and "data=emoji:" not in page
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("# All mine\n_target_: mine.Model\n")
    assert re.search(r"^    mine +All mine$", help_page("train", ["--config-dir", str(tmp_path)]), re.MULTILINE)


@pytest.mark.parametrize("args", [["--help"], ["model=small", "-h"]])
def test_help_is_answered_before_anything_else_and_without_torch(args: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    page = run_python("-m", "clipx.train", *args, cwd=tmp_path)
    assert page.returncode == 0 and page.stderr == "" and page.stdout == help_page("train", args) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["torch.py"]


@pytest.fixture
def complete(tmp_path: Path) -> Callable[[str], list[str]]:
    """What bash offers to complete a line, with Hydra's completion installed as --help describes."""

    def run(line: str) -> list[str]:
        command = line.split()[0]
        script = f"""eval "$({command} -sc install=bash)"
            complete -p {command} | grep -q 'hydra_bash_completion {command}$' || exit 3
            COMP_LINE="$1" COMP_POINT=${{#1}} COMP_CWORD=$2
            hydra_bash_completion; printf '%s\\n' "${{COMPREPLY[@]}}" """
        number = len(line.split()) - (not line.endswith(" "))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", "-c", script, "bash", line, str(number)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path},
        )
        assert result.returncode == 0 and result.stderr == "", result
        return result.stdout.split()

    return run


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("clipx-train model=vit_l", ["model=vit_l14", "model=vit_l14_336", "model=vit_l16"]),
        ("clipx-train data=folder data.roo", ["data.root="]),
        ("clipx-train config=x.yaml data.root='/a b'=c optim.lr", ["optim.lr="]),
        ("clipx-prepare source=c", ["source=cc3m", "source=coco", "source=csv"]),
    ],
)
def test_bash_completes_keys_and_options(
    line: str, completions: list[str], complete: Callable[[str], list[str]]
) -> None:
    assert complete(line) == completions


def test_completion_skips_arguments_that_hydra_cannot_parse() -> None:
    assert completion_line("clipx-train -m --config-dir D optim.lr=1,2 data.root=/a=b 'x y' config=c mod") == (
        "clipx-train -m --config-dir D optim.lr=1,2 mod"
    )
    assert completion_line("clipx-train model=tiny ") == "clipx-train model=tiny "
    assert completion_line("clipx-train") == "clipx-train" and completion_line("") == ""
