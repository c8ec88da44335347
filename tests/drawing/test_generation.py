"""Pictures: the same pixels as plain diffusers, deterministic, with every way of saying what to draw."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import draw, hashes
from PIL import Image

from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.record.picture import pixel_hash

PROMPT = "a red circle left of a blue square"
NEUTRAL = ("attention=sdpa", "compile=none", "vae=full", "memory=resident", "quantization=none")


@pytest.fixture(scope="module")
def bench():
    with SessionPool() as pool:
        yield pool


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A picture with something to see in it, larger than what is drawn."""
    path = tmp_path_factory.mktemp("reference") / "reference.png"
    pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def plain_diffusers(pipeline: str, distilled: bool = True, **arguments):
    """The tiny model drawn without fluxrun's build and generate: weights, then diffusers' own pipeline call."""
    import torch

    from fluxrun.options.model import Flux2Model
    from fluxrun.weights.loading import load

    model = Flux2Model(weights="random", architecture="tiny", pipeline=pipeline, distilled=distilled)
    pipe = load(model, dtype="float32", device="cpu").pipeline
    pipe.set_progress_bar_config(disable=True)
    common = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 32}
    return pipe(
        prompt=arguments.pop("prompt", PROMPT), text_encoder_out_layers=(1, 2, 3),
        generator=torch.Generator("cpu").manual_seed(arguments.pop("seed", 0)), **common, **arguments,
    ).images[0]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "pipeline", "arguments"),
    [
        (["model.pipeline=klein"], "klein", {"guidance_scale": 1.0}),
        (["model.pipeline=klein", "seed=5"], "klein", {"guidance_scale": 1.0, "seed": 5}),
        (["model.pipeline=dev"], "dev", {"guidance_scale": 4.0}),
        (["model.pipeline=dev", "guidance=2.5"], "dev", {"guidance_scale": 2.5}),
        (["model.pipeline=dev", "guidance=0"], "dev", {"guidance_scale": 0.0}),
        (["model.distilled=false", "guidance=4"], "klein", {"guidance_scale": 4.0, "distilled": False}),
        (["model.distilled=false", "guidance=1"], "klein", {"guidance_scale": 1.0, "distilled": False}),
        (["model.distilled=false"], "klein", {"guidance_scale": 4.0, "distilled": False}),
    ],
)
def test_the_same_pixels_as_plain_diffusers(tmp_path, bench, overrides, pipeline, arguments):
    record = draw(tmp_path / "run", *NEUTRAL, *overrides, pool=bench)
    assert hashes(record) == [pixel_hash(plain_diffusers(pipeline, **arguments))]


@pytest.mark.parametrize("pipeline", ["klein", "dev"])
def test_reference_images_are_the_same_as_in_plain_diffusers(tmp_path, bench, reference, pipeline):
    record = draw(
        tmp_path / "run", *NEUTRAL, f"model.pipeline={pipeline}", f"reference_images=[{reference}]", pool=bench
    )
    arguments = {"guidance_scale": 1.0 if pipeline == "klein" else 4.0}
    with Image.open(reference) as image:
        assert hashes(record) == [pixel_hash(plain_diffusers(pipeline, image=[image.convert("RGB")], **arguments))]
    without = draw(tmp_path / "without", *NEUTRAL, f"model.pipeline={pipeline}", pool=bench)
    assert hashes(without) != hashes(record)
    # 36 tokens of the picture to edit beside 16 of the new one and 32 of text.
    assert record.options["attention"].facts["shape"][1] == 84


def test_deterministic_for_a_seed(tmp_path, bench):
    first = draw(tmp_path / "1", "num_images=2", "seed=3", pool=bench)
    second = draw(tmp_path / "2", "num_images=2", "seed=3")
    alone = draw(tmp_path / "3", "seed=4", pool=bench)
    assert hashes(first) == hashes(second)
    assert hashes(first)[1] == hashes(alone)[0]
    assert hashes(first)[0] != hashes(first)[1]
    assert [(image.seed, image.path) for image in first.images] == [
        (3, "images/000_seed3.png"), (4, "images/001_seed4.png"),
    ]  # fmt: skip


def pixels(folder, record):
    return [np.asarray(Image.open(folder / image.path), dtype=int) for image in record.images]


