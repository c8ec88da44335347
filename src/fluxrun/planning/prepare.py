"""Everything that can be known, and refused, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from PIL.Image import Image

from fluxrun.config.catalog import Catalog
from fluxrun.config.prompts import Job, jobs_of, load_reference_images, texts_of
from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError
from fluxrun.hardware.detection import detect
from fluxrun.hardware.machine import Machine
from fluxrun.options.compile import autotune_note
from fluxrun.options.lora import LoraOption
from fluxrun.options.model import Flux2Model
from fluxrun.planning.estimate import reference_tokens
from fluxrun.planning.fallbacks import settle
from fluxrun.planning.plan import Choice, Plan
from fluxrun.weights.find import check_layers, find_weights, resolve
from fluxrun.weights.location import Located
from fluxrun.weights.lora_files import LoraSource, find_adapters


@dataclass
class Prepared:
    """A run whose input was checked, with its plan."""

    config: RunConfig
    jobs: list[Job]
    references: list[Image]
    located: Located
    plan: Plan
    adapters: tuple[LoraSource, ...] = ()
    """The run's LoRA files."""

    @property
    def texts(self) -> list[str]:
        """Every text that the run must encode, once each."""
        return texts_of(self.jobs, self.plan.negative_prompt)


def prepare(config: RunConfig, machine: Machine | None = None) -> Prepared:
    """Check all of a run's input and plan it. Imports no torch; raises ConfigError or OptionUnavailable."""
    jobs = jobs_of(config)
    references = load_reference_images(config.reference_images)
    if problem := config.quantization.input_problem():
        raise ConfigError(problem)
    machine = machine or detect()
    located = find_weights(config.model, machine)
    plan = make_plan(
        config,
        machine,
        resolve(config.model, located),
        located.component_bytes,
        reference_tokens(references),
        {name: str(declared) for name, declared in located.declared.items()},
    )
    check_layers(plan.model, located)
    return Prepared(config, jobs, references, located, plan, find_adapters(plan.option(LoraOption, "lora")))


def make_plan(
    config: RunConfig,
    machine: Machine,
    model: Flux2Model | None = None,
    weight_bytes: Mapping[str, int] | None = None,
    reference_tokens: int = 0,
    declared: Mapping[str, str] | None = None,
) -> Plan:
    """Plan a run; ``model`` is the option with what its checkpoint knows filled in, ``weight_bytes`` its sizes,
    ``declared`` what it says of its components' quantization.

    Raises ConfigError for what contradicts the model, OptionUnavailable where nothing is left.
    """
    if reason := machine.lacks_device(config.device):
        raise ConfigError(f"device={config.device}: {reason}; use device=auto or device=cpu")
    choices = {group: Choice(option.name, option) for group, option in config.options().items()}
    choices["model"].option = model or config.model
    catalog = Catalog(config.config_dirs)
    plan = Plan(config, machine.on(config.device), catalog, choices, weight_bytes, reference_tokens, declared or {})
    check_call(plan)
    settle(plan)
    for group, choice in plan.choices.items():
        for knob in choice.option.unused_knobs():
            plan.note(f"{group}.{knob} is set, but {group}={choice.effective} does not use it")
    if text := autotune_note(plan.compile):
        plan.note(text)
    return plan


def check_call(plan: Plan) -> None:
    """Refuse what the model cannot do with the call's arguments, instead of ignoring it."""
    config, model = plan.config, plan.model
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
