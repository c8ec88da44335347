"""The device's clock and memory: waiting for it, its use and peak, giving cached memory back."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path


def free_memory() -> None:
    """Collect what nothing refers to and give cached device memory back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def takes_work_ahead(device: str) -> bool:
    """Whether a device takes work while it is still at something else, and the process goes on."""
    return device.startswith("cuda")


def used_bytes(device: str) -> int:
    """Memory in use now, in bytes: allocated on a GPU, resident set size of the process on a CPU."""
    import psutil
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def reset_peak(device: str) -> None:
    """Start measuring peak memory anew: a run after another one in the same process has a peak of its own."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # Linux only; elsewhere the peak is the process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Peak memory in bytes: allocated on a GPU since the last call, resident set size of the process on a CPU."""
    import torch

    if device.startswith("cuda"):
        # Of torch's statistics one is wanted; max_memory_allocated lays out all of them, at each of a picture's stages.
        peak = int(torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["peak"])
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    import resource  # not on Windows, where no GPU run needs it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_lost(device: str) -> bool:
    """Whether the device answers no more: after an illegal access a process cannot use its CUDA context again."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False
