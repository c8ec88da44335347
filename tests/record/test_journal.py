"""images.jsonl: a run's images are in its record whatever ends it, at a cost that does not grow with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fluxrun.config.composition import compose
from fluxrun.config.prompts import Job
from fluxrun.errors import ConfigError
from fluxrun.record import folder as record_folder
from fluxrun.record import journal, writing
from fluxrun.record.folder import RunFolder, read_record, write_failure
from fluxrun.record.schema import RunRecord

PICTURE = Image.new("RGB", (16, 16), "red")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", compose([]).source)


def save(folder: RunFolder, *indices: int, prompt: str = "a star") -> None:
    """Save pictures as drawing does: their calls are in the record's timings first."""
    timings = folder.record.timings
    for index in indices:
        timings.text_encode_s.append(0.5)
        timings.step_s.append([1.0, float(index)])
        timings.denoise_s.append(1.0 + index)
        timings.decode_s.append(0.1)
        job = Job(prompt, index, line=index + 1, index=index)
        folder.save(job, PICTURE, "png", finite=True, constant=False)


def written(folder: RunFolder) -> dict[str, Any]:
    return dict(json.loads((folder.path / "run.json").read_text()))


def lines(folder: RunFolder) -> int:
    return (folder.path / "images.jsonl").read_text().count("\n")


def test_while_a_run_draws_its_images_are_beside_its_record(folder: RunFolder) -> None:
    save(folder, 0, 1)
    folder.write()
    short = written(folder)
    assert (short["images"], short["images_file"], short["images_saved"]) == ([], "images.jsonl", 2)
    assert short["timings"]["step_s"] == short["timings"]["save_s"] == []
    assert lines(folder) == 2
    record = read_record(folder.path)
    assert record.images == folder.record.images
    assert record.timings == folder.record.timings


def test_an_ended_run_with_few_images_lists_them_in_its_record_alone(folder: RunFolder) -> None:
    save(folder, 0, 1)
    folder.finish("completed")
    assert [image["seed"] for image in written(folder)["images"]] == [0, 1]
    assert not (folder.path / "images.jsonl").exists()
    assert read_record(folder.path) == folder.record


def test_one_with_many_keeps_them_beside_it(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MOST_LISTED", 2)
    monkeypatch.setattr(record_folder, "MOST_LISTED", 2)
    save(folder, 0, 2, 1)
    timings = folder.record.timings  # a repeat of the last image, after it was saved
    timings.step_s.append([7.0]), timings.denoise_s.append(7.0), timings.decode_s.append(7.0)
    folder.finish("completed")
    assert (written(folder)["images"], lines(folder)) == ([], 3)
    record = read_record(folder.path)
    assert [image.seed for image in record.images] == [0, 1, 2], "in the order in which they were asked for"
    assert (record.timings.denoise_s, record.timings.step_s[-1]) == ([1.0, 3.0, 2.0, 7.0], [7.0])
    assert (record.images_saved, len(record.timings.save_s)) == (3, 3)


@pytest.mark.parametrize("torn", [b'{"path": "images/0', '{"path": "é'.encode()[:-1], b"\xff\x00"])
def test_what_a_kill_has_left_of_a_line_is_no_line(folder: RunFolder, torn: bytes) -> None:
    save(folder, 0, 1)
    with (folder.path / "images.jsonl").open("ab") as file:
        file.write(torn)
    record = read_record(folder.path)
    assert (record.status, len(record.images)) == ("running", 2)
    assert write_failure(folder.path, {}, RuntimeError("SIGKILL"))
    closed = read_record(folder.path)
    assert (closed.status, closed.images, closed.error and closed.error.stage) == ("failed", record.images, "denoise")


def test_a_line_that_is_none_is_named(folder: RunFolder) -> None:
    save(folder, 0)
    with (folder.path / "images.jsonl").open("a") as file:
        file.write('{"path": 3}\n')
    with pytest.raises(ConfigError, match=r"images\.jsonl line 2 is no image of fluxrun's"):
        read_record(folder.path)
    (folder.path / "images.jsonl").unlink()
    folder.write()
    with pytest.raises(ConfigError, match=r"images\.jsonl is missing: it lists the run's 1 image"):
        read_record(folder.path)


def test_a_run_that_ends_while_it_is_read(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 0)
    folder.write()
    read = journal.read_lines

    def ended_meanwhile(path: Path) -> Any:
        folder.finish("completed")
        return read(path)

    monkeypatch.setattr(journal, "read_lines", ended_meanwhile)
    assert read_record(folder.path).status == "completed"


def test_a_disk_that_takes_no_list_any_more_keeps_the_lines(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reserve holds a few KiB: where the list of images does not fit, they stay in their lines."""
    save(folder, 0)
    append = journal.append
    monkeypatch.setattr(journal, "append", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save(folder, 1)
    monkeypatch.setattr(journal, "append", append)
    monkeypatch.setattr(writing, "json_text", lambda record: (_ for _ in ()).throw(OSError(28, "No space left")))
    monkeypatch.setattr(writing, "short_text", lambda record: journal.without_lines(record).model_dump_json())
    folder.finish("failed", OSError(28, "No space left on device"), "save")
    record = read_record(folder.path)
    assert (record.status, [image.seed for image in record.images], lines(folder)) == ("failed", [0, 1], 2)


def test_a_line_is_written_whole_or_not_at_all(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 0)
    before = (folder.path / "images.jsonl").read_bytes()
    line = journal.lines_of(folder.record)[0]
    opened = Path.open

    class Short:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Short:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            return int(self.file.write(data[:10]))

    monkeypatch.setattr(Path, "open", lambda *a, **k: Short(opened(*a, **k)))
    with pytest.raises(OSError, match="No space"):
        journal.append(folder.path, line)
    monkeypatch.undo()
    assert (folder.path / "images.jsonl").read_bytes() == before


def test_a_record_of_version_1_reads_as_before(folder: RunFolder) -> None:
    save(folder, 0, 1)
    folder.finish("completed")
    old = written(folder)
    for name in ("images_file", "images_asked", "images_saved", "resumed_at"):
        del old[name]
    for image in old["images"]:
        for name in ("line", "number", "file_bytes"):
            del image[name]
    (folder.path / "run.json").write_text(json.dumps({**old, "schema_version": 1, "status": "running"}))
    record = read_record(folder.path)
    assert (record.schema_version, [image.seed for image in record.images]) == (1, [0, 1])
    assert write_failure(folder.path, {}, RuntimeError("SIGKILL"))
    assert RunRecord.model_validate_json((folder.path / "run.json").read_text()).images == record.images


def test_the_cost_of_an_image_does_not_grow(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, counted: nothing but its own line is written with an image; run.json every ten seconds at most."""
    monkeypatch.setattr(record_folder, "AGAIN_S", 1e6)
    folder.write()
    stamp = os.stat(folder.path / "run.json").st_mtime_ns
    save(folder, 1)
    one = os.path.getsize(folder.path / "images.jsonl")
    save(folder, 2, 3, 4)
    assert os.path.getsize(folder.path / "images.jsonl") < 4 * one + 200, "digits of the times"
    assert os.stat(folder.path / "run.json").st_mtime_ns == stamp
    assert not folder.is_due
