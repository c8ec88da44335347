"""Which knobs a stranger's file may set: each is marked open or closed, and what nobody marked is closed."""

from __future__ import annotations

import re
import sys
import types
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
import yaml
from helpers import GLOBAL, every_option, preset
from hydra.types import RunMode
from omegaconf import OmegaConf
from pydantic import BaseModel, Field, ValidationError

from fluxrun.config.catalog import Catalog
from fluxrun.config.composition import compose, compose_node, config_dirs, hydra_for
from fluxrun.config.schema import GROUPS, CommandConfig, Measure, RayConfig, RunConfig, SweepConfig, WorkersConfig
from fluxrun.errors import TrustError
from fluxrun.options.attention import Attention
from fluxrun.trust import UNMARKED, Closed, Open, OpenWhere, objection, why_closed


@pytest.mark.parametrize(
    "knob", ["inductor_options: {cpp.cxx: [/tmp/evil]}", "cache_dir: /tmp/evil", "cache_artifacts: /tmp/evil"]
)
def test_knobs_that_run_code_are_the_command_lines(config_dir, knob, monkeypatch):
    preset(config_dir, GLOBAL + f"compile: {{{knob}}}\n")
    with pytest.raises(TrustError, match="--trust-config"):
        compose(["+preset=mine"], config_dir=config_dir)
    assert compose(["compile.cache_dir=/tmp/mine"]).compile.cache_dir is not None
    monkeypatch.setenv("FLUXRUN_TRUST_CONFIG", "1")
    compose(["+preset=mine"], config_dir=config_dir)


def every_knob():
    """Each key of the config, with its field and the overrides that make it one: run keys, then each option class's."""
    models = (("", RunConfig), ("measure.", Measure), ("sweep.", SweepConfig), ("", CommandConfig))
    for prefix, model in (*models, ("", WorkersConfig), ("ray.", RayConfig)):
        for name, knob in model.model_fields.items():
            if not knob.exclude and name not in (*GROUPS, "measure", "ray"):
                yield pytest.param(prefix + name, knob, None, id=prefix + name)
    seen = set()
    for group, option in every_option():
        cls = type(Catalog().load(group, option))
        if cls in seen:
            continue
        seen.add(cls)
        for name, knob in cls.model_fields.items():
            if not knob.exclude and name != "name":
                yield pytest.param(f"{group}.{name}", knob, (group, option), id=f"{group}={option} {name}")


def another_value(annotation, default):
    """A value of a knob's type that is not its default."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
        return another_value(annotation, default)
    if get_origin(annotation) is Literal:
        return next(word for word in get_args(annotation) if word != default)
    if get_origin(annotation) is tuple:
        return [another_value(part, None) for part in get_args(annotation) if part is not Ellipsis]
    if annotation is bool:
        return not default
    if annotation in (int, float):
        return {int: 64, float: 0.5}[annotation]
    return {"entry": "x"} if get_origin(annotation) is dict else "native" if annotation is str else "somewhere"


VALUES = {
    "device": "cpu", "sweep.baseline": "neutral", "model.bundled": "tiny", "attention.flash_impl": "FA3",
    "cache.mask": "101", "cache.taylor_order": 2, "cache.compute": 0.25, "guidance": 2.5,
}  # fmt: skip
"""Where the knob asks for more than its type says."""

STRANGE = {"sweep.baseline": "/somewhere", "model.bundled": "../x", "attention.flash_impl": "x"}
STRANGE |= {"attention.backend": "flash_hub", "model.variant": "../x"}
"""Values that a knob is not open for."""


@pytest.mark.slow
@pytest.mark.parametrize(("key", "knob", "option"), every_knob())
def test_every_key_is_open_or_closed(key, knob, option, config_dir, monkeypatch):
    def text(value):
        chosen = f"  - override /{option[0]}: {option[1]}\n" if option else ""
        *within, last = key.split(".")
        body = {last: value}
        return f"{GLOBAL}defaults:\n{chosen}  - _self_\n" + yaml.safe_dump({within[0]: body} if within else body)

    def composed(value):
        """Composition as far as the rule goes: whether the value fits is the schema's business."""
        preset(config_dir, text(value))
        with hydra_for(config_dirs(config_dir)) as app:
            node = compose_node(app, ["+preset=mine"], config_dirs(config_dir), RunMode.MULTIRUN)
        return OmegaConf.to_container(OmegaConf.select(node, key)) if isinstance(value, list | dict) else node

    def refused(value):
        with pytest.raises(TrustError, match=re.escape(why_closed(knob))) as caught:
            composed(value)
        said = str(caught.value)
        assert key in said
        assert "mine.yaml" in said
        assert "--trust-config" in said
        assert "\n" not in said
        monkeypatch.setenv("FLUXRUN_TRUST_CONFIG", "1")
        composed(value)
        monkeypatch.delenv("FLUXRUN_TRUST_CONFIG")

    usual = VALUES.get(key, another_value(knob.annotation, None if knob.is_required() else knob.default))
    if key in STRANGE:
        composed(usual)
        refused(STRANGE[key])
    elif why_closed(knob):
        refused(usual)
    else:
        composed(usual)


