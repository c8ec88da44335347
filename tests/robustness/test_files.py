"""Found cases, each for good: prompts, config files, pictures and records with something odd in them."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from checkpoints import hollow_folder
from PIL import Image, PngImagePlugin
from robustness.attempts import finished_run
from robustness.campaign import unclean
from robustness.strategies import DEPTH, HUGE_INTEGER, LONG_NAME, alias_bomb

from fluxrun.cli.app import main
from fluxrun.config.prompts import read_prompts
from fluxrun.errors import ConfigError
from fluxrun.reading import MOST_DEPTH, MOST_NODES, Unreadable, parse_json, parse_yaml, read_text
from fluxrun.record.picture import METADATA_KEY

pytestmark = pytest.mark.slow

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
    assert [entry["seed"] for _, entry in read_prompts(tmp_path / "p.yaml")] == [3, 3, 4]


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
    assert "pixels" in refusal(f"reference_images=[{path}]")
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


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("config", "batch_size"), "two"),
        (("config", "measure"), [1]),
        (("config", "steps"), {"a": 1}),
        (("config", "guidance"), [[]]),
        (("environment", "ram_bytes"), "much"),
        (("environment", "device"), [1]),
    ],
    ids=str,
)
def test_a_report_on_a_record_with_something_else_in_it(here, place, value):
    """What it asked for may be wrong, what it measured is not: there is a page."""
    shutil.copytree(finished_run(), here / "sweep" / "0")
    record = json.loads((here / "sweep" / "0" / "run.json").read_text())
    record[place[0]][place[1]] = value
    record["timings"]["step_s"] = []
    (here / "sweep" / "0" / "run.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit) as ended:
        main(["report", "sweep"])
    assert ended.value.code == 0
    assert (here / "sweep" / "report.html").exists()
