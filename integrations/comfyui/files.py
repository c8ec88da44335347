"""What a workflow may name: files of ComfyUI's own folders, and the pictures that the node was given."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

from fluxrun.errors import ConfigError
from fluxrun.formatting import nearest, shorten
from fluxrun.serving.uploads import SCHEME, Uploads

ENDINGS = {
    "input:": (".png", ".jpg", ".jpeg", ".webp", ".txt", ".yaml", ".yml", ".jsonl"),
    "loras:": (".safetensors",),
}
"""By ComfyUI's folder: pictures, masks and lists of prompts; LoRAs."""

DEEPEST = 3
"""Levels of folders below ComfyUI's ``diffusers`` in which a checkpoint is looked for."""


class ComfyFiles:
    """``input:NAME``, ``loras:NAME``, and what was uploaded; ``folders`` gives the places of a kind."""

    schemes = (SCHEME, *ENDINGS)

    def __init__(self, uploads: Uploads, folders: Callable[[str], Sequence[str]]) -> None:
        self._uploads, self._folders = uploads, folders

    def path(self, name: str) -> Path:
        """The file of a name; raises ConfigError for one that leads out of the folder, or is not there."""
        scheme, _, rest = name.partition(":")
        if f"{scheme}:" == SCHEME:
            return self._uploads.path(name)
        endings = ENDINGS[f"{scheme}:"]
        if "\0" in rest or not rest.lower().endswith(endings):
            raise ConfigError(f"{shorten(name)}: allowed in ComfyUI's {scheme} folder: {', '.join(endings)}")
        if PurePath(rest).is_absolute() or ".." in PurePath(rest).parts:
            raise ConfigError(f"{shorten(name)} leads out of ComfyUI's {scheme} folder")
        roots = [Path(root) for root in self._folders(scheme)]
        found = next((root / rest for root in roots if os.path.isfile(root / rest)), None)
        if found is None:
            there = sorted(path.name for root in roots for path in root.glob("*") if path.suffix.lower() in endings)
            raise ConfigError(
                f"{shorten(name)}: no such file in ComfyUI's {scheme} folder; {nearest(rest, there[:20])}"
            )
        return found


def checkpoints(roots: Sequence[str]) -> dict[str, Path]:
    """Checkpoints in diffusers layout below ComfyUI's folders, by the names that the drop-down has."""
    found: dict[str, Path] = {}
    for root in map(Path, roots):
        for depth in range(1, DEEPEST + 1):
            for index in sorted(root.glob("/".join(["*"] * depth) + "/model_index.json")):
                found.setdefault(f"diffusers/{index.parent.relative_to(root).as_posix()}", index.parent)
    return found
