"""What to draw: prompts files of every kind, good and bad, and reference pictures."""

from __future__ import annotations

import json

import pytest

from fluxrun.config.composition import compose
from fluxrun.config.prompts import Job, jobs_of, read_prompts
from fluxrun.errors import ConfigError

AWKWARD = '"It\'s 50% #1 (really)!", ${HOME}, é'


def jobs(path, *overrides):
    return jobs_of(compose([f"prompts_file={path}", *overrides]))


def test_seeds_count_up():
    assert jobs_of(compose(["prompt=[a, b]", "seed=7", "num_images=2"])) == [
        Job("a", 7, 1, 1, 0), Job("a", 8, 1, 2, 1), Job("b", 7, 2, 1, 2), Job("b", 8, 2, 2, 3),
    ]  # fmt: skip


def test_text_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text(f"\ufeffa cat\n\n  \n{AWKWARD}\r\nwith\u2028separator\n", encoding="utf-8")
    found = [(job.line, job.prompt) for job in jobs(path)]
    assert found == [(1, "a cat"), (4, AWKWARD), (5, "with\u2028separator")], "lines as an editor counts them"


def test_yaml_file(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("- a cat\n- {prompt: '${HOME} #1', seed: 5, num_images: 2}\n")
    assert jobs(path, "seed=1") == [
        Job("a cat", 1), Job("${HOME} #1", 5, 2, 1, 1), Job("${HOME} #1", 6, 2, 2, 2),
    ]  # fmt: skip


def test_json_lines_file(tmp_path):
    path = tmp_path / "p.jsonl"
    entries = ["a cat", {"prompt": AWKWARD, "seed": 3}, {"prompt": "x\u2028y"}]
    path.write_text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries), encoding="utf-8")
    assert jobs(path) == [Job("a cat", 0), Job(AWKWARD, 3, 2, 1, 1), Job("x\u2028y", 0, 3, 1, 2)]


BAD = {
    "empty.txt": (b"", "holds no prompt"),
    "blank.txt": (b"\n \n", "holds no prompt"),
    "empty.yaml": (b"", "holds no prompt"),
    "empty.jsonl": (b"\n", "holds no prompt"),
    "latin.txt": ("é".encode("latin-1"), "UTF-8"),
    "p.csv": (b"a", "ending must be one of"),
    "broken.yaml": (b"- [a\n", "not valid YAML"),
    "mapping.yaml": (b"prompt: a\n", "must hold a list"),
    "number.yaml": (b"- 3\n", "entry 1"),
    "tag.yaml": (b"- !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt"\n', "line 2"),
    "unknown.jsonl": (b'{"prompt": "a", "stesp": 1}\n', "unknown key 'stesp'"),
    "none.jsonl": (b'{"seed": 1}\n', "a mapping with a prompt"),
    "seed.jsonl": (b'{"prompt": "a", "seed": -1}\n', "seed"),
    "big.jsonl": (b'{"prompt": "a", "seed": 99999999999999999999}\n', "seed"),
    "type.jsonl": (b'{"prompt": "a", "seed": "1"}\n', "seed"),
    "true.jsonl": (b'{"prompt": "a", "num_images": true}\n', "num_images"),
    "surrogate.jsonl": (b'{"prompt": "a \\ud800"}\n', "not text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_line(tmp_path, name):
    content, expected = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        jobs(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path)


def test_a_command_line_that_is_not_text():
    with pytest.raises(ConfigError, match="not text"):
        jobs_of(compose(["prompt=caf\udce9"]))


def test_seeds_stay_in_range():
    with pytest.raises(ConfigError, match="seed"):
        jobs_of(compose([f"seed={2**63 - 1}", "num_images=2"]))
