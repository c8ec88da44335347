"""quantization.py: which rows it measures, what it keeps of earlier ones, and a dry run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import quantization

ROOT = Path(__file__).resolve().parents[2]


def row(setting: str, ms: float, gb: float, status: str = "measured") -> dict[str, dict[str, object]]:
    return {f"klein_4b {setting} compiled": {"status": status, "step_ms": [ms], "draw_peak_gb": gb}}


def test_later_models_are_measured_with_what_was_best_for_the_first():
    rows = row("fp8", 40, 5) | row("sdnq uint4", 50, 3) | row("int8", 30, 9, "failed") | row("sdnq int8", 60, 5)
    rows |= row("sdnq int8, quantized matmul", 45, 5)
    assert quantization.best(rows) == ["fp8", "sdnq uint4"]
    assert quantization.best({}) == ["fp8", "sdnq uint4"]
    assert [name.setting for name in quantization.names("dev", rows)] == [
        "bf16", "fp8", "sdnq int8, quantized matmul", "sdnq uint4",
    ]  # fmt: skip
    assert len(quantization.names("klein_4b", rows)) == 2 * len(quantization.SETTINGS)


@pytest.mark.slow
def test_dry_run_keeps_what_was_measured_and_says_what_was_not(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.json"
    done = row("bf16", 1, 1)["klein_4b bf16 compiled"]
    earlier.write_text(json.dumps({"rows": {"klein_4b bf16 eager": done, "klein_4b nf4 eager": {"status": "failed"}}}))

    def rows(*arguments: str) -> dict[str, dict[str, object]]:
        command = [sys.executable, str(ROOT / "benchmarks" / "quantization.py"), str(tmp_path / "out.json")]
        subprocess.run([*command, "--model", "tiny", *arguments], capture_output=True, check=True, timeout=300)
        found: dict[str, dict[str, object]] = json.loads((tmp_path / "out.json").read_text())["rows"]
        return found

    found = rows("--known", str(earlier), "--only", "bf16 eager", "nf4 eager", "klein_9b fp8")
    assert found["klein_4b bf16 eager"] == done
    assert "needs a CUDA GPU" in str(found["klein_4b nf4 eager"]["error"])
    assert found["klein_9b fp8 compiled"]["status"] == "failed"
    measured = rows("--only", "klein_4b bf16 eager")["klein_4b bf16 eager"]
    assert (measured["status"], measured["rel_l2"], measured["finite"]) == ("measured", 0.0, True)
    assert len(measured["step_ms"]) == 12  # type: ignore[arg-type]
    left = rows("--known", str(earlier), "--budget", "0", "--only", "fp8 eager")
    assert left["klein_4b fp8 eager"]["error"] == "out of time"
