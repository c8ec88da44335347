"""docs/matrix.md is of the options that there are, planned as they are planned now, drawn without a crash."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import CONF

sys.path.insert(0, str(CONF.parent / "docs"))
import matrix

SAMPLE = (
    "memory=staged quantization=sdnq", "memory=balanced quantization=checkpoint", "quantization=gguf cache=fixed",
    "vae=sliced quantization=int8_weight_only", "attention=math quantization=bfl_fp8",
)  # fmt: skip
NEEDED = {"sdnq": "sdnq", "checkpoint": "sdnq", "gguf": "gguf", "int8_weight_only": "torchao"}


@pytest.mark.slow
def test_the_page_says_what_is_planned_now_and_what_was_drawn():
    known, plans = matrix.read(), matrix.plans()
    assert known.keys() <= plans.keys(), "run `python docs/matrix.py`"
    assert [name for name in plans if name not in known and "compile=" not in name] == [], "run `python docs/matrix.py`"
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.page(known), "run `python docs/matrix.py`"


def test_every_picture_was_made_of_numbers():
    assert [name for name, found in matrix.read().items() if not found["finite"]] == []


@pytest.mark.slow
def test_a_sample_is_drawn_again(tmp_path, monkeypatch):
    for option, package in NEEDED.items():
        if any(option in name for name in SAMPLE):
            pytest.importorskip(package)
    known: dict[str, object] = {}
    monkeypatch.setattr(matrix, "JSON_FILE", tmp_path / "matrix.json")
    matrix.draw_all(SAMPLE, known, Path(tmp_path))
    assert known == {name: found for name, found in matrix.read().items() if name in SAMPLE}
