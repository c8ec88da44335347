"""Compile artefacts in one file, so that a team compiles once: torch's "mega-cache" with a header in front.

A file is a row of parts, each a line of JSON that says what it was made with and the bytes torch wrote. Parts of
another torch, GPU or fluxrun are left alone, as are those with a ``kind`` (``triton_artifacts.py``); what was compiled
new is added as a part of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxrun.errors import ConfigError, one_line
from fluxrun.hardware.machine import Machine
from fluxrun.version import __version__

if TYPE_CHECKING:
    from torch.compiler._cache import CacheInfo

log = logging.getLogger("fluxrun.artifacts")

FORMAT = "fluxrun compile artefacts 1"

Header = dict[str, str | None]


def made_with(machine: Machine) -> Header:
    """What compiled code depends on, as a part's header says it."""
    device = machine.gpu.name if machine.gpu else machine.cpu
    return {"torch": machine.packages.get("torch"), "device": device, "fluxrun": __version__}


def read_parts(file: Path) -> Iterator[tuple[Header, bytes]]:
    """Every part of a file. Raises ConfigError for a file that is something else, or cut off."""
    with file.open("rb") as stream:
        while line := stream.readline(4096):
            try:
                header = json.loads(line)
                size = int(header.pop("bytes"))
                known = header.pop("format") == FORMAT
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ConfigError(f"{file} holds no compile artefacts ({one_line(error)})") from error
            if not known:
                raise ConfigError(f"{file} was written by another fluxrun, which wrote artefacts in another way")
            part = stream.read(size)
            if len(part) < size:
                raise ConfigError(f"{file} is cut off")
            yield header, part


def add_part(file: Path, header: Header, part: bytes, instead: Collection[str] = ()) -> None:
    """Add a part to a file, which may not exist yet, in one step: another process never reads half of it.

    Parts whose ``digest`` is in ``instead`` are left out: the new one holds everything they hold.
    """
    import os
    import tempfile

    file.parent.mkdir(parents=True, exist_ok=True)
    before = list(read_parts(file)) if file.exists() else []
    kept = [(head, body) for head, body in before if digest(body) not in instead]
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            for head, body in (*kept, (header, part)):
                stream.write(json.dumps({"format": FORMAT, **head, "bytes": len(body)}).encode() + b"\n" + body)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def digest(part: bytes) -> str:
    """What tells parts apart."""
    return hashlib.sha256(part).hexdigest()


@dataclass
class Artifacts:
    """One run's use of such a file: loaded before the first compile, added to when something new was compiled."""

    file: Path
    header: Header
    facts: dict[str, Any] = field(default_factory=dict)
    usable: bool = True
    """False for a file that could not be read: it is not written to either."""
    saved_at: float = 0.0
    """Cache misses when it was last written."""
    _parts: dict[str, set[str]] = field(default_factory=dict)
    """What each part of the file holds that is for this machine, by the part's digest."""

    def load(self) -> str | None:
        """Put the file's artefacts into torch's compile cache; returns what the user should know, or None."""
        self.facts = {"file": str(self.file), "loaded": {}, "saved": {}}
        if not self.file.exists():
            return None
        try:
            parts = [(header, part) for header, part in read_parts(self.file) if "kind" not in header]  # torch's own
        except (ConfigError, OSError) as error:
            self.usable = False
            self.facts["refused"] = one_line(error)
            return f"compile.cache_artifacts: {one_line(error)}; it is neither used nor written to"
        fitting = [part for header, part in parts if header == self.header]
        for part in fitting:
            info = _load(part)
            self._count("loaded", info)
            self._parts[digest(part)] = _keys(info)
        if parts and not fitting:
            self.facts["refused"] = self._difference(parts[-1][0])
            return f"compile.cache_artifacts: nothing in {self.file} is for this machine ({self.facts['refused']})"
        return None

    def save(self, misses: float) -> None:
        """Add this process's artefacts to the file if ``misses``, torch's cache misses so far, tells of new ones."""
        if not self.usable or misses <= self.saved_at:
            return
        import torch

        self.saved_at = misses
        made = torch.compiler.save_cache_artifacts()
        if made is None:
            return
        part, info = made
        _begin_next_part()
        covered = [name for name, keys in self._parts.items() if keys and keys <= _keys(info)]
        try:
            add_part(self.file, self.header, part, instead=covered)
        except (OSError, ConfigError) as error:
            self.usable = False
            self.facts["refused"] = f"cannot be written: {one_line(error)}"
            log.warning("compile.cache_artifacts: %s %s", self.file, self.facts["refused"])
            return
        self._parts = {name: keys for name, keys in self._parts.items() if name not in covered}
        self._parts[digest(part)] = _keys(info)
        self._count("saved", info)

    def _count(self, what: str, info: CacheInfo | None) -> None:
        """Artefacts by kind, for example inductor's kernels."""
        if info is None:
            self.facts["refused"] = "torch could not read it"
            return
        found = self.facts[what]
        for kind, keys in info.artifacts.items():
            found[kind] = found.get(kind, 0) + len(keys)

    def _difference(self, other: Header) -> str:
        pairs = ((key, other.get(key), value) for key, value in self.header.items())
        return ", ".join(f"{key} {theirs}, here {ours}" for key, theirs, ours in pairs if theirs != ours)


def _load(part: bytes) -> CacheInfo | None:
    import torch

    return torch.compiler.load_cache_artifacts(part)


def _keys(info: CacheInfo | None) -> set[str]:
    return {f"{kind} {key}" for kind, keys in info.artifacts.items() for key in keys} if info is not None else set()


def _begin_next_part() -> None:
    """Let torch's next save hold only what is new since this one.

    By itself it writes everything once more, in a second list of each kind, and loads only the last list of a kind.
    """
    from torch.compiler._cache import CacheArtifactManager

    CacheArtifactManager._serializer.clear()
    CacheArtifactManager._cache_info.clear()
