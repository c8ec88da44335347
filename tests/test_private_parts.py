"""What docs/private.md lists is all that fluxrun reaches into, and each of it is as the installed libraries have it."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from helpers import small

import fluxrun
from fluxrun.paths import PACKAGE

LIBRARIES = r"\b(?:torch|diffusers|transformers|accelerate|hydra|cache_dit|torchao|xformers)\b"
UNDOCUMENTED = ("diffusers.models", "cache_dit.caching")
"""Modules without an underscore that no manual promises."""
DOCUMENTED = {"os._exit", "_fields"}
"""Underscores that Python's own manual explains."""


class Part(NamedTuple):
    """A row of the tables."""

    name: str
    expected: str
    files: tuple[str, ...]


def parts() -> list[Part]:
    """The rows of docs/private.md."""
    text = (PACKAGE.parents[1] / "docs" / "private.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| `?([^`|]+?)`? \| ([^|]+) \| [^|]+ \|$", text, re.MULTILINE)
    assert len(rows) == text.count("\n| `"), "a row is not written as the others"
    return [Part(name, expected, tuple(files.split(", "))) for name, expected, files in rows]


PARTS = parts()

# --- as expected ----------------------------------------------------------------------------------------------------


def named(expected: str) -> list[Part]:
    return [part for part in PARTS if (part.expected if part.expected[0] != "(" else "parameters") in expected.split()]


def parameters(function: Any, expected: str) -> list[str]:
    """A function's parameters; where ``…`` is expected, it stands for those that have a default and are not named."""
    rest = ["…"] if "…" in expected else []
    found = inspect.signature(function).parameters.values()
    known = re.findall(r"\w+", expected)
    return [p.name for p in found if p.name in known or p.default is p.empty or not rest] + rest


@pytest.mark.parametrize("part", named("class module value parameters"), ids=lambda part: part.name)
def test_it_is_there_and_takes_what_we_give(part: Part) -> None:
    if (extra := part.name.partition(".")[0]) in ("cache_dit", "ray"):
        pytest.importorskip(extra)
    found: Any = pkgutil.resolve_name(part.name)
    if part.expected.startswith("("):
        assert f"({', '.join(parameters(found, part.expected))})" == part.expected
    elif part.expected != "value":
        assert {"class": inspect.isclass, "module": inspect.ismodule}[part.expected](found)


@pytest.fixture(scope="module")
def objects() -> list[Any]:
    """Objects on which libraries have set what they keep there."""
    import torch
    from accelerate.hooks import ModelHook, add_hook_to_module
    from diffusers.hooks import apply_group_offloading

    grouped, cpu = torch.nn.Sequential(torch.nn.Linear(1, 1)), torch.device("cpu")
    apply_group_offloading(grouped, cpu, cpu, offload_type="leaf_level")
    return [grouped[0], add_hook_to_module(torch.nn.Linear(1, 1), ModelHook())]


PLAIN = [part for part in named("set") if not part.name.startswith("_context")]


@pytest.mark.parametrize("part", PLAIN, ids=lambda part: part.name)
def test_libraries_keep_it_on_their_objects(part: Part, objects: list[Any]) -> None:
    assert any(hasattr(found, part.name) for found in objects)


def test_a_step_caches_pipeline_has_its_contexts() -> None:
    pytest.importorskip("cache_dit")
    session = fluxrun.build(small("cache=fixed", "steps=8"))
    try:
        transformer = session.pipeline.transformer
        owners = [session.pipeline, transformer, transformer.transformer_blocks]
        names = {part.name for part in named("set")} - {part.name for part in PLAIN}
        assert {name for name in names if any(hasattr(owner, name) for owner in owners)} == names
    finally:
        session.close()


# --- all of it ------------------------------------------------------------------------------------------------------


def uses(tree: ast.Module) -> Iterator[str]:
    """Private names of others that a module uses: imported, as an attribute, in getattr or by a text."""
    own, for_types = set(_own_names(tree)), set(_for_types_only(tree))
    for node in ast.walk(tree):
        if node in for_types:  # mypy holds these against the library
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _private(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(("fluxrun", "__")):
            yield from filter(_private, (f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Attribute) and _private(node.attr) and node.attr not in own:
            yield ast.unparse(node) if isinstance(node.value, ast.Name) and node.value.id == "os" else node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and _private(str(name.value)):
                yield str(name.value)
    yield from (name for text in _texts(tree) for name in re.findall(rf"{LIBRARIES}(?:\.\w+)+", text) if _private(name))


def _for_types_only(tree: ast.Module) -> Iterator[ast.AST]:
    """Imports that are not made when the module runs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from node.body


def _private(name: str) -> bool:
    underscore = any(part[0] == "_" and not part.endswith("__") for part in name.split(".") if part)
    return (underscore and not name.startswith("_fluxrun")) or name.startswith(UNDOCUMENTED)


def _own_names(tree: ast.Module) -> Iterator[str]:
    """What the module defines itself: functions, classes, and attributes of ``self`` and ``cls``."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            yield node.attr
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def _texts(tree: ast.Module) -> Iterator[str]:
    """Texts that are no docstrings."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def listed(use: str, file: str) -> bool:
    """Whether a row has this use in this file: the name itself, something in it, or an attribute of that name."""
    rows = [part.name for part in PARTS if file in part.files]
    return any(row.startswith(f"{use}.") or f".{use}." in f".{row}." for row in rows)


SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_use_is_listed_with_its_file() -> None:
    found = {(use, file) for file, path in SOURCES.items() for use in uses(ast.parse(path.read_text("utf-8")))}
    missing = sorted(f"{file}: {use}" for use, file in found if use not in DOCUMENTED and not listed(use, file))
    assert missing == [], "add a row, with what is expected, to docs/private.md"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_what_is_listed_is_used_there(part: Part) -> None:
    last = part.name.rpartition(".")[2]
    assert [file for file in part.files if not re.search(rf"\b{last}\b", SOURCES[file].read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from hydra._internal.hydra import Hydra", ["hydra._internal.hydra.Hydra"]),
        ("import torch._dynamo.utils as d", ["torch._dynamo.utils"]),
        ("from diffusers.models.lora import X", ["diffusers.models.lora.X"]),
        ("pipeline._execution_device", ["_execution_device"]),
        ("getattr(module, '_hf_hook', None)", ["_hf_hook"]),
        ("import_module('cache_dit.caching')", ["cache_dit.caching"]),
        ("LOG = 'torch._dynamo.convert_frame'", ["torch._dynamo.convert_frame"]),
        ("'a docstring of torch._dynamo'", []),
        ("class A:\n  def f(self):\n    self._x = B()._y\n  def _y(self): ...", []),
        ("from fluxrun.x import _y", []),
        ("pipeline._fluxrun_steps, node.__dict__, data['_target_']", []),
    ],
)
def test_a_use_is_found(code: str, found: list[str]) -> None:
    assert list(uses(ast.parse(code))) == found
