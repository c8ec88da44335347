"""Weight files are brought into the page cache once, in the order of loading, and never more than fits."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fluxrun.process import spans
from fluxrun.weights import readahead
from fluxrun.weights.location import Located
from fluxrun.weights.readahead import read_ahead


@pytest.fixture
def located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Located:
    monkeypatch.setattr(readahead, "WORTH_BYTES", 2**20)
    monkeypatch.setattr(readahead, "CHUNK", 2**20)
    files = []
    for component in ("text_encoder", "transformer", "vae"):
        file = tmp_path / component / "model.safetensors"
        file.parent.mkdir()
        file.write_bytes(os.urandom(5 * 2**20 + 17))
        files.append(file)
    return Located("folder", str(tmp_path), "klein", True, folder=tmp_path, weight_files=tuple(files))


def drop_from_memory(located: Located) -> None:
    for file in located.weight_files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_memory(file: Path) -> bool:
    with file.open("rb") as stream:
        try:
            return os.preadv(stream.fileno(), [bytearray(2**20)], 4 * 2**20, os.RWF_NOWAIT) == 2**20
        except BlockingIOError:
            return False


def test_all_files_are_in_memory_afterwards(located: Located) -> None:
    drop_from_memory(located)
    if any(in_memory(file) for file in located.weight_files):
        pytest.skip("this file system keeps its files in memory (tmpfs)")
    reading = read_ahead(located.weight_files)
    assert reading is not None
    reading.wait()
    assert all(in_memory(file) for file in located.weight_files)
    assert reading.bytes > 0


def test_what_is_in_memory_is_not_read_again(located: Located) -> None:
    for file in located.weight_files:
        file.read_bytes()
    reading = read_ahead(located.weight_files)
    assert reading is not None
    reading.wait()
    assert reading.bytes == 0


def test_it_is_a_part_of_the_run(located: Located) -> None:
    spans.forget()
    reading = read_ahead(located.weight_files)
    assert reading is not None
    reading.wait()
    assert [name for name, _, _ in spans.recorded()] == ["read"]
    spans.forget()


def test_it_can_be_stopped(located: Located) -> None:
    reading = read_ahead(located.weight_files)
    assert reading is not None
    reading.stop()
    reading.wait()


def test_a_file_that_goes_away_is_left_to_who_loads_it(
    located: Located, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = replace(located, weight_files=located.weight_files[1:])
    reading = read_ahead(gone.weight_files)
    located.weight_files[2].unlink()
    assert reading is not None
    reading.wait()
    assert not recwarn.list  # pytest warns of an exception in a thread


def test_nothing_is_read_that_does_not_fit(located: Located, monkeypatch: pytest.MonkeyPatch) -> None:
    small = psutil.virtual_memory()._replace(available=16 * 2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    assert read_ahead(located.weight_files) is None


def test_a_small_model_is_not_worth_it(located: Located, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "WORTH_BYTES", 2**30)
    assert read_ahead(located.weight_files) is None
    assert read_ahead(()) is None
