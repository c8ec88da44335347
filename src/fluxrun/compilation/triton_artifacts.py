"""Triton's kernels in the file of ``compile.cache_artifacts``: another machine takes them instead of compiling.

Each is a folder of Triton's cache, named by what it was made of (source, Triton, ptxas, architecture), and so is each
launcher, a small C library. They are put into the cache by Triton's own cache manager.
"""

from __future__ import annotations

import io
import logging
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fluxrun.compilation.artifacts import Header, add_part, digest, read_parts
from fluxrun.errors import ConfigError, one_line
from fluxrun.hardware.machine import Machine

log = logging.getLogger("fluxrun.artifacts")

KIND = "triton"

FOLDER = re.compile(r"[A-Z2-7]{52}")
"""The name of a folder in Triton's cache: base 32 of a SHA-256."""

FILE = re.compile(r"\w[\w.\-]*\.(?:cubin|json|so)")

LAUNCHER = "__triton_launcher."
"""What the file of each launcher is called."""

MAPPED = Path("/proc/self/maps")
"""Where Linux says what this process has mapped; nowhere else does Triton run."""

Entries = dict[str, dict[str, bytes]]
"""Folder → file → content."""


def triton_header(machine: Machine) -> Header:
    """What kernels depend on, as a part's header says it."""
    capability = machine.gpu.capability if machine.gpu else None
    return {
        "kind": KIND,
        "torch": machine.packages.get("torch"),
        "triton": machine.packages.get("triton"),
        "capability": ".".join(map(str, capability)) if capability else None,
    }


class TritonArtifacts:
    """One process's use of such a file: loaded before kernels are compiled, added to when others were."""

    def __init__(self, file: Path, machine: Machine) -> None:
        self.facts: dict[str, Any] = {"loaded": 0, "saved": 0}
        self._file, self._header = file, triton_header(machine)
        self._parts: list[str] = []
        self._known: set[str] = set()
        self._usable = True

    def load(self) -> str | None:
        """Put the file's kernels into Triton's cache; returns what the user should know, or None."""
        if not self._file.exists():
            return None
        try:
            for header, part in list(read_parts(self._file)):
                if header == self._header:
                    entries = unpacked(part)
                    _put(entries)
                    self._parts.append(digest(part))
                    self._known |= entries.keys()
        except (ConfigError, OSError) as error:
            self._usable = False
            self.facts["refused"] = one_line(error)
            return f"compile.cache_artifacts: {one_line(error)}; it is neither used nor written to"
        self.facts["loaded"] = len(self._known)
        return None

    def save(self, functions: Iterable[Any]) -> None:
        """Add what these Triton functions have compiled, or found in the cache, and the file does not hold yet."""
        if not self._usable:
            return
        files = [file for file in used_files(functions) if _belongs(file)]
        if {file.parent.name for file in files} <= self._known:
            return
        entries: Entries = {}
        for file in files:
            entries.setdefault(file.parent.name, {})[file.name] = file.read_bytes()
        part = packed(entries)
        try:
            covered = self._parts if self._known <= entries.keys() else []
            add_part(self._file, self._header, part, instead=covered)
        except (OSError, ConfigError) as error:
            self._usable = False
            self.facts["refused"] = f"cannot be written: {one_line(error)}"
            log.warning("compile.cache_artifacts: %s %s", self._file, self.facts["refused"])
            return
        self.facts["saved"] = len(entries.keys() - self._known)
        self._parts = [digest(part), *([] if covered else self._parts)]
        self._known |= entries.keys()


# --- what Triton has --------------------------------------------------------------------------------------------------


def used_files(functions: Iterable[Any]) -> Iterator[Path]:
    """The files of every kernel that this process has of these functions, and every launcher."""
    for function in functions:
        for kernels, *_ in list(function.device_caches.values()):
            for kernel in list(kernels.values()):
                yield from (Path(path) for path in kernel.metadata_group.values())
    yield from launchers(MAPPED.read_text(encoding="utf-8") if MAPPED.exists() else "")


def launchers(mapped: str) -> Iterator[Path]:
    """Triton's launchers among the files that a process has mapped.

    Not by their modules' ``__file__``: all have one name, and where Python loads a launcher for a second kernel, it
    writes its path into whichever module has that name by then.
    """
    paths = {line.split(maxsplit=5)[-1].removesuffix(" (deleted)") for line in mapped.splitlines()}
    yield from (Path(path) for path in paths if Path(path).name.startswith(LAUNCHER) and Path(path).is_file())


def _belongs(file: Path) -> bool:
    """Whether it takes this file to run a kernel."""
    return bool(FOLDER.fullmatch(file.parent.name) and FILE.fullmatch(file.name))


def _put(entries: Entries) -> None:
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    for folder, files in entries.items():
        manager = (knobs.cache.manager_class or FileCacheManager)(folder)
        description = next((name for name in files if name.endswith(".json")), None)
        if description is None:  # a launcher
            for name, content in files.items():
                if manager.get_file(name) is None:
                    manager.put(content, name)
        elif not manager.get_group(description):
            manager.put_group(description, {name: manager.put(content, name) for name, content in files.items()})


# --- one part ---------------------------------------------------------------------------------------------------------


def packed(entries: Mapping[str, Mapping[str, bytes]]) -> bytes:
    """A part's bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in sorted(entries):
            for name in sorted(entries[folder]):
                archive.writestr(zipfile.ZipInfo(f"{folder}/{name}"), entries[folder][name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def unpacked(part: bytes) -> Entries:
    """What a part holds. Raises ConfigError for one that is broken, or names files that are none of Triton's."""
    entries: Entries = {}
    try:
        with zipfile.ZipFile(io.BytesIO(part)) as archive:
            for path in archive.namelist():
                folder, _, name = path.partition("/")
                if not FOLDER.fullmatch(folder) or not FILE.fullmatch(name):
                    raise ConfigError(f"its Triton part holds {path[:80]!r}, which is no file of Triton's cache")
                entries.setdefault(folder, {})[name] = archive.read(path)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"its Triton part is broken ({one_line(error)})") from error
    return entries
