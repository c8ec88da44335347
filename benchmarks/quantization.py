"""Measures what each quantization takes and gives at real size, on the GPU that is here: memory, load and step time.

    python benchmarks/quantization.py OUT.json                        # klein-4B, dev, klein-9B: about 15 minutes
    python benchmarks/quantization.py OUT.json --budget 480           # begins no row after that many seconds
    python benchmarks/quantization.py OUT.json --known EARLIER.json   # keeps what is measured, goes on with the rest
    python benchmarks/quantization.py OUT.json --only "4b nf4" dev    # rows with one of these in their names
    python benchmarks/quantization.py OUT.json --model tiny           # a dry run on any machine

Random weights, random prompt embeddings, no text encoder: the transformer and the VAE at 1024x1024. A model's rows are
measured one after the other in one process, which quantizes a layer at a time; a row that fails, hangs or leaves memory
behind ends it, and the next row has a new one. OUT.json is written after each row, with those not reached by name.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import bench  # noqa: F401 - this checkout's fluxrun
from bench.quantized import Process
from bench.results import Row
from bench.section import gpu_state
from bench.settings import MODELS, TINY_MODELS
from fluxrun.atomic import write_atomically
from fluxrun.hardware.detection import detect
from fluxrun.record.environment import git_commit

SDNQ = "quantization=sdnq quantization.weights_dtype="
MATMUL = "quantization.quantized_matmul="
SETTINGS = {
    "bf16": "quantization=none",
    "fp8": "quantization=fp8",
    "sdnq int8": f"{SDNQ}int8 {MATMUL}off",
    "sdnq uint4": f"{SDNQ}uint4 {MATMUL}off",
    "sdnq int8, quantized matmul": f"{SDNQ}int8 {MATMUL}on",
    "sdnq uint4, quantized matmul": f"{SDNQ}uint4 {MATMUL}on",
    "int8": "quantization=int8",
    "nf4": "quantization=nf4",
}
MODES = {"eager": "compile=none", "compiled": "compile=regional"}
ROW_S = 200.0
"""The longest a row may take: dev is drawn, converted and compiled."""


class Name(NamedTuple):
    """What a row is about."""

    model: str
    setting: str
    mode: str

    def __str__(self) -> str:
        return f"{self.model} {self.setting} {self.mode}"


def main(line: Sequence[str]) -> int:
    """Measure row by row; 1 if nothing could be measured."""
    given, started = arguments(line), time.monotonic()
    rows: dict[str, Row] = known(given.known)
    content: Row = {
        "command": ["python", "benchmarks/quantization.py", *line], "tiny": given.model == "tiny",
        "versions": {"python": detect().python, "git_commit": git_commit(), **detect().packages},
        "before": gpu_state(), "after": None, "rows": rows,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fluxrun-quantization-") as folder:
        for model in MODELS:
            overrides = (TINY_MODELS if given.model == "tiny" else MODELS)[model]
            with Process(Path(folder) / model, overrides) as process:
                for name in asked(given, model, rows):
                    left = given.budget - (time.monotonic() - started)
                    rows[str(name)] = measured(process, name, left)
                    content["after"] = gpu_state()
                    save(given.out, content)
    save(given.out, content)
    return int(not any(row["status"] == "measured" for row in rows.values()))


def asked(given: argparse.Namespace, model: str, rows: dict[str, Row]) -> Iterator[Name]:
    """A model's rows that are asked for and not measured yet, in the order of what they are wanted for."""
    for name in names(model, rows):
        if str(name) not in rows and any(text in str(name) for text in given.only):
            yield name


def names(model: str, rows: dict[str, Row]) -> list[Name]:
    """klein-4B in every way; dev compiled; klein-9B with the two that were the best of klein-4B."""
    if model == "klein_4b":
        return [Name(model, setting, mode) for setting in SETTINGS for mode in MODES]
    if model == "dev":
        chosen = ["bf16", "fp8", *(faster(rows, f"sdnq {format}") for format in ("int8", "uint4"))]
    else:
        chosen = best(rows)
    return [Name(model, setting, "compiled") for setting in chosen]


def faster(rows: dict[str, Row], setting: str) -> str:
    """SDNQ's own way to multiply or the quantized one, whichever klein-4B was faster with; as it is by default else."""
    quantized = f"{setting}, quantized matmul"
    times = [step_ms(rows, Name("klein_4b", name, "compiled")) for name in (setting, quantized)]
    return setting if times[0] < times[1] else quantized


def best(rows: dict[str, Row]) -> list[str]:
    """The quantized setting with the fastest compiled step of klein-4B, and the one that takes the least memory."""
    done = {
        name: row
        for name in list(SETTINGS)[1:]
        if (row := rows.get(f"klein_4b {name} compiled", {})).get("status") == "measured"
    }
    by_time = sorted(done, key=lambda name: step_ms(rows, Name("klein_4b", name, "compiled")))
    by_memory = sorted(done, key=lambda name: (done[name]["draw_peak_gb"], by_time.index(name)))
    return list(dict.fromkeys([*by_time[:1], *by_memory[:1], *by_time[1:2]]))[:2] or ["fp8", "sdnq uint4"]


def step_ms(rows: dict[str, Row], name: Name) -> float:
    """The median step of a measured row; infinite for others."""
    row = rows.get(str(name), {})
    return float(statistics.median(row["step_ms"])) if row.get("status") == "measured" else float("inf")


def measured(process: Process, name: Name, left: float) -> Row:
    """One row, said on the screen."""
    overrides = f"{SETTINGS[name.setting]} {MODES[name.mode]} strict=true"
    if left <= 0:
        row: Row = {"status": "not measured", "error": "out of time"}
    else:
        row = process.measure(str(name), overrides, min(ROW_S, left + 60))
    figures = {key: row[key] for key in ("quantize_s", "load_peak_gb", "draw_peak_gb", "first_call_s") if key in row}
    if row["status"] == "measured":
        figures["step_ms"] = round(statistics.median(row["step_ms"]), 2)
    print(f"{name!s:50} {row['status']} {row.get('error') or figures}", flush=True)
    return {"model": name.model, "setting": name.setting, "mode": name.mode, "overrides": overrides, **row}


def known(file: Path | None) -> dict[str, Row]:
    """The measured rows of an earlier run."""
    if file is None:
        return {}
    rows: dict[str, Row] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return {name: row for name, row in rows.items() if row["status"] == "measured"}


def save(out: Path, content: Row) -> None:
    """Everything as it stands."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(content, indent=1, default=str) + "\n")


def arguments(line: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--known", type=Path, help="an earlier file, whose measured rows are kept")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name (MODEL SETTING MODE) has this in it")
    parser.add_argument("--model", choices=("real", "tiny"), default="real", help="tiny: a dry run on any machine")
    return parser.parse_args(line)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
