"""Lazy packages, deferred and mended modules: what they hold is what the modules hold without them."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from fluxrun.startup.finder import Deferred, DeferredModule, Finder, LazyPackage, exported, mended


@pytest.fixture
def finder(tmp_path, monkeypatch):
    """A finder over the packages of a temporary folder, which leave no trace behind."""
    finder, before = Finder(), set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    finder.install()
    yield finder
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, **files: str) -> None:
    """Modules by name; ``one_in_family`` is family.one."""
    for name, text in files.items():
        path = folder.joinpath(*name.split("_in_")[::-1]).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def family(tmp_path, finder):
    """A package that imports its three modules, of which the last one cannot be imported."""
    write(
        tmp_path,
        __init___in_family='"""Doc."""\nfrom ._tools import is_torch_available\n\nif is_torch_available():\n'
        "    from .one import One\n    from .two import Two, three as four\n    from .broken import Never\n",
        _tools_in_family="def is_torch_available():\n    return True\n",
        one_in_family="class One: ...\n",
        two_in_family="from . import one\nclass Two(one.One): ...\nthree = 3\n",
        broken_in_family="raise RuntimeError('imported')\n",
    )
    finder.loaders["family"] = LazyPackage
    return importlib.import_module("family")


def test_a_lazy_package_imports_what_is_asked_for(family):
    assert not {"family.one", "family.two"} & sys.modules.keys()
    from family import Two

    assert Two is sys.modules["family.two"].Two
    assert family.four == 3
    assert family.one is sys.modules["family.one"]
    assert "family.broken" not in sys.modules
    assert {"One", "Two", "four", "Never", "is_torch_available"} <= set(dir(family))
    assert isinstance(family.__loader__, SourceFileLoader)


def test_what_it_lacks_or_cannot_import_is_an_error_of_its_own(family):
    with pytest.raises(AttributeError, match="has no attribute 'Nobody'"):
        _ = family.Nobody
    with pytest.raises(RuntimeError, match="imported"):
        _ = family.Never


def test_a_package_that_does_more_is_run_as_it_is(tmp_path, finder):
    write(tmp_path, __init___in_busy="from .one import One\nanswer = 42\n", one_in_busy="class One: ...\n")
    finder.loaders["busy"] = LazyPackage
    assert importlib.import_module("busy").answer == 42
    assert "busy.one" in sys.modules


def test_a_package_may_name_itself_and_list_what_it_exports():
    source = b"from p.q.a import b\nfrom .c import d as e\n__all__ = ['b', 'e']\n"
    assert exported(source, "p.q") == {"b": ("p.q.a", "b"), "e": ("p.q.c", "d")}


@pytest.mark.parametrize(
    "source", ["import os", "from .a import *", "from a import b", "if x():\n    from .a import b", "b = 1"]
)
def test_only_plain_imports_make_a_package_lazy(source):
    assert exported(source.encode(), "p") is None


def test_a_deferred_module_runs_when_something_in_it_is_asked_for(tmp_path, finder):
    write(
        tmp_path,
        __init___in_slow="import slow.part\nimport slow.part as again\n",
        part_in_slow="ran = True\ndef f():\n    return ran\n",
    )
    finder.loaders["slow.part"] = DeferredModule
    slow = importlib.import_module("slow")
    part = vars(slow)["part"]
    assert isinstance(part, Deferred)
    assert "ran" not in vars(part)
    from slow.part import f

    assert f() is True
    assert not isinstance(part, Deferred)
    assert dir(part) == dir(sys.modules["slow.part"])


def test_a_module_in_a_deferred_package_runs_the_package_first(tmp_path, finder):
    write(tmp_path, __init___in_outer="ran = True\n", inner_in_outer="import outer\nassert vars(outer)['ran']\n")
    finder.loaders["outer"] = DeferredModule
    importlib.import_module("outer")
    assert importlib.import_module("outer.inner")


def test_a_deferred_module_that_fails_is_tried_again(tmp_path, finder):
    write(tmp_path, fails="import sys\nif not sys.fluxrun_test:\n    raise OSError('no')\nok = 1\n")
    finder.loaders["fails"] = DeferredModule
    fails = importlib.import_module("fails")
    sys.fluxrun_test = False  # type: ignore[attr-defined]
    try:
        with pytest.raises(OSError, match="no"):
            _ = fails.ok
        sys.fluxrun_test = True  # type: ignore[attr-defined]
        assert fails.ok == 1
    finally:
        del sys.fluxrun_test  # type: ignore[attr-defined]


def test_a_mended_module_is_changed_before_anybody_sees_it(tmp_path, finder):
    write(tmp_path, told="there = True\n")
    finder.loaders["told"] = mended(lambda module: setattr(module, "there", False))
    assert importlib.import_module("told").there is False
