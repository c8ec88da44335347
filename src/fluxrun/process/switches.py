"""Process-wide switches of torch and diffusers: read once, put back when a run is over.

Without this a baseline after a fast job in the same process is not a baseline: diffusers' active attention
backend, inductor's config, TF32 and cuDNN flags all outlive the pipeline they were set for.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

log = logging.getLogger("fluxrun.state")

WATCHED_ENVIRONMENT = ("TORCHINDUCTOR_CACHE_DIR", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "DIFFUSERS_ATTN_BACKEND")

CONFIG_MODULES = ("torch._dynamo.config", "torch._inductor.config")
"""Watched unless a lean start has left torch's compiler out."""


def import_diffusers() -> dict[str, str]:
    """Import diffusers even beside a broken attention library; returns {distribution: why it is broken}.

    diffusers imports xformers at its own import when it is installed, and xformers beside flash-attn-4 dies with
    a ModuleNotFoundError nobody catches. A library that cannot be imported is hidden from diffusers.
    """
    _quiet_libraries()
    from diffusers.utils import import_utils

    broken: dict[str, str] = {}
    if import_utils._xformers_available:  # not where a lean start has hidden it already
        try:
            importlib.import_module("xformers.ops")
        except Exception as error:  # whatever it throws: it is reported, and the library hidden
            broken["xformers"] = f"import xformers.ops fails: {type(error).__name__}: {error}".splitlines()[0]
            log.warning("xformers is installed but broken, hidden from diffusers (%s)", broken["xformers"])
            import_utils._xformers_available = False
    importlib.import_module("diffusers.models.attention_dispatch")
    return broken


def _quiet_libraries() -> None:
    """Send the libraries' own lines to the log file only: on the screen they bury what fluxrun says."""
    logging.captureWarnings(True)
    # Said once per import of torchao beside a newer torch; of no use to anyone who runs a pipeline.
    for name in ("torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for library in ("diffusers", "transformers"):
        switches = importlib.import_module(f"{library}.utils.logging")
        switches.disable_default_handler()
        switches.enable_propagation()


class ProcessState:
    """Snapshot on entering, restore on leaving. ``restore`` may also be called in between."""

    def __enter__(self) -> ProcessState:
        self._before = snapshot()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Put back everything that differs from the snapshot."""
        now = snapshot()
        for key in self._before.keys() | now.keys():
            if now.get(key) != self._before.get(key):
                _put_back(key, self._before.get(key))

    def use_device(self, device: str) -> None:
        """Make a GPU that is chosen by number torch's current one.

        Plain "cuda", Triton's kernels and CUDA graphs mean the current one, wherever the tensors are.
        """
        import torch

        chosen = torch.device(device)
        if chosen.type == "cuda" and chosen.index is not None:
            torch.cuda.set_device(chosen.index)

    def activate_flash_attention(self, implementation: str) -> None:
        """Switch torch's own flash backend to another generation (``FA3``, ``FA4``)."""
        import torch

        torch.nn.attention.activate_flash_attention_impl(implementation)

    @contextlib.contextmanager
    def flash_attention(self, implementation: str | None) -> Iterator[None]:
        """The same for one measurement; None leaves torch's own kernel."""
        import torch

        if implementation is None:
            yield
            return
        before = torch.nn.attention.current_flash_attention_impl()
        self.activate_flash_attention(implementation)
        try:
            yield
        finally:
            _set_flash_attention(before)


def snapshot() -> dict[str, Any]:
    """Every watched switch by a flat name."""
    state = {name: read() for name, (read, _) in _switches().items()}
    state |= {f"environment.{name}": os.environ.get(name) for name in WATCHED_ENVIRONMENT}
    for module in CONFIG_MODULES if _has_compiler() else ():
        values = importlib.import_module(module).get_config_copy()
        state |= {f"{module}:{key}": value for key, value in values.items()}
    return state


def _has_compiler() -> bool:
    """Whether torch's compiler can be imported: a lean start may have put something else, no package, in its place."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is None or hasattr(dynamo, "__path__")


def _put_back(key: str, value: Any) -> None:
    if key.startswith("environment."):
        name = key.partition(".")[2]
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    elif ":" in key:
        module, _, name = key.partition(":")
        setattr(importlib.import_module(module), name, value)
    else:
        _switches()[key][1](value)


def _switches() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Each switch with the function that reads it and the one that sets it."""
    import torch
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn

    def cudnn_flag(name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        return lambda: getattr(cudnn, name), lambda value: setattr(cudnn, name, value)

    return {
        "diffusers_backend": (lambda: registry._active_backend, registry.set_active_backend),
        "flash_attention": (torch.nn.attention.current_flash_attention_impl, _set_flash_attention),
        "matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        "default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
        "num_threads": (torch.get_num_threads, torch.set_num_threads),
        "deterministic": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
        "cudnn.benchmark": cudnn_flag("benchmark"),
        "cudnn.deterministic": cudnn_flag("deterministic"),
        "cudnn.allow_tf32": cudnn_flag("allow_tf32"),
        "sdp.flash": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        "sdp.mem_efficient": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        "sdp.math": (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        "sdp.cudnn": (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        "cuda.device": (_current_device, _set_current_device),
        "cuda.memory_share": (_memory_shares, _set_memory_shares),
    }


def _current_device() -> int | None:
    """torch's current GPU; None while this process uses none: asking would begin."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _set_current_device(number: int | None) -> None:
    import torch

    if torch.cuda.is_initialized():
        # Not set_device: on a GPU that this process does not use yet that would take some hundred MB at once.
        torch.cuda._maybe_exchange_device(number or 0)


def _memory_shares() -> tuple[float, ...] | None:
    """The share of each GPU that torch's allocator may take; None while this process uses none: asking would begin."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    return tuple(torch.cuda.get_per_process_memory_fraction(n) for n in range(torch.cuda.device_count()))


def _set_memory_shares(shares: tuple[float, ...] | None) -> None:
    import torch

    if not torch.cuda.is_initialized():
        return
    for number in range(torch.cuda.device_count()):
        share = shares[number] if shares else 1.0
        if torch.cuda.get_per_process_memory_fraction(number) != share:
            with torch.cuda.device(number):  # setting a GPU's share leaves it the current one
                torch.cuda.set_per_process_memory_fraction(share, number)


def _set_flash_attention(implementation: str | None) -> None:
    import torch

    torch.nn.attention.restore_flash_attention_impl()
    if implementation is not None:
        torch.nn.attention.activate_flash_attention_impl(implementation)
