"""The modules of integrations/comfyui without ComfyUI: the folder as a package, its ``__init__`` left out."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "integrations" / "comfyui"

PACKAGE = "fluxrun_comfyui"


def module(name: str) -> Any:
    """A module of the node that needs nothing of ComfyUI's."""
    if PACKAGE not in sys.modules:
        package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
        package.__path__ = [str(FOLDER)]
    return importlib.import_module(f"{PACKAGE}.{name}")
