"""Imports a quantization library the way a run needs it, and says how."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any

SDNQ_SWITCH = "SDNQ_USE_TORCH_COMPILE"
"""Read once, at sdnq's import: whether its dequantizers are compiled."""

LIMITS = (
    "recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit",
)  # fmt: skip
"""Of torch._dynamo.config: sdnq raises them for the whole process at its import."""

MANY = 8192
"""What it raises them to."""


def import_library(package: str, device: str) -> dict[str, Any]:
    """Import what reads quantized weights for a run on ``device``; returns what the record is to say of it."""
    if package == "sdnq":
        return _import_sdnq(device)
    importlib.import_module(package)
    return {}


def _import_sdnq(device: str) -> dict[str, Any]:
    """Import sdnq once, and put back what it changes in torch for everybody.

    With compiled dequantizers the import compiles a test function, which on a CPU takes 9 to 50 s and gains nothing
    there. Setting the switch costs a GPU its compiled dequantizers, so it is set for a CPU only; a process keeps what
    its first run has decided.
    """
    if "sdnq" not in sys.modules:
        # Its warnings are about what the plan has decided: no Triton, no OpenVINO.
        logging.getLogger("sdnq").setLevel(logging.ERROR)
        limits = _limits()
        before = os.environ.get(SDNQ_SWITCH)
        if before is None and not device.startswith("cuda"):
            os.environ[SDNQ_SWITCH] = "0"
        try:
            importlib.import_module("sdnq")
        finally:
            _set_limits(limits)
            if before is None:
                os.environ.pop(SDNQ_SWITCH, None)
    allow_recompiling()
    sdnq, common = sys.modules["sdnq"], sys.modules["sdnq.common"]
    return {"sdnq": sdnq.__version__, "dequantizers": "compiled" if common.use_torch_compile else "eager"}


def allow_recompiling() -> None:
    """Give sdnq's compiled functions a graph for each shape of a layer, until the run puts its switches back.

    From torch 2.12 on sdnq asks for that function by function. Before, it needs the limits of the whole process: its
    functions are compiled as one graph each, and then the ninth shape is an error.
    """
    common = sys.modules["sdnq.common"]
    if common.use_torch_compile and tuple(common.torch_version) < (2, 12):
        _set_limits({name: max(value, MANY) for name, value in _limits().items()})


def _limits() -> dict[str, int]:
    config = importlib.import_module("torch._dynamo.config")
    return {name: getattr(config, name) for name in LIMITS if hasattr(config, name)}


def _set_limits(limits: dict[str, int]) -> None:
    config = importlib.import_module("torch._dynamo.config")
    for name, value in limits.items():
        setattr(config, name, value)
