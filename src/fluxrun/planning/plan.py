"""The plan: what would run, what falls back and why, and what the user should know before. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fluxrun.config.catalog import Catalog
from fluxrun.config.schema import RunConfig
from fluxrun.hardware.machine import Machine
from fluxrun.options.base import Facts, O, Option, Workload, steps_after
from fluxrun.options.compile import CompileOption
from fluxrun.options.kernels import KernelsOption
from fluxrun.options.lora import LoraOption
from fluxrun.options.memory import MemoryOption
from fluxrun.options.model import Flux2Model
from fluxrun.options.parallel import ParallelOption
from fluxrun.options.quantization import QuantizationOption
from fluxrun.options.scheduler import SchedulerOption
from fluxrun.options.vae import VaeOption
from fluxrun.planning.estimate import Estimate
from fluxrun.quantization.declared import Declared
from fluxrun.record.schema import Fallback, OptionRecord
from fluxrun.types import Json


@dataclass
class Choice:
    """One group's way from what was requested to what is used."""

    requested: str
    option: Option
    fallbacks: list[Fallback] = field(default_factory=list)
    facts: Facts = field(default_factory=dict)

    @property
    def effective(self) -> str:
        """The name of the option in use."""
        return self.option.name

    def record(self) -> OptionRecord:
        """The choice as run.json keeps it."""
        return OptionRecord(
            requested=self.requested, effective=self.effective, fallbacks=list(self.fallbacks), facts=dict(self.facts)
        )


@dataclass
class Plan:
    """What will be built: one choice per group, and what the user should know before."""

    config: RunConfig
    machine: Machine
    catalog: Catalog
    choices: dict[str, Choice]
    weight_bytes: Mapping[str, int] | None = None
    """Bytes of the model's components, where they are known before loading."""
    reference_tokens: int = 0
    """What reference pictures add to the transformer's sequence."""
    adapter_elements: int = 0
    """Numbers in the LoRA files' matrices, as they will stand beside the weights."""
    heads: int | None = None
    """The transformer's attention heads, where its checkpoint was looked at."""
    inpainted_size: tuple[int, int] | None = None
    """Height and width of the picture that is repainted, which are the run's."""
    guidance_batched: bool = False
    """Whether a guided step is one call of the transformer; decided once the placement is known."""
    declared: Mapping[str, Declared] = field(default_factory=dict)
    """Components that the checkpoint has quantized weights of, with a description."""
    notes: list[str] = field(default_factory=list)

    # -- the options in use -------------------------------------------------------------------------------------------

    @property
    def options(self) -> dict[str, Option]:
        """The options in use, by group."""
        return {group: choice.option for group, choice in self.choices.items()}

    def option(self, base: type[O], group: str) -> O:
        """The option in use of a group, as the group's base class."""
        found = self.choices[group].option
        assert isinstance(found, base)
        return found

    @property
    def model(self) -> Flux2Model:
        """The model option, with what its checkpoint knows filled in."""
        return self.option(Flux2Model, "model")

    @property
    def memory(self) -> MemoryOption:
        """The memory option in use."""
        return self.option(MemoryOption, "memory")

    @property
    def quantization(self) -> QuantizationOption:
        """The quantization option in use."""
        return self.option(QuantizationOption, "quantization")

    @property
    def scheduler(self) -> SchedulerOption:
        """The scheduler option in use."""
        return self.option(SchedulerOption, "scheduler")

    @property
    def compile(self) -> CompileOption:
        """The compile option in use."""
        return self.option(CompileOption, "compile")

    @property
    def parallel(self) -> ParallelOption:
        """The parallel option in use."""
        return self.option(ParallelOption, "parallel")

    @property
    def ranks(self) -> int:
        """How many processes draw a picture together."""
        return self.parallel.size(self.machine)

    # -- the call -----------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> str:
        """The weights' dtype on this run's device."""
        return self.model.dtype_on(self.machine)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels: those of the picture that is repainted, else the run's, else the model's."""
        if self.inpainted_size is not None:
            return self.inpainted_size
        return self.config.height or self.model.height, self.config.width or self.model.width

    @property
    def steps(self) -> int | None:
        """Denoising steps: as many as sigmas, else the run's or the model's; None before a checkpoint was looked at."""
        return len(self.scheduler.sigmas or ()) or self.config.steps or self.model.steps

    @property
    def steps_made(self) -> int | None:
        """How many of the steps are made: inpainting leaves out the first ones, by its strength."""
        if self.model.pipeline != "klein_inpaint" or self.steps is None:
            return self.steps
        return steps_after(self.steps, self.config.strength)

    @property
    def guidance(self) -> float | None:
        """Guidance scale: the run's, else the model's; 0 is a value of its own."""
        return self.model.guidance if self.config.guidance is None else self.config.guidance

    @property
    def guided(self) -> bool:
        """Whether the run uses classifier-free guidance, which calls the transformer twice a step."""
        return self.model.classifier_free and self.guidance is not None and self.guidance > 1

    @property
    def negative_prompt(self) -> str | None:
        """The text that classifier-free guidance encodes besides the prompt; None without it."""
        return (self.config.negative_prompt or "") if self.guided else None

    # -- what it takes ------------------------------------------------------------------------------------------------

    @property
    def estimate(self) -> Estimate:
        """The memory estimate for the options in use."""
        height, width = self.size
        return Estimate(
            weight_bytes=self.weight_bytes,
            height=height,
            width=width,
            batch_size=self.config.batch_size,
            reference_tokens=self.reference_tokens,
            dtype=self.dtype,
            model=self.model,
            vae=self.option(VaeOption, "vae"),
            memory=self.memory,
            kernels=self.option(KernelsOption, "kernels"),
            quantization=self.quantization,
            adapter_elements=self.adapter_elements if self.option(LoraOption, "lora").adapts else 0,
            guidance_batched=self.guidance_batched,
            declared=self.declared,
            weight_shares=self.ranks if self.parallel.splits_weights else 1,
        )

    @property
    def workload(self) -> Workload:
        """What the options may know of this run."""
        estimate = self.estimate
        return Workload(
            machine=self.machine,
            height=estimate.height,
            width=estimate.width,
            tokens=estimate.tokens,
            steps=self.steps_made,
            batch_size=estimate.batch_size,
            dtype=estimate.dtype,
            guided=self.guided,
            needs=estimate.memory_needs(),
            ram=estimate.ram_needs(),
            declared=self.declared,
            swapping_bytes=estimate.swapping_bytes(),
            text_tokens=self.model.max_sequence_length,
            heads=self.heads or estimate.heads,
            ranks=self.ranks,
            shares_tokens=self.parallel.splits_tokens,
            needs_lse=self.parallel.needs_lse,
        )

    # -- changes ------------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def switch(self, group: str, name: str, facts: Mapping[str, Json]) -> None:
        """Take what an ``auto`` option chose; a choice is not a fallback (those are ``fallbacks.py``'s)."""
        choice = self.choices[group]
        choice.option = self.catalog.load(group, name, like=choice.option)
        choice.facts = {**choice.facts, **facts}

    def record(self) -> dict[str, OptionRecord]:
        """Every choice as run.json keeps it, by group."""
        return {group: choice.record() for group, choice in self.choices.items()}
