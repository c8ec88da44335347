"""The weights of a plan: which key they have in the store, how they are loaded and quantized, what that took."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from fluxrun.errors import Interrupted, OptionFailed
from fluxrun.options.adapters import LoraWeights
from fluxrun.options.base import Facts
from fluxrun.options.lora import LoraOption
from fluxrun.pipeline.blame import is_out_of_memory
from fluxrun.planning.plan import Plan
from fluxrun.process import spans
from fluxrun.process.console import Reporter
from fluxrun.process.ranks import ALONE, Ranks
from fluxrun.process.signals import Interrupts
from fluxrun.weights.loading import Conversion, load
from fluxrun.weights.location import Located
from fluxrun.weights.lora_files import LoraSource, load_adapters
from fluxrun.weights.store import Base, Part, WeightsKey, WeightStore

log = logging.getLogger("fluxrun.build")

DESCRIPTIONS: dict[Part, str] = {"all": "model", "text": "text encoder", "image": "transformer and VAE"}


class WeightsLoader:
    """Loads what a plan needs into a store, on first use; other weights are freed first."""

    def __init__(self, plan: Plan, store: WeightStore, located: Located | None) -> None:
        self.plan = plan
        self.store = store
        self.located = located
        self.ranks: Ranks = ALONE
        """This process among those that draw the pictures together."""
        self.adapters: Sequence[LoraSource] = ()
        """The LoRA files of this run,"""
        self.upcoming: Sequence[Sequence[LoraSource]] = ()
        """and those of each later one over the same weights: room is made for them."""
        self.seconds = 0.0
        """Spent on loading for this run."""
        self.components: Facts = {}
        """Facts of the components loaded so far, with memory=staged of both parts."""

    def key(self, part: Part) -> WeightsKey:
        """The key of ``part`` under the options in use."""
        placement = "cpu" if self.plan.memory.offloads else self.plan.machine.device
        quantization = self.plan.quantization.model_dump_json(exclude={"fallback"})
        share = f"{self.ranks.rank + 1} of {self.ranks.size}" if self.plan.parallel.splits_weights else "all"
        return WeightsKey.of(
            self.plan.model, dtype=self.plan.dtype, device=placement, part=part, quantization=quantization, share=share
        )

    def load(self, part: Part, reporter: Reporter, interrupts: Interrupts) -> Base:
        """The stored weights of ``part``, loaded on first use.

        Raises OptionFailed for an option's failure (quantization could not convert, or the memory was not enough) and
        whatever else the libraries raise.
        """
        key = self.key(part)
        self.store.keep_only([key])
        loads = len(self.store.reasons)
        started = time.perf_counter()
        try:
            with interrupts.immediate(), spans.span("load"):
                base = self.store.get(key, lambda: self._load(part, key, reporter))
        except (Interrupted, KeyboardInterrupt, OptionFailed):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise OptionFailed("memory", error) from error
            raise
        finally:
            if len(self.store.reasons) > loads:  # else the weights were there
                self.seconds += time.perf_counter() - started
        self.components = {**self.components, **base.facts["components"]}
        if 0 < loads < len(self.store.reasons) and self.store.reasons[-1] != "first load":
            self.plan.note(f"weights loaded again: {self.store.reasons[-1]}")
            log.info("weights loaded again: %s", self.store.reasons[-1])
        return base

    def read_adapters(self, transformer: nn.Module) -> LoraWeights | None:
        """The run's LoRA files, read for this transformer; None for a run without. Raises ConfigError."""
        if not self.plan.option(LoraOption, "lora").adapts:
            return None
        started = time.perf_counter()
        found = load_adapters(self.adapters, self.upcoming, transformer, _say)
        self.seconds += time.perf_counter() - started
        return found

    def _load(self, part: Part, key: WeightsKey, reporter: Reporter) -> Base:
        text = f"Loading {self.plan.model.name} ({DESCRIPTIONS[part]}, {key.dtype}, {key.placement})"
        with reporter.stage(text):
            return load(
                self.plan.model,
                dtype=key.dtype,
                device=key.placement,
                part=part,
                conversion=self._conversion(),
                progress=_say,
                located=self.located,
            )

    def _conversion(self) -> Conversion:
        shares = self.plan.parallel.tensor_config(self.ranks)
        return Conversion(self._quantize, self._instead, self.plan.machine.device, shares)

    def _instead(self, name: str, folder: Path | None) -> nn.Module | None:
        try:
            return self.plan.quantization.load(name, folder, self.plan.dtype)
        except Exception as error:  # a file of another model, or of no model at all
            raise OptionFailed("quantization", error) from error

    def _quantize(self, component: nn.Module, name: str) -> Facts:
        try:
            return self.plan.quantization.quantize(component, name, self.key("all").placement, self.plan.machine.device)
        except Exception as error:  # a library's failure to convert is this option's failure
            raise OptionFailed("quantization", error) from error


def _say(text: str) -> None:
    """A download's lines are for the user; each component's are for the log."""
    log.log(logging.INFO if text.startswith("download") else logging.DEBUG, "%s", text)
