"""Found cases, each for good: whatever is typed or lies in a file, the answer is one line and the right exit code."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import hollow_folder, tiny_folder
from helpers import SMALL, fluxrun, said
from PIL import Image, PngImagePlugin
from robustness.attempts import finished_run, nothing_drawn
from robustness.campaign import unclean
from robustness.strategies import CONTROL, DEPTH, HUGE_INTEGER, LONG_NAME, alias_bomb

from fluxrun.cli.app import main
from fluxrun.config.prompts import read_prompts
from fluxrun.errors import ConfigError, FluxrunError
from fluxrun.formatting import as_message, printable
from fluxrun.hardware.machine import Machine, Proof
from fluxrun.hardware.proofs import remember, remembered
from fluxrun.options.model import Flux2Model
from fluxrun.paths import cache_dir
from fluxrun.process.console import LogFormatter
from fluxrun.reading import MOST_DEPTH, MOST_NODES, Unreadable, parse_json, parse_yaml, read_text
from fluxrun.record.picture import METADATA_KEY
from fluxrun.terminal import make_console
from fluxrun.weights.chat_template import check_templates
from fluxrun.weights.find import find_weights


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; runs and sweeps end where they would begin to load."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with nothing_drawn(), warnings.catch_warnings():
        yield tmp_path


@pytest.fixture
def refusal(here: Path, capsys: pytest.CaptureFixture[str]):
    """Types a command and returns its one line; checks that there is only that, and the exit code."""

    def typed(*arguments: str, code: int = 2) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        written = capsys.readouterr()
        (line,) = said(written.err)
        assert written.out == ""
        assert line.startswith("error: ")
        assert unclean(line) is None
        assert ended.value.code == code
        return line

    return typed


# --- what is typed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model=[[1],[2]]"], "Hydra cannot use model=[[1],[2]]"),
        (["+sweep=[1]"], "Hydra cannot use +sweep=[1]"),
        (["+config_dirs=[x]"], "unknown key 'config_dirs'"),
        (["+source={a: 1}"], "unknown key 'source'"),
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


# --- prompts and config files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.yaml", "- 2024-13-45", "month must be in 1..12"),
        ("p.yaml", "- 2024-01-01", "must be a text"),
        ("p.yaml", f"- {{prompt: x, seed: {HUGE_INTEGER}}}", "more than 4300 digits"),
        ("p.yaml", "[" * DEPTH + "]" * DEPTH, f"nested more than {MOST_DEPTH} levels deep"),
        ("p.yaml", "- " * DEPTH + "x", f"nested more than {MOST_DEPTH} levels deep"),
        ("p.yaml", alias_bomb(), f"more than {MOST_NODES:,} values"),
        ("p.yaml", "- &a [*a]", "inside of what it stands for"),
        ("p.yaml", "- !!timestamp x", "is not valid YAML"),
        ("p.yaml", "- !!int ''", "is not valid YAML"),
        ("p.yaml", "- {prompt: x, 1: 2, null: 3}", "unknown key"),
        ("p.yaml", "- [" + "x" * 10**5 + "]", "must be a text"),
        ("p.jsonl", f'{{"prompt": "x", "seed": {HUGE_INTEGER}}}', "more than 4300 digits"),
        ("p.jsonl", "[" * 10**5, "nested too deep"),
    ],
)  # fmt: skip
def test_a_prompts_file(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        read_prompts(tmp_path / name)
    assert unclean(str(caught.value)) is None


def test_aliases_of_a_sane_size_stay(tmp_path):
    (tmp_path / "p.yaml").write_text("- &a {prompt: a cat, seed: 3}\n- *a\n- {<<: *a, seed: 4}\n")
    assert [entry["seed"] for entry in read_prompts(tmp_path / "p.yaml")] == [3, 3, 4]


@pytest.mark.parametrize("depth", [MOST_DEPTH, MOST_DEPTH + 1])
def test_the_depth_that_is_read(depth):
    text = "[" * depth + "]" * depth
    if depth <= MOST_DEPTH:
        assert parse_yaml(text)
    else:
        with pytest.raises(Unreadable):
            parse_yaml(text)
    assert parse_json("[" * MOST_DEPTH + "]" * MOST_DEPTH)


def test_a_file_that_is_too_large(tmp_path):
    (tmp_path / "p.txt").write_text("x" * 100)
    assert len(read_text(tmp_path / "p.txt", 100)) == 100
    with pytest.raises(Unreadable, match="larger than"):
        read_text(tmp_path / "p.txt", 99)


@pytest.mark.parametrize(
    "text",
    [alias_bomb(), "[" * DEPTH + "]" * DEPTH, "seed: 2024-99-99", f"seed: {HUGE_INTEGER}", "- a\n- b", "!!int ''"],
)
def test_a_preset(refusal, here, text):
    folder = here / "conf" / "preset"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\n" + text)
    refusal("plan", "--config-dir", str(here / "conf"), "+preset=mine")


# --- pipes and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["prompts_file=pipe.txt"], ["reference_images=[pipe.png]"], ["rerun", "pipe.png"], ["rerun", "run"],
        ["plan", "--config-dir", "conf", "+preset=mine"], ["plan", "--config-dir", "conf", "attention=mine"],
        ["plan", "model=local", "model.path=checkpoint"], ["plan", "model=local", "model.path=pipe.txt"],
        ["rerun", "/dev/zero"], ["reference_images=[/dev/zero]"], ["report", "pipe.txt"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_pipe_or_a_device_is_not_waited_for(refusal, here, arguments):
    hollow_folder(here / "checkpoint")
    (here / "checkpoint" / "tokenizer" / "tokenizer.json").unlink()
    for place in ("run", "conf/preset", "conf/attention"):
        (here / place).mkdir(parents=True)
    pipes = ("pipe.txt", "pipe.png", "run/run.json", "conf/preset/mine.yaml", "conf/attention/mine.yaml")
    for pipe in (*pipes, "checkpoint/tokenizer/tokenizer.json"):
        os.mkfifo(here / pipe)
    refusal(*arguments)


# --- pictures ---------------------------------------------------------------------------------------------------------


def bomb(path: Path, side: int, metadata: str | None = None) -> Path:
    """A PNG of a few bytes that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    text = b"" if metadata is None else chunk(b"tEXt", METADATA_KEY.encode() + b"\0" + metadata.encode())
    size = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + text + data + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("side", [10_001, 14_000, 60_000])
