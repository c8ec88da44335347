"""What strangers, typos and broken disks put into files and on the command line, as hypothesis strategies."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st

from fluxrun.config.schema import GROUPS, Measure, RunConfig, SweepConfig
from fluxrun.options.base import own_options

# --- values -----------------------------------------------------------------------------------------------------------

HUGE_INTEGER = "9" * 4301
"""Python refuses to read an integer of more than 4300 digits."""

CONTROL = "\x1b]0;owned\x07\x1b[2J"
"""What sets a terminal's title and clears it."""

LONG_NAME = "n" * 300
"""Longer than a file's name may be."""

DEPTH = 3000
"""Deeper than Python recurses."""

odd_texts = st.one_of(
    st.sampled_from(
        ["", " ", "null", "nan", "inf", "-1", "0", "1e999", "0x10", "true", "no", "~", "..", "/", "/dev/null", ".", "'",
         '"', "{", "}", "[", "]", ",", "=", "a=b", "a,b", "${seed}", "${oc.env:HOME}", "${", "$", "\\", "#", "%", "@",
         "!", "&a", "*a", "<<", "---", "\x00", "\n", "a\nb", "\ud800", "\u202e", "\u2028", CONTROL, LONG_NAME,
         "2024-13-45", "2024-02-30 99:99:99", HUGE_INTEGER, "x" * 100_000, "é" * 200, "shapes", "tiny", "auto"]
    ),
    st.text(max_size=20),
)  # fmt: skip

odd_numbers = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e308, -0.0, 1e-320, 0.5]),
    st.integers(-(2**70), 2**70),
    st.floats(),
)

leaves = st.one_of(st.none(), st.booleans(), odd_numbers, odd_texts)

values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(odd_texts, inner, max_size=3)),
    max_leaves=8,
)

# --- the command line -------------------------------------------------------------------------------------------------

KNOBS = sorted({knob for option in own_options() for knob in option.model_fields})

KEYS = [
    *RunConfig.model_fields,
    *(f"{group}.{knob}" for group in GROUPS for knob in ("name", "fallback", "_target_", "nonsense")),
    *(f"{group}.{knob}" for group in ("model", "compile", "memory", "cache", "vae") for knob in KNOBS),
    *(f"measure.{name}" for name in Measure.model_fields),
    *(f"sweep.{name}" for name in SweepConfig.model_fields),
    "preset", "sweep", "nonsense", "a.b.c", "hydra.verbose", "hydra.mode", "hydra.job.chdir", "hydra.job.name",
    "hydra.sweep.subdir", "hydra.output_subdir", "hydra.run.dir", "hydra/job_logging", "hydra/launcher",
    "hydra/sweeper", "hydra.nonsense", "defaults", "_target_", "compile.inductor_options.x",
]  # fmt: skip

OPTION_NAMES = ["sdpa", "none", "auto", "tiny", "shapes", "local", "flux2_klein_4b", "max_autotune", "regional", "fp8",
                "tiled", "staged", "block_swap", "h100_fast", "cpu", "compile_grid", "optuna", "joblib"]  # fmt: skip


