"""Files that clients have sent: named by their hash, looked at before they are kept, the oldest ones removed."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from fluxrun.errors import ConfigError, FluxrunError
from fluxrun.formatting import gigabytes, shorten
from fluxrun.pictures import open_picture
from fluxrun.reading import Unreadable, read_text
from fluxrun.serving.limits import Limits
from fluxrun.weights.headers import read_header

SCHEME = "upload:"
"""What a request writes in the place of a path: ``image=upload:HASH.png``."""


class TooLarge(FluxrunError):
    """A body or file of more bytes than the server takes."""


def _check_picture(path: Path, limits: Limits) -> None:
    with open_picture(path) as picture:
        if picture.width * picture.height > limits.pixels:
            raise Unreadable(f"has {picture.width}x{picture.height} pixels, {limits.pixels:,} is the most")
        picture.load()


CHECKS: dict[str, Callable[[Path, Limits], object]] = {
    **dict.fromkeys(("png", "jpg", "jpeg", "webp"), _check_picture),
    "safetensors": lambda path, limits: read_header(path),
    **dict.fromkeys(("txt", "yaml", "yml", "jsonl"), lambda path, limits: read_text(path)),
}
"""How a file is looked at, by the ending it claims: pictures and masks, LoRAs, lists of prompts."""

NAME = re.compile(rf"{SCHEME}([0-9a-f]{{64}})\.({'|'.join(CHECKS)})")


class Uploads:
    """The folder of uploaded files. The client's names and paths never reach the disk."""

    schemes = (SCHEME,)

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self._limits = folder, limits
        folder.mkdir(parents=True, exist_ok=True)
        for torn in folder.glob(".*.part"):  # of a server that was killed
            torn.unlink(missing_ok=True)

    async def take(self, ending: str, chunks: AsyncIterator[bytes]) -> str:
        """Keep a file; returns its name. Raises ConfigError for one that is not what its ending says, or TooLarge."""
        if ending not in CHECKS:
            raise ConfigError(f"ending={shorten(ending)}: allowed: {', '.join(CHECKS)}")
        hashed, size = hashlib.sha256(), 0
        part = self.folder / f".{secrets.token_hex(8)}.part"
        try:
            with part.open("wb") as file:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > self._limits.upload:
                        raise TooLarge(f"an upload may have {gigabytes(self._limits.upload)}")
                    hashed.update(chunk)
                    file.write(chunk)
            await asyncio.to_thread(self._check, part, ending)
            part.replace(self.folder / f"{hashed.hexdigest()}.{ending}")
        finally:
            part.unlink(missing_ok=True)
        self._make_room()
        return f"{SCHEME}{hashed.hexdigest()}.{ending}"

    def _check(self, part: Path, ending: str) -> None:
        try:
            CHECKS[ending](part, self._limits)
        except Unreadable as error:
            raise ConfigError(f"the upload {error} (ending={ending})") from error

    def path(self, name: str) -> Path:
        """The file of a name that ``take`` has returned; raises ConfigError for anything else."""
        found = NAME.fullmatch(name)
        path = self.folder / name.removeprefix(SCHEME)
        if not found or not path.is_file():
            raise ConfigError(f"{shorten(name)} was not uploaded, or was removed since: POST /api/files takes files")
        os.utime(path)
        return path

    def _make_room(self) -> None:
        files = sorted((path for path in self.folder.iterdir()), key=lambda path: path.stat().st_mtime_ns)
        used = sum(path.stat().st_size for path in files)
        for path in files[:-1]:
            if used <= self._limits.uploads:
                return
            used -= path.stat().st_size
            path.unlink(missing_ok=True)