def test_a_decompression_bomb(refusal, here, side):
    path = bomb(here / "bomb.png", side, '{"config": {}}')
    assert f"{side}x{side} pixels" in (line := refusal(f"reference_images=[{path}]")) or "pixels" in line
    assert "pixels" in refusal("rerun", str(path))


@pytest.mark.parametrize(
    "metadata",
    ["7", "[]", "null", '{"config": 3}', '{"config": []}', '{"config": {"model": 3}}', '{"config": {"model": []}}',
     '{"config": ' + HUGE_INTEGER + "}", "[" * DEPTH + "]" * DEPTH, '{"a":' * DEPTH + "1" + "}" * DEPTH,
     '{"config": {"config_dirs": ["x"], "source": {}}}', '{"config": {"measure": [1]}}'],
)  # fmt: skip
def test_what_a_picture_carries(refusal, here, metadata):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA_KEY, metadata)
    Image.new("RGB", (8, 8)).save(here / "a.png", pnginfo=info)
    refusal("rerun", "a.png")


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("timings", "load_s"), "fast"),
        (("timings", "step_s"), "fast"),
        (("images", 0, "seed"), "x"),
        (("images", 0, "width"), "wide"),
        (("memory", "start_bytes"), []),
        (("config",), []),
        (("config", "seed"), "x"),
        (("config", "measure"), [1]),
        (("config", "batch_size"), "two"),
        (("config", "model"), 3),
        (("config", "steps"), HUGE_INTEGER),
        (("cwd",), LONG_NAME),
        (("options",), 3),
    ],
    ids=str,
)
def test_a_record_with_something_else_in_it(refusal, here, place, value):
    shutil.copytree(finished_run(), here / "run")
    record = json.loads((here / "run" / "run.json").read_text())
    node = record
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    (here / "run" / "run.json").write_text(json.dumps(record))
    if place == ("cwd",):
        record["config"]["prompts_file"] = "absent.txt"
        (here / "run" / "run.json").write_text(json.dumps(record))
    refusal("rerun", "run")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def broken(folder: Path, name: str, change) -> str:
    """What is said of the tiny checkpoint with one of its JSON files changed."""
    shutil.copytree(tiny_folder("klein"), folder / "m")
    file = folder / "m" / name
    data = json.loads(file.read_text())
    changed = change(data)
    file.write_text(changed if isinstance(changed, str) else json.dumps(data))
    with pytest.raises(ConfigError) as caught:
        find_weights(Flux2Model(path=folder / "m"))
    assert unclean(str(caught.value)) is None
    return str(caught.value)


INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (INDEX, lambda data: data.update(weight_map=[1]), "weight_map must name a file"),
        (INDEX, lambda data: data.update(weight_map={"a": 3}), "weight_map must name a file"),
        (INDEX, lambda data: data.update(weight_map={"a": "../../x"}), "weight_map must name a file"),
        (INDEX, lambda data: data["weight_map"].update(ghost=next(iter(data["weight_map"].values()))),
         "lacks the tensor ghost"),
        ("model_index.json", lambda data: data.update(_class_name={}), "not a FLUX.2 pipeline"),
        ("model_index.json", lambda data: "[" * DEPTH, "is not JSON"),
        ("transformer/config.json", lambda data: data.update(num_layers=1_000_000), "num_layers=1000000 cannot be"),
        ("transformer/config.json", lambda data: data.update(num_layers="many"), "num_layers=many cannot be"),
        ("transformer/config.json", lambda data: data.update(attention_head_dim=10**12), "attention_head_dim"),
        ("vae/config.json", lambda data: data.update(block_out_channels=[32] * 5000), "5,000 entries"),
        ("vae/config.json", lambda data: data.update(layers_per_block=10**6), "layers_per_block"),
        ("text_encoder/config.json", lambda data: data.update(num_hidden_layers=10**6), "num_hidden_layers"),
        ("text_encoder/config.json", lambda data: HUGE_INTEGER, "more than 4300 digits"),
        ("scheduler/scheduler_config.json", lambda data: data.update(num_train_timesteps=10**12), "at most 1,000,000"),
    ],
)  # fmt: skip
def test_a_checkpoint_with_something_else_in_it(tmp_path, name, change, expected):
    assert expected in broken(tmp_path, name, change)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("[]", "no JSON object"),
        ('{"a": 3}', "no proper shape and offsets"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}', "no proper shape and offsets"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "no proper shape and offsets"),
        ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "no proper shape and offsets"),
        ('{"a": {"dtype": "F32", "shape": [9999999], "data_offsets": [0, 4]}}', "smaller than its shape"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4444]}}', "is truncated"),
        ("[" * DEPTH, "nested too deep"),
    ],
)
def test_a_weight_file_with_something_else_in_its_header(tmp_path, header, expected):
    folder = hollow_folder(tmp_path / "m")
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(16)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=expected):
        find_weights(Flux2Model(path=folder))


def test_a_missing_tensor_is_named_with_its_file(tmp_path):
    """Of a component in one file: there is no index that would promise it."""
    from safetensors.torch import load_file, save_file

    from fluxrun.weights.loading import load, save_tiny

    folder = save_tiny(tmp_path / "m")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, file)
    with pytest.raises(ConfigError) as caught:
        load(Flux2Model(path=folder, text_encoder_out_layers=(1, 2, 3)), dtype="float32", device="cpu")
    assert "diffusion_pytorch_model.safetensors" in str(caught.value)
    assert "decoder.conv_in.weight" in str(caught.value)


def test_a_checkpoint_that_brings_code_is_not_asked_about(tmp_path, here, capsys):
    """A tokenizer's auto_map once made the library ask on the terminal whether to run it."""
    from fluxrun.weights.loading import load

    shutil.copytree(tiny_folder("klein"), tmp_path / "m")
    file = tmp_path / "m" / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {
        "auto_map": {"AutoTokenizer": ["tok.Evil", None]},
        "tokenizer_class": "Evil",
    }
    file.write_text(json.dumps(config))
    (tmp_path / "m" / "tokenizer" / "tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "AutoTokenizer"]
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index))
    model = Flux2Model(path=tmp_path / "m", text_encoder_out_layers=(1, 2, 3))
    with pytest.raises(ConfigError, match="tokenizer cannot be loaded"):
        load(model, dtype="float32", device="cpu", part="text")
    assert "[y/N]" not in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template",
    ["{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**10 }}",
     "{% for i in range(99999) %}{% generation %}{{ messages }}{% endgeneration %}{% endfor %}"],
)  # fmt: skip
def test_a_chat_template_that_never_ends(tmp_path, template):
    with pytest.raises(ConfigError, match="its chat template takes more than"):
        check_templates([template], tmp_path)


@pytest.mark.parametrize("template", ["", "{{ messages[0].content }}", "{{ raise_exception('no') }}", "{% if"])
def test_a_chat_template_that_ends(tmp_path, template):
    check_templates([template], tmp_path)


def test_a_run_on_a_broken_checkpoint(tmp_path):
    """The whole way in a child process: one line, a true record."""
    shutil.copytree(tiny_folder("klein"), tmp_path / "m")
    (tmp_path / "m" / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0", "truncation": 3}')
    done = fluxrun("model=local", f"model.path={tmp_path / 'm'}", "model.text_encoder_out_layers=[1,2,3]",
                   *SMALL[1:], "hydra.run.dir=run", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in said(done.stderr) if line.startswith("error: ")]
    assert "tokenizer cannot be loaded" in line
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
