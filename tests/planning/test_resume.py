"""``resume=FOLDER``: what is there counts, what has changed is refused in one line that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fluxrun.config.composition import compose
from fluxrun.config.prompts import jobs_of
from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError
from fluxrun.planning.resume import earlier_run
from fluxrun.record import asked
from fluxrun.record.folder import RunFolder, read_record, write_failure

LINES = "a cat\na dog\n\na cat\na fox\n"
PICTURE = Image.new("RGB", (16, 16), "red")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text(LINES)
    return tmp_path / "prompts.txt"


def config_of(prompts: Path, *overrides: str) -> RunConfig:
    return compose([f"prompts_file={prompts}", "num_images=2", *overrides])


def begun(prompts: Path, *indices: int, folder: str = "run") -> Path:
    """The folder of a run that was killed when it had drawn the images with these numbers."""
    config = config_of(prompts)
    run, jobs = RunFolder(prompts.parent / folder, config.source), jobs_of(config)
    run.begin(jobs, from_file=True)
    run.write()
    for index in indices:
        run.save(jobs[index], PICTURE, "png", finite=index != 5, constant=False)
    return run.path


def refusal(config: RunConfig, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        earlier_run(config, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_equal_lines_are_two_images_each(prompts: Path) -> None:
    earlier = earlier_run(config_of(prompts), begun(prompts, 0, 4))
    assert (earlier.done, earlier.lost, earlier.complete) == (frozenset({0, 4}), 0, False)
    assert [(image.line, image.number, image.prompt) for image in earlier.record.images] == [
        (1, 1, "a cat"), (4, 1, "a cat"),
    ]  # fmt: skip


def test_images_that_are_lost_cut_short_or_not_finite_are_missing(prompts: Path) -> None:
    folder = begun(prompts, 0, 1, 2, 5)
    images = read_record(folder).images
    (folder / images[0].path).unlink()
    whole = (folder / images[1].path).read_bytes()
    (folder / images[1].path).write_bytes(whole[:-1])
    earlier = earlier_run(config_of(prompts), folder)
    assert (earlier.done, earlier.lost) == (frozenset({2}), 3)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("a cat\na dot\n\na cat\na fox\n", "line 2 is 'a dot' (seed 0, 2 images) now, and was 'a dog' (seed 0"),
        ("a cat\na dog\n\na cat\na fax\n", "line 5 is 'a fax' (seed 0, 2 images) now, and was 'a fox'"),
        ("a cat\na dog\n\na cat\n", "line 5 is gone now, and was 'a fox'"),
        (LINES + "a hen\n", "line 6 is 'a hen' (seed 0, 2 images) now, and was not there"),
        ("a cat\na dog\na cat\na fox\n", "line 3 is 'a cat'"),
    ],
    ids=["drawn", "not drawn yet", "gone", "new", "moved"],
)
def test_a_changed_prompts_file_is_refused_with_its_line(prompts: Path, lines: str, says: str) -> None:
    folder = begun(prompts, 0, 1, 2)
    prompts.write_text(lines)
    text = refusal(config_of(prompts), folder)
    assert f"prompts_file={prompts} {says}" in text
    assert "leave resume out" in text


def test_another_command_is_refused_with_its_key(prompts: Path) -> None:
    folder = begun(prompts, 0)
    assert "steps is 7 now and was null" in refusal(config_of(prompts, "steps=7"), folder)
    assert "attention.name is math now and was sdpa" in refusal(config_of(prompts, "attention=math"), folder)
    assert "line 1 is 'a cat' (seed 0)" not in refusal(config_of(prompts, "seed=1"), folder)


def test_without_its_list_of_lines_what_was_drawn_is_held_against_them(prompts: Path) -> None:
    folder = begun(prompts, 2)
    (folder / asked.ASKED).unlink()
    prompts.write_text(LINES + "a hen\n")
    assert "was to have 8 image(s), and this command asks for 10" in refusal(config_of(prompts), folder)
    prompts.write_text(LINES.replace("dog", "dot"))
    assert "line 2 is 'a dot' (seed 0) now, and was 'a dog' (seed 0)" in refusal(config_of(prompts), folder)


def test_a_record_of_version_1_has_its_images_in_the_lines_order(prompts: Path) -> None:
    folder = begun(prompts, 0, 1, 2)
    record = read_record(folder)
    data = {**record.model_dump(mode="json"), "schema_version": 1, "images_file": None, "images_asked": None}
    for image in data["images"]:
        del image["line"], image["number"], image["file_bytes"]
    (folder / "run.json").write_text(json.dumps(data))
    assert earlier_run(config_of(prompts), folder).done == {0, 1, 2}


def test_a_folder_that_is_no_runs(prompts: Path) -> None:
    folder = prompts.parent / "sweep"
    folder.mkdir()
    assert "is not a run folder" in refusal(config_of(prompts), folder)
    (folder / "sweep.json").touch()
    assert "--multirun sweep.resume=" in refusal(config_of(prompts), folder)


def test_a_run_that_failed_before_it_began_has_everything_to_draw(prompts: Path) -> None:
    config, folder = config_of(prompts), prompts.parent / "failed"
    write_failure(folder, config.source, RuntimeError("no room"))
    earlier = earlier_run(config, folder)
    assert (earlier.done, earlier.record.images_asked) == (frozenset(), 8)
    run = RunFolder(folder, config.source, earlier=earlier.record)
    run.save(jobs_of(config)[0], PICTURE, "png", finite=True, constant=False)
    assert (read_record(folder).error, len(read_record(folder).images)) == (None, 1)


def test_going_on_takes_over_what_is_there(prompts: Path) -> None:
    folder, config = begun(prompts, 0, 3), config_of(prompts)
    before, earlier = read_record(folder), earlier_run(config, folder)
    run, jobs = RunFolder(folder, config.source, earlier=earlier.record), jobs_of(config)
    run.begin(jobs, from_file=True)
    assert read_record(folder).status == "running"
    for index in (1, 2, 4, 5, 6, 7):
        run.save(jobs[index], PICTURE, "png", finite=True, constant=False)
    run.finish("completed")
    record = read_record(folder)
    assert (record.run_id, record.started_at, len(record.resumed_at)) == (before.run_id, before.started_at, 1)
    assert [image.path.partition("_")[0] for image in record.images] == [f"images/{n:03d}" for n in range(8)]
    assert [image.identity for image in record.images] == [(job.line, job.number) for job in jobs]
    assert len(record.timings.save_s) == 8
    assert sorted(path.name for path in folder.iterdir()) == ["images", "run.json"]
    assert earlier_run(config, folder).complete
