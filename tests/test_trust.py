"""The trust rule: a config file, an image or a record from a stranger names no code and does not steer Hydra."""

from __future__ import annotations

import json
import sys
import types
from typing import Annotated

import pytest
from helpers import CONF, fluxrun, said
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from fluxrun.cli.rerun import from_image
from fluxrun.config.composition import compose
from fluxrun.config.schema import closed_knobs
from fluxrun.errors import ConfigError, TrustError
from fluxrun.options.attention import Attention
from fluxrun.record.picture import save_image
from fluxrun.trust import UNMARKED, Closed, Open, check_file, check_target, closed_in

GLOBAL = "# @package _global_\n# fluxrun +preset=mine\n"

STEERING = {
    "callbacks": GLOBAL + "hydra:\n  callbacks:\n    x:\n      _target_: os.system\n",
    "run dir": GLOBAL + "hydra: {run: {dir: /tmp/elsewhere}}\n",
    "dotted key": GLOBAL + "hydra.run.dir: /tmp/elsewhere\n",
    "sweep keys belong to sweep files": GLOBAL + "hydra: {sweeper: {params: {seed: '1,2'}}}\n",
    "package": "# @package hydra\nrun: {dir: /tmp/elsewhere}\n",
    "package below": "# @package hydra.job_logging\nroot: {level: DEBUG}\n",
    "defaults": GLOBAL + "defaults:\n  - override /hydra/job_logging: none\n",
    "defaults' package": GLOBAL + "defaults:\n  - /preset@hydra.run: other\n",
}


def preset(folder, text, name="mine"):
    (folder / "preset").mkdir(exist_ok=True)
    (folder / "preset" / f"{name}.yaml").write_text(text)


def test_preset_of_a_users_own_folder(config_dir):
    preset(config_dir, GLOBAL + "defaults:\n  - override /compile: regional\nsteps: 3\ncompile: {dynamic: true}\n")
    config = compose(["+preset=mine"], config_dir=config_dir)
    assert (config.steps, config.compile.name, config.compile.dynamic) == (3, "regional", True)
    # A preset's knobs stay when the command line swaps the option, and the command line wins over it.
    config = compose(["+preset=mine", "compile=default", "steps=5"], config_dir=config_dir)
    assert (config.steps, config.compile.name, config.compile.dynamic) == (5, "default", True)


def test_preset_that_leaves_a_node_is_refused(config_dir):
    preset(config_dir, "steps: 3\n")
    with pytest.raises(ConfigError, match="# @package _global_"):
        compose(["+preset=mine"], config_dir=config_dir)


def test_unknown_preset_and_broken_yaml(config_dir):
    preset(config_dir, GLOBAL + "steps: [3\n")
    with pytest.raises(ConfigError, match="absent") as caught:
        compose(["+preset=absent"], config_dir=config_dir)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="valid YAML"):
        compose(["+preset=mine"], config_dir=config_dir)


@pytest.mark.parametrize("text", STEERING.values(), ids=STEERING)
def test_a_file_may_not_steer_hydra(config_dir, text):
    preset(config_dir, text)
    preset(config_dir, "x: 1\n", name="other")
    with pytest.raises(TrustError, match="--trust-config"):
        compose(["+preset=mine"], config_dir=config_dir)


@pytest.mark.filterwarnings("ignore:.*deprecated keyword in package header")
def test_a_files_name_as_its_package_is_seen(config_dir):
    preset(config_dir, "# @package _name_\nrun: {dir: /tmp/elsewhere}\n", name="hydra")
    with pytest.raises(ConfigError, match="unknown key '_name_'"):  # in Hydra 1.3 it is a package like any other
        compose(["+preset=hydra"], config_dir=config_dir)


def test_a_folder_called_hydra_may_not_shadow_hydras_own_files(config_dir):
    folder = config_dir / "hydra" / "job_logging"
    folder.mkdir(parents=True)
    (folder / "default.yaml").write_text("version: 1\nhandlers: {x: {class: logging.NullHandler}}\n")
    with pytest.raises(TrustError, match="steer Hydra"):
        compose([], config_dir=config_dir)


def test_foreign_target_is_never_imported(config_dir):
    (config_dir / "attention").mkdir()
    module = config_dir / "evil_module.py"
    module.write_text(f"open({str(config_dir / 'touched')!r}, 'w')\n")
    (config_dir / "attention" / "evil.yaml").write_text("_target_: evil_module.Evil\n")
    with pytest.raises(TrustError, match=r"evil_module\.Evil"):
        compose(["attention=evil"], config_dir=config_dir)
    assert not (config_dir / "touched").exists()


@pytest.mark.parametrize("target", ["os.system", "fluxrun.runner.run", "fluxrun.optionsx.A", "subprocess.Popen", ""])
def test_targets(target):
    with pytest.raises(TrustError):
        check_target(target)


@pytest.mark.parametrize(
    "target", ["fluxrun.options.attention.Nothing", "fluxrun.options.nothing.A", "fluxrun.options.model.Path"]
)
def test_a_target_must_be_an_option_class(config_dir, target):
    (config_dir / "attention").mkdir()
    (config_dir / "attention" / "odd.yaml").write_text(f"_target_: {target}\n")
    with pytest.raises(ConfigError, match="_target_"):
        compose(["attention=odd"], config_dir=config_dir)


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


