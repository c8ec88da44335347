"""What this computer has, found out in milliseconds and without torch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
import re
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from fluxrun.hardware.machine import Gpu, Machine, Place
from fluxrun.hardware.proofs import remembered

# Distributions an option may need, by the name pip knows them.
LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "torchao", "torchvision", "xformers", "flash-attn",
    "flash-attn-3", "flash-attn-4", "sageattention", "kernels", "triton", "sdnq", "gguf", "bitsandbytes", "cache-dit",
    "hydra-core", "nvidia-cudnn-frontend", "peft", "omegaconf", "pydantic", "huggingface-hub", "safetensors", "pillow",
    "numpy", "isal",
)  # fmt: skip

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's memory limit stands, in versions 2 and 1."""


def installed() -> dict[str, str]:
    """Versions of the installed ones among LIBRARIES, without importing any; read again when a folder has changed."""
    return dict(_installed(tuple(map(_changed, sys.path))))


def _changed(folder: str) -> tuple[str, int]:
    """A folder of modules and when something was last put into it or taken out."""
    try:
        return folder, os.stat(folder or os.curdir).st_mtime_ns
    except OSError:
        return folder, 0


@functools.lru_cache(maxsize=1)
def _installed(folders: tuple[tuple[str, int], ...]) -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _torch_cuda() -> str | None:
    """torch's CUDA version, read from its version file: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text()
    match = re.search(r"^cuda.*=\s*'([^']+)'", text, re.MULTILINE)
    return match.group(1) if match else None


def _nvml() -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs and driver version as NVML tells them; honours CUDA_VISIBLE_DEVICES given as numbers."""
    pynvml = _started_nvml()
    if pynvml is None:
        return (), None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = list(range(pynvml.nvmlDeviceGetCount()))
    if visible is not None:
        wanted = [part.strip() for part in visible.split(",") if part.strip()]
        if all(part.lstrip("-").isdigit() for part in wanted):
            numbers = [int(part) for part in wanted if int(part) in numbers]
    gpus: list[Gpu] = []
    for number in numbers:
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = pynvml.nvmlDeviceGetName(handle)
        capability = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        free = min(int(memory.total), int(memory.free) + own_bytes(len(gpus)))
        gpus.append(Gpu(str(name), int(memory.total), free, (int(capability[0]), int(capability[1]))))
    return tuple(gpus), str(pynvml.nvmlSystemGetDriverVersion())


@functools.cache
def _started_nvml() -> Any | None:
    """NVML, started once in a process: each run asks for the memory that is free by then. None without a driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None  # a machine without NVIDIA GPUs
    return pynvml


def own_bytes(index: int) -> int:
    """What this process itself holds of a GPU: an earlier job's weights are freed, or used again, by the next."""
    torch = sys.modules.get("torch")  # not imported for this: a process that has not, holds nothing
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_reserved(index))


def ram_bytes() -> int:
    """The computer's memory, or the container's limit where that is less."""
    if not (hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names):
        return 0  # unknown (Windows): nothing is then said about it
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such cgroup, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1) if match else platform.machine()


def cxx_compiler() -> str | None:
    """The C++ compiler inductor would use: ``$CXX``, else the usual names on the PATH."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def place() -> Place | None:
    """Where torchrun has put this process; None where something else has started it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return Place(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))


def detect() -> Machine:
    """This computer, with the run on its default device; remembered proofs included."""
    gpus, driver = _nvml()
    machine = Machine(
        platform=sys.platform,
        python=platform.python_version(),
        cpu=_cpu_name(),
        cpu_count=os.cpu_count() or 1,
        ram_bytes=ram_bytes(),
        gpus=gpus,
        driver=driver,
        torch_cuda=_torch_cuda(),
        mps=sys.platform == "darwin" and platform.machine() == "arm64",
        cxx_compiler=cxx_compiler(),
        packages=installed(),
        place=place(),
    )
    machine = replace(machine, proven=remembered(machine))
    return machine.on("auto")
