"""The sweep's table on the screen: within the terminal's width, every job with what ran, nothing taken for markup."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fluxrun.config.catalog import is_neutral_option, neutral_options
from fluxrun.formatting import seconds
from fluxrun.record.schema import Chosen, Fallback
from fluxrun.report.rows import Result, Row, label
from fluxrun.report.table import description, effective, show_result, table_lines

WIDTHS = (60, 80, 120, 160)


def row(job: str, status: str = "completed", **config: Any) -> Row:
    """A job of a sweep; figures only where it completed."""
    groups = {"attention": "sdpa", "compile": "none"} | {
        k: v for k, v in config.items() if k in ("attention", "compile")
    }
    options = {group: Chosen(requested=name, effective=name) for group, name in groups.items()}
    measured: dict[str, Any] = {
        "step_s": 0.0438, "first_call_s": 9.06, "image_s": 0.176, "speedup": 1.35, "pays_after": 147, "psnr_db": 101.1,
        "ssim": 1.0, "accuracy": 1.0, "peak_memory_bytes": 763363328, "steps": 2, "size": [256, 256],
        "model": "shapes", "machine": "AMD EPYC",
    }  # fmt: skip
    return Row(
        job=job, folder=job, status=status, overrides=[f"{key}={value}" for key, value in config.items()],
        config={**config, **{group: {"name": name} for group, name in groups.items()}},
        options=options if status == "completed" else {}, **(measured if status == "completed" else {}),
    )  # fmt: skip


GRID = [
    row("0", attention="sdpa", compile="none", steps=2, seed=0),
    row("1", attention="sdpa", compile="regional", steps=2, seed=1),
    row("10", "failed", attention="math", compile="max_autotune_no_cudagraphs", steps=0, seed=0),
    row("11", "pending", attention="math", compile="regional", steps=2, seed=1),
]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_terminal_and_no_job_is_lost(width: int) -> None:
    lines = [line.plain for line in table_lines(GRID, width)]
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for said in ("regional", "max_autotune_no_cudagraphs", "failed", "pending", "0.176 s", "1.35x", "shapes, 256x256"):
        assert said in text
    assert {line.split()[0] for line in lines} >= {"0", "1", "10", "11"}
    assert "…" not in text


def test_a_wide_terminal_has_a_column_per_swept_key_and_one_line_per_job() -> None:
    lines = [line.plain for line in table_lines(GRID, 160)]
    assert lines[1].split()[:5] == ["job", "attention", "compile", "steps", "seed"]
    assert len(lines) == 2 + len(GRID)


def test_what_ran_instead_is_in_the_jobs_line() -> None:
    fell = row("0", attention="xformers")
    reason = Fallback(option="xformers", stage="requires", reason="needs a CUDA GPU")
    fell.options["attention"] = Chosen(requested="xformers", effective="sdpa", fallbacks=[reason])
    chosen = row("1", attention="auto")
    chosen.options["attention"] = Chosen(requested="auto", effective="cudnn")
    rows = [fell, chosen]
    assert [description(r, rows) for r in rows] == ["attention=xformers→sdpa!", "attention=auto→cudnn"]
    assert effective(fell) == "attention=sdpa!"


def test_an_option_that_stayed_in_part_did_not_fall_back_to_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = row("0", compile="cudagraphs")
    reason = Fallback(option="cudagraphs", stage="requires", reason="transformer is taken out")
    kept.options["compile"] = Chosen(requested="cudagraphs", effective="cudagraphs", fallbacks=[reason])
    show_result(Result(status="completed", jobs=[kept]), tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "compile=cudagraphs fell back to a part of it (requires): transformer is taken out" in said
    assert description(kept, [kept, row("1")]) == "compile=cudagraphs!"


def test_a_prompts_brackets_are_text() -> None:
    rows = [row("0", prompt=["a [red] circle"]), row("1", prompt="a, [/b] \\ star")]
    text = "\n".join(line.plain for line in table_lines(rows, 80))
    assert "a [red] circle" in text
    assert "a, [/b] \\ star" in text


def test_a_job_is_labelled_by_what_its_config_has_and_others_have_not() -> None:
    baseline = row("baseline").model_copy(update={"overrides": []})
    one = row("0", attention="math", compile="none")
    assert label(one, [baseline, one]) == "attention=math"
    assert label(one, [one]) == "attention=math compile=none"
    assert label(baseline, [baseline, one]) == "baseline"


def test_neutral_options_come_from_the_config_folder_and_unknown_groups_are_coped_with() -> None:
    assert neutral_options()["attention"] == "sdpa"
    assert neutral_options()["kernels"] == "diffusers"
    assert "model" not in neutral_options()
    assert is_neutral_option("from_another_version", "none")
    assert not is_neutral_option("from_another_version", "turbo")
    strange = row("0", attention="sdpa")
    strange.options["from_another_version"] = Chosen(requested="turbo", effective="turbo")
    assert description(strange, [strange, row("1", attention="math")]) == "attention=sdpa from_another_version=turbo"
    assert not strange.neutral()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0438, "43.8 ms"), (0.05, "50.0 ms"), (0.18, "0.180 s"), (1396.0, "1396 s"), (9.06, "9.06 s")],
)
def test_seconds_have_three_digits(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_a_table_without_a_completed_job_is_one() -> None:
    rows = [row("0", "failed", steps=0), row("1", "interrupted", steps=2)]
    for width in WIDTHS:
        text = "\n".join(line.plain for line in table_lines(rows, width))
        assert "failed" in text
        assert "interrupted" in text
    assert math.isfinite(len(table_lines([], 80)))
