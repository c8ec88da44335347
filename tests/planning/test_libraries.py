"""What a run may come to use beyond torch, diffusers and transformers: its options, and whatever may replace them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import CPU, H100, SMALL, composed, every_option

from fluxrun.config.catalog import Catalog
from fluxrun.options.base import COMPILER
from fluxrun.planning.libraries import libraries_of
from fluxrun.planning.prepare import prepare
from fluxrun.quantization.declared import Declared

RANDOM_KLEIN = ("model=flux2_klein_4b", "model.weights=random")
QUANTIZERS = replace(
    H100, packages={**H100.packages, "sdnq": "0.2.8", "gguf": "0.19.0", "bitsandbytes": "0.50.2"},
)  # fmt: skip
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
        (H100, (*RANDOM_KLEIN, "quantization=fp8"), {"torchao"}),
        (H100, (*RANDOM_KLEIN, "quantization=int8_weight_only"), {"torchao"}),
        (H100, (*RANDOM_KLEIN, "quantization=fp8", "compile=regional"), {COMPILER, "torchao"}),
        (H100, (*RANDOM_KLEIN, "+preset=h100_fast"), {"torchao"}),
        (QUANTIZERS, (*RANDOM_KLEIN, "quantization=sdnq"), {COMPILER, "sdnq"}),
        (QUANTIZERS, (*RANDOM_KLEIN, "quantization=nf4"), {COMPILER, "bitsandbytes"}),
        (H100, (*RANDOM_KLEIN, "quantization=sdnq"), set()),  # not installed: falls back to none
        (H100, (*RANDOM_KLEIN, "compile=max_autotune"), {COMPILER}),
        (FLASH, (*RANDOM_KLEIN, "attention=flash"), None),
        (FLASH, (*RANDOM_KLEIN, "attention=auto"), None),  # which may choose it
    ],
)
def test_the_libraries_of_a_plan(machine, overrides, expected):
    assert needed(machine, *overrides) == expected


@pytest.mark.parametrize(
    ("name", "suffix", "expected"), [("gguf", "gguf", {"gguf"}), ("bfl_fp8", "safetensors", set())]
)
def test_a_single_files_libraries(name, suffix, expected, tmp_path):
    file = tmp_path / f"transformer.{suffix}"
    file.write_bytes(b"")
    assert needed(QUANTIZERS, *RANDOM_KLEIN, f"quantization={name}", f"quantization.file={file}") == expected


def test_a_quantized_checkpoint_needs_what_reads_it():
    prepared = prepare(composed(*SMALL), CPU)
    for methods, expected in (
        ([], set()),
        (["sdnq"], {COMPILER, "sdnq"}),
        (["sdnq", "bitsandbytes"], {COMPILER, "sdnq", "bitsandbytes"}),
    ):
        declared = dict(zip(("text_encoder", "transformer"), map(Declared, methods), strict=False))
        # On the hub as well: what it declares is known before it is downloaded.
        located = replace(prepared.located, kind="hub", folder=None, declared=declared)
        assert libraries_of(replace(prepared, located=located)) == expected


@pytest.mark.parametrize(("group", "name"), every_option())
def test_every_option_of_our_own_says_what_it_uses(group, name):
    option = Catalog().load(group, name)
    known = {"attention": {"flash", "flash3", "flash4", "flex", "sage", "xformers"}}
    assert (option.libraries is None) == (name in known.get(group, ()))
