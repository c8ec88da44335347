"""Sizes of the code base, and of what it imports inside functions: python scripts/house.py [src/fluxrun].

The packages' import table itself is kept by import-linter (``lint-imports``).
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median

HERE = Path(__file__).parents[1] / "src" / "fluxrun"
SMALL = 15
"""Lines; files with fewer, and every ``__init__.py``, do not count as modules."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, nargs="?", default=HERE)
    root = parser.parse_args().package
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    modules = {path: len(text.splitlines()) for path, text in texts.items() if path.name != "__init__.py"}
    modules = {path: length for path, length in modules.items() if length >= SMALL}
    functions = {
        f"{path.relative_to(root)}:{function.lineno} {function.name}": length_of(function)
        for path, tree in trees.items()
        for function in functions_of(tree)
    }
    longest, longest_module = max(functions, key=functions.__getitem__), max(modules, key=modules.__getitem__)
    inside = sum(len(set(own_imports(tree, root.name))) for tree in trees.values())
    packages = [path for path in texts if path.name == "__init__.py" and path.parent.parent == root]
    print(f"packages: {len(packages)} in {root.name}, {len(texts)} files, {sum(modules.values()):,} lines")
    print(f"modules: median {median(modules.values()):g} lines, longest {modules[longest_module]}", end="")
    print(f" ({longest_module.relative_to(root)})")
    print(f"functions: median {median(functions.values()):g} lines, longest {functions[longest]} ({longest})")
    print(f"imports of own modules inside functions: {inside}")


def functions_of(tree: ast.Module) -> Iterator[Function]:
    """Every function and method."""
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def length_of(function: Function) -> int:
    """Lines from ``def`` to the last one, docstring included."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def own_imports(tree: ast.Module, package: str) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements inside functions that name a module of the package itself."""
    for function in functions_of(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == package):
                yield node
            if isinstance(node, ast.Import) and any(name.name.split(".")[0] == package for name in node.names):
                yield node


if __name__ == "__main__":
    main()
