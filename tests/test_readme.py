"""Every command and Python block of README.md and docs/ runs as written, or says why not."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, blocks, follow

README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))


def test_what_is_not_run_says_why_and_most_is_run() -> None:
    run = 0
    for page in (README, *DOCS):
        marks = [block.mark for block in blocks(page) if block.language in ("bash", "python")]
        assert len(marks) == len(re.findall(r"^```(?:bash|python)$", page.read_text(), re.MULTILINE))
        assert all(re.fullmatch(r"not run: \w.{5,}", mark) for mark in marks if mark), page
        assert not marks or not all(marks), page
        run += sum(1 if not mark else -1 for mark in marks)
    assert run > 0


def test_no_command_hides_outside_the_blocks() -> None:
    for page in (README, *DOCS):
        assert not re.findall(r"^    (?:python|make|tensorboard|torchrun) .*", page.read_text(), re.MULTILINE), page


def test_the_architecture_names_every_module() -> None:
    table = (ROOT / "docs/architecture.md").read_text().partition("## Modules by folder")[2].partition("\n## ")[0]
    for path in (ROOT / "clipx").rglob("*.py"):
        module = path.parent.name if path.stem == "__init__" else path.stem
        assert re.search(rf"\b{module}\b", table) or module == "clipx", path.relative_to(ROOT)


def test_every_link_leads_somewhere() -> None:
    for page in (README, *DOCS):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/evaluate.md"])
def test_the_python_alone_runs_as_written(page: str, reader: Path) -> None:
    follow(ROOT / page, reader, {"python"})


@pytest.mark.long
@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page.name}" for page in DOCS if page.stem != "extend")])
def test_the_commands_and_the_python_run_as_written(page: str, reader: Path) -> None:
    follow(ROOT / page, reader)
