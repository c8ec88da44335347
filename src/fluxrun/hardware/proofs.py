"""Results of real kernel calls made earlier, by versions, driver and GPUs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from fluxrun.atomic import write_atomically
from fluxrun.hardware.machine import Machine, Proof
from fluxrun.paths import cache_dir
from fluxrun.reading import parse_json, read_text

log = logging.getLogger("fluxrun.hardware")

PROBED_PACKAGES = (
    "torch",
    "diffusers",
    "xformers",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "sageattention",
    "kernels",
    "nvidia-cudnn-frontend",
)


def fingerprint(machine: Machine) -> str:
    """What a proof depends on: library versions, driver and GPUs."""
    versions = {name: machine.packages.get(name) for name in PROBED_PACKAGES}
    parts = [machine.python, machine.driver, [gpu.name for gpu in machine.gpus], versions]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def remembered(machine: Machine) -> Mapping[str, Proof]:
    """Proofs made earlier with the same versions, driver and GPUs."""
    try:
        stored = parse_json(read_text(_file(machine)))
        return {name: Proof(**proof) for name, proof in stored.items()}
    except (OSError, TypeError, AttributeError):  # no such file, or one that something else has written
        return {}


def remember(machine: Machine, name: str, proof: Proof) -> None:
    """Add a proof to the remembered ones."""
    proofs = {**remembered(machine), name: proof}
    file = _file(machine)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({key: vars(value) for key, value in proofs.items()}, indent=1))
    except OSError as error:
        log.warning("%s cannot be written (%s): kernels are probed again next time", file, error.strerror)


def _file(machine: Machine) -> Path:
    return cache_dir() / "probes" / f"{fingerprint(machine)}.json"
