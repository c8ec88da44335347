"""From raw results to the summary, the tables and the plots."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import summarize
from bench import next_tenth
from bench.results import fallen_back, read
from bench.summary import document, summary, tables
from bench.timed import ERROR

ROOT = Path(__file__).resolve().parents[2]
KEYS = ["model", "setting", "metric", "unit", "value", "plain_diffusers", "target", "met", "command"]


def section(name: str, rows: list[dict[str, Any]], at: str = "2026-11-23T10:00:00+00:00") -> dict[str, Any]:
    """A section file as speed.py writes it."""
    state = {"at": at, "name": "NVIDIA H100 80GB HBM3", "driver_version": "580.159", "power.limit": "700.00"}
    command = ["python", "benchmarks/speed.py", "OUT", "--only", name]
    versions = {"torch": "2.11.0+cu130", "git_commit": "0123456789abcdef"}
    about = {"section": name, "command": command, "tiny": False, "versions": versions, "before": state}
    return {**about, "rows": rows}


def row(setting: str, samples: dict[str, list[list[float]]], **more: Any) -> dict[str, Any]:
    """A setting that was measured."""
    about = {"setting": setting, "status": "measured", "error": None, "group": 0, "first_call_s": 1.5}
    return {**about, "samples": samples, **more}


def steps(setting: str, ms: float, **more: Any) -> dict[str, Any]:
    """A setting's steps in two turns around a median."""
    return row(setting, {"step_ms": [[ms - 1, ms, ms + 1], [ms]]}, **more)


def process(setting: str, total_s: float, **more: Any) -> dict[str, Any]:
    """A setting measured through the ``fluxrun`` command."""
    timings = {
        "total_s": total_s,
        "import_s": 1.5,
        "load_s": 2.0,
        "first_call_s": 3.0,
        "text_encode_s": [0.1],
        "denoise_s": [9.0, 0.3],
        "decode_s": [0.5, 0.05],
    }
    about = {"setting": setting, "status": "measured", "error": None, "timings": timings, "process_s": total_s + 3}
    memory = {"peak_allocated_bytes": 18 * 2**30}
    return {**about, "memory": memory, "options": {"memory": {"requested": "auto", "effective": "staged"}}, **more}


def fallen() -> dict[str, Any]:
    """Options of which one is not what was asked for."""
    return {"compile": {"requested": "cudagraphs", "effective": "none", "fallbacks": ["cudagraphs: needs a GPU"]}}


def write(folder: Path) -> Path:
    """Results of every section."""
    klein = [
        steps("plain", 85.0),
        steps("plain_regional", 60.0, rel_l2=2e-2),
        steps("h100_lossless", 52.0, rel_l2=2e-2),
        steps("h100_fast", 40.0, rel_l2=0.15, options=fallen()),
        {"setting": "broken", "status": "failed", "error": "no such option", "group": 0, "samples": {}},
    ]
    dev = [steps("plain", 566.0), steps("plain_regional", 442.0), steps("h100_fast", 255.0, rel_l2=0.15)]
    stages = {"total_s": [[0.2]], "text_s": [[0.02]], "denoise_s": [[0.15]], "decode_s": [[0.03]]}
    turns = [
        {"size": [size, size], "step_ms": [ms], "first_call_s": 1.0, "counts": {"recompiles": 1, "compile_s": 2.0}}
        for size, ms in ((512, 15.0), (1024, 40.0), (2048, 260.0))
    ]
    missed = {
        "setting": "dev fp8, group",
        "model": "dev",
        "status": "not measured",
        "error": "not finished",
        "steps": 2,
    }
    contents = {
        "klein": section("klein", klein),
        "dev": section("dev", dev),
        "image": section("image", [row("plain", stages), row("h100_fast", stages)]),
        "sizes": section("sizes", [row("h100_fast", {}, turns=turns)]),
        "first_image": section("first_image", [process("h100_fast", 6.0, state="warm", overrides=[])]),
        "memory": section(
            "memory",
            [
                process("klein-9B bf16, staged", 20.0, model="klein_9b", budget_gb=24, steps=4),
                {**missed, "budget_gb": 24},
            ],
        ),
        "roofline": section(
            "roofline", [{"what": "bf16 matmul, square", "unit": "TFLOP/s", "samples": [700.0, 710.0]}]
        ),
    }
    results = folder / "results" / "speed_one"
    results.mkdir(parents=True)
    for name, content in contents.items():
        (results / f"{name}.json").write_text(json.dumps(content))
    return results


