"""What a composed config is, typed and validated: a run, and what a sweep adds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fluxrun.errors import ConfigError
from fluxrun.formatting import nearest, shorten
from fluxrun.options.attention import AttentionOption
from fluxrun.options.base import Option, load_option, own_options
from fluxrun.options.cache import CacheOption
from fluxrun.options.compile import CompileOption
from fluxrun.options.groups import ROWS
from fluxrun.options.kernels import KernelsOption
from fluxrun.options.lora import LoraOption
from fluxrun.options.memory import MemoryOption
from fluxrun.options.model import Flux2Model
from fluxrun.options.parallel import ParallelOption
from fluxrun.options.quantization import QuantizationOption
from fluxrun.options.scheduler import SchedulerOption
from fluxrun.options.vae import VaeOption
from fluxrun.trust import Closed, Open, OpenWhere
from fluxrun.types import JsonObject

M = TypeVar("M", bound=BaseModel)

_LOAD = BeforeValidator(load_option)

READ = "it names a file or folder of this machine, which is read"


class Measure(BaseModel):
    """How often an image is drawn when its speed is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    warmup: Open[int] = Field(0, ge=0)
    """Images drawn and thrown away before the first one that counts."""

    repeats: Open[int] = Field(1, ge=1)
    """How many times each image is drawn; it is saved once, every time is recorded."""


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, (str, Path)) else value


ReferenceResize = Literal["area", "fit", "crop", "stretch"]

PathList = Annotated[tuple[Path, ...], BeforeValidator(_as_list)]


class RunConfig(BaseModel):
    """One run, composed and validated. Sizes in pixels; ``None`` means the model's own default."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    prompt: Open[str | tuple[str, ...] | None] = None
    """What to draw: one text or a list of texts."""
    prompts_file: Annotated[Path | None, Closed(READ)] = None
    """Text (one prompt a line), YAML or JSON-lines file of prompts; used instead of ``prompt``."""
    negative_prompt: Open[str | None] = None
    """What not to draw; only for models with classifier-free guidance (FLUX.2 klein base)."""
    seed: Open[int] = Field(0, ge=0, lt=2**63)
    """Seed of the first image; further images of a prompt count up."""
    num_images: Open[int] = Field(1, ge=1)
    """Images per prompt."""
    steps: Open[int | None] = Field(None, ge=1)
    """Denoising steps."""
    guidance: Open[float | None] = Field(None, ge=0, allow_inf_nan=False)
    """Guidance scale; refused for distilled models, which have none."""
    guidance_batched: Open[bool] = False
    """Classifier-free guidance (FLUX.2 klein base): prompt and negative prompt in one call of the transformer a step
    instead of two, where the memory allows. Equal up to rounding."""
    height: Open[int | None] = Field(None, ge=16, multiple_of=16)
    """Picture height in pixels, a multiple of 16."""
    width: Open[int | None] = Field(None, ge=16, multiple_of=16)
    """Picture width in pixels, a multiple of 16."""
    reference_images: Annotated[PathList, Closed(READ)] = ()
    """Pictures to edit or to take subjects from (FLUX.2 image editing)."""
    reference_resize: Open[ReferenceResize] = "area"
    """Size of the reference pictures. ``area``: their own; ``fit``: scaled to lie within the picture that is drawn;
    ``crop``: scaled to cover it, the rest cut off; ``stretch``: its size. In any case the pipeline scales what has more
    than 1024x1024 pixels down to that area, and cuts each edge to a multiple of 16."""
    image: Annotated[Path | None, Closed(READ)] = None
    """The picture to repaint a part of (model.pipeline=klein_inpaint), which also gives the size."""
    mask_image: Annotated[Path | None, Closed(READ)] = None
    """klein_inpaint: a picture of the same size, white where ``image`` is repainted."""
    strength: Open[float | None] = Field(None, gt=0, le=1)
    """klein_inpaint: how far the repainted part may leave what it was; below 1 first steps are left out (null: 0.8)."""
    padding_mask_crop: Open[int | None] = Field(None, ge=0)
    """klein_inpaint: work on the mask and so many pixels around it alone, scaled up to the picture's size; everything
    outside of the mask keeps its bytes."""
    output_format: Open[Literal["png", "jpeg", "webp"]] = "png"
    """Image file format; all of them carry the config as metadata."""
    batch_size: Open[int] = Field(1, ge=1)
    """Images per pipeline call."""
    device: Open[str] = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto, cpu, cuda, cuda:N or mps."""
    strict: Open[bool] = False
    """Turn every fallback into an error."""
    measure: Measure = Measure()
    """Repeats for measurements."""

    model: Annotated[Flux2Model, _LOAD]
    attention: Annotated[AttentionOption, _LOAD]
    kernels: Annotated[KernelsOption, _LOAD]
    compile: Annotated[CompileOption, _LOAD]
    vae: Annotated[VaeOption, _LOAD]
    memory: Annotated[MemoryOption, _LOAD]
    quantization: Annotated[QuantizationOption, _LOAD]
    cache: Annotated[CacheOption, _LOAD]
    lora: Annotated[LoraOption, _LOAD]
    scheduler: Annotated[SchedulerOption, _LOAD]
    parallel: Annotated[ParallelOption, _LOAD]

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
    def from_dict(cls, data: JsonObject, config_dirs: tuple[Path, ...] = ()) -> RunConfig:
        """Validate plain data; raises ConfigError with one line for the first thing that is wrong."""
        if inner := sorted({"source", "config_dirs"} & data.keys()):  # fields, but no knobs
            raise ConfigError(f"unknown key {inner[0]!r}: {nearest(inner[0], _known_keys(inner[:1], data))}")
        try:
            return cls(**data, config_dirs=config_dirs)
        except ValidationError as error:
            raise ConfigError(explain(error, data)) from error


