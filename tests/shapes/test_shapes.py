"""The shapes world checks itself: drawings score 100 %, wrong drawings fail, sentences lead back to their scenes."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from PIL import Image

from fluxrun.shapes import evaluate
from fluxrun.shapes.captions import caption, is_held_out, parse, plain_caption, random_scene, same_scene
from fluxrun.shapes.checker import look, score
from fluxrun.shapes.scenes import Object, Scene, draw, mirrored
from fluxrun.shapes.vocabulary import COLOURS, PLACES, SHAPES, SIZES

RED_CIRCLE = Scene(objects=(Object(colour="red", shape="circle", size="medium", place="top left"),))
PAIR = Scene(objects=(Object(colour="red", shape="circle"), Object(colour="blue", shape="square")), relation="left of")


def pixels(scene: Scene, size: int = 256) -> np.ndarray:
    return np.asarray(draw(scene, size=size))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_shape_and_size_is_recognised_in_every_place(shape: str, size: str) -> None:
    for place, colour in zip(PLACES, COLOURS, strict=False):
        scene = Scene(objects=(Object(colour=colour, shape=shape, size=size, place=place),))
        assert score(scene, pixels(scene))["all"], scene


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_random_drawings_score_fully(held_out: bool) -> None:
    rng = random.Random(1)
    for _ in range(60):
        scene = random_scene(rng, held_out=held_out)
        assert score(scene, pixels(scene))["all"], scene


@pytest.mark.parametrize(
    ("change", "attribute"),
    [
        ({"colour": "pink"}, "colour"),
        ({"shape": "hexagon"}, "shape"),
        ({"size": "large"}, "size"),
        ({"place": "top"}, "position"),
    ],
)
def test_one_wrong_attribute_fails_alone(change: dict[str, str], attribute: str) -> None:
    wrong = dataclasses.replace(RED_CIRCLE, objects=(dataclasses.replace(RED_CIRCLE.objects[0], **change),))
    result = score(RED_CIRCLE, pixels(wrong))
    assert [name for name, right in result.items() if not right] == [attribute, "all"]


def test_wrong_background_count_and_relation_fail() -> None:
    assert not score(RED_CIRCLE, pixels(dataclasses.replace(RED_CIRCLE, background="yellow")))["background"]
    assert not score(RED_CIRCLE, pixels(PAIR))["count"]
    assert not score(PAIR, pixels(RED_CIRCLE))["colour"]
    swapped = dataclasses.replace(PAIR, objects=PAIR.objects[::-1])
    assert [name for name, right in score(PAIR, pixels(swapped)).items() if not right] == ["position", "all"]


def test_swapped_colours_fail() -> None:
    swapped = Scene(
        objects=(Object(colour="blue", shape="circle"), Object(colour="red", shape="square")), relation="left of"
    )
    assert not score(PAIR, pixels(swapped))["all"]


def test_noise_and_emptiness_score_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert not score(RED_CIRCLE, noise)["shape"]
    assert look(np.full((256, 256, 3), 255, np.uint8)).objects == ()


def test_checker_refuses_other_arrays() -> None:
    with pytest.raises(ValueError, match="uint8"):
        look(np.zeros((8, 8, 3), np.float32))


def test_checker_reads_other_sizes() -> None:
    for size in (128, 512):
        assert score(RED_CIRCLE, pixels(RED_CIRCLE, size=size))["all"]


def test_sentences_lead_back_to_their_scene() -> None:
    rng = random.Random(2)
    scenes = [random_scene(rng, held_out=index % 2 == 0) for index in range(1000)]
    wrong = [scene for scene in scenes if not _leads_back(scene, caption(scene, rng))]
    assert len(wrong) <= 20  # commas that carry the meaning are dropped now and then, as people do


def _leads_back(scene: Scene, text: str) -> bool:
    parsed = parse(text)
    return parsed is not None and same_scene(parsed, scene)


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a red circle left of a blue square", PAIR),
        ("Blue box to the right of a red ball.", mirrored(PAIR)),
        ("a red circle in the upper left corner, medium-sized", RED_CIRCLE),
        ("red circle inside a blue square", dataclasses.replace(PAIR, relation="inside")),
        ("a blue square with a red circle inside", dataclasses.replace(PAIR, relation="inside")),
        (
            "a small blue star in the top left corner, on a yellow background",
            Scene(objects=(Object(colour="blue", shape="star", size="small", place="top left"),), background="yellow"),
        ),
    ],
)
def test_parse(prompt: str, scene: Scene) -> None:
    assert parse(prompt) == scene


@pytest.mark.parametrize(
    "prompt", ["", "a lighthouse at dusk", "circle", "red", "a red circle, a blue square and a star"]
)
def test_parse_admits_what_it_cannot_read(prompt: str) -> None:
    assert parse(prompt) is None


def test_split_does_not_depend_on_how_the_scene_is_told() -> None:
    rng = random.Random(3)
    for _ in range(300):
        scene = random_scene(rng)
        if scene.relation in ("left of", "above"):
            assert is_held_out(scene) == is_held_out(mirrored(scene))


def test_evaluation_asks_only_for_held_out_scenes_and_repeats_itself() -> None:
    for name in evaluate.SETS:
        cases = evaluate.prompts(name, 20, seed=5)
        assert cases == evaluate.prompts(name, 20, seed=5)
        assert all(is_held_out(case.scene) for case in cases)


def test_judge_counts_by_attribute_and_lists_failures() -> None:
    cases = evaluate.prompts("single", 4) + evaluate.prompts("pair", 4)
    images = [draw(case.scene) for case in cases]
    report = evaluate.judge(cases, images)
    assert report["accuracy"]["single"]["all"] == report["accuracy"]["pair"]["all"] == 1.0
    images[0] = Image.new("RGB", (256, 256), "white")
    report = evaluate.judge(cases, images, seeds=[7] * 8)
    assert report["accuracy"]["single"]["all"] == 0.75
    assert report["failures"][0]["seed"] == 7


def test_contact_sheet_has_room_for_every_image() -> None:
    sheet = evaluate.contact_sheet([draw(RED_CIRCLE)] * 7, ["a red circle in the top left corner"] * 7, columns=3)
    assert sheet.width > 3 * 192
    assert sheet.height > 3 * 192


def test_a_caption_is_lower_case_and_decorated_only_when_asked() -> None:
    rng = random.Random(4)
    assert all((text := plain_caption(random_scene(rng), rng)) == text.lower() for _ in range(100))
