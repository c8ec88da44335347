"""Texts that are encoded behind the picture before: the same pixels, each time told with its own picture."""

from __future__ import annotations

import signal

import pytest
from helpers import draw, hashes, small

from fluxrun.drawing import ahead
from fluxrun.errors import Interrupted
from fluxrun.pipeline.prompt_encoder import PromptEncoder
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.process.clock import DeviceClock
from fluxrun.record.folder import read_record
from fluxrun.runner import build

TEXTS = ["a red circle", "a blue square", "a green star", "a triangle", "a red circle"]


@pytest.fixture(scope="module")
def bench():
    with SessionPool() as pool:
        yield pool


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    return ["vae=fast", "memory=resident", f"prompts_file={file}"]


@pytest.fixture
def begun(monkeypatch):
    """A device that takes work ahead, as a GPU does, and which texts it was given like that."""
    given: list[list[str]] = []
    encode = PromptEncoder.encode_ahead

    def noted(self, texts, *more):
        given.append(list(texts))
        encode(self, texts, *more)

    monkeypatch.setattr(ahead, "takes_work_ahead", lambda device: True)
    monkeypatch.setattr(PromptEncoder, "encode_ahead", noted)
    return given


def parts(record, name):
    return sorted((span.start_s, span.end_s) for span in record.spans if span.name == name)


def test_the_same_pictures_and_a_time_for_each_text(tmp_path, prompts, bench, begun, monkeypatch):
    record = draw(tmp_path / "ahead", *prompts, pool=bench)
    assert begun == [[text] for text in TEXTS[2:]], "the first picture's call may fall back: nothing goes beside it"
    again = draw(tmp_path / "warm", *prompts, pool=bench)
    assert begun[len(TEXTS) - 2 :] == [[text] for text in TEXTS[1:]]
    monkeypatch.undo()
    plain = draw(tmp_path / "plain", *prompts, pool=bench)
    assert hashes(record) == hashes(again) == hashes(plain)
    for one in (record, again, plain):
        assert len(one.timings.text_encode_s) == len(parts(one, "encode")) == len(set(TEXTS))
    decoded = parts(again, "decode")
    assert [text[0] < end for text, (_, end) in zip(parts(again, "encode")[1:], decoded, strict=False)] == [True] * 3
    assert all(text[0] > decoded[0][1] for text in parts(plain, "encode")[1:])


@pytest.mark.parametrize("more", ["measure.repeats=2", "vae=full"])
def test_nothing_goes_ahead_where_it_would_disturb_or_cannot_be(tmp_path, prompts, bench, begun, more):
    draw(tmp_path / "run", *prompts, more, pool=bench)
    assert begun == []


def test_a_text_that_cannot_go_ahead_is_encoded_in_its_turn(tmp_path, prompts, bench, begun, monkeypatch):
    plain = draw(tmp_path / "plain", *prompts, pool=bench)

    def fail(self, texts, *more):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PromptEncoder, "encode_ahead", fail)
    record = draw(tmp_path / "run", *prompts, pool=bench)
    assert record.status == "completed"
    assert hashes(record) == hashes(plain)


def test_an_interrupt_beside_a_text_leaves_the_picture_that_was_drawn(tmp_path, prompts, bench, begun, monkeypatch):
    draw(tmp_path / "warm", *prompts, pool=bench)
    encode = PromptEncoder.encode_ahead

    def interrupted(self, texts, *more):
        signal.raise_signal(signal.SIGINT)
        encode(self, texts, *more)

    monkeypatch.setattr(PromptEncoder, "encode_ahead", interrupted)
    with pytest.raises(Interrupted):
        draw(tmp_path / "run", *prompts, pool=bench)
    record = read_record(tmp_path / "run")
    assert (record.status, len(record.images)) == ("interrupted", 1)
    monkeypatch.setattr(PromptEncoder, "encode_ahead", encode)
    assert hashes(draw(tmp_path / "next", *prompts, pool=bench)) == hashes(read_record(tmp_path / "warm"))


def test_the_times_of_two_batches_of_texts_in_one_call_are_told():
    session = build(small("vae=fast", "memory=resident", "model.distilled=false", "guidance=4", "negative_prompt=fog"))
    pipeline, clock, encoder = session.pipeline, DeviceClock("cpu"), session.prompts
    told: list[float] = []
    encoder.begin([*TEXTS, "fog"], lambda: None, told.append)
    encoder.encode_ahead(TEXTS[:1], pipeline, clock)
    encoder.of(TEXTS[:1], pipeline, clock)
    encoder.of(["fog"], pipeline, clock)
    encoder.tell_times()
    assert len(told) == 2
    session.close()


def test_what_went_ahead_is_dropped_when_the_pipeline_is_built_anew():
    session = build(small("vae=fast", "memory=resident"))
    pipeline, clock, encoder = session.pipeline, DeviceClock("cpu"), session.prompts
    told: list[float] = []
    encoder.begin(TEXTS, lambda: None, told.append)
    encoder.of(TEXTS[:1], pipeline, clock)
    encoder.encode_ahead(TEXTS[:2], pipeline, clock)
    encoder.tell_times()
    assert (len(told), encoder.has_begun_the_next) == (1, True)
    encoder.forget_ahead()
    assert not encoder.has_begun_the_next
    encoder.of(TEXTS[:1], pipeline, clock)
    encoder.tell_times()
    assert len(told) == 1, "the text of the call before was known already, and stays"
    encoder.of(TEXTS[1:2], pipeline, clock)
    encoder.tell_times()
    assert len(told) == 2, "the other one is encoded again"
    session.close()
