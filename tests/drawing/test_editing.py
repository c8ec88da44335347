"""Editing: several references, the same pixels as in plain diffusers, and what the record says about them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from helpers import SMALL, composed, cuda_machine, draw, hashes, plan_on
from PIL import Image

from fluxrun.cli.rerun import rerun
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.record.picture import pixel_hash
from fluxrun.runner import run

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def bench():
    with SessionPool() as pool:
        yield pool


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Pictures to edit: red and blue ones of one size, a wide one."""
    folder = tmp_path_factory.mktemp("given")
    for name, size in (("red", (64, 64)), ("blue", (64, 64)), ("wide", (160, 80))):
        Image.new("RGB", size, "green" if name == "wide" else name).save(folder / f"{name}.png")
    return folder


def references(folder, *names):
    return f"reference_images=[{','.join(f'{folder}/{name}.png' for name in names)}]"


def test_several_references_and_their_sizes(tmp_path, bench, given):
    def tokens(*overrides):
        record = draw(tmp_path / "-".join(overrides)[-20:], references(given, "wide", "red"), *overrides, pool=bench)
        assert record.status == "completed"
        return record.options["attention"].facts["shape"][1] - 16 - 32

    assert tokens("reference_resize=area") == 50 + 16
    assert tokens("reference_resize=crop") == 16 + 16


def test_the_record_has_the_pictures_hashes_and_rerun_looks_at_them(tmp_path, given, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "red.png").write_bytes((given / "red.png").read_bytes())
    record = draw(tmp_path / "run", "reference_images=[red.png]")
    pixels = hashlib.sha256(bytes((255, 0, 0)) * 64 * 64).hexdigest()
    assert [(each.key, each.path, each.sha256) for each in record.inputs] == [("reference_images", "red.png", pixels)]
    picture = tmp_path / "run" / record.images[0].path
    assert rerun(str(picture), [f"hydra.run.dir={tmp_path / 'again'}"]) == 0
    (tmp_path / "red.png").write_bytes((given / "blue.png").read_bytes())
    for target in (picture, tmp_path / "run"):
        capsys.readouterr()
        assert rerun(str(target), [f"hydra.run.dir={tmp_path / target.stem}-other"]) == 1
        assert "red.png has other pixels" in capsys.readouterr().err


# --- klein_kv -------------------------------------------------------------------------------------------------------


def plain(kind, **arguments):
    """The tiny model drawn by plain diffusers: weights, its pipeline class, one call."""
    import torch

    from fluxrun.options.model import Flux2Model
    from fluxrun.weights.loading import load, pipeline_class

    model = Flux2Model(weights="random", architecture="tiny", pipeline="klein", distilled=True)
    parts = load(model, dtype="float32", device="cpu").pipeline.components
    pipe = pipeline_class(kind)(**parts, is_distilled=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt=PROMPT, text_encoder_out_layers=(1, 2, 3), generator=torch.Generator("cpu").manual_seed(0),
        num_inference_steps=3, max_sequence_length=32, **arguments,
    ).images[0]  # fmt: skip


def test_klein_kv_is_diffusers_and_leaves_the_weights_to_klein(tmp_path, bench, given):
    kv = ("model.pipeline=klein_kv", "steps=3")
    edit = references(given, "wide", "red")
    drawn = draw(tmp_path / "kv", *kv, edit, pool=bench)
    pictures = [Image.open(given / f"{name}.png").convert("RGB") for name in ("wide", "red")]
    assert hashes(drawn) == [pixel_hash(plain("klein_kv", image=pictures, height=64, width=64))]
    without = draw(tmp_path / "without", *kv, pool=bench)
    klein = draw(tmp_path / "klein", "steps=3", pool=bench)
    assert hashes(without) == hashes(klein) != hashes(drawn)
    assert hashes(draw(tmp_path / "edited", "steps=3", edit, pool=bench)) != hashes(drawn)
    assert len(bench.loads) == 1


@pytest.mark.parametrize("option", ["kernels=fused", "compile=cudagraphs", "cache=fixed", "compile=reduce_overhead"])
def test_what_klein_kv_does_not_go_with_falls_back(given, option):
    group, name = option.split("=")
    machine = cuda_machine("H100", 80, (9, 0), cache_dit="1.5.3")
    plan = plan_on(machine, *SMALL, "model.pipeline=klein_kv", "steps=20", references(given, "red"), option)
    choice = plan.choices[group]
    assert choice.effective != name
    assert "klein_kv" in choice.fallbacks[0].reason


