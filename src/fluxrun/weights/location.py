"""Where a model's weights are and what it takes to have them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fluxrun.architectures import PipelineKind
from fluxrun.formatting import gigabytes
from fluxrun.quantization.declared import Declared

Kind = Literal["folder", "hub", "random"]


@dataclass(frozen=True)
class Located:
    """Where weights are and what it takes to have them. Sizes in bytes."""

    kind: Kind
    source: str
    """For people and the record: the folder, ``hub ID`` or ``random ARCHITECTURE``."""
    pipeline: PipelineKind
    distilled: bool
    folder: Path | None = None
    """The checkpoint folder; None while it is not (completely) on this disk."""
    id: str | None = None
    revision: str | None = None
    """The resolved commit, for a hub id."""
    asked_revision: str | None = None
    files: tuple[str, ...] = ()
    """What a download fetches: the files diffusers needs and nothing else of the repository."""
    download_bytes: int = 0
    cached_bytes: int = 0
    free_disk_bytes: int = 0
    cache: Path | None = None
    variant: str | None = None
    component_bytes: dict[str, int] = field(default_factory=dict)
    """Weight bytes of each model component: of its files, whose dtype may not be the run's; of ``random``, as built."""
    weight_files: tuple[Path, ...] = ()
    """The files of a checkpoint folder that hold them, component by component."""
    declared: dict[str, Declared] = field(default_factory=dict)
    """Components whose weights are quantized as they lie there, with what their config.json says of it."""

    def announcement(self) -> str | None:
        """What is said before a download starts, or None when there is none."""
        if not self.download_bytes:
            return None
        have = f", {gigabytes(self.cached_bytes)} already there" if self.cached_bytes else ""
        return (
            f"download: {gigabytes(self.download_bytes)} to {self.cache} ({gigabytes(self.free_disk_bytes)} free{have})"
        )
