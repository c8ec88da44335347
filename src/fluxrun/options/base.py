"""What an option is, and what it may know: of a run before anything is loaded, and while it is applied."""

from __future__ import annotations

import importlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from fluxrun.errors import ConfigError, one_line
from fluxrun.formatting import GIB, shorten
from fluxrun.hardware.machine import Machine
from fluxrun.offload.block_sizes import BlockSizes
from fluxrun.process.device import synchronize
from fluxrun.process.ranks import ALONE, Ranks
from fluxrun.process.switches import ProcessState
from fluxrun.quantization.declared import Declared
from fluxrun.trust import OWN_TARGETS, Open, check_target
from fluxrun.types import Json, Pipeline

if TYPE_CHECKING:
    import torch

    from fluxrun.compilation.compiler import Compiler
    from fluxrun.compilation.cuda_graphs import Graphs
    from fluxrun.kernels.transformer.matmul_choice import Matmuls
    from fluxrun.offload.pinning import Pins
    from fluxrun.options.adapters import LoraWeights

Facts = dict[str, Any]

COMPILER = "torch._dynamo"
"""The module of torch's compiler: the largest of the libraries that an option may do without."""

NOTHING_MORE: frozenset[str] = frozenset()
"""The libraries of an option that gets by with torch, diffusers and transformers."""


class Option(BaseModel):
    """One choice in an option group: a YAML file's knobs, and what they do to a pipeline.

    Each group has a base class of its own (``VaeOption``, ``MemoryOption``, …) with what the rest of fluxrun asks of
    its options. A subclass of that adds knobs as typed fields, says in ``requires`` why a machine cannot use it, and in
    ``apply`` does its work on a diffusers pipeline and returns what it counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: Open[str] = ""
    """The option's name, which is its YAML file's; filled in when the config is composed."""

    fallback: Open[str] = "error"
    """Option of the same group that is used when this one cannot be; ``error`` refuses the run instead."""

    inherent: ClassVar[bool] = False
    """Whether it says how the weights are: where they are so, nothing can take its place."""

    @property
    def needs_proof(self) -> bool:
        """Whether only a real call (``prove``) shows that it works here: its kernels are not torch's own."""
        return False

    @property
    def libraries(self) -> frozenset[str] | None:
        """Optional libraries that it may use, by module name, ``torch._dynamo`` (torch's compiler) among them.

        None: any of them. What no option of a run may use is not imported.
        """
        return None

    @property
    def alternatives(self) -> tuple[str, ...]:
        """Options of its group that it may choose among once the pipeline is built (``choose``)."""
        return ()

    @property
    def autotunes(self) -> bool:
        """Whether its first image may take minutes: a compiler is told to time many kernels."""
        return False

    def prove(self, device: str) -> None:
        """Do what ``needs_proof`` asks for, in a process of its own; raises whatever it raises."""
        raise TypeError(f"{self.name} has nothing to prove")

    def requires(self, machine: Machine) -> str | None:
        """Why this machine cannot use the option, or None. Pure: imports no torch, loads nothing."""
        return None

    def inapplicable(self, workload: Workload) -> str | None:
        """Why this run leaves the option nothing to do (then it falls back, as at ``requires``), or None. Pure."""
        return None

    def resolve(self, workload: Workload) -> Resolution | None:
        """For an option that only chooses (``auto``): the option to use and why. Pure, like ``requires``."""
        return None

    def choose(self, pipeline: Pipeline, context: Context) -> tuple[str, Facts] | None:
        """As ``resolve``, for a choice that needs the built pipeline and a measurement."""
        return None

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """Do it to ``pipeline`` (a diffusers pipeline) and return what was counted.

        Raises whatever the library raises; the session turns that into a fallback.
        """
        return {}

    def observe(self, pipeline: Pipeline, context: Context) -> Facts:
        """What can only be counted after pictures were drawn; merged into the facts of ``apply``."""
        return {}

    def unused_knobs(self) -> list[str]:
        """Knobs that were set but that this option does not use (the options of a group share one knob schema)."""
        return []

    def changed_knobs(self, *but: str) -> list[str]:
        """Knobs whose value is not their default, those named in ``but`` left out."""
        fields = type(self).model_fields
        return [
            knob
            for knob in fields
            if knob not in {"name", "fallback", *but}
            and getattr(self, knob) != fields[knob].get_default(call_default_factory=True)
        ]


O = TypeVar("O", bound=Option)  # noqa: E741 - as in "option"


class Resolution(NamedTuple):
    """What an ``auto`` option chose before anything was loaded."""

    option: str
    because: str
    note: str | None = None
    """What the user should know besides."""


@dataclass(frozen=True)
class MemoryNeed:
    """What a memory option needs of the GPU, by an estimate. Bytes."""

    bytes: int
    blocks: BlockSizes | None = None
    """For block swap: the transformer's blocks,"""
    beside: int = 0
    """what is on the GPU besides them,"""
    asked: int | None = None
    """and how many are to be swapped; None: as few as fit."""

    def described(self, budget: int) -> str:
        """``needs about 10.4 of 24.0 GB``; block swap fills what it is given, and says what a step then copies."""
        of = f"{self.bytes / GIB:.1f} of {budget / GIB:.1f} GB"
        if self.blocks is None:
            return f"needs about {of}"
        count = self.blocks.count(self.asked, budget - self.beside)
        moved = sum(self.blocks.swapped(count)) / GIB
        return f"needs at least {of}, swaps {count} of {len(self.blocks.blocks)} blocks, {moved:.1f} GB a step"


