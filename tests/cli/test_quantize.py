"""``fluxrun quantize``: a folder that plain diffusers reads, its record, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import import_sdnq, sdnq_folder, tiny_folder
from helpers import draw, hashes

from fluxrun.cli import quantize
from fluxrun.errors import ConfigError

SMALL = ("model=local", "model.dtype=float32", "model.text_encoder_out_layers=[1,2,3]", "height=64", "width=64",
         "steps=2", "model.max_sequence_length=32")  # fmt: skip


def arguments(folder: Path, *overrides: str) -> list[str]:
    return [str(folder), f"model.path={tiny_folder()}", *SMALL, f"hydra.run.dir={folder}_runs", *overrides]


@pytest.mark.slow
def test_what_is_written_is_what_is_drawn_with(tmp_path):
    import_sdnq()
    folder = tmp_path / "made"
    assert quantize.command(arguments(folder, "quantization=sdnq", "seed=3", "num_images=2")) == 0
    record = json.loads((folder / quantize.RECORD).read_text())
    facts = record["components"]["transformer"]
    assert 0 < facts["converted"] < facts["of"]
    assert facts["bytes"] < facts["bytes_before"]
    assert record["quantization"]["weights_dtype"] == "int8"
    assert record["bytes"] > 0
    assert record["quantize_s"] > 0
    fidelity = record["fidelity"]
    assert [image["seed"] for image in fidelity["images"]] == [3, 4]
    assert 20 < fidelity["psnr_db_min"] <= fidelity["psnr_db_mean"]
    assert [path for path in tmp_path.iterdir() if "partial" in path.name] == []

    # Converted while loading, and read back, draw the same; and so does plain diffusers.
    overrides = ("model=local", f"model.path={tiny_folder()}", *SMALL[1:3], "seed=3")
    on_the_fly = draw(tmp_path / "fly", *overrides, "quantization=sdnq")
    again = draw(tmp_path / "again", overrides[0], f"model.path={folder}", *overrides[2:])
    assert hashes(on_the_fly) == hashes(again)
    assert pixels(folder, 3) == pixels_of(tmp_path / "again")


def pixels_of(run: Path) -> bytes:
    from PIL import Image

    return Image.open(next((run / "images").glob("*.png"))).convert("RGB").tobytes()


def pixels(folder: Path, seed: int) -> bytes:
    """A picture by diffusers alone, after ``import sdnq``."""
    import torch
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        prompt="a red circle left of a blue square", height=64, width=64, num_inference_steps=2, guidance_scale=1.0,
        max_sequence_length=32, text_encoder_out_layers=(1, 2, 3), generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return bytes(found.images[0].convert("RGB").tobytes())


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    import_sdnq()
    from diffusers import Flux2KleinPipeline

    def interrupted(self: object, folder: Path, **how: object) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(Flux2KleinPipeline, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize.command(arguments(tmp_path / "made", "quantization=sdnq", "--no-pictures"))
    assert [path.name for path in tmp_path.iterdir()] == ["made_runs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "quantization=none makes no folder that diffusers loads; this does: sdnq"),
        (("quantization=int8",), "quantization=int8 makes no folder"),
        (("quantization=fp8",), "needs a CUDA GPU"),
        (("quantization=sdnq", "--fast"), "unknown flag '--fast'"),
    ],
)
def test_refusals(tmp_path, overrides, said):
    import_sdnq()
    with pytest.raises(ConfigError, match=said):
        quantize.command(arguments(tmp_path / "made", *overrides))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_quantized_checkpoint_and_a_folder_that_is_there(tmp_path):
    import_sdnq()
    with pytest.raises(ConfigError, match="already there"):
        quantize.command(arguments(tmp_path, "quantization=sdnq"))
    given = [a for a in arguments(tmp_path / "made", "quantization=sdnq") if not a.startswith("model.path=")]
    with pytest.raises(ConfigError, match="quantized already"):
        quantize.command([*given, f"model.path={sdnq_folder()}"])


def test_the_folder_comes_first():
    with pytest.raises(ConfigError, match="name the folder first"):
        quantize.command(["quantization=sdnq"])
