"""The run's root class and the option protocol: what a composed config is, typed and validated."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fluxrun.errors import ConfigError

if TYPE_CHECKING:
    from fluxrun.context import Context
    from fluxrun.machine import Machine
    from fluxrun.plan import Plan

Facts = dict[str, Any]


class Option(BaseModel):
    """One choice in an option group: a YAML file's knobs, and what they do to a pipeline.

    A subclass adds knobs as typed fields, says in ``requires`` why a machine cannot use it, and in ``apply``
    does its work on a diffusers pipeline and returns what it counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    name: str = ""
    """The option's name, which is its YAML file's; filled in when the config is composed."""

    fallback: str = "error"
    """Option of the same group that is used when this one cannot be; ``error`` refuses the run instead."""

    def requires(self, machine: Machine) -> str | None:
        """Why this machine cannot use the option, or None. Pure: imports no torch, loads nothing."""
        return None

    def inapplicable(self, plan: Plan) -> str | None:
        """Why this run leaves the option nothing to do (then it falls back, as at ``requires``), or None. Pure."""
        return None

    def resolve(self, plan: Plan) -> tuple[str, str] | None:
        """For an option that only chooses (``auto``): the option to use and why. Pure, like ``requires``."""
        return None

    def choose(self, pipeline: Any, context: Context) -> tuple[str, Facts] | None:
        """As ``resolve``, for a choice that needs the built pipeline and a measurement."""
        return None

    def apply(self, pipeline: Any, context: Context) -> Facts:
        """Do it to ``pipeline`` (a diffusers pipeline) and return what was counted.

        Raises whatever the library raises; the builder turns that into a fallback.
        """
        return {}

    def observe(self, pipeline: Any, context: Context) -> Facts:
        """What can only be counted after pictures were drawn; merged into the facts of ``apply``."""
        return {}

    def unused_knobs(self) -> list[str]:
        """Knobs that were set but that this option does not use (groups share one knob schema)."""
        return []


def load_option(node: Any) -> Option:
    """Turn ``{_target_, name, knobs…}`` into the option it names; an Option passes through.

    Raises ConfigError for a missing or untrusted ``_target_`` and for knobs that do not validate.
    """
    from fluxrun.trust import check_target

    if isinstance(node, Option):
        return node
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"an option must be a mapping with a _target_, got {node!r}")
    knobs = dict(node)
    target = str(knobs.pop("_target_"))
    check_target(target)
    module_name, _, class_name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"_target_ {target!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Option)):
        raise ConfigError(f"_target_ {target!r} is not a fluxrun option class (a subclass of fluxrun.Option)")
    return cls(**knobs)


_LOAD_OPTION = BeforeValidator(load_option)
GroupOption = Annotated[Option, _LOAD_OPTION]


class Measure(BaseModel):
    """How often an image is drawn when its speed is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    warmup: int = Field(0, ge=0)
    """Images drawn and thrown away before the first one that counts."""

    repeats: int = Field(1, ge=1)
    """How many times each image is drawn; it is saved once, every time is recorded."""


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, (str, Path)) else value


PathList = Annotated[tuple[Path, ...], BeforeValidator(_as_list)]


class RunConfig(BaseModel):
    """One run, composed and validated. Sizes in pixels; ``None`` means the model's own default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    prompt: str | tuple[str, ...] | None = None
    """What to draw: one text or a list of texts."""
    prompts_file: Path | None = None
    """Text (one prompt a line), YAML or JSON-lines file of prompts; used instead of ``prompt``."""
    negative_prompt: str | None = None
    """What not to draw; only for models with classifier-free guidance (FLUX.2 klein base)."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the first image; further images of a prompt count up."""
    num_images: int = Field(1, ge=1)
    """Images per prompt."""
    steps: int | None = Field(None, ge=1)
    """Denoising steps."""
    guidance: float | None = Field(None, ge=0)
    """Guidance scale; refused for distilled models, which have none."""
    height: int | None = Field(None, ge=16, multiple_of=16)
    """Picture height in pixels, a multiple of 16."""
    width: int | None = Field(None, ge=16, multiple_of=16)
    """Picture width in pixels, a multiple of 16."""
    reference_images: PathList = ()
    """Pictures to edit or to take subjects from (FLUX.2 image editing)."""
    output_format: Literal["png", "jpeg", "webp"] = "png"
    """Image file format; all of them carry the config as metadata."""
    batch_size: int = Field(1, ge=1)
    """Images per pipeline call."""
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto, cpu, cuda, cuda:N or mps."""
    strict: bool = False
    """Turn every fallback into an error."""
    measure: Measure = Measure()
    """Repeats for measurements."""

    model: GroupOption
    attention: GroupOption
    kernels: GroupOption
    compile: GroupOption
    vae: GroupOption
    memory: GroupOption
    quantization: GroupOption
    cache: GroupOption

    source: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    """The resolved config as plain data, as it goes into the record."""
    config_dirs: tuple[Path, ...] = Field(default=(), exclude=True, repr=False)
    """Config folders in search order: the user's first, fluxrun's own last."""

    @model_validator(mode="before")
    @classmethod
    def _keep_source(cls, data: Any) -> Any:
        if isinstance(data, dict) and "source" not in data:
            return {**data, "source": {k: v for k, v in data.items() if k != "config_dirs"}}
        return data

    def options(self) -> dict[str, Option]:
        """The option of every group, in the groups' order."""
        return {group: getattr(self, group) for group in GROUPS}

    @classmethod
    def from_dict(cls, data: dict[str, Any], config_dirs: tuple[Path, ...] = ()) -> RunConfig:
        """Validate plain data; raises ConfigError with one line for the first thing that is wrong."""
        try:
            return cls(**data, config_dirs=config_dirs)
        except ValidationError as error:
            raise ConfigError(explain(error, data)) from error


GROUPS: tuple[str, ...] = tuple(n for n, field in RunConfig.model_fields.items() if _LOAD_OPTION in field.metadata)
"""The option groups, in the order of RunConfig: a new field with type GroupOption is a new group."""


def explain(error: ValidationError, data: dict[str, Any]) -> str:
    """One line for the first problem: the key, what was got, what is allowed (nearest name first)."""
    from fluxrun.suggest import nearest

    problem = error.errors(include_url=False)[0]
    path = [str(part) for part in problem["loc"] if str(part) not in ("str", "tuple[str, ...]")]
    key = ".".join(path)
    got = problem.get("input")
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}: {nearest(path[-1], sorted(_known_keys(path, data)))}"
    if problem["type"] == "missing":
        return f"{key} is missing: it must be given"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    return f"{key}={shorten(got)}: {problem['msg'].lower()}, got {shorten(repr(got))} ({type(got).__name__})"


def shorten(value: Any, limit: int = 100) -> str:
    """A value for a message of one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _known_keys(path: list[str], data: dict[str, Any]) -> list[str]:
    """The keys that are allowed where ``path`` ends."""
    if len(path) == 1:
        return [name for name in RunConfig.model_fields if name not in ("source", "config_dirs")]
    if path[0] == "measure":
        return list(Measure.model_fields)
    module, _, name = str(data[path[0]]["_target_"]).rpartition(".")
    fields = getattr(importlib.import_module(module), name).model_fields
    return [key for key, knob in fields.items() if not knob.exclude and key != "name"]
