"""Tests drive fluxrun by its public names: what begins with an underscore may change without asking them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxrun.paths import PACKAGE

TESTS = Path(__file__).parent


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> Iterator[str]:
    """The private functions, methods, classes and attributes that a module makes.

    What it sets on an object that it is handed, and what a Protocol says of one, is another library's.
    """
    protocols = {part for node in ast.walk(tree) if is_protocol(node) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and private(node.name):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in protocols:
            yield from filter(private, [node.id])
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_its_own(node):
            yield from filter(private, [node.attr])


def is_protocol(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Protocol") for base in node.bases)


def of_its_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def used(tree: ast.AST) -> Iterator[str]:
    """The private names that a module takes from elsewhere: imported, of another object, or replaced by their text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fluxrun"):
            yield from (alias.name for alias in node.names if private(alias.name))
        elif isinstance(node, ast.Attribute) and private(node.attr):
            if not of_its_own(node):
                yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("setattr"):
            texts = (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
            yield from (text.rpartition(".")[2] for text in texts if private(text.rpartition(".")[2]))


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


OURS = {name for path in PACKAGE.rglob("*.py") for name in defined(parsed(path))}


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_private_name_of_fluxruns_is_used(path: Path) -> None:
    assert sorted(OURS & set(used(parsed(path)))) == []


def test_each_way_of_using_one_is_found() -> None:
    assert "_load" in OURS
    ways = "from fluxrun.x import _load", "session._load()", "monkeypatch.setattr(Session, '_load', f)"
    dotted = "monkeypatch.setattr('fluxrun.x._load', f)"
    assert [list(used(ast.parse(way))) for way in (*ways, dotted, "self._load()")] == [["_load"]] * 4 + [[]]
