"""Pictures written beside drawing: in order, all of them, and no error is lost."""

from __future__ import annotations

import logging
import os
import threading
import time

import pytest
from PIL import Image

from fluxrun.config.composition import compose
from fluxrun.config.prompts import Job
from fluxrun.drawing.saving import MOST_WAITING, Saver
from fluxrun.errors import Interrupted
from fluxrun.record import folder as record_folder
from fluxrun.record.folder import RunFolder, read_record

PICTURE = Image.new("RGB", (16, 16), "red")


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run", compose([]).source)


def hold_back(monkeypatch):
    """No picture is written before the returned event is set."""
    go, write = threading.Event(), record_folder.save_image

    def slow(*arguments):
        assert go.wait(30)
        return write(*arguments)

    monkeypatch.setattr(record_folder, "save_image", slow)
    return go


def disk_full(*_):
    raise OSError("disk full")


def test_pictures_wait_beside_drawing_and_come_in_order(folder, monkeypatch):
    go = hold_back(monkeypatch)
    with Saver(folder, "png", beside=True) as saver:
        for seed in range(MOST_WAITING):
            saver.save(PICTURE, Job("a star", seed, index=seed), "drawn")
        assert folder.record.images == []
        go.set()
    record = read_record(folder.path)
    assert [image.seed for image in record.images] == list(range(MOST_WAITING))
    assert all((folder.path / image.path).exists() for image in record.images)
    assert len(record.timings.save_s) == MOST_WAITING


def test_a_picture_is_in_the_record_as_soon_as_it_is_on_disk(folder):
    """Whatever kills the run while the next one is drawn."""
    with Saver(folder, "png", beside=True) as saver:
        saver.save(PICTURE, Job("a star", 0), "drawn")
        until = time.monotonic() + 30
        while not (known := read_record(folder.path).images) and time.monotonic() < until:
            time.sleep(0.01)
        assert [image.path for image in known] == ["images/000_seed0.png"]


def abandoned(folder, go):
    """What a second signal does while a picture is written and another one waits, but for ending the process."""
    with Saver(folder, "png", beside=True) as saver:
        saver.save(PICTURE, Job("a star", 0), "drawn")
        saver.save(PICTURE, Job("a star", 1, index=1), "drawn")
        threading.Timer(0.2, go.set).start()
        folder.abandon(Interrupted("interrupted"), "denoise")
        assert os.listdir(folder.path / "images") == ["000_seed0.png"]


def test_a_second_signal_finishes_the_picture_that_is_being_written(folder, monkeypatch):
    with pytest.raises(Interrupted, match="the run has ended"):
        abandoned(folder, hold_back(monkeypatch))
    record = read_record(folder.path)
    assert record.status == "interrupted"
    assert [image.seed for image in record.images] == [0]


def test_a_slow_disk_holds_drawing_up(folder, monkeypatch):
    go = hold_back(monkeypatch)
    threading.Timer(0.2, go.set).start()
    with Saver(folder, "png", beside=True) as saver:
        for seed in range(MOST_WAITING + 1):
            saver.save(PICTURE, Job("a star", seed, index=seed), "drawn")
        assert go.is_set()
        assert folder.record.images


def test_not_beside_means_now(folder):
    with Saver(folder, "png", beside=False) as saver:
        saver.save(PICTURE, Job("a star", 0), "drawn")
        assert [image.path for image in folder.record.images] == ["images/000_seed0.png"]


def save_then_raise(folder, error=None, after=lambda: None):
    with Saver(folder, "png", beside=True) as saver:
        saver.save(PICTURE, Job("a star", 0), "drawn")
        after()
        saver.save(PICTURE, Job("a star", 1, index=1), "drawn")
        if error is not None:
            raise error


def test_what_is_drawn_is_kept_when_the_run_is_interrupted(folder):
    with pytest.raises(KeyboardInterrupt):
        save_then_raise(folder, KeyboardInterrupt())
    assert len(read_record(folder.path).images) == 2


def test_a_full_disk_is_an_error_at_the_end(folder, monkeypatch):
    go = hold_back(monkeypatch)

    def fill():
        monkeypatch.setattr(record_folder, "save_image", disk_full)
        threading.Timer(0.2, go.set).start()

    with pytest.raises(OSError, match="disk full"):
        save_then_raise(folder, after=fill)
    assert len(read_record(folder.path).images) == 1


def test_a_full_disk_does_not_hide_why_the_run_ended(folder, monkeypatch, caplog):
    go = hold_back(monkeypatch)

    def fill():
        monkeypatch.setattr(record_folder, "save_image", disk_full)
        threading.Timer(0.2, go.set).start()

    with pytest.raises(RuntimeError, match="the step failed"):
        save_then_raise(folder, RuntimeError("the step failed"), after=fill)
    assert len(folder.record.images) == 1
    lost = [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert lost == ["a finished picture could not be saved: disk full"]