def test_a_batch_draws_nearly_the_same_pictures(tmp_path, bench):
    one = draw(tmp_path / "1", "num_images=3", "prompt=[a, b]", pool=bench)
    two = draw(tmp_path / "2", "num_images=3", "prompt=[a, b]", "batch_size=2", pool=bench)
    assert [(i.prompt, i.seed) for i in one.images] == [(i.prompt, i.seed) for i in two.images]
    assert [(i.prompt, i.seed) for i in one.images] == [(p, s) for p in "ab" for s in range(3)]
    for left, right in zip(pixels(tmp_path / "1", one), pixels(tmp_path / "2", two), strict=True):
        assert np.abs(left - right).max() <= 2
    assert len(two.timings.denoise_s) == 3
    assert len(two.timings.text_encode_s) == 2


def test_the_last_batch_may_be_smaller(tmp_path, bench):
    record = draw(tmp_path / "run", "num_images=3", "batch_size=2", pool=bench)
    assert len(record.images) == 3


@pytest.mark.parametrize("memory", ["resident", "staged"])
def test_negative_prompt_changes_the_picture_of_a_base_model(tmp_path, bench, memory):
    base = ("model.distilled=false", "guidance=4", f"memory={memory}")
    without = draw(tmp_path / "1", *base, pool=bench)
    empty = draw(tmp_path / "2", *base, "negative_prompt=", pool=bench)
    with_one = draw(tmp_path / "3", *base, "negative_prompt=blurry, dark", pool=bench)
    assert hashes(without) == hashes(empty)
    assert hashes(without) != hashes(with_one)


@pytest.mark.parametrize("pipeline", ["klein", "dev"])
def test_tiles_change_little(tmp_path, bench, pipeline):
    size = ("height=256", "width=192", f"model.pipeline={pipeline}")
    whole = draw(tmp_path / "1", *size, "vae=full", pool=bench)
    tiled = draw(tmp_path / "2", *size, "vae=tiled", "vae.tile_size=128", pool=bench)
    assert tiled.options["vae"].facts["tiles_decoded"] == 6
    (left,), (right,) = pixels(tmp_path / "1", whole), pixels(tmp_path / "2", tiled)
    assert left.shape == right.shape == (256, 192, 3)
    assert (left != right).any()


def test_measurement(tmp_path, bench):
    record = draw(tmp_path / "run", "measure.warmup=1", "measure.repeats=3", "num_images=2", "steps=3", pool=bench)
    timings = record.timings
    assert len(record.images) == len(timings.save_s) == 2
    assert len(timings.denoise_s) == len(timings.decode_s) == len(timings.step_s) == 6
    assert [len(steps) for steps in timings.step_s] == [3] * 6
    assert timings.steady_step_s
    assert timings.steady_step_s.n == 18
    assert timings.first_call_s is not None
    cold = draw(tmp_path / "cold", "steps=3").timings
    assert cold.steady_step_s
    assert cold.steady_step_s.n == 2
    assert cold.first_call_s == cold.step_s[0][0]
    assert cold.total_s >= cold.load_s + sum(cold.denoise_s) + sum(cold.decode_s)
    assert set(record.memory.by_stage) >= {"text_encode", "denoise", "decode"}
    assert record.memory.start_bytes
    assert record.memory.start_bytes > record.options["memory"].facts["resident_bytes"], "the process, and the weights"


def test_prompts_file(tmp_path, bench):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps("one") + "\n" + json.dumps({"prompt": "two", "seed": 9, "num_images": 2}))
    record = draw(tmp_path / "run", f"prompts_file={path}", pool=bench)
    assert [(image.prompt, image.seed) for image in record.images] == [("one", 0), ("two", 9), ("two", 10)]


@pytest.mark.parametrize("size", [("height=16", "width=16"), ("height=48", "width=112")])
def test_odd_sizes(tmp_path, bench, size):
    record = draw(tmp_path / "run", *size, pool=bench)
    (image,) = record.images
    assert [f"height={image.height}", f"width={image.width}"] == list(size)
    assert Image.open(tmp_path / "run" / image.path).size == (image.width, image.height)


def test_half_precision(tmp_path, bench):
    record = draw(tmp_path / "run", "model.dtype=bfloat16", pool=bench)
    assert len(record.images) == 1


def test_a_checkpoint_folder_on_disk(tmp_path):
    from checkpoints import tiny_folder

    for pipeline in ("klein", "dev"):
        overrides = ("model=local", f"model.path={tiny_folder(pipeline)}", "model.dtype=float32")
        record = draw(tmp_path / pipeline, *overrides, "model.text_encoder_out_layers=[1,2,3]")
        assert record.status == "completed"
        assert record.options["model"].facts["source"] == str(tiny_folder(pipeline).resolve())
