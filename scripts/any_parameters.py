"""Count the parameters whose type contains Any anywhere, by package: python scripts/any_parameters.py [src/fluxrun].

An alias of ours that contains Any (``Facts = dict[str, Any]``) counts as Any, too. ``--list`` prints each of them.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).parents[1] / "src" / "fluxrun"


def main() -> None:
    """Print the count of every package, and the total."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, nargs="?", default=HERE)
    parser.add_argument("--list", action="store_true", help="print each of these parameters, too")
    given = parser.parse_args()
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(given.package.rglob("*.py"))}
    names = any_names(trees.values())
    total, loose = Counter[str](), Counter[str]()
    for path, tree in trees.items():
        module = path.relative_to(given.package)
        package = module.parts[0] if len(module.parts) > 1 else "(no package)"
        for function, parameter in parameters(tree):
            total[package] += 1
            if mentions(parameter.annotation, names):
                loose[package] += 1
                if given.list:
                    print(f"{module}:{parameter.lineno} {function}({ast.unparse(parameter)})")
    for package in sorted(total):
        print(f"{package:14}{loose[package]:4} of {total[package]:5,}")
    print(f"{'all':14}{loose.total():4} of {total.total():5,} parameters have Any in their type")


def parameters(tree: ast.Module) -> Iterator[tuple[str, ast.arg]]:
    """(function, parameter) of every function, ``self`` and ``cls`` left out."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            given = function.args
            every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
            found = (parameter for parameter in every if parameter is not None)
            yield from ((function.name, one) for one in found if one.arg not in {"self", "cls"})


def any_names(trees: Iterable[ast.Module]) -> set[str]:
    """``Any``, and the module-level aliases that contain it, or another such alias."""
    aliases = [alias for tree in trees for statement in tree.body if (alias := alias_of(statement)) is not None]
    names: set[str] = set()
    found = {"Any"}
    while found - names:
        names |= found
        found = {name for name, value in aliases if mentions(value, names)}
    return names


def alias_of(statement: ast.stmt) -> tuple[str, ast.expr] | None:
    """Name and value of ``Name = …`` or ``Name: TypeAlias = …``; a constant's name is all capitals."""
    if isinstance(statement, ast.Assign):
        target, value = statement.targets[0], statement.value
    elif isinstance(statement, ast.AnnAssign) and ast.unparse(statement.annotation) == "TypeAlias":
        target, value = statement.target, statement.value
    else:
        return None
    if isinstance(target, ast.Name) and value is not None and target.id[0].isupper() and not target.id.isupper():
        return target.id, value
    return None


def mentions(annotation: ast.expr | None, names: set[str]) -> bool:
    """Whether an annotation contains one of these names, quoted or not."""
    for node in ast.walk(annotation) if annotation is not None else ():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = mentions(quoted(node.value), names)
        else:
            found = (node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)) in names
        if found:
            return True
    return False


def quoted(text: str) -> ast.expr | None:
    """A type written as a string; None for a string that is none."""
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        return None


if __name__ == "__main__":
    main()
