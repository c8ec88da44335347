"""What a run may come to use beyond torch, diffusers and transformers: its options, and whatever may replace them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import CPU, H100, SMALL, composed, every_option

from fluxrun.config.catalog import Catalog
from fluxrun.options.base import COMPILER
from fluxrun.planning.libraries import libraries_of
from fluxrun.planning.prepare import prepare

RANDOM_KLEIN = ("model=flux2_klein_4b", "model.weights=random")
FLASH = replace(H100, packages={**H100.packages, "flash-attn": "2.8.3"})


def needed(machine, *overrides):
    return libraries_of(prepare(composed(*overrides), machine))


@pytest.mark.parametrize(
    ("machine", "overrides", "expected"),
    [
        (CPU, SMALL, set()),
        (CPU, (*SMALL, "+preset=cpu"), set()),
        (CPU, (*SMALL, "compile=regional"), {COMPILER}),
        (CPU, (*SMALL, "compile=cudagraphs"), set()),  # no GPU: falls back to none
        (CPU, (*SMALL, "attention=auto"), set()),  # nobody's kernels run here
        (CPU, (*SMALL, "attention=flex"), None),
        (H100, (*RANDOM_KLEIN, "kernels=fused"), set()),
        (H100, (*RANDOM_KLEIN, "quantization=fp8"), {COMPILER, "torchao"}),
        (H100, (*RANDOM_KLEIN, "compile=max_autotune"), {COMPILER}),
        (FLASH, (*RANDOM_KLEIN, "attention=flash"), None),
        (FLASH, (*RANDOM_KLEIN, "attention=auto"), None),  # which may choose it
    ],
)
def test_the_libraries_of_a_plan(machine, overrides, expected):
    assert needed(machine, *overrides) == expected


def test_a_checkpoint_that_may_be_quantized_may_need_anything(tmp_path):
    prepared = prepare(composed(*SMALL), CPU)
    for folder, quantized in (("plain", False), ("quantized", True)):
        for name in ("transformer", "text_encoder", "vae"):
            (tmp_path / folder / name).mkdir(parents=True)
            text = '{"quantization_config": {}}' if quantized and name == "text_encoder" else "{}"
            (tmp_path / folder / name / "config.json").write_text(text)
        located = replace(prepared.located, kind="folder", folder=tmp_path / folder)
        assert libraries_of(replace(prepared, located=located)) == (None if quantized else set())
    assert libraries_of(replace(prepared, located=replace(prepared.located, kind="hub", folder=None))) is None


@pytest.mark.parametrize(("group", "name"), every_option())
def test_every_option_of_our_own_says_what_it_uses(group, name):
    option = Catalog().load(group, name)
    known = {"attention": {"flash", "flash3", "flash4", "flex", "fp8", "sage", "xformers"}}
    assert (option.libraries is None) == (name in known.get(group, ()))
