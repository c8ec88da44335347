"""Falling back: at apply, at the first call, down the memory ladder; never half-applied, always recorded."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from helpers import CONF, H100, SMALL, draw, fluxrun, hashes, plan_on, small

from fluxrun.errors import OptionUnavailable, OutOfMemory
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.record.folder import read_record
from fluxrun.record.schema import RunRecord

CUSTOM = '''
from operator import attrgetter

import torch
from fluxrun.options.attention import AttentionOption


class RaisesInApply(AttentionOption):
    """Changes the pipeline, then fails: nothing of it may stay."""

    def apply(self, pipeline, context):
        for parameter in pipeline.transformer.parameters():
            parameter.data = torch.zeros_like(parameter)
        pipeline.transformer.set_attention_backend("_native_math")
        raise RuntimeError("half way\\nsecond line")


class RaisesAnother(AttentionOption):
    """Fails while it handles another failure, names a third one as the cause, and holds on to the real one."""

    def apply(self, pipeline, context):
        try:
            RaisesInApply.apply(self, pipeline, context)
        except RuntimeError as error:
            real = error  # a circle through its traceback: only the garbage collector would free this frame
            raise ValueError("no luck") from KeyError(str(real))


class RaisesAtFirstCall(AttentionOption):
    def apply(self, pipeline, context):
        def hook(*args):
            raise NotImplementedError("No operator found")

        pipeline.transformer.register_forward_pre_hook(hook)
        return {"hooks": 1}


class RaisesLater(AttentionOption):
    calls: int = 0

    def apply(self, pipeline, context):
        seen = []

        def hook(*args):
            seen.append(1)
            if len(seen) > 2:
                raise NotImplementedError("No operator found")

        pipeline.transformer.register_forward_pre_hook(hook)
        return {}


class Hungry(AttentionOption):
    """Runs out of memory wherever it is told to, unless memory is one of the small options."""

    where: str = "transformer"
    too_large: tuple[str, ...] = ("resident",)

    def apply(self, pipeline, context):
        if context.options["memory"].name in self.too_large:
            if self.where == "apply":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
            module = attrgetter(self.where)(pipeline)

            def hook(*args):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

            module.register_forward_pre_hook(hook)
        return {}


class AlwaysHungry(AttentionOption):
    def apply(self, pipeline, context):
        raise torch.OutOfMemoryError("CUDA out of memory")
'''


@pytest.fixture
def options(tmp_path, config_dir, trusted, monkeypatch) -> Path:
    """A config dir with options of a user's own in the attention group."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own_options.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    (config_dir / "attention").mkdir()
    names = {"in_apply": "RaisesInApply", "at_first_call": "RaisesAtFirstCall", "later": "RaisesLater"}
    names |= {"hungry": "Hungry", "always_hungry": "AlwaysHungry", "another": "RaisesAnother"}
    for name, class_name in names.items():
        text = f"_target_: own_options.{class_name}\nfallback: sdpa\n"
        text += "where: transformer\n" if class_name == "Hungry" else ""
        (config_dir / "attention" / f"{name}.yaml").write_text(text)
    yield config_dir
    sys.modules.pop("own_options", None)


@pytest.fixture(scope="module")
def bench():
    with SessionPool() as pool:
        yield pool


@pytest.fixture(scope="module")
def plain(bench, tmp_path_factory) -> list[str]:
    """The pixels of the run that everything here must fall back to."""
    return hashes(draw(tmp_path_factory.mktemp("plain") / "run", "vae=full", "memory=resident", pool=bench))


def only_fallback(record: RunRecord, group: str) -> tuple[str, str, str, str | None]:
    (fallback,) = record.options[group].fallbacks
    return fallback.option, fallback.stage, fallback.reason, fallback.error_type


