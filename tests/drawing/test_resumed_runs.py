"""A prompt set that was killed goes on with the images that are missing, and they are the ones of an unbroken run."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from helpers import SMALL, draw, fluxrun, hashes, small, start_fluxrun

from fluxrun.config.prompts import jobs_of
from fluxrun.config.shards import shards
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.record import asked, journal
from fluxrun.record.folder import RunFolder, read_record
from fluxrun.record.helping import Owner, SharedFolder, steady_steps, take_over
from fluxrun.record.picture import read_metadata
from fluxrun.record.writing import short_text
from fluxrun.runner import draw_part

LINES = "a cat\na dog\na cat\na fox\na hen\n"


def killed(folder: Path, *kept: int) -> None:
    """Make a completed run's folder what a SIGKILL leaves of one that had drawn the images with these numbers."""
    record = read_record(folder)
    record.images = [image for n, image in enumerate(record.images) if n in kept]
    record.status, record.finished_at, record.images_saved = "running", None, len(kept)
    journal.rewrite(folder, record)
    (folder / "run.json").write_text(short_text(record))
    for path in (folder / "images").iterdir():
        if int(path.name[:3]) not in kept:
            path.unlink()


def test_the_missing_images_are_those_of_an_unbroken_run(tmp_path: Path) -> None:
    """Batches too: one that lacks an image is drawn as a whole, as batching changes the rounding."""
    (tmp_path / "prompts.txt").write_text(LINES)
    how = [f"prompts_file={tmp_path / 'prompts.txt'}", "num_images=2", "batch_size=3"]
    with SessionPool() as pool:
        whole = draw(tmp_path / "run", *how, pool=pool)
        stays = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "images").iterdir()}
        killed(tmp_path / "run", 0, 1, 2, 4, 9)
        again = draw(tmp_path / "run", *how, pool=pool, resume=True)
        assert draw(tmp_path / "run", *how, pool=pool, resume=True).status == "completed", "nothing is left to draw"
    assert (again.status, again.run_id, len(again.images)) == ("completed", whole.run_id, 10)
    assert hashes(again) == hashes(whole)
    assert read_record(tmp_path / "run") == again
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "images").iterdir()}
    assert times.keys() == stays.keys()
    drawn = {name for name in stays if times[name] != stays[name]}
    assert {int(name[:3]) for name in drawn} == {3, 5, 6, 7, 8}, "what was there is not written again"
    assert not (tmp_path / "run" / asked.ASKED).exists()


def test_parts_drawn_elsewhere_are_the_images_of_an_unbroken_run(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(LINES)
    config = small(f"prompts_file={tmp_path / 'prompts.txt'}", "batch_size=2")
    jobs = jobs_of(config)
    with SessionPool() as pool:
        whole = draw(tmp_path / "whole", f"prompts_file={tmp_path / 'prompts.txt'}", "batch_size=2", pool=pool)
        folder = RunFolder(tmp_path / "run", config.source, ["fluxrun"])
        folder.begin(jobs, from_file=True)
        first, *others = shards(jobs, (), config.batch_size, workers=3)
        for shard in [*others, first]:
            shared = SharedFolder(Owner.of(folder), config.source, folder.add)
            take_over(folder, draw_part(config, shared, shard.jobs, pool=pool, quiet=True), shard.name)
        folder.add(journal.lines_of(folder.record)[0])  # told twice by a worker that was thought lost
        assert len(read_record(folder.path).images) == 5
        folder.record.timings.steady_step_s = steady_steps(folder.record)
        folder.finish("completed")
    record = read_record(folder.path)
    assert hashes(record) == hashes(whole)
    assert [image.identity for image in record.images] == [(line, 1) for line in range(1, 6)]
    assert (len(record.timings.save_s), len(record.timings.step_s)) == (5, 3)
    assert record.options.keys() == whole.options.keys()
    assert record.environment["torch"]
    assert record.memory.peak_allocated_bytes
    for image in record.images:
        metadata = read_metadata(folder.path / image.path)
        assert (metadata["run_id"], metadata["signature"]) == (record.run_id, folder.signature)


@pytest.mark.slow
def test_the_same_command_again_with_resume(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n" * 150)
    command = [*SMALL, "prompts_file=prompts.txt"]
    with (tmp_path / "screen").open("w") as screen:
        child = start_fluxrun(*command, "hydra.run.dir=run", cwd=tmp_path, stderr=screen)
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("run/images/*.png"))) < 20 and time.monotonic() < until:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait(60)
    there = read_record(tmp_path / "run")
    assert there.status == "running"
    (tmp_path / "prompts.txt").write_text("a cat\n" * 140 + "a dog\n" * 10)
    refused = fluxrun(*command, "resume=run", cwd=tmp_path)
    assert refused.returncode == 2
    assert "line 141 is 'a dog'" in refused.stderr
    assert read_record(tmp_path / "run") == there, "a refusal changes nothing"
    (tmp_path / "prompts.txt").write_text("a cat\n" * 150)
    done = fluxrun(*command, "resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / "run")
    assert [image.identity for image in record.images] == [(line, 1) for line in range(1, 151)]
    assert len(list((tmp_path / "run" / "images").iterdir())) == 150
    assert record.images[: len(there.images)] == there.images
    assert len((tmp_path / "run" / "images.jsonl").read_text().splitlines()) == 150
    again = fluxrun(*command, "resume=run", cwd=tmp_path)
    assert again.returncode == 0
    assert "all 150 image(s)" in again.stderr
    swept = fluxrun("--multirun", *command, "seed=0,1", "resume=run", cwd=tmp_path)
    assert (swept.returncode, "sweep.resume=FOLDER" in swept.stderr) == (2, True)
