"""Where weights are and whether they are whole: every refusal is one line that names the file or the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import hollow_folder, refusal, write_weights
from hub import REPO

from fluxrun.hardware.machine import Machine
from fluxrun.options.model import Flux2Model
from fluxrun.weights import folder as checkpoint
from fluxrun.weights.find import find_weights, resolve

SRC = Path(__file__).resolve().parents[2] / "src"


@pytest.mark.parametrize(
    ("class_name", "said", "option", "expected"),
    [
        ("Flux2KleinPipeline", True, None, ("klein", True)),
        ("Flux2KleinPipeline", False, True, ("klein", False)),
        ("Flux2KleinPipeline", None, True, ("klein", True)),
        ("Flux2KleinPipeline", None, None, ("klein", False)),
        ("Flux2Pipeline", None, True, ("dev", False)),
    ],
)
def test_folder_knows_its_pipeline(tmp_path, class_name, said, option, expected):
    folder = hollow_folder(tmp_path / "m", class_name, distilled=said)
    located = find_weights(Flux2Model(path=folder, distilled=option))
    assert (located.pipeline, located.distilled) == expected
    assert located.folder == folder
    assert located.download_bytes == 0
    assert located.announcement() is None
    assert set(located.component_bytes) == {"transformer", "vae", "text_encoder"}


def test_resolve_fills_in_what_the_checkpoint_knows(tmp_path):
    model = Flux2Model(path=hollow_folder(tmp_path / "m", distilled=False), steps=None, guidance=None)
    resolved = resolve(model, find_weights(model))
    assert (resolved.pipeline, resolved.distilled, resolved.steps, resolved.guidance) == (
        "klein",
        False,
        50,
        4.0,
    )


def test_path_wins_over_id_and_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    hollow_folder(tmp_path / "mine")
    located = find_weights(Flux2Model(id=REPO, path=Path("~/mine")))
    assert located.kind == "folder"
    assert located.folder == tmp_path / "mine"


def test_no_weights_named():
    text = refusal(Flux2Model(name="local"))
    assert "model.path=" in text
    assert "model.id=" in text


def test_folder_missing(tmp_path):
    assert f"{tmp_path / 'no'}: no such folder" in refusal(Flux2Model(path=tmp_path / "no"))


def test_not_a_diffusers_folder(tmp_path):
    assert "no model_index.json" in refusal(Flux2Model(path=tmp_path))
    (tmp_path / "flux2.safetensors").write_bytes(b"")
    assert "flux2.safetensors alone is a single-file checkpoint" in refusal(Flux2Model(path=tmp_path))
    assert "no model_index.json" in refusal(Flux2Model(path=tmp_path / "flux2.safetensors"))


def test_another_pipeline_is_named(tmp_path):
    text = refusal(Flux2Model(path=hollow_folder(tmp_path / "m", "FluxPipeline")))
    assert "holds a FluxPipeline" in text
    assert "Flux2KleinPipeline" in text


def test_broken_model_index(tmp_path):
    folder = hollow_folder(tmp_path / "m")
    (folder / "model_index.json").write_text("{")
    assert "model_index.json is not JSON" in refusal(Flux2Model(path=folder))


def test_code_of_other_libraries_is_refused(tmp_path):
    folder = hollow_folder(tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["os", "system"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "asks for code from os" in refusal(Flux2Model(path=folder))


@pytest.mark.parametrize(
    "missing",
    [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00002-of-00003.safetensors",
        "text_encoder/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_missing_file_is_named(tmp_path, missing):
    folder = hollow_folder(tmp_path / "m", shards=3)
    (folder / missing).unlink()
    text = refusal(Flux2Model(path=folder))
    assert f"{missing} is missing" in text
    assert "incomplete" in text


def test_missing_weights_and_folder_are_named(tmp_path):
    folder = hollow_folder(tmp_path / "m")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(folder / "text_encoder")
    text = refusal(Flux2Model(path=folder))
    assert "vae/ has no .safetensors weights" in text
    assert "folder text_encoder/ is missing" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda whole: whole[:-1], "is truncated"),
        (lambda whole: whole[:20], "is truncated"),
        (lambda whole: b"", "is truncated"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (lambda whole: (5).to_bytes(8, "little") + b"hello", "is not a safetensors file"),
    ],
)
def test_damaged_weights_are_named(tmp_path, content, said):
    folder = hollow_folder(tmp_path / "m")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    text = refusal(Flux2Model(path=folder))
    assert f"transformer/{file.name} {said}" in text


def test_variant(tmp_path):
    folder = hollow_folder(tmp_path / "m", variant="fp16", shards=2)
    assert find_weights(Flux2Model(path=folder, variant="fp16")).variant == "fp16"
    assert "only the variant(s) fp16" in refusal(Flux2Model(path=folder))
    for name, stem in (("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        write_weights(folder / name, stem, None)
    write_weights(folder / "text_encoder", "model", None)
    assert "no bf16 weight files; it has fp16" in refusal(Flux2Model(path=folder, variant="bf16"))
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    located = find_weights(Flux2Model(path=folder, variant="fp16"))
    assert located.folder
    assert checkpoint.variant_of(folder, "vae", "fp16") is None


def test_dev_processor_needs_torchvision(tmp_path):
    real = hollow_folder(tmp_path / "real", "Flux2Pipeline", tokenizer="PixtralProcessor", distilled=None)
    plain = hollow_folder(tmp_path / "plain", "Flux2Pipeline", tokenizer="PreTrainedTokenizerFast", distilled=None)
    assert "fluxrun[dev]" in refusal(Flux2Model(path=real), Machine())
    assert find_weights(Flux2Model(path=real), Machine(packages={"torchvision": "0.28"}))
    assert find_weights(Flux2Model(path=plain), Machine())


def test_random_needs_sizes():
    assert "model.architecture=" in refusal(Flux2Model(weights="random"))
    located = find_weights(Flux2Model(weights="random", architecture="klein_4b", distilled=False))
    assert (located.kind, located.pipeline, located.distilled) == ("random", "klein", False)
