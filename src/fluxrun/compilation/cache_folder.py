"""How long the compiler keeps the first image waiting, told before it does. Light: nothing heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path

from fluxrun.paths import cache_dir, expanded


def cache_folder(asked: Path | None) -> Path:
    """Where compiled code is kept between processes: the option's folder, the user's, or fluxrun's own."""
    if asked is not None:
        return expanded(asked)
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(given) if given else cache_dir() / "inductor"


def holds_anything(folder: Path) -> bool:
    """Whether an earlier process left compiled graphs there."""
    try:
        return next((folder / "fxgraph").iterdir(), None) is not None
    except OSError:
        return False