def found(rows: list[dict[str, Any]], setting: str, metric: str, model: str = "klein-4B") -> dict[str, Any]:
    """The one row of the summary that this is about."""
    (only,) = [r for r in rows if (r["model"], r["setting"], r["metric"]) == (model, setting, metric)]
    return only


def test_summary_judges_what_was_measured_against_the_targets(tmp_path: Path) -> None:
    rows = summary(read([write(tmp_path)]))
    assert all(list(r) == KEYS for r in rows)
    step = found(rows, "h100_lossless", "denoising step")
    assert (step["value"], step["plain_diffusers"], step["target"], step["met"]) == (52.0, 85.0, 55, True)
    assert step["command"] == "python benchmarks/speed.py OUT --only klein"
    dev = found(rows, "h100_fast", "denoising step", "dev")
    assert (dev["value"], dev["unit"], dev["met"]) == (0.255, "s", True)
    error = found(rows, "h100_lossless", ERROR)
    assert (error["value"], error["met"]) == (0.02, True)
    warm = found(rows, "h100_fast", "first image of a new process beyond imports and load, warm")
    assert (warm["value"], warm["target"], warm["met"]) == (2.5, 5, True)


def test_summary_says_what_fell_back_and_what_was_not_measured(tmp_path: Path) -> None:
    rows = summary(read([write(tmp_path)]))
    fast = found(rows, "h100_fast (compile: cudagraphs → none)", "denoising step")
    assert (fast["value"], fast["target"], fast["met"]) == (40.0, 37, False)
    missing = found(rows, "h100_lossless", "denoising step", "dev")
    assert (missing["value"], missing["met"], missing["target"]) == (None, None, 0.425)
    assert not any(r["setting"] == "broken" for r in rows)


def test_an_option_that_stayed_in_part_is_no_other_one() -> None:
    kept = {"requested": "cudagraphs", "effective": "cudagraphs", "fallbacks": ["cudagraphs: a step cache (requires)"]}
    assert fallen_back({"options": {"compile": kept}}) == " (compile: cudagraphs → a part of it)"


def test_the_newest_measurement_counts_and_dry_runs_do_not(tmp_path: Path) -> None:
    folder = write(tmp_path)
    newer = section("klein", [steps("plain", 84.0), steps("h100_lossless", 50.0)], at="2026-11-24T10:00:00+00:00")
    dry = {**section("klein", [steps("h100_lossless", 1.0)], at="2026-11-25T10:00:00+00:00"), "tiny": True}
    (folder / "klein_again.json").write_text(json.dumps(newer))
    (folder / "klein_dry.json").write_text(json.dumps(dry))
    step = found(summary(read([folder])), "h100_lossless", "denoising step")
    assert (step["value"], step["plain_diffusers"]) == (50.0, 84.0)


def test_main_writes_summary_tables_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    results = write(tmp_path).parent
    names = [*tables([]), "next_tenth"]
    markers = "".join(f"<!-- speed:{name} -->STALE<!-- /speed:{name} -->\n" for name in names)
    docs = tmp_path / "docs" / "performance.md"
    docs.parent.mkdir()
    docs.write_text(f"By hand.\n{markers}Also by hand.\n")
    monkeypatch.setattr(sys, "argv", ["summarize.py", "--results", str(results), "--docs", str(docs)])
    summarize.main()
    text = docs.read_text()
    assert text.startswith("By hand.\n")
    assert text.endswith("Also by hand.\n")
    assert "STALE" not in text
    assert "| klein-4B | `h100_lossless` | denoising step | 85 ms | **52** ms | 1.63× | ≤ 55 ms | yes |" in text
    assert "| `h100_lossless` | **52** | 51–53, n=4 | 1.63× | 1.15× | 2.0e-02 | 1.5 s |" in text
    assert "| klein-9B bf16, staged | 24 GB | staged | 18.0 GB | – | 0.45 s | 4 steps |" in text
    assert "not measured: not finished" in text
    assert "| `h100_fast` | 1024×1024 | 40 | 1.0 s | recompiles 1 |" in text
    assert json.loads((results / "summary.json").read_text())
    plots = {path.name for path in (docs.parent / "images").iterdir()}
    assert plots == {"performance_steps.svg", "performance_image.svg", "performance_sizes.svg"}


