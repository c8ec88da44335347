"""Weights: loaded or built once, component by component, kept in a store, handed out as fresh module shells.

This module is heavy (torch, diffusers, transformers); nothing light may import it. Where a checkpoint lies and
whether it is whole is ``checkpoint.py``'s business and is settled before anything here runs.
"""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from fluxrun import architectures, checkpoint, hub
from fluxrun.errors import ConfigError
from fluxrun.offload import Pins
from fluxrun.random_weights import random_source
from fluxrun.tensors import tensor_bytes
from fluxrun.text_encoder import NeededLayers

if TYPE_CHECKING:
    from fluxrun.options.model import Flux2Model

Part = Literal["all", "text", "image"]
Quantize = Callable[[nn.Module, str], dict[str, Any]]
Progress = Callable[[str], None]

PARTS: dict[Part, tuple[str, ...]] = {
    "text": ("text_encoder", "tokenizer"),
    "image": ("transformer", "vae", "scheduler"),
    "all": ("transformer", "text_encoder", "tokenizer", "vae", "scheduler"),
}
"""Pipeline components of each part, in the order in which they are loaded: what may be quantized first, while there is
still room for it as it was."""


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

    @classmethod
    def of(
        cls, model: Flux2Model, *, dtype: str, device: str, part: Part = "all", quantization: str = "none"
    ) -> WeightsKey:
        """The key of ``model`` loaded as ``dtype`` onto ``device``; ``quantization``: option and knobs."""
        read, layers = model.text_encoder_out_layers, str(model.text_encoder_layers)
        return cls(
            model.source(), model.revision, model.variant, model.distilled, dtype, quantization, device, part,
            layers if read is None else f"{layers} for {read}",
        )  # fmt: skip

    def difference(self, other: WeightsKey) -> str:
        """The parts that differ, for example ``dtype bfloat16 → float16``; empty when none does."""
        pairs = ((f.name, getattr(other, f.name), getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{name} {old} → {new}" for name, old, new in pairs if old != new)


@dataclass(frozen=True)
class Base:
    """Loaded weights in an ordinary pipeline that is never called: pictures are drawn by its shells."""

    pipeline: DiffusionPipeline
    facts: dict[str, Any]
    bytes: int
    """Bytes of all weights and buffers, shared storages counted once."""
    pins: Pins = field(default_factory=Pins, compare=False)
    """What of them is page-locked, for offloading."""


def _tensors(modules: Iterable[nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _silent(_: str) -> None:
    return None


def load(
    model: Flux2Model,
    *,
    dtype: str,
    device: str,
    part: Part = "all",
    quantize: Quantize | None = None,
    progress: Progress = _silent,
    located: checkpoint.Located | None = None,
) -> Base:
    """Load or build ``part`` of ``model`` as ``dtype`` (a torch dtype's name) onto ``device``.

    ``quantize(component, name)`` is called with each model component before the next one is loaded. A
    pretrained component is then still on the CPU, so that a quantizer can move it layer by layer (torchao's
    ``quantize_(..., device=...)``); a random one is already on ``device``. ``progress`` gets a line per stage.

    Raises ConfigError when the checkpoint is missing, partial or of another kind.
    """
    located = located or checkpoint.inspect(model)
    parts: dict[str, Any] = dict.fromkeys(PARTS["all"])
    facts: dict[str, Any] = {"source": located.source, "revision": located.revision, "components": {}}
    needed = _needed_layers(model, located.pipeline)
    make = random_source(model, dtype, device, needed) if located.kind == "random" else None
    folder = None if make else hub.download(located, progress)
    for name in PARTS[part]:
        progress(f"{'building' if make else 'loading'} {name}")
        parts[name] = make(name) if make else _pretrained(folder, name, dtype, model.variant, needed)  # type: ignore[arg-type]
        if isinstance(parts[name], nn.Module):
            facts["components"][name] = _settle(parts[name], name, device, quantize)
        if name == "text_encoder" and needed is not None:
            facts["components"][name] |= needed.facts(getattr(torch, dtype).itemsize)
    pipeline = _assemble(located.pipeline, located.distilled, parts)
    modules = [module for module in parts.values() if isinstance(module, nn.Module)]
    facts["parameters"] = sum(component["parameters"] for component in facts["components"].values())
    facts["bytes"] = tensor_bytes(_tensors(modules))
    return Base(pipeline, facts, facts["bytes"])


def _settle(module: nn.Module, name: str, device: str, quantize: Quantize | None) -> dict[str, Any]:
    """Freeze, quantize and place one component; returns its facts."""
    module.eval().requires_grad_(False)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    facts = quantize(module, name) if quantize else {}
    module.to(device)
    facts = {"quantization": facts} if facts else {}
    return {
        "class": type(module).__name__,
        "parameters": parameters,
        "bytes": tensor_bytes(_tensors([module])),
        **facts,
    }


def _assemble(kind: architectures.PipelineKind, distilled: bool, parts: dict[str, Any]) -> DiffusionPipeline:
    """The pipeline object of ``parts``; missing ones stay None."""
    cls: Any = pipeline_class(kind)
    return cls(**parts, is_distilled=distilled) if kind == "klein" else cls(**parts)


def pipeline_class(kind: architectures.PipelineKind) -> type[DiffusionPipeline]:
    """diffusers' class, imported when it is asked for: each brings libraries that the other does without."""
    if kind == "klein":
        from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline

        return Flux2KleinPipeline
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

    return Flux2Pipeline


# --- pretrained -----------------------------------------------------------------------------------


def _needed_layers(model: Flux2Model, pipeline: architectures.PipelineKind) -> NeededLayers | None:
    """What is cut from the text encoder; None when all of it is wanted."""
    if model.text_encoder_layers == "all":
        return None
    return NeededLayers(model.text_encoder_out_layers or architectures.HIDDEN_STATES_READ[pipeline])


def _pretrained(folder: Path, name: str, dtype: str, variant: str | None, needed: NeededLayers | None) -> Any:
    """One component of a diffusers folder, on the CPU, in ``dtype``; of the text encoder what is ``needed``.

    Components are loaded one at a time by their own ``from_pretrained`` and not through the pipeline's: that
    is what lets each be quantized before the next one needs memory.
    """
    library, class_name = checkpoint.component_classes(folder)[name]
    cls = getattr(importlib.import_module(library), class_name)
    if name not in architectures.MODEL_COMPONENTS:
        return cls.from_pretrained(str(folder), subfolder=name, local_files_only=True)
    # Always said: a folder saved in bfloat16 would otherwise mix a bfloat16 text encoder with a float32 transformer.
    precision = {"dtype": getattr(torch, dtype)}
    used = checkpoint.variant_of(folder, name, variant)
    arguments = {"subfolder": name, "variant": used, "local_files_only": True, **precision}
    if name == "text_encoder" and needed is not None:
        return _cut_text_encoder(cls, folder, arguments, needed)
    with _no_bars():
        return cls.from_pretrained(str(folder), **arguments)


def _cut_text_encoder(cls: Any, folder: Path, arguments: dict[str, Any], needed: NeededLayers) -> nn.Module:
    """A text encoder without what is never read; tensors of the layers behind are not read from disk either.

    Raises ConfigError when the checkpoint lacks tensors of what remains: transformers would only warn.
    """
    config = needed.cut(cls.config_class.from_pretrained(str(folder), subfolder=arguments["subfolder"]))
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would report every layer that was left out
    try:
        with _no_bars():
            encoder, report = cls.from_pretrained(str(folder), config=config, output_loading_info=True, **arguments)
    finally:
        transformers_logging.set_verbosity(level)
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("lm_head.")):
        raise ConfigError(f"{folder}/text_encoder lacks {len(missing)} tensors, {missing[0]} for one")
    needed.trim(encoder)
    return encoder


@contextmanager
def _no_bars() -> Iterator[None]:
    """Switch the libraries' own loading bars off: ``progress`` says what is loaded."""
    switches = (diffusers_logging, transformers_logging)
    shown = [switch.is_progress_bar_enabled() for switch in switches]
    for switch in switches:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch, was in zip(switches, shown, strict=True):
            if was:
                switch.enable_progress_bar()


def save_tiny(
    folder: Path,
    pipeline: architectures.PipelineKind = "klein",
    *,
    distilled: bool = True,
    dtype: str = "float32",
    shard_bytes: int | None = None,
    variant: str | None = None,
) -> Path:
    """Write the tiny model as an ordinary diffusers checkpoint folder and return ``folder``.

    ``shard_bytes`` splits the weights of each component into files of at most that size.
    """
    from fluxrun.options.model import Flux2Model

    model = Flux2Model(
        weights="random", architecture="tiny", pipeline=pipeline, distilled=distilled, text_encoder_layers="all"
    )
    base = load(model, dtype=dtype, device="cpu")
    base.pipeline.save_pretrained(folder, variant=variant, max_shard_size=shard_bytes or "5GB")
    return folder


# --- shells ---------------------------------------------------------------------------------------


def shell(base: Base) -> DiffusionPipeline:
    """A pipeline of fresh modules over ``base``'s weights: change it freely, the base stays as it was.

    Modules, hooks, attention processors, Parameter objects and buffers are new; parameters share their storage
    with the base (no memory, no time, bit-identical output). Writing into a parameter in place would reach the
    base: whatever must change weights replaces them instead.
    """
    modules = {name: part for name, part in base.pipeline.components.items() if isinstance(part, nn.Module)}
    parts = {name: _fresh(part) for name, part in base.pipeline.components.items() if name not in modules}
    parts |= {name: _shared_copy(module) for name, module in modules.items()}
    cls = type(base.pipeline)
    # Settings such as is_distilled: leaving one out silently turns classifier-free guidance on.
    accepted = inspect.signature(cls.__init__).parameters
    settings = {k: v for k, v in base.pipeline.config.items() if k in accepted and k not in parts}
    return cls(**parts, **settings)


def _shared_copy(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters share storage with the original's; ties and tensor subclasses are kept."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    return copy.deepcopy(module, memo)


def _fresh(part: Any) -> Any:
    """A component without weights, with no state of an earlier run (a scheduler keeps its timesteps)."""
    if part is None:
        return None
    return type(part).from_config(part.config) if hasattr(type(part), "from_config") else copy.deepcopy(part)


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


def free_memory() -> None:
    """Collect what nothing refers to and give cached device memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
