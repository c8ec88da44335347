"""memory=staged over several runs: every prompt is encoded once, and nothing is loaded twice for it."""

from __future__ import annotations

import pytest
from helpers import draw, hashes

from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.sweep.grid import prompts_beside

STAGED = ("memory=staged", "vae=full")


@pytest.fixture
def bench():
    with SessionPool() as pool:
        yield pool


def test_a_sweep_over_seeds_and_known_prompts_loads_nothing_again(bench, tmp_path):
    bench.upcoming = ["a red circle", "a blue square"]
    first = draw(tmp_path / "0", *STAGED, "prompt=a red circle", pool=bench)
    again = draw(tmp_path / "1", *STAGED, "prompt=a red circle", "seed=1", "num_images=2", pool=bench)
    other = draw(tmp_path / "2", *STAGED, "prompt=a blue square", pool=bench)
    assert bench.loads == ["first load", "first load"]  # the text encoder, then the rest
    facts = [record.options["memory"].facts["prompts_encoded_first"] for record in (first, again, other)]
    assert facts == [2, 0, 0]
    assert [r.options["memory"].facts["prompts_known_before"] for r in (first, again, other)] == [0, 1, 1]
    alone = draw(tmp_path / "alone", *STAGED, "prompt=a blue square")
    assert hashes(other) == hashes(alone)
    # Another option makes a new pipeline over the same weights: the text encoder is not needed for that.
    draw(tmp_path / "3", *STAGED, "prompt=a red circle", "attention=math", pool=bench)
    assert len(bench.loads) == 2


def test_a_prompt_nobody_announced_is_encoded_when_it_comes(bench, tmp_path):
    draw(tmp_path / "0", *STAGED, "prompt=a red circle", pool=bench)
    record = draw(tmp_path / "1", *STAGED, "prompt=a blue square", pool=bench)
    assert record.options["memory"].facts["prompts_encoded_first"] == 1
    assert len(bench.loads) == 4
    assert hashes(record) == hashes(draw(tmp_path / "alone", *STAGED, "prompt=a blue square"))


def test_the_negative_prompt_counts_as_one(bench, tmp_path):
    base = (*STAGED, "model.distilled=false", "guidance=4", "prompt=a red circle")
    first = draw(tmp_path / "0", *base, pool=bench)
    assert first.options["memory"].facts["prompts_encoded_first"] == 2
    second = draw(tmp_path / "1", *base, "negative_prompt=blurred", pool=bench)
    assert second.options["memory"].facts["prompts_encoded_first"] == 1
    assert hashes(first) != hashes(second)


def test_the_prompts_of_a_sweeps_other_jobs():
    jobs = [
        {"model": "a", "prompt": "one"}, {"model": "a", "prompt": ["two", "one"]}, {"model": "b", "prompt": "three"},
        {"model": "a", "prompt": "ignored", "prompts_file": "x.txt"}, {"model": "a", "prompt": None},
    ]  # fmt: skip
    assert prompts_beside(jobs[0], jobs) == ["one", "two"]
    assert prompts_beside({"model": "c"}, jobs) == []
