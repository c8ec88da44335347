"""run.json and the images: valid, atomic, carrying their config; rerun makes the same pixels."""

from __future__ import annotations

import json
import os
import shutil

import jsonschema
import pytest
from helpers import SMALL, draw, fluxrun, hashes
from PIL import Image

from fluxrun.atomic import write_atomically
from fluxrun.cli.rerun import rerun
from fluxrun.config.composition import compose
from fluxrun.errors import ConfigError
from fluxrun.paths import PACKAGE
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.record.folder import RunFolder, read_record
from fluxrun.record.picture import pixel_hash, read_metadata, save_image
from fluxrun.record.schema import RunRecord, spread

AWKWARD = '"It\'s 50% #1 (really)!", ${HOME}, é \U0001f600 \\ \\n'
METADATA = {"prompt": AWKWARD, "seed": 3, "config": {"prompt": AWKWARD, "x": [1, None]}}


@pytest.fixture(scope="module")
def bench():
    with SessionPool() as pool:
        yield pool


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("output_format", "ending"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
def test_metadata_of_every_format(tmp_path, bench, output_format, ending):
    record = draw(tmp_path / "run", f"output_format={output_format}", f"prompt={AWKWARD}", pool=bench)
    path = tmp_path / "run" / record.images[0].path
    assert path.suffix == f".{ending}"
    metadata = read_metadata(path)
    assert (metadata["prompt"], metadata["seed"], metadata["run_id"]) == (AWKWARD, 0, record.run_id)
    assert metadata["config"] == record.config
    assert metadata["environment"]["torch"]
    with Image.open(path) as image:
        assert image.format == output_format.upper()
        # JPEG is lossy; the others hold the very pixels that the record's hash is of.
        assert (pixel_hash(image) == record.images[0].sha256) == (output_format != "jpeg")


@pytest.mark.slow
def test_a_very_long_prompt_fits_into_every_format(tmp_path, bench):
    prompt = "é" * 30_000
    for output_format in ("png", "jpeg", "webp"):
        folder = tmp_path / output_format
        record = draw(folder, f"output_format={output_format}", f"prompt={prompt}", pool=bench)
        assert read_record(folder) == record
        path = folder / record.images[0].path
        with Image.open(path) as image:
            image.load()
        if output_format == "jpeg":  # 64 kB is all it can carry: the picture is kept, its config is in run.json
            with pytest.raises(ConfigError, match="no fluxrun metadata"):
                read_metadata(path)
        else:
            assert read_metadata(path)["prompt"] == prompt


def test_other_images_are_refused(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "plain.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "plain.jpg")
    (tmp_path / "text.png").write_text("text")
    for name in ("plain.png", "plain.jpg"):
        with pytest.raises(ConfigError, match="no fluxrun metadata"):
            read_metadata(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read as an image"):
        read_metadata(tmp_path / "text.png")


def test_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    image = Image.new("RGB", (16, 16))

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space"):
        save_image(image, tmp_path / "image.png", METADATA, "png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_is_claimed_once(tmp_path):
    config = compose([])
    folder = RunFolder(tmp_path / "run", config.source, ["fluxrun"])
    assert read_record(folder.path).status == "running"
    with pytest.raises(ConfigError, match="already holds a run"):
        RunFolder(tmp_path / "run", config.source)
    # A folder with somebody's pictures in it is not ours to fill, and stays as it is.
    (tmp_path / "other" / "images").mkdir(parents=True)
    with pytest.raises(ConfigError):
        RunFolder(tmp_path / "other", config.source)
    assert [entry.name for entry in (tmp_path / "other").iterdir()] == ["images"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot write"):
        RunFolder(tmp_path / "run", compose([]).source)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError):
        RunFolder(tmp_path / "run", compose([]).source)


def test_records_that_are_not(tmp_path):
    with pytest.raises(ConfigError, match=r"no run\.json"):
        read_record(tmp_path)
    for text in ("", "{", "[]", '{"schema_version": 3}', "\ufeff{}"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_record(tmp_path)
        assert "\n" not in str(caught.value)


def test_spread():
    found = spread([3.0, 1.0, 2.0])
    assert found
    assert (found.median, found.min, found.max, found.n) == (2.0, 1.0, 3.0, 3)
    assert spread([]) is None


# --- the schema -------------------------------------------------------------------------------------------------


def test_every_record_follows_the_schema(tmp_path, bench):
    schema = RunRecord.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    draw(tmp_path / "good", "attention=xformers", "compile=none", "num_images=2", pool=bench)
    for folder in (tmp_path / "good",):
        data = json.loads((folder / "run.json").read_text())
        jsonschema.validate(data, schema)
        assert set(data) == set(schema["properties"])
        assert (data["schema_version"], data["images_file"]) == (2, None)
        assert data["finished_at"] >= data["started_at"]
        for entry in data["options"].values():
            assert set(entry) == {"requested", "effective", "fallbacks", "facts"}
        for image in data["images"]:
            assert (folder / image["path"]).exists()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "status": "good"}, schema)


def test_the_schema_documents_its_fields():
    schema = json.loads((PACKAGE.parents[1] / "docs" / "run.schema.json").read_text(encoding="utf-8"))
    assert schema["$defs"]["Timings"]["properties"]["steady_step_s"]["description"]
    assert schema["description"]


# --- rerun ------------------------------------------------------------------------------------------------------


@pytest.fixture
def original(tmp_path, bench, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = draw(tmp_path / "run", "prompt=[a cat, 'b, [c]']", "num_images=2", "seed=5", pool=bench)
    assert len(record.images) == 4
    return tmp_path / "run", record


def test_rerun_of_an_image(original, tmp_path):
    folder, record = original
    image = record.images[3]
    assert rerun(str(folder / image.path), ["hydra.run.dir=again"]) == 0
    again = read_record(tmp_path / "again")
    assert [(i.prompt, i.seed, i.sha256) for i in again.images] == [(image.prompt, image.seed, image.sha256)]


def test_rerun_of_a_folder(original, tmp_path):
    folder, record = original
    assert rerun(str(folder), ["hydra.run.dir=again"]) == 0
    again = read_record(tmp_path / "again")
    assert hashes(again) == hashes(record)
    assert again.config_hash == record.config_hash
    assert again.run_id != record.run_id


def test_rerun_says_when_the_pixels_differ(original, tmp_path):
    folder, _ = original
    data = json.loads((folder / "run.json").read_text())
    data["images"][0]["sha256"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(data))
    assert rerun(str(folder), ["hydra.run.dir=again"]) == 1


@pytest.mark.slow
def test_rerun_into_a_used_folder_changes_nothing(original, tmp_path):
    folder, _ = original
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = fluxrun("rerun", str(folder), f"hydra.run.dir={folder}", cwd=tmp_path)
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_rerun_of_a_prompt_of_a_prompts_file(tmp_path, bench, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    record = draw(tmp_path / "run", "prompts_file=prompts.txt", pool=bench)
    (tmp_path / "prompts.txt").unlink()
    assert rerun(str(tmp_path / "run" / record.images[1].path), ["hydra.run.dir=again"]) == 0
    with pytest.raises(ConfigError, match="no such file"):
        rerun(str(tmp_path / "run"), ["hydra.run.dir=folder"])
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("overrides", [["seed=1"], ["hydra.run.dir="], ["x"]])
def test_rerun_takes_nothing_else(original, overrides):
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir"):
        rerun(str(original[0]), overrides)


@pytest.mark.slow
def test_rerun_in_a_process_of_its_own(tmp_path):
    first = fluxrun(*SMALL, "hydra.run.dir=run", "num_images=2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    record = read_record(tmp_path / "run")
    done = fluxrun("rerun", f"run/{record.images[1].path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 image(s) have the same pixels" in done.stderr
    (again,) = (tmp_path / "outputs").glob("*/*")
    assert hashes(read_record(again)) == hashes(record)[1:]


def test_the_folder_going_away_is_said(tmp_path, bench, monkeypatch, caplog):
    """Somebody deletes the run folder while it draws: one line, no traceback, and no claim of having finished."""
    from fluxrun.pipeline.prompt_encoder import PromptEncoder

    embeddings_of = PromptEncoder.of

    def delete_first(*arguments):
        shutil.rmtree(tmp_path / "run")
        return embeddings_of(*arguments)

    monkeypatch.setattr(PromptEncoder, "of", delete_first)
    with pytest.raises(OSError, match="No such file"):
        draw(tmp_path / "run", pool=bench)
    assert "cannot write" in caplog.text


def test_rerun_from_another_folder_finds_relative_paths(tmp_path, bench, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("a red circle\n")
    monkeypatch.chdir(tmp_path / "here")
    record = draw(tmp_path / "run", "prompts_file=mine.txt", pool=bench)
    assert record.cwd == str(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "there")
    assert rerun(str(tmp_path / "run"), ["hydra.run.dir=again"]) == 0


def test_only_paths_that_are_missing_here_are_looked_for_there(tmp_path, monkeypatch):
    from fluxrun.cli.rerun import with_found_paths

    for name in ("here/both.png", "there/both.png", "there/only.png", "there/model/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    target = {"_target_": "fluxrun.options.model.Flux2Model", "id": None, "bundled": "model"}
    artifacts = {"_target_": "fluxrun.options.compile.Compile", "cache_dir": "model", "cache_artifacts": "only.png"}
    config = {
        "reference_images": ["both.png", "only.png", "neither.png"], "prompt": "only.png",
        "model": {**target, "path": "model"}, "compile": artifacts, "measure": {"repeats": 1},
    }  # fmt: skip
    there = tmp_path / "there"
    found = with_found_paths(config, str(there))
    assert found["reference_images"] == ["both.png", str(there / "only.png"), "neither.png"]
    assert found["model"] == {**target, "path": str(there / "model")}, "no other text is a path"
    assert found["compile"]["cache_dir"] == str(there / "model")
    assert found["compile"]["cache_artifacts"] == str(there / "only.png")
    assert {key: found[key] for key in ("prompt", "measure")} == {key: config[key] for key in ("prompt", "measure")}
    assert "prompts_file" not in found, "what a config does not have is not made up"
    assert with_found_paths(config, None)["reference_images"] == config["reference_images"]
