"""What this computer has, as a plain value: read in milliseconds, without torch, and easy to fake in a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from packaging.version import InvalidVersion, Version

from fluxrun.formatting import GIB

CONTEXT_BYTES = GIB // 2
"""What a process takes of a GPU outside torch's allocator: the CUDA context, kernels, cuBLAS's own buffers."""

PROCESS_BYTES = 4 * GIB
"""What a process with torch and diffusers takes of the computer's own memory besides the weights."""


@dataclass(frozen=True)
class Gpu:
    """One accelerator. Memory in bytes; ``capability`` is CUDA's (major, minor)."""

    name: str
    memory_bytes: int
    free_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that torchrun has started."""

    rank: int
    local_rank: int
    """The same among those on this machine, which is the number of its GPU."""
    size: int
    """How many there are."""


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
    place: Place | None = None
    """This process among torchrun's; None outside of it."""

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
        if minimum and _release(version) < _release(minimum):
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
        """The same machine, with the run on ``device``; each of torchrun's processes has a GPU of its own."""
        chosen = self.default_device() if device == "auto" else device
        if chosen == "cuda" and self.place is not None:
            chosen = f"cuda:{self.place.local_rank}"
        return replace(self, device=chosen)

    def with_free_bytes(self, free: int) -> Machine:
        """The same machine, with so much left of the run's GPU."""
        gpus = [replace(gpu, free_bytes=free) if gpu is self.gpu else gpu for gpu in self.gpus]
        return replace(self, gpus=tuple(gpus))


def _release(version: str) -> Version:
    """A version without what follows its numbers: a nightly build of 2.11 is 2.11. What is no version is the oldest."""
    try:
        return Version(Version(version).base_version)
    except InvalidVersion:
        return Version("0")
