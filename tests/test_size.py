"""Size limits on files and functions, and the line counts in the README."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from conftest import ROOT

MODULES = sorted((ROOT / "clipx").rglob("*.py"))
BATCH_FOLDERS = {"models", "training", "distributed", "config", "data"}  # folders on the path of a batch,
EXCLUDED_FILES = {"config/help.py", "config/sweep.py", "config/tune.py", "config/study.py"}  # except these
EXCLUDED_FOLDERS = {"data/remote", "data/prepare"}


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
    batch_path = [
        path
        for path, name in names.items()
        if name.split("/")[0] in BATCH_FOLDERS
        and name not in EXCLUDED_FILES
        and name.rpartition("/")[0] not in EXCLUDED_FOLDERS
    ]
    claimed = re.search(r"is ([\d,]+) of ([\d,]+) lines", (ROOT / "README.md").read_text())
    assert [int(number.replace(",", "")) for number in claimed.groups()] == [
        round(lines(batch_path), -2),
        round(lines(MODULES), -2),
    ]