@pytest.mark.slow
def test_klein_kv_compiled(tmp_path, bench, given):
    kv = ("model.pipeline=klein_kv", "steps=3", references(given, "red"))
    record = draw(tmp_path / "compiled", *kv, "compile=regional", pool=bench)
    assert record.options["compile"].effective == "regional"
    eager = draw(tmp_path / "eager", *kv, pool=bench)
    pixels = [
        np.asarray(Image.open(tmp_path / name / one.images[0].path), dtype=int)
        for name, one in (("compiled", record), ("eager", eager))
    ]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1  # compiled code rounds elsewhere


# --- klein_inpaint --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A picture of 64x80 pixels of noise and a mask that is white in its lower right quarter."""
    folder = tmp_path_factory.mktemp("scene")
    pixels = np.random.default_rng(0).integers(0, 255, (80, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    mask = np.zeros((80, 64), dtype=np.uint8)
    mask[48:, 32:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def inpainting(scene, *overrides):
    """As ``small``, which names a size that inpainting takes from its picture."""
    tiny = ("model=tiny", "model.max_sequence_length=32", "steps=3", "model.pipeline=klein_inpaint")
    return composed(*tiny, f"image={scene}/image.png", f"mask_image={scene}/mask.png", *overrides)


def inpaint(folder, scene, *overrides, **how):
    return run(inpainting(scene, *overrides), folder, **how)


def pictures_of(scene):
    return {"image": Image.open(scene / "image.png"), "mask_image": Image.open(scene / "mask.png")}


@pytest.mark.parametrize(("strength", "steps"), [(None, 3), (0.5, 2), (1.0, 3)])
def test_inpainting_is_diffusers_and_counts_the_steps_that_it_makes(tmp_path, bench, scene, strength, steps):
    given = {} if strength is None else {"strength": strength}
    record = inpaint(tmp_path / "run", scene, *(f"{key}={value}" for key, value in given.items()), pool=bench)
    assert hashes(record) == [pixel_hash(plain("klein_inpaint", guidance_scale=1.0, **pictures_of(scene), **given))]
    assert [len(times) for times in record.timings.step_s] == [steps]
    assert (record.images[0].width, record.images[0].height) == (64, 80)
    assert [each.key for each in record.inputs] == ["image", "mask_image"]
    assert record.options["attention"].facts["shape"][1] == 20 + 20 + 32


def test_a_crop_keeps_the_bytes_outside_of_the_mask(tmp_path, bench, scene):
    record = inpaint(tmp_path / "run", scene, "padding_mask_crop=8", "strength=1", pool=bench)
    before = np.asarray(pictures_of(scene)["image"])
    after = np.asarray(Image.open(tmp_path / "run" / record.images[0].path))
    mask = np.asarray(pictures_of(scene)["mask_image"]) > 0
    assert (after[~mask] == before[~mask]).all()
    assert (after[mask] != before[mask]).any()


def test_each_run_of_a_pool_repaints_its_own_picture(tmp_path, bench, scene):
    """Pictures of one size leave the pipeline as it stands, and still are the run's own."""
    for name, key in (("image", "image"), ("mask", "mask_image")):
        pictures_of(scene)[key].rotate(180).save(scene / f"turned_{name}.png")
    loads, drawn = len(bench.loads), []
    ways = ([], [f"image={scene}/turned_image.png"], [f"mask_image={scene}/turned_mask.png"], ["strength=0.4"])
    for number, way in enumerate([*ways, ["padding_mask_crop=4"]]):
        pooled = inpaint(tmp_path / f"{number}", scene, *way, pool=bench)
        drawn += hashes(pooled)
        assert hashes(pooled) == hashes(inpaint(tmp_path / f"{number} alone", scene, *way)), way
    assert len(set(drawn)) == len(drawn)
    assert len(bench.loads) <= max(loads, 1)


def test_inpainting_with_references_in_a_batch_of_a_base_model(tmp_path, bench, scene, given):
    more = (references(given, "red", "wide"), "reference_resize=crop", "num_images=3", "batch_size=3")
    record = inpaint(tmp_path / "run", scene, *more, "model.distilled=false", "guidance=2")
    assert len(record.images) == 3
    assert record.options["attention"].facts["shape"][1] == 20 + 3 * 20 + 32


def test_rerun_of_an_inpainted_picture(tmp_path, scene):
    record = inpaint(tmp_path / "run", scene)
    assert rerun(str(tmp_path / "run" / record.images[0].path), [f"hydra.run.dir={tmp_path / 'again'}"]) == 0


def test_a_step_cache_counts_the_steps_that_inpainting_makes(tmp_path, scene):
    pytest.importorskip("cache_dit")
    record = inpaint(tmp_path / "run", scene, "steps=12", "strength=0.5", "cache=fixed")
    facts = record.options["cache"].facts
    assert (facts["steps_computed_per_image"], facts["steps_skipped_per_image"]) == ([3], [3])
