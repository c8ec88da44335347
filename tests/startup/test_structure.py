"""transformers' import structure comes from a file of ours, as long as it is of the same installation."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from fluxrun.startup.structure import remember_structure

STRUCTURE = {frozenset(): {"a.configuration_a": {"AConfig"}}, frozenset({"torch"}): {"a.modeling_a": {"A", "B"}}}


@pytest.fixture
def transformers(tmp_path, monkeypatch):
    """Something like transformers, which counts how often it reads its folders."""
    monkeypatch.setenv("FLUXRUN_CACHE_DIR", str(tmp_path / "cache"))
    code = tmp_path / "transformers" / "utils" / "import_utils.py"
    code.parent.mkdir(parents=True)
    code.touch()
    (tmp_path / "transformers" / "models" / "a").mkdir(parents=True)
    calls: list[str] = []

    def start() -> Any:
        def define(module_path, prefix=None):
            calls.append(str(module_path))
            return STRUCTURE

        module: Any = SimpleNamespace(define_import_structure=define, __file__=str(code))
        remember_structure(module)
        return module

    return SimpleNamespace(start=start, calls=calls, models=tmp_path / "transformers" / "models", code=code)


def test_the_folders_are_read_once(transformers):
    for _ in range(3):
        assert transformers.start().define_import_structure(transformers.models, prefix="models") == STRUCTURE
    assert len(transformers.calls) == 1
    assert transformers.start().define_import_structure(str(transformers.models / "__init__.py")) == STRUCTURE
    assert len(transformers.calls) == 2  # another prefix


def test_one_models_folder_is_read_as_ever(transformers):
    for _ in range(2):
        transformers.start().define_import_structure(str(transformers.models / "a" / "__init__.py"))
    assert len(transformers.calls) == 2


def test_another_installation_is_read_anew(transformers):
    transformers.start().define_import_structure(transformers.models, prefix="models")
    os.utime(transformers.code, ns=(1, 1))
    transformers.start().define_import_structure(transformers.models, prefix="models")
    assert len(transformers.calls) == 2


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '[["torch", 3]]'])
def test_a_broken_file_is_not_used(transformers, tmp_path, text):
    transformers.start().define_import_structure(transformers.models, prefix="models")
    (file,) = (tmp_path / "cache" / "imports").iterdir()
    file.write_text(text)
    assert transformers.start().define_import_structure(transformers.models, prefix="models") == STRUCTURE


def test_without_a_cache_folder_it_works_too(transformers, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert transformers.start().define_import_structure(transformers.models, prefix="models") == STRUCTURE
