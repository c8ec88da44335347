"""The pool that the denoiser trains on: scenes from the training side of the split, each with several captions."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
from make_tokenizer import ENGLISH, PROMPT_FORMAT
from render import scene_rows

from fluxrun.shapes.captions import caption, decorate, is_held_out, random_scene
from fluxrun.shapes.scenes import Object, Scene
from fluxrun.shapes.vocabulary import COLOUR_WORDS, COLOURS, SHAPE_WORDS, SHAPES

VAGUE_SHARE = 0.04


def _vague(rng: random.Random) -> tuple[Scene, list[str]]:
    """A single object in the centre, and sentences that leave its colour, its shape or everything open."""
    while True:
        thing = Object(colour=rng.choice([c for c in COLOURS if c != "white"]), shape=rng.choice(SHAPES))
        if not is_held_out(Scene(objects=(thing,))):
            break
    colour, shape = rng.choice(COLOUR_WORDS[thing.colour]), rng.choice(SHAPE_WORDS[thing.shape])
    kind = rng.random()
    if kind < 0.3:
        words = [shape, f"a {shape}", f"one {shape}", f"a {shape} in any colour"]
    elif kind < 0.6:
        words = [colour, f"something {colour}", f"a {colour} shape", f"a {colour} thing"]
    else:
        english = ENGLISH.split()
        words = ["", *(" ".join(rng.sample(english, rng.randint(1, 14))) for _ in range(4))]
    return Scene(objects=(thing,)), words


def _work(job: tuple[int, int, int, int, str]) -> tuple[np.ndarray, np.ndarray]:
    """(scene rows [n, 3, 5], token ids [n, captions, length]) of one chunk; runs in a worker process."""
    seed, count, captions, length, folder = job
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    rng, rows, texts = random.Random(seed), [], []
    for _ in range(count):
        if rng.random() < VAGUE_SHARE:
            scene, words = _vague(rng)
            texts += [decorate(text, rng) if (text := rng.choice(words)) else text for _ in range(captions)]
        else:
            scene = random_scene(rng)
            texts += [caption(scene, rng) for _ in range(captions)]
        rows.append(scene_rows(scene))
    ids = tokenizer(
        [PROMPT_FORMAT.format(prompt=text) for text in texts],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="np",
    )["input_ids"]
    return np.stack(rows), ids.astype(np.int16).reshape(count, captions, length)


def make_pool(scenes: int, captions: int, length: int, folder: str | Path, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(scene rows [scenes, 3, 5], token ids int16 [scenes, captions, length]), made on all cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    workers = max(1, (os.cpu_count() or 2) - 1)
    chunk = max(1, min(4096, scenes // workers))
    jobs = [
        (seed * 1_000_003 + start, min(chunk, scenes - start), captions, length, str(folder))
        for start in range(0, scenes, chunk)
    ]
    if len(jobs) == 1:
        return _work(jobs[0])
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(_work, jobs, chunksize=1)
    return np.concatenate([rows for rows, _ in parts]), np.concatenate([ids for _, ids in parts])
