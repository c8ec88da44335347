"""What comes with torchao though quantizing for inference uses none of it: training, sparsity, many processes.

Only beside the stand-in for torch's compiler, which imports most of it itself. Then no checkpoint of the run is
torchao's: fluxrun quantizes, and what diffusers and transformers load such checkpoints with is left out as well.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fluxrun.startup.dynamo import module

NAME = "torchao"

VERSIONS = ("0.18.",)
"""Whose imports are known; beside another one torch's compiler is imported as ever."""

LAZY_PACKAGES = ("torchao.kernel",)

DEFERRED = ("torchao.kernel.intmm_triton", "torchao.optim", "torchao.swizzle", "torchao.testing")

CHECKPOINTS = "diffusers.quantizers.torchao.torchao_quantizer"
"""What diffusers loads torchao's checkpoints with."""

DISTRIBUTED = ("torch.distributed.tensor", "torch.distributed._tensor")
"""Both names of the module of ``DTensor``, which brings sympy. torch itself asks for the class, once, when it first
meets a tensor of another class than its own, such as torchao's."""


class DTensor:
    """A tensor spread over many processes, for ``isinstance``: no option makes any."""


def is_known() -> bool:
    """Whether this torchao can do without torch's compiler."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(NAME).startswith(VERSIONS)
    return False


@contextmanager
def unavailable() -> Iterator[None]:
    """Within: diffusers takes torchao for not installed. Its hooks, which ask later, know torchao's tensors."""
    utils = sys.modules["diffusers.utils.import_utils"]
    utils._torchao_available = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils._torchao_available = True  # type: ignore[attr-defined]


def install() -> None:
    """Answer for ``DTensor``, for as long as the process lives."""
    for name in DISTRIBUTED:
        if name not in sys.modules:
            sys.modules[name] = module(name, DTensor=DTensor)
