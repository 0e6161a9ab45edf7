"""How much there is to read: files, functions, and the path of a batch."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from conftest import ROOT

MODULES = sorted((ROOT / "clipx").rglob("*.py"))
BATCH = {"models", "training", "distributed", "config", "data"}  # folders that a batch passes through,
BESIDE = {"config/help.py", "config/sweep.py", "config/tune.py", "config/study.py"}  # but for these
BESIDE_FOLDERS = {"data/remote", "data/prepare"}


def lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_no_file_is_longer_than_300_lines() -> None:
    assert not {str(path.relative_to(ROOT)): size for path in MODULES if (size := lines([path])) > 300}


def test_no_function_is_longer_than_50_lines() -> None:
    functions = {
        (path.name, node.name): node.end_lineno - node.lineno + 1
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: size for name, size in functions.items() if size > 50}


def test_the_readme_has_the_true_number_of_lines() -> None:
    names = {path: path.relative_to(ROOT / "clipx").as_posix() for path in MODULES}
    path_of_a_batch = [
        path
        for path, name in names.items()
        if name.split("/")[0] in BATCH and name not in BESIDE and name.rpartition("/")[0] not in BESIDE_FOLDERS
    ]
    stated = re.search(r"is ([\d,]+) of ([\d,]+) lines", (ROOT / "README.md").read_text())
    assert [int(number.replace(",", "")) for number in stated.groups()] == [
        round(lines(path_of_a_batch), -2),
        round(lines(MODULES), -2),
    ]
