"""Versions and hardware, as every record and image carries them."""

from __future__ import annotations

import functools
import subprocess
from typing import Any

from fluxrun.hardware.machine import Machine
from fluxrun.paths import PACKAGE
from fluxrun.version import __version__


def environment(machine: Machine) -> dict[str, Any]:
    """Versions and hardware, as every record and image carries them."""
    gpu = machine.gpu
    return {
        "fluxrun": __version__,
        "git_commit": git_commit(),
        "python": machine.python,
        "platform": machine.platform,
        "device": machine.device,
        "cpu": machine.cpu,
        "cpu_count": machine.cpu_count,
        "ram_bytes": machine.ram_bytes,
        "gpu": gpu.name if gpu else None,
        "gpu_memory_bytes": gpu.memory_bytes if gpu else None,
        "gpus": [found.name for found in machine.gpus],
        "driver": machine.driver,
        "cuda": machine.torch_cuda,
        **{name.replace("-", "_"): version for name, version in machine.packages.items()},
    }


@functools.cache
def git_commit() -> str | None:
    """The commit of the source checkout fluxrun runs from, or None for an installed package; looked up once."""
    root = PACKAGE.parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
