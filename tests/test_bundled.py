"""The bundled model: it is the default, it draws what it is told, and plain diffusers draws the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import composed
from PIL import Image

from fluxrun.errors import ConfigError
from fluxrun.options.lora import Adapters
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.planning.prepare import prepare
from fluxrun.record.picture import pixel_hash
from fluxrun.record.schema import RunRecord
from fluxrun.runner import run
from fluxrun.shapes.captions import parse
from fluxrun.shapes.checker import score
from fluxrun.weights.headers import read_header
from fluxrun.weights.lora_files import find_adapters, load_adapters

STEPS = "steps=4"
PROMPTS = (
    "a large red circle on a white background",
    "a small blue star in the top left corner, on a yellow background",
    "a red circle left of a green square",
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, list[Image.Image]]:
    """One run of all prompts with everything neutral."""
    folder = tmp_path_factory.mktemp("bundled") / "run"
    record = run(composed(f"prompt=[{', '.join(repr(p) for p in PROMPTS)}]", STEPS), folder)
    return record, [Image.open(folder / image.path) for image in record.images]


def test_it_is_the_default_and_loads_without_a_network(drawn):
    record, images = drawn
    assert record.options["model"].effective == "shapes"
    assert [image.size for image in images] == [(256, 256)] * len(PROMPTS)


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_it_draws_what_it_is_told(drawn, number):
    scene = parse(PROMPTS[number])
    assert scene is not None
    result = score(scene, np.asarray(drawn[1][number].convert("RGB")))
    assert {name: result[name] for name in ("count", "colour", "position", "background")} == dict.fromkeys(
        ("count", "colour", "position", "background"), True
    )


def test_hidden_states_it_does_not_have_are_refused_before_loading():
    folder = composed(STEPS).model.folder()
    with pytest.raises(ConfigError, match=r"has 6 layers, hidden state 27 would be read"):
        prepare(composed("model=local", f"model.path={folder}"))


def test_plain_diffusers_draws_the_same_pixels(drawn):
    model = composed(STEPS).model
    pipeline = DiffusionPipeline.from_pretrained(model.folder(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt=PROMPTS[0],
        height=256,
        width=256,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(0),
        max_sequence_length=model.max_sequence_length,
        text_encoder_out_layers=model.text_encoder_out_layers,
    ).images[0]
    assert pixel_hash(image) == drawn[0].images[0].sha256


LORAS = sorted((composed(STEPS).model.folder() / "loras").glob("*.safetensors"))


@pytest.mark.parametrize("file", LORAS, ids=lambda file: file.stem)
def test_a_lora_of_its_own_is_small_and_matches_every_layer_that_it_names(file):
    assert file.stat().st_size <= 10**6
    transformer = DiffusionPipeline.from_pretrained(composed(STEPS).model.folder(), dtype=torch.float32).transformer
    [adapter] = load_adapters(find_adapters(Adapters(files=[{"bundled": file.stem}])), [], transformer, print).adapters
    named = {name.rsplit(".lora_", 1)[0] for name in read_header(file)}
    assert len(adapter.layers) == len(named) > 0
    assert not adapter.dropped


def test_at_night_the_ground_is_black_and_the_scene_the_same(drawn, tmp_path):
    pytest.importorskip("peft")
    by_day = drawn[0].images[2]
    night = ("lora=adapters", "lora.files=[{bundled: night}]", f"prompt={PROMPTS[2]}", f"seed={by_day.seed}", STEPS)
    with SessionPool() as pool:
        records = [run(composed(*night, f"lora.scale={n}"), tmp_path / str(n), pool=pool) for n in (1, 0)]
    picture = np.asarray(Image.open(tmp_path / "1" / records[0].images[0].path).convert("RGB"))
    assert score(dataclasses.replace(parse(PROMPTS[2]), background="black"), picture)["all"]
    assert records[1].images[0].sha256 == by_day.sha256, "scale 0"
