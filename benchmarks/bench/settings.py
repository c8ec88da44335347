"""What is compared: plain diffusers recipes, fluxrun with overrides, and the models. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

REFERENCE = "plain"
"""Plain diffusers, eager: what every ratio and every error is taken against."""


@dataclass(frozen=True)
class Setting:
    """One thing to measure: fluxrun with overrides, or a plain diffusers recipe."""

    name: str
    overrides: str = ""
    """As they are typed, with spaces between."""
    recipe: str | None = None
    """A recipe of ``bench.plain.RECIPES``; None is fluxrun."""


PLAIN = Setting(REFERENCE, recipe="eager")
LOSSLESS = Setting("h100_lossless", "+preset=h100_lossless")
FAST = Setting("h100_fast", "+preset=h100_fast")
NEUTRAL, REGIONAL = Setting("neutral"), Setting("regional", "compile=regional")
PLAIN_REGIONAL = Setting("plain_regional", recipe="regional")
PRESETS = (PLAIN, PLAIN_REGIONAL, LOSSLESS, FAST)

Models = dict[str, tuple[str, ...]]
MODELS: Models = {name: (f"model=flux2_{name}", "model.weights=random") for name in ("klein_4b", "klein_9b", "dev")}
TINY = ("model=tiny", "height=64", "width=64", "model.max_sequence_length=32")
TINY_MODELS: Models = {name: (*TINY, "model.pipeline=dev") if name == "dev" else TINY for name in MODELS}
"""What stands for each model in a dry run: its pipeline class, nothing of its size."""


class Kept:
    """What ``--keep`` asks for: comma-separated names, and settings of its own as ``name: override override …``."""

    def __init__(self, texts: Sequence[str] = ()) -> None:
        new = [text.partition(":") for text in texts if ":" in text]
        self.added = [Setting(name.strip(), overrides.strip()) for name, _, overrides in new]
        named = [name for text in texts if ":" not in text for name in text.split(",")]
        self._names = {REFERENCE, *named, *(setting.name for setting in self.added)} if texts else None

    def has(self, name: str) -> bool:
        """Whether it is asked for, as is plain diffusers; a name's own commas cannot be typed and do not count."""
        return self._names is None or name.replace(",", "") in self._names
