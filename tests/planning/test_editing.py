"""What becomes of the pictures that a run is given, and which are refused before anything is loaded."""

from __future__ import annotations

import pytest
from helpers import CPU, H100, plan_on, small
from PIL import Image

from fluxrun.errors import ConfigError, OptionUnavailable
from fluxrun.formatting import GIB
from fluxrun.planning.editing import inpainted_size, limited, resized
from fluxrun.planning.prepare import prepare


@pytest.mark.parametrize(
    ("how", "size"), [("area", (200, 100)), ("fit", (128, 64)), ("crop", (128, 96)), ("stretch", (128, 96))]
)
def test_reference_resize(how, size):
    picture = Image.new("RGB", (200, 100), "red")
    assert resized(picture, how, (96, 128)).size == size
    assert (resized(picture, how, (96, 128)) is picture) == (how == "area")


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        prepare(small(*overrides), CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_reference_that_the_pipelines_refuse_is_refused_before_anything_is_loaded(tmp_path):
    for name, size, problem in (("a", (63, 99), "at least 64"), ("b", (640, 79), "at most 8 times")):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        assert problem in refused(f"reference_images=[{tmp_path}/{name}.png]")
    assert "64x32" in refused(f"reference_images=[{tmp_path}/b.png]", "reference_resize=stretch", "height=32")


@pytest.fixture
def pictures(tmp_path):
    for name, size in (("image", (64, 80)), ("other", (80, 64)), ("low", (64, 15)), ("red", (64, 64))):
        Image.new("RGB", size, "black" if name == "other" else "red").save(tmp_path / f"{name}.png")
    for name, size, level in (("mask", (64, 80), 255), ("black", (64, 80), 127), ("flat", (64, 15), 255)):
        Image.new("L", size, level).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ("image={}/image.png", "image: only model.pipeline=klein_inpaint uses it"),
        ("mask_image={}/mask.png", "mask_image: only"),
        ("strength=0.5", "strength: only"),
        ("padding_mask_crop=8", "padding_mask_crop: only"),
        ("strength=0.5 model.pipeline=klein_kv", "strength: only"),
        ("strength=0.5 model.pipeline=dev", "strength: only"),
        ("model.pipeline=klein_inpaint", "needs image and mask_image: give image=FILE"),
        ("model.pipeline=klein_inpaint image={}/image.png", "needs mask_image: give mask_image=FILE"),
        ("model.pipeline=klein_inpaint image={}/image.png mask_image={}/absent.png", "no such file"),
        ("model.pipeline=klein_inpaint image={}/image.png mask_image={}/other.png", "80x64 pixels, image has 64x80"),
        ("model.pipeline=klein_inpaint image={}/image.png mask_image={}/black.png", "black all over"),
        ("model.pipeline=klein_inpaint image={}/low.png mask_image={}/flat.png", "less than 16 pixels"),
        ("model.pipeline=klein_inpaint image={}/image.png mask_image={}/mask.png", "height=64: klein_inpaint draws at"),
        ("model.pipeline=klein_kv model.distilled=false", "guidance: model.pipeline=klein_kv has no"),
        ("model.pipeline=klein_kv model.distilled=false guidance=1 negative_prompt=x", "negative_prompt: model.pip"),
        ("guidance_batched=true", "guidance_batched: this run calls the transformer once a step"),
        ("model.pipeline=klein_kv guidance_batched=true", "guidance_batched: this run"),
    ],
)
def test_what_does_not_go_with_a_pipeline(pictures, overrides, problem):
    assert problem in refused(*overrides.replace("{}", str(pictures)).split())


def test_references_of_inpainting(pictures):
    edit = f"model.pipeline=klein_inpaint image={pictures}/image.png mask_image={pictures}/mask.png height=80".split()
    two = f"reference_images=[{pictures}/red.png,{pictures}/image.png]"
    assert "give reference_resize=crop" in refused(*edit, two)
    assert "batch_size=2" in refused(*edit, two, "reference_resize=crop", "batch_size=2", "num_images=2")
    assert "batch of 2" in refused(*edit, two, "reference_resize=crop", "batch_size=3", "num_images=5")
    plan = prepare(small(*edit, two, "reference_resize=crop"), CPU).plan
    assert (plan.size, plan.reference_tokens, plan.steps_made) == ((80, 64), 3 * 20, 2)


def test_inpainting_draws_with_euler(pictures):
    edit = f"model.pipeline=klein_inpaint image={pictures}/image.png mask_image={pictures}/mask.png height=80".split()
    choice = prepare(small(*edit, "scheduler=heun", "scheduler.shift=2"), CPU).plan.choices["scheduler"]
    assert (choice.effective, choice.option.shift) == ("euler", 2)
    assert "klein_inpaint" in choice.fallbacks[0].reason


def test_a_dev_checkpoint_has_no_other_pipelines(tmp_path):
    pytest.importorskip("torch")
    from fluxrun.weights.loading import save_tiny

    path = save_tiny(tmp_path / "dev", "dev")
    assert "is a dev model" in refused("model=local", f"model.path={path}", "model.pipeline=klein_kv")


@pytest.mark.parametrize("size", [(1500, 1100), (1024, 1024), (2000, 701)])
def test_inpainted_size_is_what_the_pipeline_makes_of_a_picture(size):
    from math import sqrt

    width, height = size
    if width * height > 1024 * 1024:
        scale = sqrt(1024 * 1024 / (height * width))
        height, width = int(height * scale), int(width * scale)
    picture = Image.new("RGB", size)
    assert inpainted_size(picture) == (height // 16 * 16, width // 16 * 16)
    assert limited(picture).size == (width, height)


def test_what_klein_kv_remembers_takes_memory(tmp_path):
    Image.new("RGB", (1024, 1024)).save(tmp_path / "large.png")
    three = f"reference_images=[{','.join([str(tmp_path / 'large.png')] * 3)}]"
    model = ("model=flux2_klein_4b", "model.weights=random", three)
    klein, kv = (plan_on(H100, *model, *more).estimate.working_bytes() for more in ((), ("model.pipeline=klein_kv",)))
    step = (4 * 4096 + 512) * 3072 * 2 * 22
    assert kv == step + 3 * 4096 * 2 * 3072 * 2 * 25
    assert step <= klein < kv


def test_guidance_in_one_call_where_memory_allows(tmp_path):
    base = ("model=flux2_klein_base_4b", "model.weights=random", "guidance_batched=true")
    large = plan_on(H100, *base)
    assert large.guidance_batched
    cached = plan_on(CPU, "model=tiny", "model.distilled=false", "cache=fixed", "steps=20", "guidance_batched=true")
    assert cached.guidance_batched == (cached.choices["cache"].effective == "none")
    need = large.estimate.memory_needs()["resident"].bytes / GIB
    tight = plan_on(H100, *base, "memory=resident", f"memory.budget_gb={need - 0.1}", "height=2048", "width=2048")
    assert not tight.guidance_batched
    assert any("two calls of the transformer" in note for note in tight.notes)
    with pytest.raises(OptionUnavailable):
        plan_on(H100, *base, "memory=resident", "memory.budget_gb=1", "strict=true")