def _grammar(value: Any) -> str:
    """A value as Hydra's grammar writes it, roughly: what it cannot read is a case as well."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_grammar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_grammar, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


_keys = st.one_of(st.sampled_from(KEYS), st.sampled_from(GROUPS), odd_texts)

_settings = st.one_of(
    values.map(_grammar),
    st.sampled_from(OPTION_NAMES),
    st.lists(st.sampled_from(["1", "2", "sdpa", "none", "auto", "x"]), min_size=2, max_size=3).map(",".join),
    st.sampled_from(["range(0,3)", "choice(1,2)", "glob(*)", "interval(0,1)", "shuffle(1,2)", "[[1],[2]]", "tag(a,1)"]),
    odd_texts.map(lambda text: "'" + text + "'"),
)

_assignments = st.tuples(st.sampled_from(["", "", "", "", "+", "++"]), _keys, _settings).map(
    lambda parts: f"{parts[0]}{parts[1]}={parts[2]}"
)

_known = st.tuples(st.sampled_from(KEYS), _settings).map("=".join)
"""One key that there is: more of these come through to what checks their value."""

overrides = st.one_of(
    _known.map(lambda one: [one]),
    st.lists(st.one_of(_assignments, _assignments, _keys.map("~{}".format), odd_texts), min_size=1, max_size=3),
)

command_lines = st.tuples(
    st.sampled_from([["plan"], ["plan"], [], ["--multirun"], ["--cfg", "job"], ["--info", "config"]]), overrides
).map(lambda parts: [*parts[0], *parts[1]])
"""Arguments of ``fluxrun``."""

# --- JSON with something changed in it --------------------------------------------------------------------------------


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    if isinstance(data, dict):
        return [(data, key) for key in data] + [place for item in data.values() for place in _places(item)]
    if isinstance(data, list):
        return [(data, n) for n in range(len(data))] + [place for item in data for place in _places(item)]
    return []


@st.composite
def _a_place(draw: Callable[..., Any], data: Any) -> tuple[Any, Any]:
    """A (container, key): any one, or one met on a walk from the top, which is more often near to it."""
    if draw(st.booleans()):
        return draw(st.sampled_from(_places(data)))
    while True:
        container, key = data, draw(st.sampled_from(list(data) if isinstance(data, dict) else range(len(data))))
        data = container[key]
        if not isinstance(data, (dict, list)) or not data or draw(st.booleans()):
            return container, key


@st.composite
def mutated(draw: Callable[..., Any], original: Any) -> Any:
    """``original`` with one to three values replaced, dropped, doubled in depth or put where they do not belong."""
    data = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(data, (dict, list)) or not data:
            return draw(values)
        container, key = draw(_a_place(data))
        match draw(st.sampled_from(["replace", "replace", "replace", "drop", "nest", "swap", "add"])):
            case "replace":
                container[key] = draw(values)
            case "drop":
                del container[key]
            case "nest":
                container[key] = draw(st.sampled_from([[container[key]], {"x": container[key]}]))
            case "swap":
                other, place = draw(_a_place(data))
                container[key] = copy.deepcopy(other[place])
            case "add" if isinstance(container, dict):
                container[draw(odd_texts)] = draw(values)
    return data


def _write(data: Any) -> str:
    try:
        return json.dumps(data)
    except ValueError:  # an integer of too many digits has no text
        return "{}"


RAW_JSON = [
    "", "null", "7", "[]", '"text"', "{", "[" * DEPTH + "]" * DEPTH, '{"a":' * DEPTH + "1" + "}" * DEPTH, HUGE_INTEGER,
    '{"config": ' + HUGE_INTEGER + "}", "NaN", '{"config": NaN}', "\x00", '{"config": {"model": 3}}',
]  # fmt: skip

raw_json = st.sampled_from(RAW_JSON)


def json_texts(original: Any) -> st.SearchStrategy[str]:
    """JSON like ``original``, now and then not JSON at all."""
    return st.one_of(mutated(original).map(_write), mutated(original).map(_write), raw_json)


@st.composite
def damaged(draw: Callable[..., Any], original: bytes) -> bytes:
    """Bytes with bits flipped, a piece cut out or the end missing."""
    data = bytearray(original)
    if not data:
        return draw(st.binary(max_size=20))
    near_the_start = st.integers(0, min(len(data) - 1, 400))
    match draw(st.sampled_from(["flip", "flip", "flip", "cut", "end", "noise"])):
        case "flip":
            for _ in range(draw(st.integers(1, 8))):
                data[draw(st.one_of(near_the_start, st.integers(0, len(data) - 1)))] ^= 1 << draw(st.integers(0, 7))
        case "cut":
            start = draw(near_the_start)
            del data[start : start + draw(st.integers(1, 64))]
        case "end":
            del data[draw(st.integers(0, len(data) - 1)) :]
        case "noise":
            start = draw(near_the_start)
            data[start : start + 8] = draw(st.binary(min_size=8, max_size=8))
    return bytes(data)


# --- YAML -------------------------------------------------------------------------------------------------------------


def alias_bomb(levels: int = 30) -> str:
    """A list of lists of lists, each ten times the one before: a few lines that become 10**levels entries."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


