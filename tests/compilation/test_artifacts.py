"""Compiled code is shared by a file: another process with an empty cache of its own compiles nothing again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import CPU, H100, SMALL, fluxrun, said

from fluxrun.compilation.artifacts import FORMAT, Artifacts, add_part, digest, made_with, read_parts
from fluxrun.errors import ConfigError


def run(folder: Path, file: Path) -> dict[str, Any]:
    """A compiled run in a process and with a compile cache of its own."""
    # One block kind less would do, but this is the option people use; nothing is cached from the suite's other tests.
    env = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "FLUXRUN_CACHE_DIR": str(folder / "cache")}
    done = fluxrun(
        *SMALL, "compile=regional", f"compile.cache_artifacts={file}", f"hydra.run.dir={folder / 'run'}",
        cwd=folder.parent, env=env,
    )  # fmt: skip
    assert done.returncode == 0, said(done.stderr)
    record: dict[str, Any] = json.loads((folder / "run" / "run.json").read_text())
    return record


@pytest.mark.slow
def test_a_second_machine_compiles_nothing(tmp_path):
    file = tmp_path / "shared" / "team.artifacts"
    records = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        records.append(run(tmp_path / name, file))
        size = file.stat().st_size
    first, second = (record["options"]["compile"]["facts"] for record in records)
    assert first["cache_hits"] == 0
    assert first["cache_misses"] > 0
    assert first["artifacts"]["loaded"] == {}
    assert first["artifacts"]["saved"]["inductor"] == first["graphs_compiled"] == 2
    assert second["artifacts"]["loaded"] == first["artifacts"]["saved"]
    assert second["artifacts"]["saved"] == {}
    assert second["cache_misses"] == 0
    assert second["cache_hits"] > 0
    assert second["graph_calls"] == first["graph_calls"] > 0
    assert records[0]["images"][0]["sha256"] == records[1]["images"][0]["sha256"]
    assert sum(1 for _ in read_parts(file)) == 1
    assert file.stat().st_size == size


def test_parts_are_added_and_read_back(tmp_path):
    file = tmp_path / "new folder" / "team.artifacts"
    parts = [({"torch": "1"}, b"\x00\n{}\n"), ({"torch": "2"}, b"")]
    for header, part in parts:
        add_part(file, header, part)
    assert list(read_parts(file)) == parts
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_artefacts_of_another_machine_are_refused_in_one_line(tmp_path, monkeypatch):
    file = tmp_path / "team.artifacts"
    add_part(file, made_with(H100), b"not looked at")
    found = Artifacts(file, made_with(CPU))
    note = found.load()
    assert note is not None
    assert "\n" not in note
    assert "torch 2.11.0+cu130, here 2.13.0+cpu, device NVIDIA H100 80GB HBM3, here" in note
    assert found.facts["loaded"] == {}
    assert found.usable  # its own artefacts go beside the other machine's


@pytest.mark.parametrize(
    "content",
    [b"\x89PNG\r\n", b"[]\n", b'{"bytes": "x"}\n', json.dumps({"format": FORMAT, "bytes": 9}).encode() + b"\nshort"],
)
def test_something_else_is_neither_used_nor_overwritten(tmp_path, content):
    file = tmp_path / "mine"
    file.write_bytes(content)
    with pytest.raises(ConfigError):
        list(read_parts(file))
    found = Artifacts(file, made_with(CPU))
    assert "neither used nor written to" in str(found.load())
    found.save(misses=1.0)
    assert file.read_bytes() == content


def test_a_file_that_is_not_there_yet_is_no_matter(tmp_path):
    found = Artifacts(tmp_path / "none yet", made_with(CPU))
    assert found.load() is None
    assert found.facts == {"file": str(tmp_path / "none yet"), "loaded": {}, "saved": {}}


def test_a_process_that_saves_twice_loses_nothing(tmp_path):
    """torch's own file would then load only what was compiled after the first save."""
    from torch.compiler._cache import CacheArtifactManager as Manager

    def keys(part: bytes) -> list[str]:
        return [artifact.key for kind in (Manager.deserialize(part) or {}).values() for artifact in kind]

    file = tmp_path / "team.artifacts"
    Manager._ensure_cache_artifacts_registered()
    Manager.clear()
    try:
        mine = Artifacts(file, made_with(CPU))
        mine.load()
        for number in (1, 2):
            Manager.record_artifact("pgo", f"key {number}", b"code")
            mine.save(misses=number)
        mine.save(misses=2)  # nothing new
        assert [keys(part) for _, part in read_parts(file)] == [["key 1"], ["key 2"]]
        assert mine.facts["saved"] == {"pgo": 2}
    finally:
        Manager.clear()


def test_a_part_that_a_newer_one_covers_is_dropped(tmp_path):
    file = tmp_path / "team.artifacts"
    other = ({"torch": "2"}, b"another machine's")
    add_part(file, {"torch": "1"}, b"old")
    add_part(file, *other)
    add_part(file, {"torch": "1"}, b"new", instead=[digest(b"old")])
    assert list(read_parts(file)) == [other, ({"torch": "1"}, b"new")]
