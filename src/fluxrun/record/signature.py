"""Records and pictures of one's own: signed with a key that only this user of this machine has.

A stranger's record may not name files or downloads. One's own names those that one typed, and is drawn again as it is.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
from pathlib import Path

from fluxrun.errors import one_line
from fluxrun.paths import data_dir
from fluxrun.types import Json, JsonObject

log = logging.getLogger("fluxrun.record")

KEY_BYTES = 32


def sign(config: JsonObject, cwd: str = "") -> str | None:
    """The signature of a config, as JSON holds it, run in ``cwd``; None where this user can keep no key."""
    key = _key(data_dir() / "record.key")
    return _signature(key, config, cwd) if key else None


def is_own(config: JsonObject, signature: Json, cwd: str = "") -> bool:
    """Whether ``sign`` gave this signature here to that config."""
    file = data_dir() / "record.key"
    if not isinstance(signature, str) or not os.path.exists(file):
        return False
    key = _key(file)
    return key is not None and hmac.compare_digest(_signature(key, config, cwd).encode(), signature.encode())


def _signature(key: bytes, config: JsonObject, cwd: str) -> str:
    text = json.dumps([config, cwd], sort_keys=True)
    return hmac.digest(key, text.encode(), "sha256").hex()


def _key(file: Path) -> bytes | None:
    """The user's key, made where there is none yet: whole under its name, or not at all."""
    try:
        if not os.path.exists(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_name(f".{secrets.token_hex(8)}.key")
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as made:
                made.write(secrets.token_bytes(KEY_BYTES))
            _put(new, file)
        key = file.read_bytes()
    except OSError as error:
        log.debug("records are not signed: %s", one_line(error))
        return None
    return key if len(key) == KEY_BYTES else None


def _put(new: Path, file: Path) -> None:
    """Give a new key its name, unless another process was first."""
    try:
        os.link(new, file)
    except FileExistsError:
        pass
    finally:
        new.unlink()
