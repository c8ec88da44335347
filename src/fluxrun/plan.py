"""The plan: config + Machine → what would run, what falls back and why. Pure; nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fluxrun.catalog import Catalog
from fluxrun.checkpoint import Located, resolve
from fluxrun.config import GROUPS, Facts, Option, RunConfig
from fluxrun.conflicts import find_conflicts
from fluxrun.errors import ConfigError, OptionUnavailable
from fluxrun.machine import Machine
from fluxrun.options.model import Flux2Model
from fluxrun.waiting import autotune_note

APPLY_ORDER = ("quantization", "memory", "attention", "kernels", "vae", "cache", "compile")
"""The one order in which options touch a pipeline: compile last, so that it captures what the others did."""

BLAME_ORDER = ("compile", "cache", "kernels", "attention", "quantization", "vae")
"""Which option falls back first when the first call fails and the error does not say who failed."""


MOST_CHANGES = 50
"""More changes than any sound plan takes: then options of a user's own point at each other."""


@dataclass(frozen=True)
class Fallback:
    """An option not usable, or only in part: when that showed (``requires``, ``apply``, ``first_call``) and why."""

    option: str
    stage: str
    reason: str
    error_type: str | None = None


def stand_in(option: str, effective: str) -> str:
    """What an option fell back to, in words: it may have kept its name and lost a knob."""
    return "a part of it" if option == effective else effective


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
    notes: list[str] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Option]:
        """The options in use, by group."""
        return {group: choice.option for group, choice in self.choices.items()}

    @property
    def model(self) -> Flux2Model:
        """The model option."""
        model = self.choices["model"].option
        assert isinstance(model, Flux2Model)
        return model

    @property
    def dtype(self) -> str:
        """The weights' dtype on this run's device."""
        return self.model.dtype_on(self.machine)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return picture_size(self.config)

    @property
    def guided(self) -> bool:
        """Whether the run uses classifier-free guidance, which calls the transformer twice a step."""
        model = self.model
        guidance = model.guidance if self.config.guidance is None else self.config.guidance
        return model.pipeline == "klein" and model.distilled is False and guidance is not None and guidance > 1

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def fall_back(self, group: str, stage: str, reason: str, error_type: str | None = None) -> Fallback:
        """The one place where an option gives way to its fallback.

        Raises OptionUnavailable when there is none (``error``), with ``strict=true``, or when all were tried.
        """
        choice = self.choices[group]
        failed = choice.option
        tried = {fallback.option for fallback in choice.fallbacks} | {failed.name}
        record = Fallback(failed.name, stage, reason, error_type)
        if self.config.strict:
            raise OptionUnavailable(f"{group}={failed.name}: {reason} (strict=true allows no fallback)", stage=stage)
        if failed.fallback == "error" or failed.fallback in tried:
            raise OptionUnavailable(f"{group}={failed.name}: {reason}", stage=stage)
        choice.fallbacks.append(record)
        choice.option = self.catalog.load(group, failed.fallback, like=failed)
        choice.facts = {}
        return record

    def switch(self, group: str, name: str, facts: Facts) -> None:
        """Take what an ``auto`` option chose; a choice is not a fallback."""
        choice = self.choices[group]
        choice.option = self.catalog.load(group, name, like=choice.option)
        choice.facts = {**choice.facts, **facts}

    def settle(self) -> None:
        """Follow requires, auto choices and conflicts until nothing changes any more."""
        for _ in range(MOST_CHANGES):
            if not (self._follow_requires() or self._follow_autos() or self._follow_conflicts()):
                return
        chain = ", ".join(f"{group}={choice.effective}" for group, choice in self.choices.items() if choice.fallbacks)
        raise ConfigError(f"the options' fallbacks and conflicts go round in a circle ({chain})")

    def _follow_requires(self) -> bool:
        for group, choice in self.choices.items():
            if reason := choice.option.requires(self.machine) or choice.option.inapplicable(self):
                self.fall_back(group, "requires", reason)
                return True
        return False

    def _follow_autos(self) -> bool:
        for group, choice in self.choices.items():
            if chosen := choice.option.resolve(self):
                self.switch(group, chosen[0], {"chosen_because": chosen[1]})
                return True
        return False

    def _follow_conflicts(self) -> bool:
        for conflict in find_conflicts(self.options):
            if conflict.group is None or conflict.instead is None:
                self.note(conflict.why)
                continue
            choice = self.choices[conflict.group]
            if self.config.strict:
                raise OptionUnavailable(f"{conflict.group}={choice.effective}: {conflict.why} (strict=true)")
            narrowed = conflict.narrowed(choice.option)
            change = f": {conflict.target} is taken out of {conflict.group}.targets" if narrowed else ""
            choice.fallbacks.append(Fallback(choice.effective, "requires", conflict.why + change))
            # Handing on the knob that makes the conflict would only bring it back.
            choice.option = narrowed or self.catalog.load(
                conflict.group, conflict.instead, like=choice.option, without=conflict.drop
            )
            choice.facts = {}
            return True
        return False


def make_plan(config: RunConfig, machine: Machine, located: Located | None = None, reference_tokens: int = 0) -> Plan:
    """Plan a run. Raises ConfigError for what contradicts the model, OptionUnavailable where nothing is left."""
    if reason := machine.lacks_device(config.device):
        raise ConfigError(f"device={config.device}: {reason}; use device=auto or device=cpu")
    machine = machine.on(config.device)
    choices = {group: Choice(option.name, option) for group, option in config.options().items()}
    if located is not None:
        choices["model"].option = resolve(choices["model"].option, located)  # type: ignore[arg-type]
    weight_bytes = located.component_bytes if located else None
    plan = Plan(config, machine, Catalog(config.config_dirs), choices, weight_bytes, reference_tokens)
    check_call(plan)
    plan.settle()
    for group, choice in plan.choices.items():
        for knob in choice.option.unused_knobs():
            plan.note(f"{group}.{knob} is set, but {group}={choice.effective} does not use it")
    if text := autotune_note(plan.options["compile"]):  # type: ignore[arg-type]
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
    if config.negative_prompt is not None and (model.distilled or model.pipeline == "dev"):
        raise ConfigError(
            f"negative_prompt: {model.name} does not use classifier-free guidance, it has no negative prompt; "
            "only the klein base models have one"
        )
    guidance = model.guidance if config.guidance is None else config.guidance
    if config.negative_prompt is not None and guidance is not None and guidance <= 1:
        raise ConfigError(
            f"negative_prompt: guidance={guidance:g} switches guidance off, so it is not used; give guidance>1"
        )


def picture_size(config: RunConfig) -> tuple[int, int]:
    """Height and width in pixels: the run's, else the model's."""
    model = config.model
    assert isinstance(model, Flux2Model)
    return config.height or model.height, config.width or model.width


def summary(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for ``fluxrun plan`` and tests."""
    return {
        group: {
            "requested": choice.requested,
            "effective": choice.effective,
            "fallbacks": [vars(f) for f in choice.fallbacks],
            "facts": choice.facts,
        }
        for group, choice in plan.choices.items()
        if group in GROUPS
    }
