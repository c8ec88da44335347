"""Quantized weights on a real GPU, on the tiny model: what only a GPU can, LoRA files beside them, and compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoints import tiny_folder
from helpers import draw as drawn
from loras import BLOCKS, write_lora

from fluxrun.record.schema import RunRecord

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

NAMES = ("fp8", "fp8_weight_only", "int8", "int8_weight_only", "nf4", "sdnq")


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    """Dynamo counts recompilations for the whole process, and gives up after some."""
    torch._dynamo.reset()


def draw(folder: Path, *overrides: str) -> RunRecord:
    """A run of the tiny model on the GPU, of more than sixteen tokens: torch's int8 matmul takes no fewer rows."""
    record = drawn(folder, "device=cuda", "height=128", "width=128", *overrides)
    print(overrides, {group: (o.effective, o.fallbacks, o.facts) for group, o in record.options.items()})
    return record


@pytest.mark.parametrize("compiled", ["none", "regional"])
@pytest.mark.parametrize("name", NAMES)
def test_lora_files_beside_converted_weights(name: str, compiled: str, tmp_path: Path) -> None:
    overrides = [f"quantization={name}", f"compile={compiled}"]
    lora = ["lora=adapters", f"lora.files=[{{path: {write_lora(tmp_path / 'lora.safetensors')}}}]"]
    with_it = draw(tmp_path / "with", *overrides, *lora)
    entry = with_it.options["quantization"]
    if entry.fallbacks and "not installed" in entry.fallbacks[0].reason:
        pytest.skip(entry.fallbacks[0].reason)
    assert (entry.effective, entry.fallbacks) == (name, [])
    assert entry.facts["transformer"]["converted"] > 0
    assert with_it.options["lora"].facts["layers_matched"] == len(BLOCKS)
    assert with_it.options["lora"].fallbacks == []
    assert with_it.images[0].finite
    without = draw(tmp_path / "without", *overrides)
    assert with_it.images[0].sha256 != without.images[0].sha256
    if compiled == "regional":
        assert without.options["compile"].fallbacks == []


@pytest.mark.parametrize("memory", ["staged", "balanced", "group", "block_swap"])
def test_sdnq_draws_the_same_wherever_its_weights_lie(memory: str, tmp_path: Path) -> None:
    pytest.importorskip("sdnq")
    resident, other = (draw(tmp_path / place, "quantization=sdnq", f"memory={place}") for place in ("resident", memory))
    assert other.options["memory"].effective == memory
    assert other.images[0].sha256 == resident.images[0].sha256


@pytest.mark.parametrize("memory", ["resident", "staged", "balanced"])
def test_a_folder_that_bitsandbytes_has_quantized(memory: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from diffusers import BitsAndBytesConfig, Flux2Transformer2DModel

    plain, folder = tiny_folder(), tmp_path / "model"
    shutil.copytree(plain, folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    transformer = Flux2Transformer2DModel.from_pretrained(
        plain, subfolder="transformer", quantization_config=config, torch_dtype=torch.bfloat16
    )
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer")
    record = draw(
        tmp_path / "run", "model=local", f"model.path={folder}", "model.text_encoder_out_layers=[1,2,3]",
        f"memory={memory}",
    )  # fmt: skip
    entry = record.options["quantization"]
    assert (entry.effective, entry.facts["transformer"]["format"]) == ("checkpoint", "bitsandbytes nf4")
    assert entry.facts["transformer"]["converted"] > 0
    assert record.images[0].finite
    assert record.options["memory"].effective == ("resident" if memory == "balanced" else memory)
