"""Triton's kernels travel in the file of compiled code: from one cache folder into another, and nothing else does."""

from __future__ import annotations

import io
import json
import mmap
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from helpers import H100

from fluxrun.compilation.artifacts import Artifacts, add_part, made_with, read_parts
from fluxrun.compilation.triton_artifacts import TritonArtifacts, packed, triton_header, unpacked
from fluxrun.errors import ConfigError

KERNEL, OTHER, LAUNCHER = ("A" * 51 + "2", "B" * 51 + "3", "C" * 51 + "4")


MAPPED: list[mmap.mmap] = []


class Manager:
    """Triton's cache manager, as far as it is used."""

    root: Path

    def __init__(self, key: str) -> None:
        self.folder = self.root / key
        self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes | str, name: str) -> str:
        path = self.folder / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(path)

    def put_group(self, name: str, group: dict[str, str]) -> None:
        self.put(json.dumps({"child_paths": group}), f"__grp__{name}")

    def get_group(self, name: str) -> dict[str, str] | None:
        path = self.folder / f"__grp__{name}"
        return json.loads(path.read_text())["child_paths"] if path.exists() else None

    def get_file(self, name: str) -> str | None:
        path = self.folder / name
        return str(path) if path.exists() else None


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Iterator[type[Manager]]:
    """A Triton whose cache is in a folder."""

    class Here(Manager):
        root = tmp_path / "second machine"

    triton, cache = ModuleType("triton"), ModuleType("triton.runtime.cache")
    triton.knobs = SimpleNamespace(cache=SimpleNamespace(manager_class=Here))
    cache.FileCacheManager = Here
    for module in (triton, ModuleType("triton.runtime"), cache):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield Here
    while MAPPED:
        MAPPED.pop().close()


def function(folder: Path, name: str = KERNEL):
    """A Triton function that has one kernel with a launcher, in a cache folder."""
    files = {}
    for suffix in ("cubin", "json", "ttir"):
        path = folder / name / f"_pack_kernel.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{suffix} of {name}".encode())
        files[path.name] = str(path)
    launcher = folder / LAUNCHER / "__triton_launcher.cpython-312-x86_64-linux-gnu.so"
    launcher.parent.mkdir(exist_ok=True)
    launcher.write_bytes(b"\x7fELF")
    with launcher.open("rb") as stream:
        MAPPED.append(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))  # as a process does that has loaded it
    kernel = SimpleNamespace(metadata_group=files)
    return SimpleNamespace(device_caches={0: ({"key": kernel}, {}, None, None, None)})


def test_a_second_machine_takes_what_the_first_has_compiled(tmp_path, cache):
    file, first = tmp_path / "team.artifacts", TritonArtifacts(tmp_path / "team.artifacts", H100)
    assert first.load() is None
    first.save([function(tmp_path / "first machine")])
    first.save([function(tmp_path / "first machine")])  # nothing new
    assert first.facts == {"loaded": 0, "saved": 2}
    assert len(list(read_parts(file))) == 1

    second = TritonArtifacts(file, H100)
    assert second.load() is None
    assert second.facts == {"loaded": 2, "saved": 0}
    group = cache(KERNEL).get_group("_pack_kernel.json")
    assert group is not None
    assert {Path(path).parent for path in group.values()} == {cache.root / KERNEL}
    assert Path(group["_pack_kernel.cubin"]).read_bytes() == f"cubin of {KERNEL}".encode()
    assert cache(LAUNCHER).get_file("__triton_launcher.cpython-312-x86_64-linux-gnu.so")
    assert not list(cache.root.rglob("*.ttir"))

    second.save([function(tmp_path / "third", KERNEL), function(tmp_path / "third", OTHER)])
    assert second.facts["saved"] == 1
    assert len(list(read_parts(file))) == 1  # the new part holds all that the old one held


def test_another_gpu_or_triton_leaves_it_alone(tmp_path, cache):
    file = tmp_path / "team.artifacts"
    add_part(file, triton_header(H100), packed({KERNEL: {"_pack_kernel.json": b"{}"}}))
    other = replace(H100, packages={**H100.packages, "triton": "9.0"})
    found = TritonArtifacts(file, other)
    assert found.load() is None
    assert found.facts["loaded"] == 0
    torchs = Artifacts(file, made_with(H100))  # of torch's compiler there is nothing in it, which is no reason to warn
    assert torchs.load() is None
    assert torchs.usable


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name in names:
            made.writestr(name, b"x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "part",
    [
        b"no archive",
        archive(f"../{KERNEL}/a.so"),
        archive(f"{KERNEL}/../../a.so"),
        archive(f"{KERNEL}/a.py"),
        archive("short/a.so"),
        archive(f"{KERNEL}/.so"),
    ],
)
def test_a_part_that_is_none_of_tritons_is_refused(part, tmp_path, cache):
    with pytest.raises(ConfigError, match="Triton part"):
        unpacked(part)
    file = tmp_path / "team.artifacts"
    add_part(file, triton_header(H100), part)
    refused = TritonArtifacts(file, H100)
    assert "neither used nor written to" in (refused.load() or "")
    refused.save([function(tmp_path / "first machine")])
    assert len(list(read_parts(file))) == 1
