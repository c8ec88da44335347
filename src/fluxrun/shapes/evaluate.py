"""The accuracy harness: held-out prompts, a judgement by attribute, a contact sheet. Images may come from anywhere."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from fluxrun.shapes.captions import (
    caption,
    is_held_out,
    plain_caption,
    random_placed_pair,
    random_related,
    random_single,
)
from fluxrun.shapes.checker import score
from fluxrun.shapes.scenes import Scene

SETS = ("single", "pair", "placed_pair")
PROMPT_SIZE = 256  # the side, in pixels, that the bundled model is made for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One question: a held-out scene and the sentence that asks for it."""

    set_name: str
    prompt: str
    scene: Scene


def prompts(set_name: str, n: int, seed: int = 0, *, as_typed: bool = True) -> list[Case]:
    """`n` held-out cases of a set (`single`, `pair`, `placed_pair`), the same for the same seed.

    `as_typed` adds what people type around a sentence (capitals, full stops, "a picture of"). Singles always say a
    place, so that there is one to judge. ValueError: no such set.
    """
    if set_name not in SETS:
        raise ValueError(f"no prompt set {set_name!r}; there are {', '.join(SETS)}")
    rng = random.Random(f"{set_name}-{seed}")
    cases: list[Case] = []
    while len(cases) < n:
        scene = _random_scene(set_name, rng)
        if is_held_out(scene):
            text = caption(scene, rng) if as_typed else plain_caption(scene, rng)
            cases.append(Case(set_name=set_name, prompt=text, scene=scene))
    return cases


def _random_scene(set_name: str, rng: random.Random) -> Scene:
    if set_name == "single":
        return random_single(rng, place_chance=1.0)
    return random_related(rng) if set_name == "pair" else random_placed_pair(rng)


def _score(case: Case, image: np.ndarray) -> dict[str, bool]:
    return score(case.scene, image)


def judge(
    cases: Sequence[Case], images: Sequence[Image.Image], seeds: Sequence[int] | None = None, *, workers: int = 1
) -> dict[str, Any]:
    """The share of images that show what was asked, by set and attribute, and every failure.

    `images[i]` answers `cases[i]`; ask with several seeds by repeating the cases. JSON-able. `workers` processes check.
    ValueError: lengths differ.
    """
    if len(cases) != len(images) or (seeds is not None and len(seeds) != len(cases)):
        raise ValueError(f"{len(cases)} cases, {len(images)} images, {len(seeds or cases)} seeds: must be as many")
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            scores = list(pool.map(_score, cases, arrays, chunksize=8))
    else:
        scores = list(map(_score, cases, arrays))
    failures = [
        {
            "set": case.set_name,
            "prompt": case.prompt,
            "seed": None if seeds is None else seeds[index],
            "wrong": [name for name, right in result.items() if not right and name != "all"],
        }
        for index, (case, result) in enumerate(zip(cases, scores, strict=True))
        if not result["all"]
    ]
    sets = {name: _summary([r for c, r in zip(cases, scores, strict=True) if c.set_name == name]) for name in SETS}
    relations = sorted({case.scene.relation for case in cases if case.scene.relation})
    by_relation = {
        name: _summary([r for c, r in zip(cases, scores, strict=True) if c.scene.relation == name])["all"]
        for name in relations
    }
    return {
        "images": len(images),
        "distinct_prompts": len({case.prompt for case in cases}),
        "accuracy": {name: summary for name, summary in sets.items() if summary["images"]},
        "pair_all_by_relation": by_relation,
        "failures": failures,
    }


def _summary(scores: list[dict[str, bool]]) -> dict[str, Any]:
    if not scores:
        return {"images": 0}
    shares = {name: round(sum(result[name] for result in scores) / len(scores), 4) for name in scores[0]}
    return {"images": len(scores), **shares}


def contact_sheet(
    images: Sequence[Image.Image], labels: Sequence[str], *, columns: int = 6, side: int = 192
) -> Image.Image:
    """The images in a grid, each `side` pixels wide, with its label (two lines at most) beneath."""
    gap, text = 12, 30
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (gap + columns * (side + gap), gap + rows * (side + text + gap)), (236, 237, 240))
    pen = ImageDraw.Draw(sheet)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = gap + index % columns * (side + gap), gap + index // columns * (side + text + gap)
        sheet.paste(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (x, y))
        pen.multiline_text((x + 1, y + side + 3), _two_lines(pen, label, side), fill=(50, 50, 56), spacing=1)
    return sheet


def _two_lines(pen: ImageDraw.ImageDraw, label: str, width: int) -> str:
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines[:2])