GROUPS: tuple[str, ...] = tuple(n for n, field in RunConfig.model_fields.items() if _LOAD in field.metadata)
"""The option groups, in the order of RunConfig: a new group is a field here and a row in ``options/groups.py``."""


class SweepConfig(BaseModel):
    """The ``sweep`` node of the config: how a multirun's jobs are run and compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    isolation: Open[Literal["none", "process"]] = "none"
    """``none``: all jobs in this process, over weights loaded once. ``process``: every job in a process of its own."""
    resume: Annotated[Path | None, Closed("the sweep's pictures and table go there")] = None
    """Folder of an earlier sweep: jobs that it has completed (by config hash) are not run again."""
    baseline: Annotated[str, OpenWhere(r"auto|neutral|[\w.]+=[^/\s]+( [\w.]+=[^/\s]+)*", READ)] = "auto"
    """What others are compared with. ``auto``: the neutral job; ``neutral``: the same, drawn first when the sweep has
    none; ``key=value key=value``: the job with these; or the folder of an earlier run."""
    min_psnr: Open[float | None] = Field(None, gt=0)
    """For a sweeper that optimises: settings whose pictures are further from the baseline's are worth nothing (dB)."""


class CommandConfig(BaseModel):
    """Keys that say how a command draws, and not what: they are in no record, and in no config's hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resume: Annotated[Path | None, Closed("the run's pictures and record go there")] = None
    """Folder of an earlier run of the same command: the images that it lacks are drawn, the others stay as they are."""


OTHER_PROCESSES = "it starts processes that draw, on this machine or on others"


class RayConfig(BaseModel):
    """The ``ray`` node of the config: the cluster that ``workers`` run on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: Annotated[str | None, Closed(OTHER_PROCESSES)] = None
    """A Ray cluster that is there: ``host:port``, or ``auto`` on one of its nodes. Else Ray is started on this machine
    alone, and ends with the command."""


