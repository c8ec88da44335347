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
    "vae=tiled quantization=int8_weight_only", "attention=math quantization=bfl_fp8",
)  # fmt: skip


def test_every_pair_was_drawn_and_no_other():
    assert list(matrix.read()) == [str(pair) for pair in matrix.all_pairs()], "run `python docs/matrix.py`"


def test_no_crash_and_nothing_but_numbers():
    assert [name for name, found in matrix.read().items() if "refused" in found or not found["finite"]] == []


@pytest.mark.slow
def test_the_page_says_what_is_planned_now():
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.page(matrix.read()), "run `python docs/matrix.py --page`"


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_is_drawn_again(name, tmp_path):
    needed = {"sdnq": "sdnq", "checkpoint": "sdnq", "gguf": "gguf", "int8_weight_only": "torchao"}
    for option, package in needed.items():
        if option in name:
            pytest.importorskip(package)
    pair = next(pair for pair in matrix.all_pairs() if str(pair) == name)
    known: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(matrix, "JSON_FILE", tmp_path / "matrix.json")
        matrix.draw_all([pair], known, Path(tmp_path))
    assert known[name] == matrix.read()[name]
