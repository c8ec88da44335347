"""fluxrun: declarative, measured FLUX.2 image generation.

``compose([...overrides])`` → RunConfig, ``build(config)`` → an optimized diffusers pipeline and what was applied,
``run(config, folder)`` → the record. Importing the package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fluxrun.version import __version__

if TYPE_CHECKING:
    from fluxrun.config.composition import compose as compose
    from fluxrun.config.schema import RunConfig as RunConfig
    from fluxrun.options.base import Option as Option
    from fluxrun.runner import build as build
    from fluxrun.runner import run as run

_LAZY = {
    "build": "fluxrun.runner",
    "compose": "fluxrun.config.composition",
    "Option": "fluxrun.options.base",
    "RunConfig": "fluxrun.config.schema",
    "run": "fluxrun.runner",
}
__all__ = ["Option", "RunConfig", "__version__", "build", "compose", "run"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fluxrun' has no attribute {name!r}")
