"""What is compared: plain diffusers recipes, fluxrun with overrides, and the models. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

REFERENCE = "plain"
"""Plain diffusers, eager: what every ratio and every error is taken against."""


@dataclass(frozen=True)
class Setting:
    """One thing to measure: a plain diffusers recipe (``bench.plain``), or fluxrun with overrides."""

    name: str
    overrides: tuple[str, ...] = ()
    recipe: str | None = None
    """A recipe of ``bench.plain.RECIPES``; None is fluxrun."""
    turns: int = 0
    """Turns where a section's own number would take too long (0: the section's)."""


def plain(recipe: str) -> Setting:
    """Plain diffusers with a recipe applied."""
    return Setting(f"plain_{recipe}", recipe=recipe)


def fluxrun(name: str, *overrides: str) -> Setting:
    """fluxrun with these overrides."""
    return Setting(name, overrides)


PLAIN = Setting(REFERENCE, recipe="eager")
LOSSLESS = fluxrun("h100_lossless", "+preset=h100_lossless")
FAST = fluxrun("h100_fast", "+preset=h100_fast")
PRESETS = (PLAIN, plain("regional"), LOSSLESS, FAST)

Models = dict[str, tuple[str, ...]]
NAMES = ("klein_4b", "klein_9b", "dev")
MODELS: Models = {name: (f"model=flux2_{name}", "model.weights=random") for name in NAMES}
TINY = ("model=tiny", "height=64", "width=64", "model.max_sequence_length=32")
TINY_MODELS: Models = {name: (*TINY, "model.pipeline=dev") if name == "dev" else TINY for name in MODELS}
"""What stands for each model in a dry run: its pipeline class, nothing of its size."""


class Kept:
    """What ``--keep`` asks for: comma-separated names, and settings of its own as ``name: override override …``."""

    def __init__(self, texts: Sequence[str] = ()) -> None:
        new = [text.partition(":") for text in texts if ":" in text]
        self.added = [fluxrun(name.strip(), *overrides.split()) for name, _, overrides in new]
        named = [name for text in texts if ":" not in text for name in text.split(",")]
        self._names = {REFERENCE, *named, *(setting.name for setting in self.added)} if texts else None

    def has(self, name: str) -> bool:
        """Whether it is asked for, as is plain diffusers; a name's own commas cannot be typed and do not count."""
        return self._names is None or name.replace(",", "") in self._names
