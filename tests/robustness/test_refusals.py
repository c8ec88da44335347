"""Found cases, each for good: whatever is typed, wherever, the answer is one line and the right exit code."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from helpers import fluxrun, said
from robustness.strategies import CONTROL, DEPTH, HUGE_INTEGER, LONG_NAME

from fluxrun.cli.app import main
from fluxrun.errors import FluxrunError
from fluxrun.formatting import as_message, printable
from fluxrun.hardware.machine import Machine, Proof
from fluxrun.hardware.proofs import remember, remembered
from fluxrun.paths import cache_dir
from fluxrun.process.console import LogFormatter
from fluxrun.terminal import make_console

pytestmark = pytest.mark.slow

# --- what is typed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model=[[1],[2]]"], "Hydra cannot use model=[[1],[2]]"),
        (["+sweep=[1]"], "Hydra cannot use +sweep=[1]"),
        (["+config_dirs=[x]"], "unknown key 'config_dirs'"),
        (["+source={a: 1}"], "unknown key 'source'"),
        (["--multirun", "attention.fallback=interval(0,1)"], "does not support sweep type"),
        (["hydra.verbose=nan"], "Hydra cannot use hydra.verbose=nan"),
        (["hydra.verbose=[1]"], "hydra.verbose=[1]: A logger name must be a string"),
        (["hydra.job_logging.version=x"], "Unsupported version: x"),
        (["--experimental-rerun", "x"], "it unpickles a file"),
        (["--resolve"], "--resolve"),
        (["-sc", "x"], "Expecting one subcommand"),
        (["--shell-completion", "install=zzz"], "No completion plugin for 'zzz'"),
        (["seed=" + HUGE_INTEGER], "a number of more than 4300 digits"),
        (["attention=" + LONG_NAME], "unknown option attention=nnn"),
        (["+preset=" + LONG_NAME], "unknown option preset=nnn"),
        (["hydra/launcher=" + LONG_NAME], "unknown option hydra=launcher/nnn"),
        (["hydra.run.dir=" + LONG_NAME], "cannot write to the output folder"),
        (["prompts_file=" + LONG_NAME + ".txt"], "cannot be read: File name too long"),
        (["reference_images=[" + LONG_NAME + ".png]"], "File name too long"),
        (["model=local", "model.path=" + LONG_NAME], "no such folder"),
        (["--config-dir", LONG_NAME], "does not exist (--config-dir)"),
        (["--config-dir", "~nobody-of-this-name"], "does not exist (--config-dir)"),
        (["rerun", LONG_NAME + ".png"], "no such image or run folder"),
        (["rerun", "~nobody-of-this-name/x"], "no such image or run folder"),
        (["report", LONG_NAME], "no such folder"),
        (["report", ".", "--output", LONG_NAME], "cannot write there"),
        (["report"], "the following arguments are required"),
        (["eval", "--seeds", "a"], "argument --seeds"),
        (["tune", "--repeats", "x"], "argument --repeats"),
        (["tune", "--output", LONG_NAME + ".yaml"], "cannot write there"),
        (["tune", "--folder", LONG_NAME], "cannot write there"),
        (["--multirun", "sweep.resume=" + LONG_NAME], "sweep.resume"),
        (["--multirun", "sweep.baseline=" + LONG_NAME], "sweep.baseline"),
        (["attention=" + CONTROL], r"\x1b]0;owned\x07\x1b[2J"),
        (["x" * 10**6], "unknown command 'xxx"),
        (["stesp=" + "x" * 10**5], "did you mean 'steps'"),
    ],
    ids=lambda value: (
        " ".join(value)[:40].replace("\x1b", "ESC").replace("\x07", "") if isinstance(value, list) else ""
    ),
)
def test_typed(refusal, arguments, expected):
    assert expected in refusal(*arguments)


def test_the_traceback_is_in_the_log(refusal):
    refusal("hydra.verbose=nan")
    assert "Traceback" in (cache_dir() / "refused.log").read_text()


def test_the_last_resort(refusal, monkeypatch):
    """A mistake of fluxrun's own: one line, exit code 1, and where the traceback is."""

    def mistaken(*_: object) -> None:
        raise KeyError("what\x1b[2J\never")

    monkeypatch.setattr("fluxrun.cli.app.config_dirs", mistaken)
    line = refusal("steps=2", code=1)
    assert "KeyError" in line
    assert "refused.log" in line
    assert "mistaken" in (cache_dir() / "refused.log").read_text()


# --- the surroundings -------------------------------------------------------------------------------------------------


def test_a_working_directory_that_was_deleted(tmp_path):
    """A child process, as libraries look at it while they are imported."""
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec {sys.executable} -m fluxrun plan"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = said(done.stderr)
    assert "the working directory cannot be used" in line


def test_a_cache_folder_that_is_a_file(refusal, here, monkeypatch):
    (here / "cache").write_text("")
    monkeypatch.setenv("FLUXRUN_CACHE_DIR", str(here / "cache"))
    assert "is a file: remove it, or set FLUXRUN_CACHE_DIR" in refusal("plan")


@pytest.mark.parametrize(
    "text", ["[]", "7", '{"attention=x": 3}', '{"attention=x": {"nonsense": 1}}', "\x00", "[" * DEPTH]
)
def test_a_cache_that_something_else_wrote(tmp_path, monkeypatch, text):
    monkeypatch.setenv("FLUXRUN_CACHE_DIR", str(tmp_path))
    machine = Machine()
    remember(machine, "attention=sage", Proof(None, "2025-01-01"))
    (file,) = tmp_path.glob("probes/*")
    file.write_text(text)
    assert remembered(machine) == {}


@pytest.mark.parametrize("columns", ["0", "-1", "²", "x"])
def test_a_terminal_of_no_columns(tmp_path, columns):
    done = fluxrun("plan", "attention=sdpa", cwd=tmp_path, env={"COLUMNS": columns})
    assert done.returncode == 0, done.stderr
    assert "attention" in done.stdout
    assert done.stderr == ""


# --- control characters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x7f", "\x9b", "\u202e", "\u2028", "\ud800"])
def test_nothing_that_steers_a_terminal_is_printed(character, capsys):
    text = f"a{character}b"
    console = make_console()
    console.print(text, markup=False)
    logged = LogFormatter("%(message)s").format(logging.makeLogRecord({"msg": text}))
    for shown in (printable(text), as_message(text), str(FluxrunError(text)), capsys.readouterr().out, logged):
        assert character not in shown
        assert shown.startswith("a")
        assert shown.rstrip().endswith("b")


def test_lines_of_a_log_cannot_be_forged():
    record = logging.makeLogRecord({"msg": "a cat\n[2030-01-01][fluxrun][ERROR] all is lost"})
    assert LogFormatter("%(message)s").format(record).splitlines()[1].startswith("  [2030")


def test_a_long_message_keeps_its_end():
    text = as_message("cannot use " + "x" * 5000 + ": use something else")
    assert len(text) <= 800
    assert text.startswith("cannot use ")
    assert text.endswith(": use something else")


def test_plan_with_an_option_of_an_odd_name(here, capsys):
    folder = here / "conf" / "compile"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text('_target_: fluxrun.options.compile.CompileOption\nname: "a\\eb"\n')
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config-dir", str(here / "conf"), "compile=mine"])
    written = capsys.readouterr()
    assert ended.value.code in (0, 2)
    assert "\x1b" not in written.out + written.err
