"""Checkpoint folders for tests: real ones written by the libraries, and hollow ones that need no torch."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from fluxrun.errors import ConfigError
from fluxrun.hardware.machine import Machine
from fluxrun.options.model import Flux2Model
from fluxrun.quantization.libraries import import_library
from fluxrun.weights.find import find_weights

HOLLOW_WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@functools.cache
def tiny_folder(pipeline: str = "klein", *, distilled: bool = True, dtype: str = "float32") -> Path:
    """A real checkpoint of the tiny model, sharded, written once per test process. Copy it before changing it."""
    from fluxrun.weights.loading import save_tiny

    root = Path(tempfile.mkdtemp(prefix="fluxrun-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return save_tiny(root / pipeline, pipeline, distilled=distilled, dtype=dtype, shard_bytes=400_000)  # type: ignore[arg-type]


def safetensors_bytes(name: str, floats: int = 16) -> bytes:
    """A whole safetensors file with one float32 tensor called ``name``."""
    header = json.dumps({name: {"dtype": "F32", "shape": [floats], "data_offsets": [0, 4 * floats]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4 * floats)


def hollow_folder(
    folder: Path,
    class_name: str = "Flux2KleinPipeline",
    *,
    variant: str | None = None,
    tokenizer: str = "Qwen2TokenizerFast",
    shards: int = 1,
    distilled: bool | None = True,
) -> Path:
    """A folder with every file of a checkpoint and weights of a few bytes: enough for every check, no torch needed."""
    index: dict[str, object] = {"_class_name": class_name, "_diffusers_version": "0.42.1"}
    if distilled is not None:
        index["is_distilled"] = distilled
    classes = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    for name in classes:
        (folder / name).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({**index, **classes}))
    (folder / "scheduler" / "scheduler_config.json").write_text("{ }")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    for name, stem in HOLLOW_WEIGHTS.items():
        (folder / name / "config.json").write_text(json.dumps({"component": name}))
        write_weights(folder / name, stem, variant, shards if name == "transformer" else 1)
    return folder


def write_weights(place: Path, stem: str, variant: str | None, shards: int = 1) -> None:
    """One file, or shards with their index, named as the libraries name them."""
    dot = f".{variant}" if variant else ""
    if shards == 1:
        (place / f"{stem}{dot}.safetensors").write_bytes(safetensors_bytes(f"{place.name} {variant}"))
        return
    files = [f"{stem}{dot}-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
    for file in files:
        (place / file).write_bytes(safetensors_bytes(f"{place.name} {file}"))
    weights = {f"{place.name} {file}": file for file in files}
    (place / f"{stem}.safetensors.index{dot}.json").write_text(json.dumps({"weight_map": weights}))


def spoiled_folder(folder: Path, component: str, value: float = float("nan"), only: str = "") -> Path:
    """A copy of the tiny checkpoint: all of a component's weights whose name has ``only`` in it are ``value``."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_folder(), folder)
    for path in (folder / component).glob("*.safetensors"):
        weights = load_file(path)
        spoiled = {
            name: torch.full_like(w, value) for name, w in weights.items() if only in name and w.is_floating_point()
        }
        save_file({**weights, **spoiled}, path, metadata={"format": "pt"})
    return folder


@functools.cache
def sdnq_folder(weights_dtype: str = "int8") -> Path:
    """The tiny model with its transformer quantized by SDNQ (its text encoder's layers are too small for that)."""
    from fluxrun.options.model import Flux2Model
    from fluxrun.options.quantization import Sdnq
    from fluxrun.weights.loading import Conversion, load

    option = Sdnq(name="sdnq", weights_dtype=weights_dtype)  # type: ignore[arg-type]
    model = Flux2Model(path=tiny_folder(), text_encoder_layers="all")
    conversion = Conversion(lambda component, name: option.quantize(component, name, "cpu", "cpu"))
    root = Path(tempfile.mkdtemp(prefix="fluxrun-sdnq-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    base = load(model, dtype="float32", device="cpu", conversion=conversion)
    base.pipeline.save_pretrained(root / "model", variant=None, max_shard_size="5GB")
    return root / "model"


def import_sdnq() -> None:
    """As a run on a CPU imports it, which decides for the whole process; skips the test where it is not installed."""
    if find_spec("sdnq") is None:
        pytest.skip("sdnq is not installed")
    import_library("sdnq", "cpu")


def refusal(model: Flux2Model, machine: Machine | None = None) -> str:
    """What is said of a model whose weights cannot be used: one line."""
    with pytest.raises(ConfigError) as caught:
        find_weights(model, machine)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)
