"""Sentences for scenes, scenes from sentences, random scenes, and the combinations that training never sees."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from collections.abc import Iterable

from fluxrun.shapes.scenes import Object, Scene, mirrored
from fluxrun.shapes.vocabulary import (
    BESIDE_PHRASES,
    COLOUR_WORDS,
    COLOURS,
    CONTAINERS,
    OPPOSITE,
    PLACE_PHRASES,
    PLACES,
    RELATION_PHRASES,
    SHAPE_WORDS,
    SHAPES,
    SIZE_WORDS,
    SIZES,
    place_direction,
)

HELD_OUT_SHARE = 0.15
STYLE_WORDS = (
    "a picture of",
    "an image of",
    "a drawing of",
    "please draw",
    "draw",
    "a simple flat illustration of",
    "there is",
    "show me",
    "I want",
    "a clean vector graphic of",
    "a photo of",
    "a minimalist poster of",
)
STYLE_TAILS = (
    "flat design",
    "clean edges",
    "minimalist",
    "vector art",
    "high quality",
    "simple",
    "flat colours",
    "4k, highly detailed",
    "beautiful",
    "geometric art",
    "no shadows",
    "please",
    "professional illustration",
)


# -- the split -------------------------------------------------------------------------------------------------------


def _hashed_share(*words: object) -> float:
    digest = hashlib.sha256("|".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def is_held_out(scene: Scene) -> bool:
    """Whether training must never see this scene.

    A single object, or one with a place of its own in a pair, is judged by (colour, shape, place); a related pair by
    both objects' colours and shapes and the relation, told from either side.
    """
    if scene.relation is None:
        return any(
            _hashed_share(thing.colour, thing.shape, thing.place or "center") < HELD_OUT_SHARE
            for thing in scene.objects
        )
    if scene.relation in ("right of", "below"):
        scene = mirrored(scene)
    first, second = scene.objects
    key = (first.colour, first.shape, scene.relation, second.colour, second.shape)
    return _hashed_share(*key) < HELD_OUT_SHARE


# -- random scenes ---------------------------------------------------------------------------------------------------


def _maybe(rng: random.Random, chance: float, choices: Iterable[str]) -> str | None:
    return rng.choice(list(choices)) if rng.random() < chance else None


def _background(rng: random.Random, objects: tuple[Object, ...], chance: float) -> str | None:
    used = {thing.colour for thing in objects}
    return _maybe(rng, chance, [colour for colour in COLOURS if colour not in used])


def random_single(rng: random.Random, *, place_chance: float = 0.75) -> Scene:
    """One object; size, place and background are said or left open at random."""
    thing = Object(
        colour=rng.choice(list(COLOURS)),
        shape=rng.choice(SHAPES),
        size=_maybe(rng, 0.6, SIZES),
        place=_maybe(rng, place_chance, PLACES),
    )
    return Scene(objects=(thing,), background=_background(rng, (thing,), 0.5))


def random_related(rng: random.Random) -> Scene:
    """Two objects with one of the five relations."""
    relation = rng.choice(list(RELATION_PHRASES))
    colours = [rng.choice(list(COLOURS)) for _ in range(2)]
    if relation == "inside":
        colours = rng.sample(list(COLOURS), 2)
        sizes: list[str | None] = [None, None]
    else:
        sizes = [_maybe(rng, 0.45, SIZES) for _ in range(2)]
    shapes = (rng.choice(SHAPES), rng.choice(CONTAINERS if relation == "inside" else SHAPES))
    objects = tuple(
        Object(colour=colour, shape=shape, size=size)
        for colour, shape, size in zip(colours, shapes, sizes, strict=True)
    )
    return Scene(objects=objects, relation=relation, background=_background(rng, objects, 0.4))


def far_apart(first: str, second: str) -> bool:
    """Whether two places lie on opposite sides, so that objects there cannot touch."""
    a, b = place_direction(first), place_direction(second)
    return abs(a[0] - b[0]) == 2 or abs(a[1] - b[1]) == 2


def random_placed_pair(rng: random.Random) -> Scene:
    """Two objects, each with a place of its own, on opposite sides of the picture."""
    first = rng.choice([place for place in PLACES if place != "center"])
    second = rng.choice([place for place in PLACES if far_apart(first, place)])
    objects = tuple(
        Object(colour=rng.choice(list(COLOURS)), shape=rng.choice(SHAPES), size=_maybe(rng, 0.3, SIZES), place=place)
        for place in (first, second)
    )
    return Scene(objects=objects, background=_background(rng, objects, 0.4))


def random_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """A scene from one side of the split: 45 % singles, 40 % related pairs, 15 % placed pairs."""
    make = rng.choices((random_single, random_related, random_placed_pair), weights=(45, 40, 15))[0]
    while True:
        scene = make(rng)
        if is_held_out(scene) == held_out:
            return scene


# -- scene to sentence -----------------------------------------------------------------------------------------------


def _pick(rng: random.Random, phrases: tuple[str, ...]) -> str:
    """The commonest phrase half of the time, else any."""
    return phrases[0] if rng.random() < 0.5 else rng.choice(phrases)


def _article(phrase: str, rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.15:
        return phrase
    if roll < 0.22:
        return f"the {phrase}"
    if roll < 0.25:
        return f"one {phrase}"
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _noun(thing: Object, rng: random.Random) -> str:
    colour, shape = _pick(rng, COLOUR_WORDS[thing.colour]), _pick(rng, SHAPE_WORDS[thing.shape])
    size = _pick(rng, SIZE_WORDS[thing.size]) if thing.size else None
    roll = rng.random()
    if size and roll < 0.12:
        return _article(f"{colour} {size} {shape}", rng)
    if roll < 0.17:
        sized = f"{size} {shape}" if size else shape
        return f"{_article(sized, rng)} {rng.choice(('that is', 'which is', 'in', 'coloured'))} {colour}"
    if roll < 0.20:
        return ", ".join(filter(None, (shape, colour, size)))
    if size and roll < 0.26:
        return f"{_article(f'{colour} {shape}', rng)} that is {size}"
    return _article(f"{size} {colour} {shape}" if size else f"{colour} {shape}", rng)


def _placed_noun(thing: Object, rng: random.Random, *, allow_front: bool = True) -> str:
    noun = _noun(thing, rng)
    if thing.place is None:
        return noun
    place = _pick(rng, PLACE_PHRASES[thing.place])
    if allow_front and rng.random() < 0.15:
        return f"{place}{rng.choice((', ', ': ', ' '))}{noun}"
    return f"{noun}{rng.choice((' ', ' ', ' ', ', '))}{place}"


def _relation_sentence(scene: Scene, rng: random.Random) -> str:
    first, second = (_noun(thing, rng) for thing in scene.objects)
    relation = scene.relation or "left of"
    roll = rng.random()
    if relation == "inside" and roll < 0.25:
        return rng.choice(
            (f"{second} containing {first}", f"{second} with {first} inside", f"{second} with {first} in it")
        )
    if relation == "left of" and roll < 0.3:
        return f"{first} {rng.choice(BESIDE_PHRASES)} {second}"
    phrase = _pick(rng, RELATION_PHRASES[relation])
    if phrase != "in" and roll > 0.92:
        return f"{phrase} {second}, {first}"
    return f"{first} {rng.choice(('', '', '', '', 'is '))}{phrase} {second}"


def _with_background(sentence: str, background: str | None, rng: random.Random) -> str:
    if background is None:
        return sentence
    colour = _pick(rng, COLOUR_WORDS[background])
    article = "an" if colour[0] in "aeiou" else "a"
    roll = rng.random()
    if roll < 0.15:
        return f"on {article} {colour} background, {sentence}"
    if roll < 0.22:
        return f"{article} {colour} background with {sentence}"
    if roll < 0.30:
        return f"{sentence}, {colour} background"
    if roll < 0.36:
        return f"{sentence}, the background is {colour}"
    link = rng.choice((" on", " on", " on", ", on", " against", " over", " with"))
    return f"{sentence}{link} {rng.choice((article, article, article, 'the'))} {colour} background"


def plain_caption(scene: Scene, rng: random.Random) -> str:
    """One sentence in the grammar: lower case, no decoration."""
    if scene.relation is not None:
        told = mirrored(scene) if scene.relation in OPPOSITE and rng.random() < 0.3 else scene
        sentence = _relation_sentence(told, rng)
    elif len(scene.objects) == 2:
        joint = rng.choice((" and ", " and ", ", ", "; ", " with "))
        order = rng.sample(scene.objects, 2)
        sentence = joint.join(_placed_noun(thing, rng, allow_front=False) for thing in order)
    else:
        sentence = _placed_noun(scene.objects[0], rng)
    return _with_background(sentence, scene.background, rng)


def decorate(sentence: str, rng: random.Random) -> str:
    """The same sentence as people type it: capitals, a full stop, a few words around it."""
    if rng.random() < 0.12:
        sentence = f"{rng.choice(STYLE_WORDS)} {sentence}"
    if rng.random() < 0.10:
        sentence = f"{sentence}, {', '.join(rng.sample(STYLE_TAILS, rng.randint(1, 2)))}"
    roll = rng.random()
    if roll < 0.12:
        sentence = sentence[0].upper() + sentence[1:]
    elif roll < 0.15:
        sentence = sentence.upper()
    elif roll < 0.18:
        sentence = sentence.title()
    if rng.random() < 0.08:
        sentence = sentence.replace(",", "")
    if rng.random() < 0.12:
        sentence += rng.choice((".", ".", "!", " "))
    return sentence


def caption(scene: Scene, rng: random.Random) -> str:
    """One way of saying the scene, as a person might type it."""
    return decorate(plain_caption(scene, rng), rng)


# -- sentence to scene -----------------------------------------------------------------------------------------------


def _lookup(table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {phrase: name for name, phrases in table.items() for phrase in phrases}


_COLOUR_OF, _SHAPE_OF, _SIZE_OF = _lookup(COLOUR_WORDS), _lookup(SHAPE_WORDS), _lookup(SIZE_WORDS)


def _any_of(phrases: Iterable[str]) -> str:
    return "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True))


_BACKGROUND = re.compile(
    rf"(?:\b(?:on|over|against|with)\s+)?(?:\b(?:an?|the)\s+)?\b({_any_of(_COLOUR_OF)})\s+(?:background|backdrop)\b(?:\s+with\b)?"
    rf"|\b(?:the\s+)?background\s+(?:is|in)\s+({_any_of(_COLOUR_OF)})\b"
)
_CONTAINS = re.compile(r"(.+?)\b(?:containing\b(.+)|with\b(.+?)\b(?:in it\b.*|inside\s*(?:,.*)?))")
_PLACE = re.compile(
    r"\b(?P<row>top|upper|bottom|lower)\b(?:[\s-]+(?P<column>left|right)\b)?|\b(?P<side>left|right)\b"
    r"|\b(?P<middle>center|centre|middle|centered)\b"
)
_RELATIONS = [
    ("left of", r"(?:to |on |at )?(?:the )?left (?:side )?of"),
    ("right of", r"(?:to |on |at )?(?:the )?right (?:side )?of"),
    ("above", r"above|over|on top of"),
    ("below", r"below|underneath|under|beneath"),
    ("inside", r"inside of|inside|within|in (?=(?:an? |the |one )?(?:[\w-]+ ){1,2}(?:" + _any_of(_SHAPE_OF) + r")\b)"),
]


def _find(table: dict[str, str], text: str) -> list[str]:
    return [table[hit] for hit in re.findall(rf"\b(?:{_any_of(table)})\b", text)]


def _parse_place(text: str) -> tuple[str | None, bool]:
    """(place or None, whether the text is unambiguous)."""
    found = set()
    for hit in _PLACE.finditer(text):
        row = {"upper": "top", "lower": "bottom"}.get(hit["row"], hit["row"])
        found.add(" ".join(filter(None, (row, hit["column"] or hit["side"]))) or "center")
    found = found - {"center"} if len(found) > 1 else found  # "in the top center"
    return (next(iter(found)) if found else None), len(found) <= 1


def _parse_object(text: str) -> Object | None:
    shapes = _find(_SHAPE_OF, text)
    rest = re.sub(rf"\b(?:{_any_of(_SHAPE_OF)})\b", " ", text)
    colours, sizes = _find(_COLOUR_OF, rest), _find(_SIZE_OF, rest)
    place, clear = _parse_place(rest)
    if len(shapes) != 1 or len(colours) != 1 or len(sizes) > 1 or not clear:
        return None
    return Object(colour=colours[0], shape=shapes[0], size=sizes[0] if sizes else None, place=place)


def _split_relation(text: str) -> tuple[str, str, str] | None:
    """(first, relation, second) of the first relation phrase that has a shape behind it."""
    shapes = _any_of(_SHAPE_OF)
    for name, pattern in _RELATIONS:
        for hit in re.finditer(rf"\b(?:{pattern})", text):
            before, after = text[: hit.start()], text[hit.end() :]
            if len(re.findall(rf"\b(?:{shapes})\b", before)) == 1 and len(re.findall(rf"\b(?:{shapes})\b", after)) == 1:
                return before, name, after
            if not re.search(rf"\b(?:{shapes})\b", before) and "," in after:
                second, first = after.split(",", 1)
                return first, name, second
    return None


def _parse_pair(text: str) -> tuple[tuple[Object | None, ...], str | None]:
    if hit := _CONTAINS.fullmatch(text):
        return (_parse_object(hit[2] or hit[3]), _parse_object(hit[1])), "inside"
    if split := _split_relation(text):
        return (_parse_object(split[0]), _parse_object(split[2])), split[1]
    halves = re.split(r"\b(?:next to|beside|near|and|with)\b|[;,]", text)
    halves = [half for half in halves if half.strip()]
    while len(halves) > 2 and len(_find(_SHAPE_OF, halves[0])) == 0:
        halves[:2] = [f"{halves[0]} {halves[1]}"]
    groups: list[str] = []
    for half in halves:  # a piece without a shape ("in the top left corner") belongs to the object before it
        if groups and not _find(_SHAPE_OF, half):
            groups[-1] += f" {half}"
        else:
            groups.append(half)
    if len(groups) != 2:
        return (None,), None
    return (_parse_object(groups[0]), _parse_object(groups[1])), None


def parse(prompt: str) -> Scene | None:
    """The scene a prompt asks for; None where it is not in the grammar (or not clearly so).

    Words it does not know are skipped. Two objects without a relation or places stand side by side, the first on the
    left, as they are drawn.
    """
    text = re.sub(r"[.!?]", " ", prompt.lower()).strip()
    background = _BACKGROUND.search(text)
    if background:
        text = f"{text[: background.start()]} {text[background.end() :]}"
    text = re.sub(r"\s+", " ", text).strip(" ,")
    things: tuple[Object | None, ...]
    things, relation = ((_parse_object(text),), None) if len(_find(_SHAPE_OF, text)) == 1 else _parse_pair(text)
    objects = tuple(thing for thing in things if thing is not None)
    if len(objects) != len(things) or not objects:
        return None
    if len(objects) == 2 and relation is None and all(thing.place is None for thing in objects):
        relation = "left of"
    if relation is not None:
        objects = tuple(dataclasses.replace(thing, place=None) for thing in objects)
    hit = next(filter(None, background.groups())) if background else None
    return Scene(objects=objects, relation=relation, background=_COLOUR_OF[hit] if hit else None)


def same_scene(first: Scene, second: Scene) -> bool:
    """Whether two scenes ask for the same picture, told from either side or in either order."""
    if first == second or (first.relation in OPPOSITE and mirrored(first) == second):
        return True
    if first.relation is None and second.relation is None and first.background == second.background:
        return sorted(map(repr, first.objects)) == sorted(map(repr, second.objects))
    return False