CLOSED = {
    "prompts_file", "reference_images", "image", "mask_image", "sweep.resume",
    "model.id", "model.path", "model.revision", "lora.files", "quantization.file",
    "attention.hub", "attention.hub_backend",
    "compile.inductor_options", "compile.cache_dir", "compile.cache_artifacts", "resume", "workers", "ray.address",
}  # fmt: skip


def test_what_is_closed():
    """A list to be changed by hand: opening or closing a knob is a decision."""
    closed = {param.values[0] for param in every_knob() if why_closed(param.values[1])}
    assert closed == CLOSED | STRANGE.keys()


class Marked(BaseModel):
    steps: Open[int] = Field(4, ge=1)
    names: Annotated[Open[tuple[str, ...]], Field(min_length=1)] = ("a",)
    forgotten: int = 0
    hub: Annotated[bool, Closed("it is downloaded and run")] = False
    backend: Annotated[str, OpenWhere("native|math", "others are downloaded")] = "native"


def test_the_mark_opens_a_knob_and_is_no_part_of_its_type():
    fields = Marked.model_fields
    closed = {name: why_closed(knob) for name, knob in fields.items() if why_closed(knob)}
    assert closed == {"forgotten": UNMARKED, "hub": "it is downloaded and run", "backend": "others are downloaded"}
    assert fields["steps"].annotation is int
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Marked(steps=0)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("steps", 9, None), ("forgotten", 1, UNMARKED), ("forgotten", 0, None), ("hub", False, None),
        ("hub", True, "it is downloaded and run"), ("backend", "x_hub", "others are downloaded"),
        ("backend", "native", None), ("backend", ["native"], "others are downloaded"), ("hub", None, None),
    ],
)  # fmt: skip
def test_objections(name, value, why):
    assert objection(Marked.model_fields[name], value) == why


@pytest.mark.parametrize("file", ["option", "preset"])
def test_a_new_knob_that_nobody_marked_is_refused(config_dir, file, monkeypatch):
    """In the class of an option of our own, as if somebody had just added it."""
    module = types.ModuleType("fluxrun.options.brand_new")
    knobs = {"brand_new_knob": int, "marked_knob": Open[int]}
    body = {"__module__": __name__, "__annotations__": knobs, "brand_new_knob": 0, "marked_knob": 0}
    module.BrandNew = type("BrandNew", (Attention,), body)
    monkeypatch.setattr(module.BrandNew, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (config_dir / "attention").mkdir()
    text = "_target_: fluxrun.options.brand_new.BrandNew\nbackend: native\nmarked_knob: 3\nbrand_new_knob: {}\n"
    (config_dir / "attention" / "new.yaml").write_text(text.format(7 if file == "option" else 0))
    preset(config_dir, GLOBAL + f"attention: {{marked_knob: 2, brand_new_knob: {7 if file == 'preset' else 0}}}\n")
    with pytest.raises(TrustError, match=f"sets 'attention.brand_new_knob': {UNMARKED}; if you trust it"):
        compose(["attention=new", "+preset=mine"], config_dir=config_dir)
    monkeypatch.setenv("FLUXRUN_TRUST_CONFIG", "1")
    assert compose(["attention=new", "+preset=mine"], config_dir=config_dir).attention.marked_knob == 2