RAW_YAML = [
    "", "- ", "a", "a: b: c", "\t- x", "- *nothing", "&a [*a]", "- &a [*a]", alias_bomb(),
    "- " + alias_bomb().replace("\n", "\n  "),
    "[" * DEPTH + "]" * DEPTH, "- " * DEPTH + "x", "\n".join(" " * n + "a:" for n in range(500)), "{[1]: 2}",
    "- {[1, 2]: 3}", "- 2024-13-45", "- 2024-02-30", "- 2001-01-01", "seed: 2024-99-99", f"seed: {HUGE_INTEGER}",
    f"- {HUGE_INTEGER}", f"- {{prompt: x, seed: {HUGE_INTEGER}}}", "!!python/object/apply:os.getcwd []", "- !!binary x",
    "- !!timestamp x", "- !!float x", "- !!int ''", "- ! x", "%YAML 9.9\n---\nx", "--- a\n--- b", "? ", "- 1:2:3",
    "- 0b", "- .nan", "- <<: 3", "- <<: [1]", "seed: {<<: *x}", "\x00", "\ufeff- x", "- 'x", f"- {'x' * 200_000}",
    "- {prompt: x, 1: 2, null: 3}", "- {prompt: x, seed: true}", "- !!set {a, b}", "- !!omap [1]", "- !!pairs [a: 1]",
    "defaults: [x]", "defaults: {a: b}", "defaults: 3", "defaults: [{attention: [a]}]", "defaults: [{override: 1}]",
    "defaults: [/preset/mine]", "defaults: [mine]", "# @package _global_\ndefaults: [/preset/mine]\n",
    "# @package a..b\nx: 1", "# @package _group_.x\nsteps: 1", "# @package hydra\nx: 1", "# @package _global_.@x\n",
]  # fmt: skip


@st.composite
def damaged_lines(draw: Callable[..., Any], original: str) -> str:
    """A file's text with a line dropped, moved in or given another value."""
    lines = original.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["value", "value", "indent", "drop", "double", "text"])):
            case "value":
                lines[n] = f"{lines[n].partition(':')[0]}: {_grammar(draw(values))}"
            case "indent":
                lines[n] = "  " + lines[n]
            case "drop" if len(lines) > 1:
                del lines[n]
            case "double":
                lines.insert(n, lines[n])
            case _:
                lines[n] = draw(odd_texts)
    return "\n".join(lines) + "\n"


def _dump(data: Any) -> str:
    try:
        return yaml.safe_dump(data, allow_unicode=True)
    except (ValueError, yaml.YAMLError):
        return "x"


def config_texts(originals: list[str]) -> st.SearchStrategy[str]:
    """Config files: fluxrun's own with something changed, any YAML with known keys, and things made to harm."""
    header = st.sampled_from(["", "# @package _global_\n", "# @package _global_\n", "# @package compile\n"])
    known = st.dictionaries(st.one_of(st.sampled_from(KEYS), odd_texts), values, max_size=4).map(_dump)
    raw = st.sampled_from(RAW_YAML)
    return st.tuples(header, st.one_of(st.sampled_from(originals).flatmap(damaged_lines), known, raw)).map("".join)


_entry = st.one_of(
    odd_texts,
    st.fixed_dictionaries(
        {"prompt": st.one_of(st.just("a cat"), leaves)},
        optional={"seed": leaves, "num_images": st.one_of(st.integers(-1, 3), odd_texts), "x": leaves},
    ),
    values,
)

prompt_files = st.one_of(
    st.tuples(st.sampled_from([".yaml", ".yml"]), st.lists(_entry, max_size=3).map(_dump)),
    st.tuples(st.sampled_from([".yaml", ".yml"]), st.sampled_from(RAW_YAML)),
    st.tuples(st.just(".jsonl"), st.lists(_entry.map(_write), max_size=3).map("\n".join)),
    st.tuples(st.just(".jsonl"), raw_json),
    st.tuples(st.just(".txt"), st.lists(odd_texts, max_size=3).map("\n".join)),
    st.tuples(st.sampled_from([".txt", ".yaml", ".jsonl", ".csv", ""]), st.binary(max_size=60)),
)
"""Suffix and content of a prompts file."""
