"""Quantized weights really drawn with: checkpoints that are quantized already, and conversion while loading."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import import_sdnq, sdnq_folder, tiny_folder
from helpers import draw, hashes
from loras import BLOCKS, write_lora

from fluxrun.cli import quantize
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.process.switches import snapshot
from fluxrun.record.schema import RunRecord

TINY = ("model=local", "model.text_encoder_out_layers=[1,2,3]", "model.dtype=float32")
"""Of a folder of the tiny model, what its option says of it."""

pytestmark = pytest.mark.slow


def drawn(folder: Path, checkpoint: Path, *overrides: str, pool: SessionPool | None = None) -> RunRecord:
    return draw(folder, f"model.path={checkpoint}", *TINY, *overrides, pool=pool)


@pytest.fixture(scope="module")
def quantized() -> Path:
    import_sdnq()
    return sdnq_folder()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> RunRecord:
    return drawn(tmp_path_factory.mktemp("plain"), tiny_folder())


# --- checkpoints that are quantized already ----------------------------------------------------------------------


def test_a_quantized_folder_says_so(quantized, plain, tmp_path):
    before = snapshot()
    record = drawn(tmp_path, quantized)
    entry = record.options["quantization"]
    assert (entry.requested, entry.effective, entry.fallbacks) == ("none", "checkpoint", [])
    assert hashes(record) != hashes(plain)
    facts = entry.facts["transformer"]
    assert 0 < facts["converted"] <= facts["of"]
    assert facts["bytes"] < facts["bytes_before"]
    assert (facts["format"], facts["quantized_matmul"]) == ("sdnq int8", False)
    assert (facts["dequantizers"], facts["component"]) == ("eager", "transformer")
    # Parameters as the architecture has them, packed or not.
    was, now = plain.options["model"].facts, record.options["model"].facts
    assert was["parameters"] == now["parameters"]
    assert now["bytes"] < was["bytes"]
    assert snapshot() == before


@pytest.mark.parametrize("memory", ["staged", "balanced", "group", "block_swap"])
def test_it_draws_the_same_wherever_the_weights_lie(quantized, memory, tmp_path, request):
    expected = hashes(drawn(tmp_path / "resident", quantized))
    if memory != "staged":
        request.getfixturevalue("on_a_cpu")
    record = drawn(tmp_path / memory, quantized, f"memory={memory}")
    assert record.options["memory"].effective == memory, record.options["memory"].fallbacks
    assert hashes(record) == expected
    assert record.options["quantization"].facts["transformer"]["converted"] > 0


def test_in_a_sweep_beside_unquantized(quantized, plain, tmp_path):
    with SessionPool() as pool:
        first = drawn(tmp_path / "1", quantized, pool=pool)
        second = drawn(tmp_path / "2", tiny_folder(), pool=pool)
        third = drawn(tmp_path / "3", quantized, pool=pool)
    assert hashes(first) == hashes(third)
    assert hashes(second) == hashes(plain)
    assert [r.options["quantization"].effective for r in (first, second, third)] == ["checkpoint", "none", "checkpoint"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """The bundled model as ``fluxrun quantize`` writes it."""
    import_sdnq()
    root = tmp_path_factory.mktemp("shapes")
    how = ("quantization=sdnq", "quantization.weights_dtype=uint4", f"hydra.run.dir={root / 'runs'}")
    assert quantize.command([str(root / "made"), "--no-pictures", "model=shapes", "device=cpu", *how]) == 0
    return root / "made"


def test_a_folder_of_the_bundled_model_in_every_place_and_beside_the_model_itself(shapes, on_a_cpu, tmp_path):
    made = ("model=local", f"model.path={shapes}", "model.text_encoder_out_layers=[2,4,6]", "model.dtype=float32")
    with SessionPool() as pool:
        before = draw(tmp_path / "before", "model=shapes", "vae=full", pool=pool)
        records = {
            memory: draw(tmp_path / memory, *made, f"memory={memory}", "vae=full", pool=pool)
            for memory in ("resident", "staged", "balanced", "group")
        }
        after = draw(tmp_path / "after", "model=shapes", "vae=full", pool=pool)
    assert hashes(before) == hashes(after) != hashes(records["resident"])
    for memory, record in records.items():
        assert hashes(record) == hashes(records["resident"]), memory
        entry = record.options["quantization"]
        assert (record.options["memory"].effective, entry.requested, entry.effective) == (memory, "none", "checkpoint")
        facts = entry.facts["transformer"]
        assert (facts["format"], facts["converted"], facts["of"]) == ("sdnq uint4", 32, 41)
    assert after.options["quantization"].effective == "none"
    assert after.options["quantization"].facts == {}


@pytest.mark.parametrize("memory", ["resident", "staged", "group"])
def test_lora_files_beside_a_quantized_folder(quantized, memory, on_a_cpu, tmp_path):
    file = write_lora(tmp_path / "lora.safetensors")
    records = with_and_without(file, tmp_path, quantized, f"memory={memory}", "memory.use_stream=false", "vae=full")
    assert [record.options["quantization"].effective for record in records] == ["checkpoint"] * 3


def with_and_without(lora: Path, folder: Path, checkpoint: Path, *overrides: str) -> list[RunRecord]:
    """Drawn with a LoRA file, with it at scale 0, and without it; holds what that has to be."""
    chosen = ("lora=adapters", f"lora.files=[{{path: {lora}}}]")
    with SessionPool() as pool:
        records = [
            drawn(folder / str(n), checkpoint, *overrides, *how, pool=pool)
            for n, how in enumerate((chosen, (*chosen, "lora.scale=0"), ()))
        ]
    with_it, at_zero, without = records
    assert hashes(with_it) != hashes(without) == hashes(at_zero)
    assert with_it.options["lora"].fallbacks == []
    assert with_it.options["lora"].facts["layers_matched"] == len(BLOCKS)
    # The weights beside the adapters are as quantized as without them.
    counts = [record.options["quantization"].facts["transformer"]["converted"] for record in records]
    assert counts[0] == counts[1] == counts[2] > 0
    return records


def test_quantized_matmul_is_the_runs_own_choice(quantized, tmp_path):
    record = drawn(tmp_path, quantized, "quantization=checkpoint", "quantization.quantized_matmul=on")
    facts = record.options["quantization"].facts
    assert facts["transformer"]["quantized_matmul"] is True


# --- conversion while loading ------------------------------------------------------------------------------------

ON_THE_FLY = {
    "sdnq": ("sdnq", "sdnq int8"), "int8": ("torchao", "int8, dynamic, per row"),
    "int8_weight_only": ("torchao", "int8 weights, per row"),
    "fp8_weight_only": ("torchao", "float8 e4m3 weights, per row"),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_THE_FLY)
def test_it_counts_what_it_converts(name, plain, tmp_path):
    package, format = ON_THE_FLY[name]
    pytest.importorskip(package)
    components = ["transformer"] if name == "sdnq" else ["transformer", "text_encoder"]  # the tiny one's are too small
    asked = f"quantization.components=[{','.join(components)}]"
    record = drawn(tmp_path, tiny_folder(), f"quantization={name}", asked)
    entry = record.options["quantization"]
    assert (entry.effective, entry.fallbacks) == (name, [])
    assert hashes(record) != hashes(plain)
    for component in components:
        facts = entry.facts[component]
        assert 0 < facts["converted"] <= facts["of"]
        assert facts["bytes"] < facts["bytes_before"]
        assert facts["format"] == format
    assert record.options["model"].facts["parameters"] == plain.options["model"].facts["parameters"]


@pytest.mark.parametrize("name", [*ON_THE_FLY, "sdnq quantization.weights_dtype=float8_e4m3fn"])
def test_lora_files_beside_converted_weights(name, tmp_path):
    pytest.importorskip(ON_THE_FLY[name.split()[0]][0])
    file = write_lora(tmp_path / "lora.safetensors")
    records = with_and_without(file, tmp_path, tiny_folder(), *f"quantization={name}".split())
    assert [record.options["quantization"].fallbacks for record in records] == [[]] * 3


@pytest.mark.parametrize("name", ["sdnq", "int8_weight_only"])
def test_patterns_leave_layers_out(name, tmp_path):
    pytest.importorskip(ON_THE_FLY[name][0])
    with SessionPool() as pool:
        every, some = (
            drawn(tmp_path / str(n), tiny_folder(), f"quantization={name}", f"quantization.skip={skip}", pool=pool)
            for n, skip in enumerate(("[]", "[single_transformer_blocks.0.*]"))
        )
    counts = [record.options["quantization"].facts["transformer"]["converted"] for record in (every, some)]
    assert 0 < counts[1] < counts[0]


def test_zero_converted_is_a_failure(tmp_path):
    pytest.importorskip("torchao")
    record = drawn(tmp_path, tiny_folder(), "quantization=int8_weight_only", "quantization.skip=['*']")
    entry = record.options["quantization"]
    assert entry.effective == "none"
    assert entry.fallbacks[0].reason.startswith("0 of ")
    assert "linear layers of the transformer are quantized" in entry.fallbacks[0].reason


@pytest.mark.parametrize(
    ("knobs", "format"),
    [
        (("weights_dtype=uint4", "group_size=32"), "sdnq uint4, group 32"),
        (("weights_dtype=int6", "hadamard=true"), "sdnq int6, Hadamard"),
        (("weights_dtype=uint4", "svd_rank=8"), "sdnq uint4, SVD rank 8"),
        (("weights_dtype=float8_e4m3fn", "quantized_matmul=on"), "sdnq float8_e4m3fn"),
        (("weights_dtype=fp4",), "sdnq float4_e2m1fn"),
        (("weights_dtype=dynamic",), "sdnq uint4, dynamic"),
    ],
)
def test_sdnqs_knobs(knobs, format, tmp_path):
    import_sdnq()
    record = drawn(tmp_path, tiny_folder(), "quantization=sdnq", *(f"quantization.{knob}" for knob in knobs))
    entry = record.options["quantization"]
    assert entry.fallbacks == []
    assert entry.facts["transformer"]["format"] == format
    assert entry.facts["transformer"]["quantized_matmul"] is False  # float8's takes a minute on a CPU


def test_staged_embeddings_of_a_quantized_text_encoder_are_not_taken_for_others(tmp_path):
    pytest.importorskip("torchao")
    with SessionPool() as pool:
        both, transformer = (
            drawn(
                tmp_path / str(n), tiny_folder(), "memory=staged", "quantization=int8_weight_only",
                f"quantization.components={components}", pool=pool,
            )
            for n, components in enumerate(("[transformer,text_encoder]", "[transformer]"))
        )  # fmt: skip
    assert transformer.options["memory"].facts["prompts_known_before"] == 0
    assert hashes(both) != hashes(transformer)
