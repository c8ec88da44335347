"""Composition: groups and overrides become one validated config, text comes through unchanged, errors are one line."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import CONF, CPU, GROUPS, every_option, option_names
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fluxrun.config.composition import compose, quote_raw_text
from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError, FluxrunError
from fluxrun.planning.prepare import prepare
from fluxrun.record.folder import data_hash

AWKWARD = '"It\'s 50% #1 (really)!", ${HOME}, é'

# Every character a UTF-8 command line can carry; NUL ends an argument, surrogates are not text.
raw_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
nasty_text = st.text(st.sampled_from("ab \\'\"${}[](),=:#!?%&*|<>\n\t~@/+-é0"), max_size=25)


def is_a_list(text: str) -> bool:
    return (text.startswith("[") and text.endswith("]")) or text == "null"


# --- text -------------------------------------------------------------------------------------------------------


def through_hydra(text):
    """What Hydra's parser and OmegaConf make of ``prompt=TEXT`` on the command line."""
    override = OverridesParser.create().parse_overrides([quote_raw_text(f"prompt={text}")])[0]
    node = OmegaConf.create({"prompt": override.value()})
    return OmegaConf.to_container(node, resolve=True)["prompt"]


def awkward(test):
    for text in (
        AWKWARD, "\\", "\\\\${a}\\", "'\\'", "${oc.env:HOME} $${x} \\${y}", "${", "a, b", " padded ", "1e3", "true",
        "???", "line\nbreak\r\n", "", "choice(1,2)", "range(3)", "a=b", "--x", "[a", "{a: b}",
    ):  # fmt: skip
        test = example(text)(test)
    return test


@awkward
@given(st.one_of(raw_text, nasty_text))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_through(text):
    assert is_a_list(text) or through_hydra(text) == text


@awkward
@given(st.one_of(raw_text, nasty_text))
@settings(max_examples=200, deadline=None)
def test_any_text_is_one_value_of_a_sweep(text):
    if is_a_list(text):
        return
    overrides = OverridesParser.create().parse_overrides([quote_raw_text(f"prompt={text}"), "seed=0,1"])
    (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    assert len(jobs) == 2
    expected = OverridesParser.create().parse_overrides([quote_raw_text(f"prompt={text}")])[0].value()
    assert all(OverridesParser.create().parse_overrides(job)[0].value() == expected for job in jobs)


@pytest.mark.parametrize("text", [AWKWARD, "\\\\${a}\\", "?", "", "a\nb", "~x@y"])
def test_text_through_the_whole_composition(text):
    assert compose([f"prompt={text}"]).prompt == text


@pytest.mark.parametrize("key", ["prompt", "+prompt", "++prompt", "negative_prompt"])
def test_only_raw_text_keys_are_quoted(key):
    assert quote_raw_text(f"{key}=a, b").endswith("='a, b'")
    assert quote_raw_text("prompt=[a, b]") == "prompt=[a, b]"
    assert quote_raw_text("negative_prompt=null") == "negative_prompt=null"
    assert quote_raw_text("seed=1,2") == "seed=1,2"
    assert quote_raw_text("prompt") == "prompt"


def test_a_list_of_prompts():
    assert compose(["prompt=[a cat, 'a dog, barking']"]).prompt == ("a cat", "a dog, barking")
    assert compose([f"prompt={AWKWARD}"]).prompt == AWKWARD


# --- groups -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["workers=2", "workers=auto", "resume=outputs/run"])
def test_how_a_command_draws_is_no_part_of_a_config(key):
    with pytest.raises(ConfigError, match=rf"^{key} is for the fluxrun command that draws"):
        compose([key])


def test_groups_are_conf_folders():
    assert set(GROUPS) <= {path.name for path in CONF.iterdir() if path.is_dir()}


@pytest.mark.parametrize(("group", "name"), every_option())
def test_every_option_composes_and_names_all_its_knobs(group, name):
    option = compose([f"{group}={name}"]).options()[group]
    assert option.name == name
    text = (CONF / group / f"{name}.yaml").read_text()
    written = OmegaConf.create(text)
    # A file shows every knob there is, and starts with when to use it.
    knobs = {k for k, f in type(option).model_fields.items() if not f.exclude} - {"name"}
    optional = {"path", "bundled", "fallback"} if group == "model" else set()
    assert knobs - optional <= set(written) - {"_target_"}
    assert text.startswith("# ")
    assert option.fallback in (*option_names(group), "error")


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "model"])
def test_every_fallback_ends_in_the_groups_one_neutral_option(group):
    fallbacks = {name: compose([f"{group}={name}"]).options()[group].fallback for name in option_names(group)}
    assert list(fallbacks.values()).count("error") == 1
    for name in fallbacks:
        seen = [name]
        while fallbacks[seen[-1]] != "error":
            seen.append(fallbacks[seen[-1]])
            assert len(seen) <= len(fallbacks)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "preset").glob("*.yaml")))
