"""Stands before Python's own finders and loads a few named modules in another way: as they are, but not more of them.

Nothing here changes what a module holds. A *lazy package* imports its siblings when they are asked for, a *deferred
module* runs when something in it is asked for, and a *mended module* runs with a few of its names set before or after.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

Loaders = dict[str, Callable[[SourceFileLoader], SourceFileLoader]]
"""By a module's name: what loads it, given what Python would load it with."""

Mend = Callable[[ModuleType], None]

AVAILABLE = "is_torch_available"
"""The one condition that a lazy package may set its imports under: that torch is installed."""


class Finder(MetaPathFinder):
    """The first of ``sys.meta_path``: its modules get a loader of ours, all others pass."""

    def __init__(self) -> None:
        self.loaders: Loaders = {}

    def install(self) -> None:
        """Be asked first, once."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of one of our modules, as Python finds it, with our loader."""
        parent = sys.modules.get(fullname.rpartition(".")[0])
        if isinstance(parent, Deferred):
            run_deferred(parent)
        make = self.loaders.get(fullname)
        if make is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = make(spec.loader)
        return spec


# --- lazy packages ----------------------------------------------------------------------------------------------------


class LazyPackage(SourceFileLoader):
    """A package whose ``__init__`` only imports names from its modules: each is imported when it is asked for."""

    def __init__(self, found: SourceFileLoader) -> None:
        super().__init__(found.name, found.path)

    def exec_module(self, module: ModuleType) -> None:
        """Set the package up; one that does anything else is run as it is."""
        origins = exported(self.get_data(self.path), self.name)
        if origins is None:
            super().exec_module(module)
            return
        names = [*dict.fromkeys([*vars(module), *origins])]

        def get(name: str) -> Any:
            value = _attribute(self.name, origins, name)
            setattr(module, name, value)
            return value

        vars(module).update(__getattr__=get, __dir__=lambda: sorted({*names, *vars(module)}), __all__=[*origins])


def exported(source: bytes, package: str) -> dict[str, tuple[str, str]] | None:
    """Each name that an ``__init__`` imports, with the module and the name there; None if it does anything else."""
    origins: dict[str, tuple[str, str]] = {}
    for statement in _statements(ast.parse(source).body):
        if not isinstance(statement, ast.ImportFrom):
            return None
        module = _absolute(statement, package)
        if not statement.level and not module.startswith(f"{package}."):  # another library's
            return None
        for alias in statement.names:
            if alias.name == "*":
                return None
            origins[alias.asname or alias.name] = (module, alias.name)
    return origins


def _absolute(statement: ast.ImportFrom, package: str) -> str:
    """The full name of the module that a package's ``__init__`` imports from."""
    if not statement.level:
        return statement.module or ""
    base = package.rsplit(".", statement.level - 1)[0] if statement.level > 1 else package
    return f"{base}.{statement.module}" if statement.module else base


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of an ``__init__``, those under ``if is_torch_available():`` among them.

    Docstrings and ``__all__``, which a lazy package has anyway, are left out.
    """
    for statement in body:
        if isinstance(statement, ast.If) and not statement.orelse and ast.unparse(statement.test) == f"{AVAILABLE}()":
            yield from _statements(statement.body)
        elif not _says_nothing(statement):
            yield statement


def _says_nothing(statement: ast.stmt) -> bool:
    """Whether it is a docstring, or a list of the names that are exported."""
    if isinstance(statement, ast.Assign):
        return [ast.unparse(target) for target in statement.targets] == ["__all__"]
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _attribute(package: str, origins: Mapping[str, tuple[str, str]], name: str) -> Any:
    """A lazy package's attribute: an imported name, or one of its modules, which importing all of them had set."""
    if name in origins:
        module, there = origins[name]
        return getattr(importlib.import_module(module), there)
    submodule = f"{package}.{name}"
    if not name.startswith("__") and any(module == submodule for module, _ in origins.values()):
        return importlib.import_module(submodule)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


# --- deferred modules -------------------------------------------------------------------------------------------------


class Deferred(ModuleType):
    """A module that has not run yet: it does when one of its names is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # what the import system itself looks for
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        run_deferred(self)
        return getattr(self, name)

    def __dir__(self) -> list[str]:
        run_deferred(self)
        return dir(self)


class DeferredModule(SourceFileLoader):
    """Runs a module when something in it is asked for."""

    def __init__(self, found: SourceFileLoader) -> None:
        super().__init__(found.name, found.path)

    def exec_module(self, module: ModuleType) -> None:
        """Make it wait; it is in ``sys.modules`` and its parent all the same."""
        module.__class__ = Deferred


def run_deferred(module: ModuleType) -> None:
    """Run a deferred module now. Raises what it raises; then it is tried again the next time."""
    module.__class__ = ModuleType
    assert isinstance(module.__loader__, SourceFileLoader)
    try:
        SourceFileLoader.exec_module(module.__loader__, module)
    except BaseException:
        module.__class__ = Deferred
        raise


# --- mended modules ---------------------------------------------------------------------------------------------------


def mended(
    after: Mend = lambda module: None, around: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Callable[[SourceFileLoader], SourceFileLoader]:
    """A loader that runs a module within ``around`` and hands it to ``after``, before anybody else sees it."""

    class Mended(SourceFileLoader):
        def exec_module(self, module: ModuleType) -> None:
            with around():
                super().exec_module(module)
            after(module)

    return lambda found: Mended(found.name, found.path)