def test_at_apply(options, plain, bench, tmp_path):
    record = draw(tmp_path / "run", "attention=in_apply", config_dir=options, pool=bench)
    assert only_fallback(record, "attention") == ("in_apply", "apply", "half way", "RuntimeError")
    assert (record.options["attention"].requested, record.options["attention"].effective) == ("in_apply", "sdpa")
    assert hashes(record) == plain
    assert bench.loads == ["first load"]
    assert read_record(tmp_path / "run") == record


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["hydra.verbose=true"], ["sweep.isolation=process"]])
def test_why_it_fell_back_is_in_the_log_file_alone(options, tmp_path, monkeypatch, how):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"), prepend=os.pathsep)
    multirun = ["--multirun"] if "sweep.isolation=process" in how else []
    folders = ["hydra.run.dir=0", "hydra.sweep.dir=."]
    done = fluxrun("--config-dir", str(options), *multirun, *SMALL, "attention=in_apply", *folders, *how, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "falling back to sdpa (apply: half way)" in done.stderr
    log = (tmp_path / "0" / "fluxrun.log").read_text()
    for what in ("Traceback", "in apply", "second line"):
        assert what in log
        assert what not in done.stderr + done.stdout


def test_at_the_first_call(options, plain, bench, tmp_path):
    record = draw(tmp_path / "run", "attention=at_first_call", config_dir=options, pool=bench)
    assert only_fallback(record, "attention") == (
        "at_first_call", "first_call", "No operator found", "NotImplementedError",
    )  # fmt: skip
    assert "hooks" not in record.options["attention"].facts
    assert hashes(record) == plain
    assert len(record.timings.denoise_s) == 1
    assert bench.loads == ["first load"]


@pytest.mark.parametrize(("name", "stage"), [("in_apply", "apply"), ("at_first_call", "first_call")])
def test_strict_is_a_failed_run(options, bench, tmp_path, name, stage):
    with pytest.raises(OptionUnavailable, match="strict=true") as caught:
        draw(tmp_path / "run", f"attention={name}", "strict=true", config_dir=options, pool=bench)
    assert caught.value.exit_code == 1
    record = read_record(tmp_path / "run")
    assert (record.status, record.images) == ("failed", [])
    assert record.error
    assert "\n" not in record.error.message


def test_what_worked_once_is_not_replaced(options, bench, tmp_path):
    """A failure after the first picture is the run's failure: pictures of one run never come from two builds."""
    with pytest.raises(NotImplementedError):
        draw(tmp_path / "run", "attention=later", "num_images=2", config_dir=options, pool=bench)
    record = read_record(tmp_path / "run")
    assert (record.status, len(record.images)) == ("failed", 1)
    assert record.options["attention"].fallbacks == []


def test_nobody_to_blame(bench, tmp_path, monkeypatch):
    """With everything neutral there is no fallback: the error is the run's."""
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

    def fails(*args, **kwargs):
        raise ZeroDivisionError("made up")

    monkeypatch.setattr(AutoencoderKLFlux2, "decode", fails)
    with pytest.raises(ZeroDivisionError):
        draw(tmp_path / "run", "seed=3", "vae=full", pool=bench)
    error = read_record(tmp_path / "run").error
    assert error is not None
    assert (error.type, error.stage) == ("ZeroDivisionError", "decode")


# --- compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_compiler(tmp_path) -> Path:
    compiler = tmp_path / "broken-g++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    return compiler


@pytest.mark.slow
def test_a_compiler_that_fails_at_the_first_call(broken_compiler, plain, bench, tmp_path, monkeypatch):
    """``requires`` finds a compiler; that it is broken shows only when the first step compiles."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    overrides = ("compile=regional", f"+compile.inductor_options={{cpp.cxx: ['{broken_compiler}']}}")
    record = draw(tmp_path / "run", *overrides, "vae=full", pool=bench)
    entry = record.options["compile"]
    assert (entry.requested, entry.effective) == ("regional", "none")
    assert [(f.option, f.stage) for f in entry.fallbacks] == [("regional", "first_call")]
    assert entry.fallbacks[0].reason
    assert "\n" not in entry.fallbacks[0].reason
    assert hashes(record) == plain
    assert bench.loads == ["first load"]


def test_no_compiler_at_all(plain, bench, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/absent/g++")
    record = draw(tmp_path / "run", "compile=default", "vae=full", pool=bench)
    assert [(f.option, f.stage) for f in record.options["compile"].fallbacks] == [
        ("default", "requires"),
        ("regional", "requires"),
    ]
    assert record.options["compile"].effective == "none"
    assert hashes(record) == plain


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["transformer", "text_encoder", "vae.decoder", "apply"])
def test_memory_auto_walks_down_the_ladder(options, plain, tmp_path, where):
    text = (options / "attention" / "hungry.yaml").read_text().replace("where: transformer", f"where: {where}")
    (options / "attention" / "hungry.yaml").write_text(text)
    record = draw(
        tmp_path / "run", "attention=hungry", "vae=full", "prompt=[a red circle left of a blue square, b]",
        config_dir=options,
    )  # fmt: skip
    entry = record.options["memory"]
    assert (entry.requested, entry.effective) == ("auto", "staged")
    assert [(f.option, f.error_type) for f in entry.fallbacks] == [("resident", "OutOfMemoryError")]
    assert entry.fallbacks[0].stage == ("apply" if where == "apply" else "first_call")
    assert record.options["attention"].effective == "hungry"
    # The prompt that was encoded before memory ran out need not be encoded again.
    assert entry.facts["prompts_encoded_first"] == (2 if where in ("apply", "text_encoder") else 1)
    assert hashes(record)[0] == plain[0]
    assert len(record.images) == 2


def test_who_has_to_give_way_with_it_is_said(options, bench, tmp_path, on_a_cpu, caplog):
    knobs = "where: apply\ntoo_large: [resident, staged, balanced]\n"
    yaml = options / "attention" / "hungry.yaml"
    yaml.write_text(yaml.read_text().replace("where: transformer\n", knobs))
    record = draw(tmp_path / "run", "attention=hungry", "compile=regional", config_dir=options, pool=bench)
    assert [f.option for f in record.options["memory"].fallbacks] == ["resident", "staged", "balanced"]
    assert (record.options["memory"].effective, record.options["compile"].effective) == ("block_swap", "none")
    assert "memory=balanced cannot be used, falling back to block_swap (apply: CUDA out of memory" in caplog.text
    assert "compile=regional cannot be used, falling back to none (requires: the weights move" in caplog.text


def test_a_rung_that_was_asked_for_is_not_left(options, bench, tmp_path):
    with pytest.raises(OutOfMemory, match="memory=resident; try memory=staged or ") as caught:
        draw(tmp_path / "run", "attention=hungry", "memory=resident", config_dir=options, pool=bench)
    assert caught.value.exit_code == 1
    assert "height=32 width=32" in str(caught.value)
    assert read_record(tmp_path / "run").status == "failed"


def test_the_end_of_the_ladder(options, tmp_path):
    with pytest.raises(OutOfMemory):
        draw(tmp_path / "run", "attention=always_hungry", config_dir=options)
    record = read_record(tmp_path / "run")
    assert [f.option for f in record.options["memory"].fallbacks] == ["resident"]


@pytest.fixture
def transformers(monkeypatch):
    """Weak references to the transformers of all pipelines made; none may be made while another is there."""

    from fluxrun.weights import shells

    made: list[weakref.ref] = []
    original = shells.shell

    def shell(*arguments):
        assert not [one for one in made if one() is not None]
        pipeline = original(*arguments)
        made.append(weakref.ref(pipeline.transformer))
        return pipeline

    monkeypatch.setattr(shells, "shell", shell)
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


@pytest.mark.parametrize("attention", ["at_first_call", "in_apply", "another"])
def test_what_failed_is_freed_before_another_is_built(options, transformers, bench, tmp_path, attention):
    draw(tmp_path / "run", f"attention={attention}", config_dir=options, pool=bench)
    assert len(transformers) == 2


def test_nothing_outlives_a_run(transformers, tmp_path):
    draw(tmp_path / "run")
    assert [one() for one in transformers] == [None]


# --- a broken library -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_broken_xformers_does_not_break_a_run(tmp_path):
    """diffusers imports an installed xformers at its own import, and beside flash-attn-4 that import dies."""
    site = tmp_path / "site"
    (site / "xformers").mkdir(parents=True)
    (site / "xformers" / "__init__.py").write_text("__version__ = '0.0.35'\n")
    (site / "xformers" / "ops.py").write_text("import flash_attn.flash_attn_interface\n")
    info = site / "xformers-0.0.35.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n")
    done = fluxrun(*SMALL, "attention=xformers", "hydra.run.dir=run", cwd=tmp_path, env={"PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    assert "installed but broken" not in done.stderr  # on a CPU nothing in the plan can use it: it is left out
    record = read_record(tmp_path / "run")
    assert record.options["attention"].effective == "sdpa"
    assert record.environment["xformers"] == "0.0.35"
    assert len(record.images) == 1
    code = "from fluxrun.process.switches import import_diffusers; print(import_diffusers()['xformers'])"
    path = os.pathsep.join([str(site), *sys.path])
    env = {**os.environ, "PYTHONPATH": path}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False)
    assert b"import xformers.ops fails: ModuleNotFoundError" in found.stdout, found.stderr


# --- the Python API ---------------------------------------------------------------------------------------------


def test_build_gives_an_ordinary_pipeline(tmp_path, plain):
    import torch

    import fluxrun
    from fluxrun.process.switches import snapshot
    from fluxrun.record.picture import pixel_hash

    before = snapshot()
    session = fluxrun.build(small("attention=math", "vae=full"))
    try:
        assert type(session.pipeline).__name__ == "Flux2KleinPipeline"
        assert session.plan.choices["attention"].effective == "math"
        arguments = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
        images = session.pipeline(
            prompt="a red circle left of a blue square", generator=torch.Generator().manual_seed(0),
            max_sequence_length=32, text_encoder_out_layers=(1, 2, 3), **arguments,
        ).images  # fmt: skip
    finally:
        session.close()
    assert images[0].size == (64, 64)
    assert snapshot() == before
    assert len(pixel_hash(images[0])) == 64


def test_a_pipeline_that_is_handed_out_keeps_its_text_encoder():
    import fluxrun
    from fluxrun.errors import ConfigError
    from fluxrun.runner import keep_whole

    with pytest.raises(ConfigError, match="memory=balanced"):
        fluxrun.build(small("memory=staged"))
    plan = plan_on(H100, "model=flux2_dev", "model.weights=random", "compile=regional")
    assert plan.choices["memory"].effective == "staged"
    keep_whole(plan)
    assert plan.choices["memory"].effective == "balanced"
    assert "keeps its text encoder" in plan.choices["memory"].facts["chosen_because"]


def test_run_from_python(tmp_path, plain):
    import fluxrun

    record = fluxrun.run(fluxrun.compose([*SMALL, "vae=full"]), tmp_path / "run")
    assert (record.status, hashes(record)) == ("completed", plain)
    assert (tmp_path / "run" / record.images[0].path).exists()
    assert CONF.is_dir()
