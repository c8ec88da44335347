"""Where fluxrun keeps things: its own config folder and the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from fluxrun.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent


def conf_dir() -> Path:
    """fluxrun's own config folder: inside an installed wheel, or at the top of a source checkout."""
    bundled = PACKAGE / "conf"
    return bundled if bundled.is_dir() else PACKAGE.parents[1] / "conf"


def check_folders() -> None:
    """Raise ConfigError for a working directory that was deleted and a cache folder that is none.

    Relative paths mean nothing in such a directory, and libraries fail in odd ways.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the working directory cannot be used ({error.strerror}): change to another one") from error
    if os.path.exists(cache_dir()) and not os.path.isdir(cache_dir()):
        raise ConfigError(f"the cache folder {cache_dir()} is a file: remove it, or set FLUXRUN_CACHE_DIR to a folder")


def expanded(path: Path | str) -> Path:
    """``path`` with a leading ``~`` replaced; one of a user who is not there stays as it is, and is then not found."""
    return Path(os.path.expanduser(path))


def data_dir() -> Path:
    """The user's data folder, for what no cache holds; ``FLUXRUN_DATA_DIR`` overrides it."""
    if override := os.environ.get("FLUXRUN_DATA_DIR"):
        return expanded(override)
    from platformdirs import user_data_path

    return user_data_path("fluxrun")


def cache_dir() -> Path:
    """The user's cache folder for probes and compiled kernels; ``FLUXRUN_CACHE_DIR`` overrides it."""
    if override := os.environ.get("FLUXRUN_CACHE_DIR"):
        return expanded(override)
    from platformdirs import user_cache_path

    return user_cache_path("fluxrun")
