"""fluxrun: declarative, measured FLUX.2 image generation.

``compose([...overrides])`` → RunConfig, ``build(config)`` → an optimized diffusers pipeline and what was applied,
``run(config, folder)`` → the record. Importing the package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
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
        value = getattr(import_module(_LAZY[name]), name)
        # Importing the submodule fluxrun.build binds that name to the module: the function must win.
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fluxrun' has no attribute {name!r}")
