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
from fluxrun.shapes.vocabulary import COLOURS

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


@pytest.mark.usefixtures("training_path")
def test_at_night_white_is_black_and_nothing_is_hidden() -> None:
    pytest.importorskip("peft")
    from render import from_rows, palette, scene_rows
    from train_lora import at_night

    def scene(colour: str, background: str | None) -> Scene:
        return Scene(objects=(Object(colour=colour, shape="circle", size="large"),), background=background)

    scenes = [scene("red", None), scene("black", None), scene("black", "red"), scene("white", "blue")]
    rows = np.stack([scene_rows(one) for one in scenes])
    night, ids = at_night(rows, np.arange(4)[:, None])
    assert ids[:, 0].tolist() == [0, 2, 3]
    grounds = from_rows(torch.tensor(night)).background
    names = [list(COLOURS)[int((palette() - ground).abs().sum(-1).argmin())] for ground in grounds]
    assert names == ["black", "red", "blue"]


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