def test_every_preset_composes_and_says_its_command(name):
    config = compose([f"+preset={name}"])
    first, second = (CONF / "preset" / f"{name}.yaml").read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert second.startswith(f"# fluxrun +preset={name} ")
    assert prepare(config.model_copy(update={"model": compose([]).model}), CPU)


def test_config_hash_is_of_the_resolved_config():
    assert data_hash(compose([]).source) == data_hash(compose(["seed=0", "attention=sdpa"]).source)
    assert data_hash(compose([]).source) != data_hash(compose(["seed=1"]).source)
    again = RunConfig.from_dict(compose(["steps=3"]).source)
    assert data_hash(again.source) == data_hash(compose(["steps=3"]).source)


# --- refusals ---------------------------------------------------------------------------------------------------

REFUSED = {
    "attention=xformer": "did you mean 'xformers'",
    "attention=slicing": "attention slicing is not offered",
    "attention=null": "allowed: auto, cudnn",
    "attention=": "allowed: auto, cudnn",
    "attention.nope=1": "unknown key 'attention.nope'",
    "+attention.bakend=x": "did you mean 'backend'",
    "~attention": "attention",
    "attentoin=sdpa": "did you mean 'attention'",
    "stesp=3": "did you mean 'steps'",
    "+stesp=3": "did you mean 'steps'",
    "steps=0": "steps=0",
    "steps=abc": "valid integer",
    "steps=2.5": "valid integer",
    "height=100": "multiple of 16",
    "width=0": "width=0",
    "seed=-1": "seed=-1",
    "num_images=0": "num_images=0",
    "guidance=-1": "guidance=-1",
    "guidance=nan": "guidance",
    "guidance=inf": "guidance",
    "guidance=3": "distilled",
    "negative_prompt=blurry": "no negative prompt",
    "prompt=[]": "nothing to draw",
    "prompt=null": "nothing to draw",
    "prompt=[3]": "prompt",
    "prompts_file=absent.txt": "no such file",
    "reference_images=[absent.png]": "no such file",
    "output_format=gif": "'png', 'jpeg' or 'webp'",
    "device=cuda": "no NVIDIA GPU",
    "device=mps": "no Apple GPU",
    "device=gpu": "auto",
    "measure=3": "measure",
    "measure.repeats=0": "measure.repeats=0",
    "measure.nope=1": "allowed: repeats, warmup",
    "vae.tile_size=100": "multiple of 16",
    "vae.tile_overlap=1": "less than 1",
    "memory.budget_gb=-1": "greater than 0",
    "memory.use_stream=7x": "valid boolean",
    "compile.scope=foo": "'blocks' or 'full'",
    "compile.targets=[foo]": "'transformer'",
    "compile=regional compile.targets=[]": "targets",
    "model=local": "model.path=",
    "model=local model.path=/absent": "no such folder",
    "model.dtype=int8": "'bfloat16'",
    "model.pipeline=foo": "'klein_kv' or 'dev'",
    "model.architecture=dev model.pipeline=klein": "belongs to pipeline dev",
    "model=flux2_klein_4b model.offline=true": "offline",
    "seed=1,2": "--multirun",
    "compile.inductor_options={a:1}": "+compile.inductor_options.NAME=VALUE",
    "a=(b": "quote the value",
    "compile=regional strict=true": "strict",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_bad_input_is_one_short_line(overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    machine = replace(CPU, cxx_compiler=None)
    with pytest.raises(FluxrunError) as caught:
        prepare(compose(overrides.split()), machine)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert REFUSED[overrides] in text
    assert "\n" not in text
    assert len(text) < 500


def test_missing_config_dir(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        compose([], config_dir=tmp_path / "absent")


def test_names_of_the_package_are_functions_whatever_was_imported():
    import fluxrun
    import fluxrun.pipeline.session

    assert fluxrun.compose is compose
    assert callable(fluxrun.build)
    assert callable(fluxrun.run)
    assert fluxrun.build.__module__ == "fluxrun.runner"
