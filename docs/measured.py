"""Tables of documents that are made of results: what benchmarks and scripts measured, read from their JSON files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxrun.formatting import gigabytes, seconds


def results(root: Path, name: str) -> Any:
    """What a file of results holds."""
    return json.loads((root / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def measured_quantizations(root: Path) -> str:
    """What each quantization costs the bundled model's pictures: benchmarks/quantization_shapes.py has measured it."""
    measured = results(root, "quantization_shapes.json")
    rows = [
        "| setting | layers | bytes of the model | PSNR min / mean | SSIM | prompts kept | a step (CPU) |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = measured["settings"]["none"]["model_bytes"]
    for name, row in measured["settings"].items():
        layers = ", ".join(f"{part['converted']} of {part['of']}" for part in row["components"].values()) or "–"
        near = "–" if name == "none" else f"{row['psnr_db_min']:.1f} / {row['psnr_db_mean']:.1f} dB"
        ssim = "–" if name == "none" else f"{row['ssim_mean']:.4f}"
        size = f"{gigabytes(row['model_bytes'])} ({row['model_bytes'] / whole:.2f})"
        kept = f"{row['accuracy']:.0%} of {row['images']}"
        rows.append(f"| {name} | {layers} | {size} | {near} | {ssim} | {kept} | {seconds(row['step_s'])} |")
    return "\n".join(rows)


def measured_at_real_size(root: Path) -> str:
    """Memory, load and step time of each quantization on a GPU, as benchmarks/quantization.py has measured them."""
    measured = results(root, "quantization_h200.json")
    lines = [
        "| model, setting | weights | GPU while loading / drawing | converting | first picture | a step | error |",
        "|---|---|---|---|---|---|---|",
    ]
    missing = []
    for name, row in measured["rows"].items():
        if row["status"] != "measured":
            missing.append(f"{name} ({row['error']})")
            continue
        memory = f"{row['load_peak_gb']:.1f} / {row['draw_peak_gb']:.1f} GB"
        converting = "–" if row["setting"] == "bf16" else seconds(row["quantize_s"])
        step, error = statistics.median(row["step_ms"]), row["rel_l2"]
        lines.append(
            f"| {name} | {row['weights_gb']:.1f} GB | {memory} | {converting} | "
            f"{seconds(row['first_call_s'])} | {step:.1f} ms | {'–' if error is None else f'{error:.1e}'} |"
        )
    names = "; ".join(missing) or "none"
    return "\n".join([*lines, "", f"Asked for and not measured: {names}."])


GROUPS = {
    "klein": "klein-4B", "dev": "dev", "klein9": "klein-9B", "edit": "klein-4B, one 1024×1024 reference",
    "large": "klein-4B, 2048×2048", "large_dev": "dev, 2048×2048",
}  # fmt: skip
FIGURES = ("denoising step", "text encoder", "decode to PIL", "prompt to PIL", "prompt to PNG, one of six")
SETTINGS = ("plain", "h100_lossless before", "h100_lossless", "h100_fast before", "h100_fast")


def next_tenth(root: Path) -> str:
    """What stands between the step and the picture, before and now, as scripts/next_tenth.py has measured it."""
    rows = results(root, "next_tenth_h200.json")["rows"]
    found = {(row["group"], row["what"], row["setting"]): row["median"] for row in rows}
    lines = [
        "| | | plain diffusers | lossless before | lossless now | fast before | fast now | now, times plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group, about in GROUPS.items():
        for what in FIGURES:
            figures = {setting: found.get((group, what, setting)) for setting in SETTINGS}
            if any(figures.values()):
                lines.append(f"| {about} | {what} | {' | '.join(_cells(figures))} |")
    return "\n".join([*lines, "", f"Asked for and not measured: {_not_reached(rows)}."])


def _cells(figures: Mapping[str, float | None]) -> list[str]:
    """Milliseconds of each setting, then how many times faster than plain diffusers both presets are."""
    plain = figures["plain"]
    times = [
        f"{plain / now:.2f}" if plain and (now := figures[name]) else "–" for name in ("h100_lossless", "h100_fast")
    ]
    return [*("–" if ms is None else f"{ms:.1f} ms" for ms in figures.values()), " / ".join(times)]


def _not_reached(rows: list[dict[str, Any]]) -> str:
    """The settings for which there was no time, by name."""
    missing = [f"{GROUPS[row['group']]} {row['setting']}" for row in rows if row["what"] == "not measured"]
    return "; ".join(missing) or "none"


def text_tokens(root: Path) -> str:
    """What fewer text tokens do to a picture, as scripts/text_tokens.py has measured it."""
    lines = ["| `model.max_sequence_length` | PSNR, worst prompt | mean | drawn as told |", "|---|---|---|---|"]
    own, *fewer = results(root, "text_tokens_shapes.json")["rows"]
    lines.append(f"| {own['max_sequence_length']} (its own) | – | – | {own['drawn_as_told']} of {own['pictures']} |")
    for row in fewer:
        figures = f"{row['psnr_min_db']:.1f} dB | {row['psnr_mean_db']:.1f} dB"
        lines.append(f"| {row['max_sequence_length']} | {figures} | {row['drawn_as_told']} of {row['pictures']} |")
    return "\n".join(lines)


def schedulers(root: Path) -> str:
    """Each scheduler's fidelity by calls of the transformer, as scripts/schedulers.py has measured it."""
    lines = ["| calls | scheduler | steps | PSNR, worst prompt | mean | SSIM, worst |", "|---|---|---|---|---|---|"]
    rows = results(root, "schedulers_shapes.json")["rows"]
    for row in sorted(rows, key=lambda row: (row["transformer_calls"], -row["psnr_mean_db"])):
        figures = f"{row['psnr_min_db']:.1f} dB | {row['psnr_mean_db']:.1f} dB | {row['ssim_min']:.4f}"
        name = row["overrides"].removeprefix("scheduler=")
        lines.append(f"| {row['transformer_calls']} | `{name}` | {row['steps']} | {figures} |")
    return "\n".join(lines)


def throughput(root: Path) -> str:
    """Latency and throughput by batch size, as scripts/throughput.py has measured them."""
    lines = [
        "| `batch_size` | until its pictures are there | a step | pictures a second | peak memory |",
        "|---|---|---|---|---|",
    ]
    for row in results(root, "throughput_klein_4b_h200.json")["throughput"]:
        latency, step = row["latency_s"]["median"], 1e3 * row["step_s"]["median"]
        figures = f"{latency:.2f} s | {step:.1f} ms | {row['images_per_s']:.2f} | {gigabytes(row['peak_bytes'])}"
        lines.append(f"| {row['batch_size']} | {figures} |")
    return "\n".join(lines)


def guidance(root: Path) -> str:
    """Guidance in two calls a step and in one, as scripts/throughput.py has measured them."""
    lines = ["| pictures | two calls | one call | times |", "|---|---|---|---|"]
    for row in results(root, "throughput_klein_4b_h200.json")["guidance"]:
        two, one = (f"{1e3 * row[name]['median']:.1f} ms" for name in ("two_calls_s", "one_call_s"))
        lines.append(f"| {row['size']}×{row['size']} | {two} | {one} | {row['speed_up']:.2f} |")
    return "\n".join(lines)
