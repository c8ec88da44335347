"""Where fluxrun keeps things: its own config folder and the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def conf_dir() -> Path:
    """fluxrun's own config folder: inside an installed wheel, or at the top of a source checkout."""
    bundled = PACKAGE / "conf"
    return bundled if bundled.is_dir() else PACKAGE.parents[1] / "conf"


def cache_dir() -> Path:
    """The user's cache folder for probes and compiled kernels; ``FLUXRUN_CACHE_DIR`` overrides it."""
    if override := os.environ.get("FLUXRUN_CACHE_DIR"):
        return Path(override).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("fluxrun")
