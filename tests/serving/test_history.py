"""The server's history: the images of a run that draws are in its record, and nothing outside of a run's folder is."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from fluxrun.config.composition import compose
from fluxrun.config.prompts import Job
from fluxrun.record.folder import RunFolder
from fluxrun.serving.history import History

RUN = "20261129-120000-0123abcd"


def save(folder: RunFolder, index: int) -> None:
    job = Job("a red circle", index, line=index + 1, index=index)
    folder.save(job, Image.new("RGB", (16, 16)), "png", finite=True, constant=True)


def test_the_images_of_a_run_that_draws(tmp_path: Path) -> None:
    history = History(tmp_path)
    folder = RunFolder(tmp_path / RUN, compose([]).source)
    assert [found.images for found in history.search("")] == [[]]
    for index in range(2):
        save(folder, index)
        record = history.record(RUN)
        assert record is not None
        paths = [image["path"] for image in record["images"]]
        assert paths == [f"images/{n:03d}_seed{n}.png" for n in range(index + 1)]
        assert [found.images for found in history.search("circle")] == [paths], "not what was known before"
    assert history.file(RUN, "images.jsonl")
    folder.finish("completed")
    assert [(found.state, len(found.images)) for found in history.search("")] == [("completed", 2)]
    assert history.file(RUN, "images.jsonl") is None


def test_a_list_of_images_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / RUN, compose([]).source)
    save(folder, 0)
    folder.write()
    journal = tmp_path / RUN / "images.jsonl"
    journal.rename(tmp_path / "elsewhere.jsonl")
    journal.symlink_to(tmp_path / "elsewhere.jsonl")
    record = History(tmp_path).record(RUN)
    assert record is not None
    assert record["images"] == []
    assert History(tmp_path).file(RUN, "images.jsonl") is None
