"""What diffusers and transformers are told while they are imported, so that they import less of other libraries."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# --- libraries that are not there -------------------------------------------------------------------------------------


TORCHS = frozenset({"torch_distributed", "torch_flex_attn"})
"""Parts of torch that transformers asks for as it does for libraries; they bring sympy with them."""


def hide_from_diffusers(names: frozenset[str], module: ModuleType) -> None:
    """Tell diffusers (its ``utils.import_utils``) that these are not installed."""
    for name in names:
        if hasattr(module, f"_{name}_available"):
            setattr(module, f"_{name}_available", False)


def hide_from_transformers(names: frozenset[str], module: ModuleType) -> None:
    """The same for transformers, which looks when it is asked."""
    look: Callable[..., tuple[bool, str | None]] = module._is_package_available

    @functools.wraps(look)
    def hidden(pkg_name: str, return_version: bool = False) -> tuple[bool, str | None]:
        return (False, "N/A" if return_version else None) if pkg_name in names else look(pkg_name, return_version)

    module._is_package_available = hidden  # type: ignore[attr-defined]
    for name in names & TORCHS:
        setattr(module, f"is_{name}_available", _no)


def _no() -> bool:
    return False


# --- what takes long to find out --------------------------------------------------------------------------------------


class DistributionsLater(Mapping[str, list[str]]):
    """``packages_distributions()`` once somebody looks into it: it reads the file lists of all that is installed."""

    def __init__(self, find: Callable[[], Mapping[str, list[str]]]) -> None:
        self._find = functools.cache(find)

    def __getitem__(self, name: str) -> list[str]:
        return self._find()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._find())

    def __len__(self) -> int:
        return len(self._find())


@contextmanager
def distributions_later() -> Iterator[None]:
    """Within: ``importlib.metadata.packages_distributions`` answers at once, and looks later."""
    find: Any = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: DistributionsLater(find)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = find
