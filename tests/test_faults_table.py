"""docs/faults.md and docs/threats.md name a test in every row, and each of them exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent


DOCUMENTS = ("faults.md", "threats.md")


def rows(*documents: str) -> list[tuple[str, list[str]]]:
    """(the fault, the tests that its row names as file::function), where a file may be the one named before."""
    found, file = [], ""
    lines = [line for name in documents for line in (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if not line.startswith("| ") or line.startswith(("| fault", "| attempt")):
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        names = re.findall(r"([\w/]*\.py)?::(\w+)", cells[-1])
        named = []
        for own, name in names:
            file = own or file
            named.append(f"{file}::{name}")
        found.append((cells[0], named if cells[-1] != "the same test" else found[-1][1]))
    return found


@pytest.mark.parametrize(("fault", "named"), rows(*DOCUMENTS), ids=str)
def test_every_row_names_tests_that_there_are(fault: str, named: list[str]) -> None:
    assert named, f"{fault}: no test"
    for name in named:
        file, _, function = name.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_every_test_of_a_fault_is_in_the_table() -> None:
    named = {name for _, names in rows("faults.md") for name in names}
    files = {name.partition("::")[0] for name in named if name.startswith("faults/")}
    assert {f"faults/{path.name}" for path in (TESTS / "faults").glob("test_*.py")} == files
