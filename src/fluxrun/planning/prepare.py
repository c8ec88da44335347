"""Everything that can be known, and refused, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxrun.config.catalog import Catalog
from fluxrun.config.inputs import InputPicture, read_inputs
from fluxrun.config.prompts import Job, jobs_of, texts_of
from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError, OptionUnavailable
from fluxrun.formatting import utf8
from fluxrun.hardware.detection import detect
from fluxrun.hardware.machine import Machine
from fluxrun.options.compile import autotune_note
from fluxrun.options.lora import LoraOption
from fluxrun.options.model import Flux2Model
from fluxrun.planning.editing import Pictures, prepared_pictures
from fluxrun.planning.fallbacks import settle
from fluxrun.planning.plan import Choice, Plan
from fluxrun.quantization.declared import Declared
from fluxrun.record.picture import pixel_hash
from fluxrun.record.schema import InputRecord
from fluxrun.weights.find import attention_heads, check_layers, find_weights, resolve
from fluxrun.weights.location import Located
from fluxrun.weights.lora_files import LoraSource, adapter_elements, find_adapters


@dataclass
class Prepared:
    """A run whose input was checked, with its plan."""

    config: RunConfig
    jobs: list[Job]
    pictures: Pictures
    inputs: list[InputRecord]
    located: Located
    plan: Plan
    adapters: tuple[LoraSource, ...] = ()
    """The run's LoRA files."""

    @property
    def weight_files(self) -> list[Path]:
        """The checkpoint folder's files that the run loads, in the order in which it does."""
        first = "text_encoder" if self.plan.memory.staged else "transformer"
        instead = self.plan.quantization.loaded_bytes
        files = [file for file in self.located.weight_files if instead(file.parent.name) is None]
        return sorted(files, key=lambda file: file.parent.name != first)

    @property
    def texts(self) -> list[str]:
        """Every text that the run must encode, once each."""
        return texts_of(self.jobs, self.plan.negative_prompt)


def prepare(config: RunConfig, machine: Machine | None = None, jobs: Sequence[Job] = ()) -> Prepared:
    """Check all of a run's input and plan it, or the part of it that has these ``jobs``.

    Imports no torch; raises ConfigError or OptionUnavailable.
    """
    jobs = list(jobs) or jobs_of(config)
    inputs = read_inputs(config)
    if problem := config.quantization.input_problem():
        raise ConfigError(problem)
    machine = machine or detect()
    located = find_weights(config.model, machine)
    model = resolve(config.model, located)
    pictures = prepared_pictures(config, model, inputs, len(jobs))
    usable = config.lora.requires(machine.on(config.device)) is None
    adapters = find_adapters(config.lora) if usable else ()
    elements = adapter_elements(adapters)
    plan = make_plan(
        config, machine, model, located.component_bytes, pictures, located.declared, elements, attention_heads(located)
    )
    check_layers(plan.model, located)
    if not plan.option(LoraOption, "lora").adapts:
        adapters = ()
    return Prepared(config, jobs, pictures, [_recorded(given) for given in inputs], located, plan, adapters)


def _recorded(given: InputPicture) -> InputRecord:
    width, height = given.picture.size
    return InputRecord(
        key=given.key, path=utf8(str(given.path)), sha256=pixel_hash(given.picture), width=width, height=height
    )


def make_plan(
    config: RunConfig,
    machine: Machine,
    model: Flux2Model | None = None,
    weight_bytes: Mapping[str, int] | None = None,
    pictures: Pictures | None = None,
    declared: Mapping[str, Declared] | None = None,
    adapter_elements: int = 0,
    heads: int | None = None,
) -> Plan:
    """Plan a run; ``model`` is the option with what its checkpoint knows filled in, ``weight_bytes`` its sizes,
    ``declared`` what it says of its components' quantization, ``heads`` how many attention heads it has.

    Raises ConfigError for what contradicts the model, OptionUnavailable where nothing is left.
    """
    if reason := machine.lacks_device(config.device):
        raise ConfigError(f"device={config.device}: {reason}; use device=auto or device=cpu")
    choices = {group: Choice(option.name, option) for group, option in config.options().items()}
    choices["model"].option = model or config.model
    catalog = Catalog(config.config_dirs)
    plan = Plan(config, machine.on(config.device), catalog, choices, weight_bytes, declared=declared or {})
    plan.adapter_elements, plan.heads = adapter_elements, heads
    if pictures is not None:
        plan.reference_tokens, plan.inpainted_size = pictures.tokens, pictures.size
    check_call(plan)
    settle(plan)
    batch_guidance(plan)
    for group, choice in plan.choices.items():
        for knob in choice.option.unused_knobs():
            plan.note(f"{group}.{knob} is set, but {group}={choice.effective} does not use it")
    if text := autotune_note(plan.compile):
        plan.note(text)
    return plan


def batch_guidance(plan: Plan) -> None:
    """Let guidance be one call of the transformer a step, if that was asked for and the placement chosen has room."""
    if not plan.config.guidance_batched:
        return
    if not plan.guided:
        raise ConfigError(
            "guidance_batched: this run calls the transformer once a step anyway; a klein base model with guidance>1 "
            "calls it twice"
        )
    if reason := _why_two_calls(plan):
        if plan.config.strict:
            raise OptionUnavailable(f"guidance_batched: {reason} (strict=true)")
        plan.guidance_batched = False
        plan.note(f"guidance_batched: {reason}, so a step is two calls of the transformer")


def _why_two_calls(plan: Plan) -> str | None:
    if plan.choices["cache"].effective != "none":
        return f"cache={plan.choices['cache'].effective} looks at the two calls of a step one by one"
    plan.guidance_batched = True
    needs, budget = plan.estimate.memory_needs(), plan.memory.budget_bytes(plan.machine)
    need = needs.get(plan.memory.name) if needs else None
    if plan.machine.accelerated and need is not None and need.bytes > budget:
        return f"memory={plan.memory.name} {need.described(budget)}"
    return None


def check_call(plan: Plan) -> None:
    """Refuse what the model cannot do with the call's arguments, instead of ignoring it."""
    config, model = plan.config, plan.model
    if model.pipeline == "klein_kv" and (config.negative_prompt is not None or (plan.guidance or 0) > 1):
        key = "guidance" if config.negative_prompt is None else "negative_prompt"
        raise ConfigError(
            f"{key}: model.pipeline=klein_kv has no classifier-free guidance; take a distilled model without {key}, "
            "or guidance=1"
        )
    if model.distilled and config.guidance is not None:
        raise ConfigError(
            f"guidance={config.guidance}: {model.name} is a distilled model, its guidance is built in; "
            "leave guidance out (a klein base model or flux2_dev takes it)"
        )
    sigmas = plan.scheduler.sigmas
    if sigmas is not None and config.steps not in (None, len(sigmas)):
        raise ConfigError(
            f"steps={config.steps}: scheduler.sigmas has {len(sigmas)} values, one for each step; leave steps out"
        )
    if config.negative_prompt is not None and (model.distilled or model.pipeline == "dev"):
        raise ConfigError(
            f"negative_prompt: {model.name} does not use classifier-free guidance, it has no negative prompt; "
            "only the klein base models have one"
        )
    if config.negative_prompt is not None and plan.guidance is not None and plan.guidance <= 1:
        raise ConfigError(
            f"negative_prompt: guidance={plan.guidance:g} switches guidance off, so it is not used; give guidance>1"
        )
