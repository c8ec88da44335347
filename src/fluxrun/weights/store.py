"""Loaded weights by key, kept for the runs of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from fluxrun.offload.pinning import Pins
from fluxrun.options.model import Flux2Model
from fluxrun.process.device import free_memory
from fluxrun.types import Pipeline

Part = Literal["all", "text", "image"]


@dataclass(frozen=True)
class WeightsKey:
    """What must agree for loaded weights to be used again."""

    source: str
    revision: str | None
    variant: str | None
    distilled: bool | None
    """Not about the weights, but the pipeline that holds them keeps it: guidance would silently stay off."""
    dtype: str
    quantization: str
    placement: str
    part: Part
    text_layers: str = "all"
    share: str = "all"
    """Which share of the transformer's weights, where each of several GPUs has one."""

    @classmethod
    def of(
        cls, model: Flux2Model, *, dtype: str, device: str, part: Part = "all", quantization: str = "none",
        share: str = "all",
    ) -> WeightsKey:  # fmt: skip
        """The key of ``model`` loaded as ``dtype`` onto ``device``; ``quantization``: option and knobs."""
        read, layers = model.text_encoder_out_layers, str(model.text_encoder_layers)
        return cls(
            model.source(), model.revision, model.variant, model.distilled, dtype, quantization, device, part,
            layers if read is None else f"{layers} for {read}", share,
        )  # fmt: skip

    def difference(self, other: WeightsKey) -> str:
        """The parts that differ, for example ``dtype bfloat16 → float16``; empty when none does."""
        pairs = ((f.name, getattr(other, f.name), getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{name} {old} → {new}" for name, old, new in pairs if old != new)


@dataclass(frozen=True)
class Base:
    """Loaded weights in an ordinary pipeline that is never called: pictures are drawn by its shells."""

    pipeline: Pipeline
    facts: dict[str, Any]
    bytes: int
    """Bytes of all weights and buffers, shared storages counted once."""
    pins: Pins = field(default_factory=Pins, compare=False)
    """What of them is page-locked, for offloading."""


# --- the store ------------------------------------------------------------------------------------


@dataclass
class WeightStore:
    """Loaded weights by key, and why each was loaded."""

    reasons: list[str] = field(default_factory=list)
    """One line per load, in order: ``first load`` or the parts of the key that changed."""
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)
    """memory=staged: prompt embeddings on the CPU, some 16 MB each, so that a sweep encodes each prompt once."""
    _bases: dict[WeightsKey, Base] = field(default_factory=dict)
    _seen: list[WeightsKey] = field(default_factory=list)

    def get(self, key: WeightsKey, loader: Callable[[], Base]) -> Base:
        """The weights of ``key``, loaded with ``loader`` unless the store holds them."""
        if key not in self._bases:
            reason = self._why(key)
            self._bases[key] = loader()
            self.reasons.append(reason)
            self._seen = [*(seen for seen in self._seen if seen != key), key]
        return self._bases[key]

    def _why(self, key: WeightsKey) -> str:
        if key in self._seen:
            return "loaded before, freed since"
        same_part = [seen for seen in self._seen if seen.part == key.part]
        return key.difference(same_part[-1]) if same_part else "first load"

    def keep_only(self, keys: Iterable[WeightsKey]) -> None:
        """Free everything but ``keys``. Shells over freed weights keep them alive: drop those first."""
        kept = set(keys)
        dropped = [key for key in self._bases if key not in kept]
        for key in dropped:
            del self._bases[key]
        if dropped:
            free_memory()

    def clear(self) -> None:
        """Free everything."""
        self.keep_only(())

    def __contains__(self, key: WeightsKey) -> bool:
        return key in self._bases
