"""The generated documents say what the code says."""

from __future__ import annotations

import runpy

import pytest

from fluxrun.paths import PACKAGE

ROOT = PACKAGE.parents[1]
documents = runpy.run_path(str(ROOT / "docs" / "reference.py"))["documents"]


@pytest.mark.parametrize("path", documents(ROOT), ids=lambda path: path.name)
def test_generated_documents_are_up_to_date(path):
    assert path.read_text(encoding="utf-8") == documents(ROOT)[path], "run `make docs`"
