"""The headers of safetensors files: which tensors there are, checked before anything is allocated for them."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from fluxrun.reading import Unreadable, parse_json
from fluxrun.types import JsonObject

MOST_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""


class Tensor(NamedTuple):
    """One tensor of a file."""

    shape: tuple[int, ...]
    bytes: int


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name. Raises Unreadable where the file cannot be whole."""
    return read_whole_header(file)[0]


def read_whole_header(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and what its writer noted beside them. Raises as ``read_header``."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise Unreadable("is a Git LFS pointer, not the weights (git lfs pull)")
            if len(start) < 8 or length > size - 8:
                raise Unreadable(f"is truncated ({size:,} bytes)")
            if length > MOST_HEADER_BYTES:
                raise Unreadable(f"is not a safetensors file: a header of {length:,} bytes")
            text = stream.read(length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable("is not a safetensors file: its header is no text") from error
    except OSError as error:
        raise error if isinstance(error, Unreadable) else Unreadable(f"cannot be read: {error.strerror}") from error
    header = _parsed(text)
    noted = header.pop("__metadata__", None)
    tensors, ends = _tensors(header)
    expected = 8 + length + ends
    if size < expected:
        raise Unreadable(f"is truncated ({size:,} of {expected:,} bytes)")
    return tensors, noted if isinstance(noted, dict) else {}


def is_special(file: Path) -> bool:
    """Whether something is there that is neither a file nor a folder: a pipe or a device, which may never answer."""
    try:
        mode = os.stat(file).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _parsed(text: str) -> dict[str, Any]:
    try:
        header = parse_json(text)
    except Unreadable as error:
        raise Unreadable(f"is not a safetensors file: its header {error}") from error
    if not isinstance(header, dict):
        raise Unreadable("is not a safetensors file: its header is no JSON object")
    return header


def _tensors(header: JsonObject) -> tuple[dict[str, Tensor], int]:
    """The tensors, and where the last one ends."""
    tensors, last = {}, 0
    for name, entry in header.items():
        shape, offsets = (entry.get("shape"), entry.get("data_offsets")) if isinstance(entry, dict) else (None, None)
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise Unreadable(f"is not a safetensors file: tensor {name[:100]!r} has no proper shape and offsets")
        if math.prod(shape) > 8 * (offsets[1] - offsets[0]):  # no number takes less than a bit
            raise Unreadable(f"is not whole: tensor {name[:100]!r} is smaller than its shape {shape}")
        tensors[name] = Tensor(tuple(shape), offsets[1] - offsets[0])
        last = max(last, offsets[1])
    return tensors, last


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def missing_tensors(weight_map: dict[str, str], headers: Mapping[str, Collection[str]]) -> list[tuple[str, str]]:
    """(file, tensor) of every tensor that a shard index promises and its file does not have."""
    return [(file, name) for name, file in weight_map.items() if file in headers and name not in headers[file]]