class WorkersConfig(BaseModel):
    """How many processes draw a sweep's jobs, or the pictures of a prompt set. As CommandConfig: in no record."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: Annotated[PositiveInt | Literal["auto"] | None, Closed(OTHER_PROCESSES)] = None
    """So many Ray actors, each with a GPU and weights of its own that are loaded once; ``auto``: one per GPU. They
    draw a sweep's jobs, or a prompt set's images."""
    ray: RayConfig = RayConfig()
    """Which cluster."""


BESIDE_A_RUN = ("hydra", "sweep", "resume", "workers", "ray")
"""Keys of the config that say how runs are drawn, and are part of none."""


def knobs_at(path: Sequence[str]) -> list[tuple[int, FieldInfo]]:
    """The knobs that a key of the config sets or reaches into, each with the length of its own path.

    Several where options of one group share a name: which of them will be in use is not known before all is composed.
    """
    within: dict[str, Sequence[type[BaseModel]]] = {"measure": [Measure], "sweep": [SweepConfig], "ray": [RayConfig]}
    models = own_options(ROWS[path[0]].base) if path[0] in GROUPS else within.get(path[0])
    if models is None:
        beside = CommandConfig.model_fields | WorkersConfig.model_fields
        return [(1, knob) for knob in [{**beside, **RunConfig.model_fields}.get(path[0])] if knob]
    return [(2, model.model_fields[path[1]]) for model in models if path[1:] and path[1] in model.model_fields]


def validate_option(group: str, data: JsonObject) -> Option:
    """An option as plain data, validated as RunConfig's field of its group; raises ConfigError with one line."""
    try:
        option = load_option(data)
    except ValidationError as error:
        raise ConfigError(explain(error, {group: data}, group)) from error
    if not isinstance(option, ROWS[group].base):
        raise ConfigError(_other_group(group, option))
    return option


def explain(error: ValidationError, data: JsonObject, *within: str) -> str:
    """One line for the first problem: the key, what was got, what is allowed (nearest name first).

    ``within`` is where in ``data`` the model lies that did not validate.
    """
    problem = error.errors(include_url=False)[0]
    path = [*within, *(str(part) for part in problem["loc"] if str(part) not in ("str", "tuple[str, ...]"))]
    key = ".".join(path)
    got = problem.get("input")
    if problem["type"] == "extra_forbidden":
        return f"unknown key {shorten(key)!r}: {nearest(path[-1], sorted(_known_keys(path, data)))}"
    if problem["type"] == "missing":
        return f"{key} is missing: it must be given"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    if problem["type"] == "model_type" and isinstance(got, Option):
        return _other_group(path[0], got)
    return f"{key}={shorten(got)}: {problem['msg'].lower()}, got {shorten(repr(got))} ({type(got).__name__})"


def _other_group(group: str, option: Option) -> str:
    wanted: Any = RunConfig.model_fields[group].annotation
    a_subclass = f"a subclass of {wanted.__module__}.{wanted.__qualname__}"
    return f"{group}={option.name}: {type(option).__name__} is no option of this group ({a_subclass})"


def _known_keys(path: list[str], data: JsonObject) -> list[str]:
    """The keys that are allowed where ``path`` ends."""
    if len(path) == 1:
        return [name for name in RunConfig.model_fields if name not in ("source", "config_dirs")]
    if path[0] == "measure":
        return list(Measure.model_fields)
    node = data[path[0]]
    assert isinstance(node, Mapping)
    module, _, name = str(node["_target_"]).rpartition(".")
    fields = getattr(importlib.import_module(module), name).model_fields
    return [key for key, knob in fields.items() if not knob.exclude and key != "name"]


def sweep_config(node: DictConfig) -> SweepConfig:
    """The validated ``sweep`` node; raises ConfigError in one line, also for what belongs to one run."""
    if (resumed := command_config(node).resume) is not None:
        raise ConfigError(f"resume={resumed} goes on with one run; sweep.resume=FOLDER goes on with a sweep")
    return _validated(SweepConfig, OmegaConf.to_container(node.sweep, resolve=True), "sweep")


def command_config(node: DictConfig) -> CommandConfig:
    """What the keys beside a run's own say; raises ConfigError in one line."""
    return _validated(CommandConfig, {name: node[name] for name in CommandConfig.model_fields})


def workers_config(node: DictConfig) -> WorkersConfig | None:
    """What ``workers`` and ``ray`` say, or None where this process draws; raises ConfigError in one line."""
    data = OmegaConf.to_container(node, resolve=False)
    assert isinstance(data, dict)
    config = _validated(WorkersConfig, {"workers": data.get("workers"), "ray": data.get("ray", {})})
    if config.workers is None and config.ray.address is not None:
        raise ConfigError(f"ray.address={config.ray.address}: add workers=N, or workers=auto for one per GPU")
    return None if config.workers is None else config


def _validated(model: type[M], data: Any, *within: str) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        loc = [str(part) for part in problem["loc"] if str(part) not in ("constrained-int", "literal['auto']")]
        key = ".".join([*within, *loc])
        raise ConfigError(f"{key}={shorten(problem['input'])}: {problem['msg'].lower()}") from error
