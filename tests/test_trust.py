"""The trust rule: a config file, an image or a record from a stranger names no code and does not steer Hydra."""

from __future__ import annotations

import json

import pytest
from helpers import fluxrun, said
from PIL import Image

from fluxrun.cli.rerun import from_image
from fluxrun.config.composition import compose
from fluxrun.errors import ConfigError, TrustError
from fluxrun.record.picture import save_image
from fluxrun.trust import check_target

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


def test_no_config_key_lifts_the_rule(config_dir):
    preset(config_dir, GLOBAL + "trust_config: true\n")
    with pytest.raises(ConfigError, match="trust_config"):
        compose(["+preset=mine"], config_dir=config_dir)
    preset(config_dir, GLOBAL + "hydra: {job: {env_set: {FLUXRUN_TRUST_CONFIG: '1'}}}\n")
    with pytest.raises(TrustError):
        compose(["+preset=mine"], config_dir=config_dir)


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
