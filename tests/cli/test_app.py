"""The command line in real child processes: what a user types, sees and gets back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import SMALL, fluxrun, option_names, said
from PIL import Image

from fluxrun.config.composition import compose
from fluxrun.record.folder import read_record
from fluxrun.record.picture import read_metadata

pytestmark = pytest.mark.slow  # processes of their own

AWKWARD = '"It\'s 50% #1 (really)!", ${HOME}, é'
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "torchao", "huggingface_hub")


def imported(done) -> set[str]:
    """Top-level packages in the report of ``python -X importtime``."""
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}


# --- without torch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["plan", "attention=xformers", "compile=max_autotune"], 0),
        (["--help"], 0),
        (["--cfg", "job"], 0),
        (["attention=xformer"], 2),
        (["steps=many"], 2),
        (["--multirun", "attention=sdpa,xformer"], 2),
        (["--version"], 0),
        (["rerun", "absent.png"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_answers_without_torch(tmp_path, arguments, code):
    done = fluxrun(*arguments, cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == code, done.stderr[-2000:]
    packages = imported(done)
    assert "hydra" in packages
    assert not packages & set(HEAVY)
    assert list(tmp_path.iterdir()) == []


def test_plan_says_what_would_run_and_why_not(tmp_path):
    done = fluxrun("plan", "attention=xformers", "compile=max_autotune", cwd=tmp_path)
    assert re.search(r"attention +xformers +sdpa .*needs a CUDA GPU", done.stdout)
    assert re.search(r"compile +max_autotune +max_autotune", done.stdout)
    assert done.stderr == ""


def test_help_lists_groups_and_options(tmp_path):
    done = fluxrun("--help", cwd=tmp_path)
    for group in ("attention", "compile", "vae", "memory", "quantization", "model"):
        assert re.search(rf"^{group}: {', '.join(option_names(group))}$", done.stdout, re.MULTILINE)
    assert "--trust-config" in done.stdout


def test_cfg_job_is_the_config_and_nothing_else(tmp_path):
    done = fluxrun("--cfg", "job", f"prompt={AWKWARD}", "attention=math", cwd=tmp_path)
    config = yaml.safe_load(done.stdout)
    assert config["attention"]["backend"] == "_native_math"
    assert "hydra" not in config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["attention=xformer"], "did you mean 'xformers'"),
        (["stesp=3"], "did you mean 'steps'"),
        (["steps=many"], "valid integer"),
        (["height=100"], "multiple of 16"),
        (["prompts_file=absent.txt"], "no such file"),
        (["model=local", "model.path=/absent"], "no such folder"),
        (["hydra.run.dir=/proc/nothing"], "cannot write to the output folder"),
        (["plna"], "did you mean 'plan'"),
        (["--config-dir", "absent"], "does not exist"),
        (["--config-name", "other"], "--config-dir"),
        (["--experimental-rerun", "x.pickle"], "fluxrun rerun"),
        (["--resolve"], "--cfg or --help"),
        (["--cfg", "job", "--multirun"], "--multirun and --cfg do not go together"),
        (["+preset=absent"], "absent"),
        (["seed=1,2"], "--multirun"),
        (["--multirun", "attention=sdpa,xformer"], "did you mean 'xformers'"),
        (["rerun", "absent.png"], "no such image or run folder"),
        (["rerun", ".", "seed=1"], "run.json"),
        (["plan", "quantization=fp8", "strict=true"], "strict=true"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_in_one_line(tmp_path, arguments, expected):
    done = fluxrun(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = said(done.stderr)
    assert line.startswith("error: ")
    assert expected in line
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" in (Path(os.environ["FLUXRUN_CACHE_DIR"]) / "refused.log").read_text()


def test_a_users_file_lies_before_fluxruns_own_wherever_a_config_is_composed(tmp_path, config_dir):
    (config_dir / "attention").mkdir()
    (config_dir / "attention" / "sdpa.yaml").write_text("defaults: [math, _self_]\n")
    shown = fluxrun("--config-dir", str(config_dir), "--cfg", "job", cwd=tmp_path)
    assert yaml.safe_load(shown.stdout)["attention"]["backend"] == "_native_math"
    assert compose([], config_dir=config_dir).attention.backend == "_native_math"


def test_an_unknown_flag(tmp_path):
    done = fluxrun("--nonsense", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def complete(line: str, tmp_path, *arguments: str) -> list[str]:
    """What a shell's completion of ``line`` gets, as Hydra's bash script asks for it."""
    environment = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_CWORD": "1"}
    return sorted(fluxrun("-sc", "query=bash", *arguments, cwd=tmp_path, env=environment).stdout.split())


def test_shell_completion(tmp_path, config_dir):
    assert complete("fluxrun attention=s", tmp_path) == ["attention=sage", "attention=sdpa"]
    assert complete("fluxrun compi", tmp_path) == ["compile.", "compile="]
    assert complete("fluxrun compile.sc", tmp_path) == ["compile.scope="]
    (config_dir / "attention").mkdir()
    (config_dir / "attention" / "superb.yaml").write_text("_target_: mine.Superb\n")
    assert "attention=superb" in complete(f"fluxrun --config-dir {config_dir} attention=su", tmp_path)
    assert fluxrun("-sc", "install=bash", cwd=tmp_path).returncode == 0


def test_doctor_lists_every_option(tmp_path):
    done = fluxrun("doctor", cwd=tmp_path)
    assert done.returncode == 0
    for name in option_names("attention"):
        assert re.search(rf"attention +{name} ", done.stdout)
    assert re.search(r"\nh100_fast +attention=fp8: needs a CUDA GPU", done.stdout)
    assert re.search(r"\ncpu +runs as it is", done.stdout)


# --- drawing ----------------------------------------------------------------------------------------------------


def test_a_bare_run(tmp_path):
    done = fluxrun(*SMALL, f"prompt={AWKWARD}", cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert {path.name for path in folder.iterdir()} == {".hydra", "run.json", "fluxrun.log", "images"}
    record = read_record(folder)
    assert record.status == "completed"
    assert record.command[0] == "fluxrun"
    (image,) = record.images
    assert image.prompt == read_metadata(folder / image.path)["prompt"] == record.config["prompt"] == AWKWARD
    assert read_metadata(folder / image.path)["config"]["prompt"] == AWKWARD
    with Image.open(folder / image.path) as picture:
        assert picture.size == (64, 64)
    # The same folder again is refused, and nothing in it changes.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = fluxrun(*SMALL, f"hydra.run.dir={folder}", cwd=tmp_path)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_sweep_with_awkward_text_where_one_job_fails(tmp_path):
    arguments = (*SMALL, f"prompt={AWKWARD}", "steps=1,0,2", "hydra.sweep.dir=sweep")
    done = fluxrun("--multirun", *arguments, cwd=tmp_path, fresh=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    good = [read_record(tmp_path / "sweep" / str(number)) for number in (0, 2)]
    for record, folder in zip(good, ("0", "2"), strict=True):
        assert record.status == "completed"
        assert record.images[0].prompt == AWKWARD
        assert read_metadata(tmp_path / "sweep" / folder / record.images[0].path)["prompt"] == AWKWARD
    assert "steps=0" in done.stderr


def test_a_failed_run_has_its_traceback_in_the_log(tmp_path, config_dir):
    """A user's own option that dies in its apply, without a fallback."""
    (tmp_path / "mine.py").write_text(
        "from fluxrun.options.attention import AttentionOption\n\n\n"
        "class Dies(AttentionOption):\n"
        "    def apply(self, pipeline, context):\n"
        "        raise ValueError('no luck\\nmore')\n"
    )
    (config_dir / "attention").mkdir()
    (config_dir / "attention" / "dies.yaml").write_text("_target_: mine.Dies\n")
    done = fluxrun(
        "--trust-config", "--config-dir", str(config_dir), *SMALL, "attention=dies", "hydra.run.dir=run",
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert [line for line in said(done.stderr) if line.startswith("error: ")] == said(done.stderr)[-1:]
    assert "no luck" in said(done.stderr)[-1]
    assert "Traceback" not in done.stderr
    assert "Traceback" in (tmp_path / "run" / "fluxrun.log").read_text()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed"
    assert "no luck" in record["error"]["message"]


def test_the_module_and_the_script_are_the_same(tmp_path):
    script = Path(sys.executable).with_name("fluxrun")
    if not script.exists():
        pytest.skip("not installed as a script")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == fluxrun("--version", cwd=tmp_path).stdout
