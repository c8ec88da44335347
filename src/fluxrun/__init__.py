"""fluxrun: declarative, measured FLUX.2 image generation.

``compose([...overrides])`` → RunConfig, ``build(config)`` → an optimized diffusers pipeline and what was applied,
``run(config, folder)`` → the record. Importing the package imports no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fluxrun.build import build as build
    from fluxrun.compose import compose as compose
    from fluxrun.config import Option as Option
    from fluxrun.config import RunConfig as RunConfig
    from fluxrun.runner import run as run

_LAZY = {
    "build": "fluxrun.build",
    "compose": "fluxrun.compose",
    "Option": "fluxrun.config",
    "RunConfig": "fluxrun.config",
    "run": "fluxrun.runner",
}
__all__ = ["Option", "RunConfig", "__version__", "build", "compose", "run"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fluxrun' has no attribute {name!r}")


class _Package(ModuleType):
    """Importing a submodule binds its name in the package; ``fluxrun.build`` and ``fluxrun.compose`` stay functions."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
