"""What a plan says of quantizations: what they need, what they stand beside, what they leave of the weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
from checkpoints import hollow_folder
from helpers import H100, effective, plan_on

from fluxrun.config.catalog import Catalog
from fluxrun.config.composition import compose
from fluxrun.errors import ConfigError
from fluxrun.options.quantization import multiplies_quantized
from fluxrun.planning.prepare import make_plan, prepare
from fluxrun.quantization.declared import Declared


def test_nf4_needs_a_gpu_and_its_library():
    plan = plan_on(H100, "quantization=nf4")
    assert "bitsandbytes is not installed" in plan.choices["quantization"].fallbacks[0].reason
    machine = replace(H100, packages={**H100.packages, "bitsandbytes": "0.50.2"})
    assert effective(plan_on(machine, "quantization=nf4"))["quantization"] == "nf4"
    assert "needs a CUDA GPU" in plan_on(machine.on("cpu"), "quantization=nf4", "device=cpu").choices[
        "quantization"
    ].fallbacks[0].reason  # fmt: skip


@pytest.mark.parametrize("name", ["gguf", "bfl_fp8"])
def test_single_files_are_looked_at_first(name, tmp_path):
    machine = replace(H100, packages={**H100.packages, "gguf": "0.19"})
    plan = plan_on(machine, f"quantization={name}")
    assert "needs quantization.file=FILE" in plan.choices["quantization"].fallbacks[0].reason
    with pytest.raises(ConfigError, match="no such file"):
        plan_on(machine, f"quantization={name}", f"quantization.file={tmp_path / 'gone'}")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"is no \.\w+ file"):
        plan_on(machine, f"quantization={name}", f"quantization.file={tmp_path / 'model.bin'}")


def test_of_the_folder_is_read_what_is_loaded_in_its_order(tmp_path):
    folder, file = hollow_folder(tmp_path / "model"), tmp_path / "own.gguf"
    file.write_bytes(b"")
    machine = replace(H100, packages={**H100.packages, "gguf": "0.19"})

    def read(*overrides: str) -> list[str]:
        config = compose(["model=local", f"model.path={folder}", *overrides])
        return [path.parent.name for path in prepare(config, machine).weight_files]

    assert read("memory=resident") == ["transformer", "text_encoder", "vae"]
    assert read("memory=staged") == ["text_encoder", "transformer", "vae"]
    assert read("quantization=gguf", f"quantization.file={file}", "memory=resident") == ["text_encoder", "vae"]


@pytest.mark.parametrize("memory", ["balanced", "group", "block_swap", "sequential"])
def test_a_bitsandbytes_folder_stays_on_the_gpu(memory):
    config = compose([f"memory={memory}"])
    plan = make_plan(config, H100, declared={"transformer": Declared("bitsandbytes", "nf4")})
    (fallback,) = plan.choices["memory"].fallbacks
    assert "have their scales beside them" in fallback.reason
    assert plan.choices["memory"].effective == "resident"


def test_dynamic_quantization_without_compile_warns():
    said = "dynamic quantization without compile"
    assert any(said in note for note in plan_on(H100, "quantization=int8").notes)
    assert not any(said in note for note in plan_on(H100, "quantization=int8", "compile=regional").notes)
    assert not any(said in note for note in plan_on(H100, "quantization=int8_weight_only").notes)


def test_estimates_count_every_component_and_the_scales():
    def transformer(*overrides: str) -> int:
        plan = plan_on(H100, "model=flux2_klein_4b", "model.weights=random", *overrides)
        return plan.estimate.in_memory("transformer")

    whole, eight = transformer(), transformer("quantization=int8_weight_only")
    assert eight == pytest.approx(whole / 2, rel=0.01)
    texts = [
        plan_on(
            H100, "model=flux2_klein_4b", "model.weights=random", "quantization=int8_weight_only",
            f"quantization.components={components}",
        ).estimate.in_memory("text_encoder")
        for components in ("[transformer]", "[transformer,text_encoder]")
    ]  # fmt: skip
    assert 0.5 < texts[1] / texts[0] < 0.65  # the embedding table stays


def test_on_and_off_may_be_yamls():
    made = Catalog().load("quantization", "sdnq")
    assert type(made).model_validate({**made.model_dump(), "quantized_matmul": True}).quantized_matmul == "on"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("asked", "format", "device", "expected"),
    [
        ("auto", "int8", "cuda", True), ("auto", "float8_e4m3fn", "cuda:1", True), ("auto", "uint4", "cuda", False),
        ("on", "uint4", "cuda", True), ("off", "int8", "cuda", False), ("auto", "int8", "cpu", False),
        ("on", "int8", "cpu", True), ("on", "float8_e4m3fn", "cpu", False), ("auto", "dynamic", "cuda", False),
    ],
)  # fmt: skip
def test_where_sdnq_multiplies_quantized(asked, format, device, expected):
    assert multiplies_quantized(asked, format, device) == expected
