"""What a measurement was taken on: versions, and the GPU's clocks, power and temperature, read and never set."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "torchao",
    "cache-dit",
    "xformers",
    "nvidia-cudnn-frontend",
)
GPU_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
    "memory.used",
    "memory.total",
    "clocks_event_reasons.active",
)


def versions() -> dict[str, str | None]:
    """Installed versions of what the speed depends on, Python's, and the commit measured."""
    found: dict[str, str | None] = {"python": platform.python_version(), "git_commit": _commit()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpu_state() -> dict[str, Any]:
    """The first GPU as nvidia-smi sees it now; without one, only the time and why."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        done = _nvidia_smi(GPU_FIELDS) or _nvidia_smi(GPU_FIELDS[:-1])  # older drivers call the last one otherwise
    except OSError as error:
        return {"at": now, "gpu": None, "why": f"{type(error).__name__}: {error}"[:200]}
    if not done:
        return {"at": now, "gpu": None, "why": "nvidia-smi refused the query"}
    values = [value.strip() for value in done.splitlines()[0].split(",")]
    return {"at": now, **dict(zip(GPU_FIELDS, values, strict=False))}


def _nvidia_smi(fields: Sequence[str]) -> str:
    """What nvidia-smi says about these fields; nothing when it refuses."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def gpu_memory_gb(state: dict[str, Any]) -> float | None:
    """GB (2**30 bytes) of the GPU that nobody uses; None without a GPU."""
    total, used = state.get("memory.total"), state.get("memory.used")
    return None if total is None or used is None else (float(total) - float(used)) / 1024


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
