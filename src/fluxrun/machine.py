"""What this computer has, as a plain value: read in milliseconds, without torch, and easy to fake in a test."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

GIB = 2**30

# Distributions an option may need, by the name pip knows them.
LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "torchao", "torchvision", "xformers", "flash-attn",
    "flash-attn-3", "flash-attn-4", "sageattention", "kernels", "triton", "sdnq", "cache-dit", "hydra-core",
    "nvidia-cudnn-frontend", "omegaconf", "pydantic", "huggingface-hub", "safetensors", "pillow", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """One accelerator. Memory in bytes; ``capability`` is CUDA's (major, minor)."""

    name: str
    memory_bytes: int
    free_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Proof:
    """What one real kernel call in a child process showed: ``reason`` is None when it worked."""

    reason: str | None
    measured_at: str


@dataclass(frozen=True)
class Machine:
    """A computer and the part of it that this run uses (``device``). Sizes in bytes."""

    platform: str = "linux"
    python: str = "3.11"
    cpu: str = "unknown"
    cpu_count: int = 1
    ram_bytes: int = 8 * GIB
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    torch_cuda: str | None = None
    """CUDA version torch was built for; None for a CPU build."""
    mps: bool = False
    cxx_compiler: str | None = None
    """The C++ compiler torch.compile needs on a CPU."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Installed versions of the libraries that options may use."""
    proven: Mapping[str, Proof] = field(default_factory=dict)
    """Remembered results of real kernel calls, by probe name (see ``fluxrun.probe``)."""
    device: str = "cpu"

    @property
    def accelerated(self) -> bool:
        """Whether this run uses an accelerator with memory of its own."""
        return self.device.startswith("cuda")

    @property
    def gpu(self) -> Gpu | None:
        """The CUDA GPU this run uses, or None."""
        if not self.accelerated:
            return None
        index = int(self.device.partition(":")[2] or 0)
        return self.gpus[index] if index < len(self.gpus) else None

    def lacks(self, package: str, minimum: str | None = None) -> str | None:
        """Why ``package`` (at least version ``minimum``) cannot be used, or None."""
        version = self.packages.get(package)
        wanted = f"{package}>={minimum}" if minimum else package
        if version is None:
            return f"{package} is not installed (pip install '{wanted}')"
        if minimum and version_tuple(version) < version_tuple(minimum):
            return f"{package} {version} is too old (pip install '{wanted}')"
        return None

    def needs_cuda(self, minimum: tuple[int, int] | None = None) -> str | None:
        """Why a CUDA kernel cannot run on this run's device, or None."""
        gpu = self.gpu
        if gpu is None:
            return f"needs a CUDA GPU; this run is on {self.device}"
        if minimum and gpu.capability < minimum:
            have, want = (".".join(map(str, c)) for c in (gpu.capability, minimum))
            return f"needs compute capability {want}; {gpu.name} has {have}"
        return None

    def default_device(self) -> str:
        """The device ``device=auto`` means here."""
        return "cuda" if self.gpus and self.torch_cuda else "mps" if self.mps else "cpu"

    def lacks_device(self, device: str) -> str | None:
        """Why ``device`` (cpu, cuda, cuda:N, mps) is not there, or None."""
        if device == "mps":
            return None if self.mps else "this machine has no Apple GPU"
        if not device.startswith("cuda"):
            return None
        if not self.gpus:
            return "this machine has no NVIDIA GPU that its driver answers for"
        if not self.torch_cuda:
            return f"torch {self.packages.get('torch', '?')} is a CPU build"
        index = int(device.partition(":")[2] or 0)
        return None if index < len(self.gpus) else f"this machine has {len(self.gpus)} GPU(s), numbered from 0"

    def on(self, device: str) -> Machine:
        """The same machine, with the run on ``device``."""
        return replace(self, device=self.default_device() if device == "auto" else device)


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparisons: ``2.11.0+cu130`` → (2, 11, 0)."""
    match = re.match(r"[\d.]+", version)
    return tuple(int(part) for part in match.group().strip(".").split(".")) if match else ()


def installed(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Versions of the installed ones among ``names``, without importing any."""
    found = {}
    for name in names:
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
    try:
        import pynvml
    except ImportError:
        return (), None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return (), None  # no driver: a machine without NVIDIA GPUs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = range(pynvml.nvmlDeviceGetCount())
    if visible is not None:
        wanted = [part.strip() for part in visible.split(",") if part.strip()]
        if all(part.lstrip("-").isdigit() for part in wanted):
            numbers = [int(part) for part in wanted if int(part) in numbers]  # type: ignore[assignment]
    gpus: list[Gpu] = []
    for number in numbers:
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = pynvml.nvmlDeviceGetName(handle)
        capability = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        free = min(int(memory.total), int(memory.free) + _own_bytes(len(gpus)))
        gpus.append(Gpu(str(name), int(memory.total), free, (int(capability[0]), int(capability[1]))))
    driver = str(pynvml.nvmlSystemGetDriverVersion())
    pynvml.nvmlShutdown()
    return tuple(gpus), driver


def _own_bytes(index: int) -> int:
    """What this process itself holds of a GPU: an earlier job's weights are freed, or used again, by the next."""
    torch = sys.modules.get("torch")  # not imported for this: a process that has not, holds nothing
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_reserved(index))


CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's memory limit stands, in versions 2 and 1."""


def _ram_bytes() -> int:
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


def detect() -> Machine:
    """This computer, with the run on its default device; remembered proofs included."""
    from fluxrun.probe import remembered

    gpus, driver = _nvml()
    machine = Machine(
        platform=sys.platform,
        python=platform.python_version(),
        cpu=_cpu_name(),
        cpu_count=os.cpu_count() or 1,
        ram_bytes=_ram_bytes(),
        gpus=gpus,
        driver=driver,
        torch_cuda=_torch_cuda(),
        mps=sys.platform == "darwin" and platform.machine() == "arm64",
        cxx_compiler=cxx_compiler(),
        packages=installed(),
    )
    machine = replace(machine, proven=remembered(machine))
    return machine.on("auto")
