"""The trust rule: a config file, an image or a record from a stranger names no code and does not steer Hydra."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from helpers import CONF, GLOBAL, draw, fluxrun, preset, said
from hydra.types import RunMode
from PIL import Image

from fluxrun.cli.rerun import from_folder, from_image
from fluxrun.config.composition import compose, compose_node, config_dirs, hydra_for
from fluxrun.errors import ConfigError, TrustError
from fluxrun.record.picture import save_image
from fluxrun.record.schema import RunRecord
from fluxrun.trust import check_target

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


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_comes_with_fluxrun_could_be_a_strangers(path, config_dir):
    group = path.parent.name
    copy = config_dir / group / f"copied_{path.name}"
    copy.parent.mkdir()
    copy.write_text(path.read_text())
    mode = RunMode.MULTIRUN if group == "sweep" else RunMode.RUN
    chosen = f"+{group}={copy.stem}" if group in ("preset", "sweep") else f"{group}={copy.stem}"
    with hydra_for(config_dirs(config_dir)) as app:
        compose_node(app, [chosen], config_dirs(config_dir), mode)


@pytest.mark.parametrize("header", ["compile.inductor_options", "_global_.compile.inductor_options"])
def test_a_closed_knob_may_not_be_a_files_package(config_dir, header):
    preset(config_dir, f"# @package {header}\ncpp.cxx: [/tmp/evil]\n")
    with pytest.raises(TrustError, match=r"sets 'compile.inductor_options.cpp.cxx': inductor's options can name prog"):
        compose(["+preset=mine"], config_dir=config_dir)


@pytest.mark.parametrize("package", ["compile.inductor_options", "_global_.compile.inductor_options"])
def test_nor_the_package_that_a_defaults_list_gives_it(config_dir, package):
    preset(config_dir, "cpp.cxx: [/tmp/evil]\n", name="other")
    preset(config_dir, GLOBAL + f"defaults:\n  - /preset@{package}: other\n  - _self_\n")
    with pytest.raises(TrustError, match="inductor_options"):
        compose(["+preset=mine"], config_dir=config_dir)


PARAMS = {
    "a callback": "+hydra.callbacks.x._target_: torch.hub.load",
    "the environment": "hydra.job.env_set.X: '1'",
    "folders": "hydra.searchpath: '[file:///tmp]'",
    "a launcher": "hydra/launcher: joblib",
    "compiled code": "compile.cache_dir: /tmp/evil,/tmp/other",
    "an output place": "sweep.resume: /tmp",
    "a package": "vae@compile.inductor_options: tiled",
    "a key taken away": "~compile: none",
    "a value of a knob": "attention.backend: native,flash_hub",
    "a choice of values": "attention.backend: choice(native, flash_hub)",
    "the environment in a value": "prompt: 'a ${oc.env:HOME}'",
    "the same, escaped for the first reading": "prompt: 'a \\${oc.env:HOME}'",
    "nested": "hydra: {run: {dir: /tmp/x}}",
}


@pytest.mark.parametrize("line", PARAMS.values(), ids=PARAMS)
def test_a_sweep_file_varies_what_any_file_may_set(config_dir, line):
    (config_dir / "sweep").mkdir()
    file = config_dir / "sweep" / "mine.yaml"
    file.write_text(f"# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      {line}\n")
    with (
        hydra_for(config_dirs(config_dir)) as app,
        pytest.raises(TrustError, match=f"{re.escape(str(file))} sets .*--trust-config"),
    ):
        compose_node(app, ["+sweep=mine"], config_dirs(config_dir), RunMode.MULTIRUN)


def test_a_sweep_files_grid(config_dir):
    (config_dir / "sweep").mkdir()
    grid = (
        "{attention: 'sdpa,math', compile.mode: 'choice(default)', seed: 'range(0,3)', +preset: 'cpu', prompt: 'a,b'}"
    )
    text = f"# @package _global_\nsweep: {{min_psnr: 30}}\nhydra: {{mode: MULTIRUN, sweeper: {{params: {grid}}}}}\n"
    (config_dir / "sweep" / "mine.yaml").write_text(text)
    with hydra_for(config_dirs(config_dir)) as app:
        node = compose_node(app, ["+sweep=mine"], config_dirs(config_dir), RunMode.MULTIRUN)
    assert node.hydra.sweeper.params.seed == "range(0,3)"


REACHING = {
    "the environment": "prompt: 'a ${oc.env:HOME}'",
    "behind two escaped backslashes": "prompt: 'a \\\\${oc.env:HOME}'",
    "in a list": "prompt: [a, '${oc.env:HOME}']",
    "nested": "prompt: '${oc.env:${device}}'",
    "put together": "prompt: '$${device}{oc.env:HOME}'",
    "decoded": "prompt: '${oc.decode:${device}}'",
    "Hydra's": "prompt: '${hydra.runtime.cwd}'",
    "in brackets": "prompt: '${[hydra][runtime][cwd]}'",
    "in a key": "'${oc.env:HOME}': 1",
    "in a defaults list": "defaults:\n  - override /compile: ${oc.env:HOME}\n",
    "a whole group": "compile: ${vae}",
}


@pytest.mark.parametrize("text", REACHING.values(), ids=REACHING)
def test_an_interpolation_names_another_key_and_nothing_else(config_dir, text):
    preset(config_dir, GLOBAL + text + "\n")
    with pytest.raises(TrustError, match="--trust-config"):
        compose(["+preset=mine"], config_dir=config_dir)


def test_another_keys_name_and_text_that_only_looks_like_one(config_dir):
    preset(config_dir, GLOBAL + "height: ${width}\nwidth: 64\nprompt: 'a ${device} \\${x}'\n")
    config = compose(["+preset=mine", "device=cpu"], config_dir=config_dir)
    assert (config.height, config.prompt) == (64, "a cpu ${x}")


def test_files_of_a_folder_that_the_command_line_names_are_a_strangers(config_dir):
    preset(config_dir, GLOBAL + "compile: {cache_dir: /tmp/evil}\n")
    with pytest.raises(TrustError, match="cache_dir"):
        compose(["+preset=mine", f"hydra.searchpath=[file://{config_dir}]"])


def test_a_strangers_main_config_names_no_further_folders(config_dir, monkeypatch):
    """A ``pkg://`` folder is looked into by importing it."""
    (config_dir / "evil_package.py").write_text(f"open({str(config_dir / 'touched')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(config_dir))
    main = yaml.safe_load((CONF / "config.yaml").read_text()) | {"hydra": {"searchpath": ["pkg://evil_package"]}}
    (config_dir / "config.yaml").write_text(yaml.safe_dump(main))
    with pytest.raises(TrustError, match="steer Hydra"):
        compose([], config_dir=config_dir)
    assert not (config_dir / "touched").exists()


def test_a_path_that_leads_out_of_our_folder_leads_to_a_stranger(config_dir):
    preset(config_dir, GLOBAL + "compile: {cache_dir: /tmp/evil}\n")
    with pytest.raises(ConfigError, match="cache_dir"):
        compose([f"+preset={'../' * 20}{config_dir}/preset/mine"])


def test_what_is_typed_is_never_checked():
    typed = ["prompt=a ${oc.env:HOME}", "compile.cache_dir=/tmp/mine", "attention.backend=flash_hub", "model.id=x/y"]
    config = compose(typed)
    assert (config.model.id, config.attention.backend) == ("x/y", "flash_hub")


@pytest.mark.parametrize("key", ["source", "config_dirs"])
def test_fields_that_are_no_knobs(config_dir, key):
    preset(config_dir, GLOBAL + f"{key}: {{steps: 3}}\n")
    with pytest.raises(ConfigError, match=key):
        compose(["+preset=mine"], config_dir=config_dir)
    with pytest.raises(ConfigError, match=key):
        compose([f"+{key}={{steps: 3}}"])


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


@pytest.mark.parametrize(
    "change",
    [
        {"vae": {"_target_": "shutil.rmtree"}},
        {"prompts_file": "/etc/passwd"},
        {"reference_images": ["/etc/passwd"]},
        {"image": "/etc/passwd"},
        {"mask_image": "/etc/passwd"},
        {"model": {"_target_": "fluxrun.options.model.Flux2Model", "id": "somebody/model"}},
        {"model": {"_target_": "fluxrun.options.model.Flux2Model", "path": "/somewhere"}},
    ],
    ids=str,
)
def test_a_record_from_a_stranger(tmp_path, change):
    record = RunRecord(run_id="x", started_at="now", config={**compose([]).source, **change}, config_hash="x")
    (tmp_path / "run.json").write_text(json.dumps(record.model_dump()))
    with pytest.raises(TrustError, match="--trust-config"):
        from_folder(tmp_path)


def test_a_strangers_record_of_a_model_that_fluxrun_names_itself(tmp_path):
    config = compose(["model=flux2_klein_4b", "prompt='${x}'"]).source
    record = RunRecord(run_id="x", started_at="now", config=config, config_hash="x")
    (tmp_path / "run.json").write_text(json.dumps(record.model_dump()))
    assert from_folder(tmp_path)[0].model.id == "black-forest-labs/FLUX.2-klein-4B"


def test_ones_own_records_and_pictures_are_drawn_as_they_are(tmp_path, monkeypatch):
    """They name files that one typed oneself; a change by somebody else, or another user, takes that away."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    own = draw(tmp_path / "own", f"reference_images=[{tmp_path}/red.png]")
    picture = tmp_path / "own" / own.images[0].path
    assert from_folder(tmp_path / "own")[0].reference_images == from_image(picture)[0].reference_images
    text = (tmp_path / "own" / "run.json").read_text()
    (tmp_path / "own" / "run.json").write_text(text.replace("red.png", "rad.png"))
    with pytest.raises(TrustError, match="reference_images"):
        from_folder(tmp_path / "own")
    (tmp_path / "own" / "run.json").write_text(text.replace(f'"cwd": "{own.cwd}"', '"cwd": "/etc"'))
    with pytest.raises(TrustError, match="reference_images"):
        from_folder(tmp_path / "own")
    monkeypatch.setenv("FLUXRUN_DATA_DIR", str(tmp_path / "another user"))
    with pytest.raises(TrustError, match="reference_images"):
        from_image(picture)
    assert not (tmp_path / "another user").exists()


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