def test_the_document_is_made_from_the_results_in_the_repository() -> None:
    results = ROOT / "benchmarks" / "results"
    measured = read(sorted(results.glob("speed*/")))
    judged = next_tenth.entries(results)
    assert json.loads((results / "summary.json").read_text(encoding="utf-8")) == [*summary(measured), *judged]
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    made = {**tables(measured), "next_tenth": next_tenth.table(judged)}
    assert document(text, made) == text, "run python benchmarks/summarize.py"


def test_targets_of_the_next_tenth_are_judged_by_their_unit(tmp_path: Path) -> None:
    figures = [
        ("klein", "h100_fast", "denoising step", 33.0), ("sustained", "h100_fast", "pictures a second, batch 4", 5.5),
        ("klein9", "plain", "prompt to PIL", 800.0), ("klein9", "h100_fast", "prompt to PIL", 300.0),
    ]  # fmt: skip
    rows = [{"group": g, "setting": s, "what": w, "median": m} for g, s, w, m in figures]
    (tmp_path / next_tenth.FILE).write_text(json.dumps({"command": "it", "rows": rows}), encoding="utf-8")
    judged = {(row["model"], row["metric"]): (row["value"], row["met"]) for row in next_tenth.entries(tmp_path)
              if row["setting"] == "h100_fast"}  # fmt: skip
    assert judged["klein-4B", "denoising step"] == (33.0, True)
    assert judged["klein-4B, for 50 s", "pictures a second, batch 4"] == (5.5, False)
    assert judged["klein-9B", "prompt to PIL, times plain diffusers"] == (800 / 300, True)
    assert judged["dev", "denoising step"] == (None, None)


def test_a_missed_target_says_what_held_the_card_or_what_the_time_is(tmp_path: Path) -> None:
    capped = {"clocks_event_reasons.active": "0x0000000000000004", "power.limit": "700.00", "clocks.max.sm": "1980"}
    busy = {**capped, "power.draw": "651.6", "clocks.sm": "1560"}
    idle = {**capped, "power.draw": "430.0", "clocks.sm": "1965"}
    free = {**busy, "clocks_event_reasons.active": "0x0000000000000000"}
    figures = [
        ("klein", "h100_fast", "denoising step", 35.0, busy), ("klein", "h100_fast", "step in a picture", 34.8, busy),
        ("klein", "h100_fast", "prompt to PIL", 184.0, idle), ("klein", "h100_lossless", "denoising step", 50.0, busy),
        ("dev", "h100_fast", "denoising step", 260.0, free),
    ]  # fmt: skip
    rows = [{"group": g, "setting": s, "what": w, "median": m, "gpu": gpu} for g, s, w, m, gpu in figures]
    (tmp_path / next_tenth.FILE).write_text(json.dumps({"command": "it", "rows": rows}), encoding="utf-8")
    why = {(row["model"], row["setting"], row["metric"]): row["why"] for row in next_tenth.entries(tmp_path)}
    assert why["klein-4B", "h100_fast", "denoising step"] == "the card's power: 652 of 700 W, 1560 of 1980 MHz"
    assert why["klein-4B", "h100_fast", "prompt to PIL"] == "139 ms of it are steps"
    assert why["klein-4B", "h100_lossless", "denoising step"] is None, "the target was met"
    assert why["dev", "h100_fast", "denoising step"] is None
    assert why["klein-9B", "h100_fast", "denoising step, times plain diffusers"] is None


def test_plots_are_of_what_was_measured() -> None:
    links = tables(read([]))
    assert [links[name] for name in ("steps_plot", "image_plot", "sizes_plot")] == ["", "", ""]
    shown = tables(read(sorted((ROOT / "benchmarks" / "results").glob("speed*/"))))
    assert shown["sizes_plot"] == "![One denoising step by picture size](images/performance_sizes.svg)"