INPAINTING_STRENGTH = 0.8
"""Flux2KleinInpaintPipeline's default."""


def steps_after(steps: int, strength: float | None) -> int:
    """How many of ``steps`` diffusers' inpainting makes at a strength: it begins at a picture with so much noise."""
    made = min(steps * (INPAINTING_STRENGTH if strength is None else strength), steps)
    return steps - int(max(steps - made, 0))


@dataclass(frozen=True)
class Workload:
    """What an option may know of a run before anything is loaded. Sizes in pixels, memory in bytes."""

    machine: Machine
    height: int
    width: int
    tokens: int
    """Sequence length of the transformer: image, reference and text tokens."""
    steps: int | None
    batch_size: int
    """Images per pipeline call."""
    dtype: str
    """Name of the weights' torch dtype on this run's device."""
    guided: bool
    """Whether classifier-free guidance calls the transformer twice a step."""
    needs: Mapping[str, MemoryNeed] | None = None
    """What each memory option needs of the GPU; None where the weights' sizes are not known."""
    ram: Mapping[str, int] | None = None
    """The same of the computer's own memory."""
    declared: Mapping[str, Declared] = field(default_factory=dict)
    """Components that the checkpoint has quantized weights of."""
    swapping_bytes: int = 0
    """Working memory beside the weights under block swap."""
    text_tokens: int = 0
    """Those of the tokens that are text."""
    heads: int | None = None
    """The transformer's attention heads; None where its sizes are not known."""
    ranks: int = 1
    """Processes that draw one picture together."""
    shares_tokens: bool = False
    """Whether each of these has a share of the tokens,"""
    needs_lse: bool = False
    """and whether attention then has to return the log-sum-exp."""


@dataclass
class Context:
    """What an option may use while it is applied: values of the run, tools, and places to count in."""

    workload: Workload
    options: Mapping[str, Option]
    """The options in use, by group."""
    state: ProcessState
    compiler: Compiler
    graphs: Graphs
    load_option: Callable[[str, str], Option]
    """Another option of a group, by its name."""
    note: Callable[[str], None]
    """Tell the user something, once; it is in the record, too."""
    prompt_counts: Mapping[str, int] = field(default_factory=Counter)
    """What the prompt encoder counted so far."""
    counters: Counter[str] = field(default_factory=Counter)
    weight_facts: Facts = field(default_factory=dict)
    """What was counted while the weights were loaded."""
    pins: Pins | None = None
    matmuls: Matmuls | None = None
    """The fused kernels' choice among cublasLt's algorithms, if it is made."""
    lora: LoraWeights | None = None
    """The LoRA files of the run, read for this transformer."""
    ranks: Ranks = ALONE
    """This process among those that draw the picture together."""

    @property
    def machine(self) -> Machine:
        """The machine, with the run's device."""
        return self.workload.machine

    @property
    def device(self) -> str:
        """torch device string."""
        return self.machine.device

    @property
    def dtype(self) -> str:
        """Name of the weights' torch dtype."""
        return self.workload.dtype

    def option(self, base: type[O], group: str) -> O:
        """The option in use of a group, as the group's base class."""
        found = self.options[group]
        assert isinstance(found, base)
        return found

    def start_counting(self) -> None:
        """Count from here on: another run carries on with this pipeline."""
        self.counters.clear()
        self.compiler.start_counting()
        self.graphs.start_counting()

    def timed(self, call: Callable[[], torch.Tensor | None]) -> float:
        """Seconds ``call`` takes, the device synchronised at both ends."""
        synchronize(self.device)
        started = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - started


def own_class(pipeline: Pipeline, namespace: Mapping[str, Any]) -> None:
    """Give a pipeline a subclass of its own with these attributes, of the same name: cache-dit goes by that."""
    cls = type(pipeline)
    pipeline.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, **namespace})


def is_own(cls: type[Option]) -> bool:
    """Whether a class is fluxrun's own."""
    return cls.__module__.startswith(OWN_TARGETS)


def own_options(base: type[Option] = Option) -> list[type[Option]]:
    """Every option class of fluxrun's own modules: what a config can name without being trusted."""
    found = [base] if is_own(base) else []
    return found + [cls for subclass in base.__subclasses__() for cls in own_options(subclass)]


def load_option(node: Option | Json) -> Option:
    """Turn ``{_target_, name, knobs…}`` into the option it names; an Option passes through.

    Raises ConfigError for a missing or untrusted ``_target_``, pydantic's ValidationError for knobs that do not
    validate.
    """
    if isinstance(node, Option):
        return node
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"an option must be a mapping with a _target_, got {shorten(node)}")
    knobs = dict(node)
    return option_class(str(knobs.pop("_target_")))(**knobs)


def option_class(target: str) -> type[Option]:
    """The class that a ``_target_`` names. Raises ConfigError when it is untrusted, not there, or no option."""
    check_target(target)
    module_name, _, class_name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (Exception, SystemExit) as error:  # a user's own module may raise anything while it is imported
        raise ConfigError(f"_target_ {target!r} cannot be imported: {one_line(error)}") from error
    if not (isinstance(cls, type) and issubclass(cls, Option)):
        raise ConfigError(f"_target_ {target!r} is not a fluxrun option class (a subclass of fluxrun.Option)")
    return cls
