"""The training side draws what the Pillow side draws, and prompts as the pipeline words them."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from fluxrun.shapes.captions import random_scene
from fluxrun.shapes.checker import score
from fluxrun.shapes.scenes import Object, Scene, draw

ROOT = Path(__file__).parents[2]
torch = pytest.importorskip("torch")


@pytest.fixture
def training_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "training"), *sys.path])


@pytest.mark.slow
@pytest.mark.usefixtures("training_path")
def test_distance_field_drawings_agree_with_pillow() -> None:
    from render import distance_table, from_rows, render, scene_rows

    table = distance_table(torch.device("cpu"))
    for seed in range(12):
        scene = random_scene(random.Random(seed))
        expected = np.asarray(draw(scene)).astype(float)
        rows = torch.tensor(scene_rows(scene))[None]
        drawn = render(from_rows(rows), table)[0].permute(1, 2, 0).add(1).mul(127.5).round().numpy()
        assert np.abs(expected - drawn).mean() < 1.0
        assert score(scene, drawn.astype(np.uint8))["all"]


@pytest.mark.slow
@pytest.mark.usefixtures("training_path")
def test_a_stroke_leaves_the_inside_empty() -> None:
    from render import distance_table, from_rows, render, scene_rows

    scene = Scene(objects=(Object(colour="red", shape="circle", size="large"),))
    rows = from_rows(torch.tensor(scene_rows(scene))[None])
    table = distance_table(torch.device("cpu"))
    whole, outline = render(rows, table)[0], render(rows, table, stroke=7.0)[0]
    assert torch.equal(outline[:, 128, 128], outline[:, 0, 0])
    edge = 128 + int(0.28 * 256) - 3
    assert torch.equal(outline[:, 128, edge], whole[:, 128, 128])
    assert torch.equal(outline[:, 128, edge + 10 :], whole[:, 128, edge + 10 :])


@pytest.mark.usefixtures("training_path")
def test_training_words_prompts_as_the_chat_template_does() -> None:
    from make_tokenizer import PROMPT_FORMAT
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(ROOT / "models" / "shapes" / "tokenizer")
    messages = [{"role": "user", "content": "a red circle"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert text == PROMPT_FORMAT.format(prompt="a red circle")
    odd = "é 😀 ${HOME}"
    assert odd in tokenizer.decode(tokenizer(odd)["input_ids"])