INTERNAL = {"source", "config_dirs"}
"""Fields of RunConfig that are no knobs: no file sets them."""

CLOSED = {
    "inductor_options": "inductor's options can name programs that it runs",
    "cache_dir": "compiled kernels that lie in a cache folder are run",
    "hub": "a kernel from the kernels hub is code that is downloaded and run",
    "cache_artifacts": "compiled code that lies in the file is run",
}


def test_every_other_knob_is_open():
    closed = closed_knobs()
    assert {name: why for name, why in closed.items() if name not in INTERNAL} == CLOSED
    assert {name for name in closed if closed[name] == UNMARKED} == INTERNAL


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_comes_with_fluxrun_could_be_a_strangers(path, tmp_path):
    check_file(path, path.parent.name, tmp_path, closed=closed_knobs())


@pytest.mark.parametrize("header", ["compile.inductor_options", "_global_.compile.inductor_options"])
def test_a_closed_knob_may_not_be_a_files_package(config_dir, header):
    preset(config_dir, f"# @package {header}\ncpp.cxx: [/tmp/evil]\n")
    with pytest.raises(TrustError, match="sets 'inductor_options': inductor's options can name programs"):
        compose(["+preset=mine"], config_dir=config_dir)


def test_nor_the_package_that_a_defaults_list_gives_it(config_dir):
    preset(config_dir, "cpp.cxx: [/tmp/evil]\n", name="other")
    preset(config_dir, GLOBAL + "defaults:\n  - /preset@compile.inductor_options: other\n  - _self_\n")
    with pytest.raises(TrustError, match="inductor_options"):
        compose(["+preset=mine"], config_dir=config_dir)


class Marked(BaseModel):
    steps: Open[int] = Field(4, ge=1)
    names: Annotated[Open[tuple[str, ...]], Field(min_length=1)] = ("a",)
    forgotten: int = 0
    hub: Annotated[bool, Closed("it is downloaded and run")] = False


class Holder(BaseModel):
    inner: Marked = Marked()


def test_the_mark_opens_a_knob_and_is_no_part_of_its_type():
    assert closed_in([Holder, Marked]) == {"forgotten": UNMARKED, "hub": "it is downloaded and run"}
    assert Marked.model_fields["steps"].annotation is int
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Marked(steps=0)


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
    with pytest.raises(TrustError, match=f"sets 'brand_new_knob': {UNMARKED}; if you trust it"):
        compose(["attention=new", "+preset=mine"], config_dir=config_dir)
    monkeypatch.setenv("FLUXRUN_TRUST_CONFIG", "1")
    assert compose(["attention=new", "+preset=mine"], config_dir=config_dir).attention.marked_knob == 2


def test_no_config_key_lifts_the_rule(config_dir):
    preset(config_dir, GLOBAL + "trust_config: true\n")
    with pytest.raises(ConfigError, match="trust_config"):
        compose(["+preset=mine"], config_dir=config_dir)
    preset(config_dir, GLOBAL + "hydra: {job: {env_set: {FLUXRUN_TRUST_CONFIG: '1'}}}\n")
    with pytest.raises(TrustError):
        compose(["+preset=mine"], config_dir=config_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"attention": {"_target_": "os.system", "name": "sdpa"}},
        {"compile": {"_target_": "fluxrun.options.compile.Compile", "inductor_options": {"cpp.cxx": ["/tmp/evil"]}}},
    ],
)
def test_an_image_from_a_stranger(tmp_path, change):
    config = {**compose([]).source, **change}
    path = tmp_path / "image.png"
    save_image(Image.new("RGB", (16, 16)), path, {"prompt": "x", "seed": 0, "config": config}, "png")
    with pytest.raises(TrustError):
        from_image(path)
    done = fluxrun("rerun", str(path), cwd=tmp_path)
    assert done.returncode == 2
    assert len(said(done.stderr)) == 1
    assert not (tmp_path / "outputs").exists()


def test_a_record_from_a_stranger(tmp_path):
    from fluxrun.cli.rerun import from_folder
    from fluxrun.record.schema import RunRecord

    config = {**compose([]).source, "vae": {"_target_": "shutil.rmtree"}}
    record = RunRecord(run_id="x", started_at="now", config=config, config_hash="x")
    (tmp_path / "run.json").write_text(json.dumps(record.model_dump()))
    with pytest.raises(TrustError):
        from_folder(tmp_path)


@pytest.mark.slow
def test_flag_and_environment_lift_it(config_dir, tmp_path):
    preset(config_dir, GLOBAL + f"hydra: {{run: {{dir: {tmp_path}/elsewhere}}}}\n")
    refused = fluxrun("--config-dir", str(config_dir), "+preset=mine", "--cfg", "job", cwd=tmp_path)
    by_flag = fluxrun("plan", "--trust-config", "--config-dir", str(config_dir), "+preset=mine", cwd=tmp_path)
    by_environment = fluxrun(
        "plan", "--config-dir", str(config_dir), "+preset=mine", cwd=tmp_path, env={"FLUXRUN_TRUST_CONFIG": "1"}
    )
    assert refused.returncode == 2
    assert "steer Hydra" in refused.stderr
    assert by_flag.returncode == by_environment.returncode == 0
