"""When a GPU has nothing to do in a picture: a trace of the third of six, as a run with a warm pool draws them.

    python scripts/gaps.py OUT.json                                      # klein-4B at real size, h100_fast
    python scripts/gaps.py OUT.json +preset=h100_lossless                # other options than h100_fast
    python scripts/gaps.py OUT.json --tiny                               # a dry run on any machine

Prints and writes the picture's milliseconds from its text to the next one's, how many of them the GPU was busy, each
gap of more than 0.1 ms with the kernels around it, and what the CPU was at by then. torch's profiler makes the CPU's
part slower; the milliseconds of a picture that was drawn without it stand beside.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedTokenizerBase

import fluxrun
from fluxrun.drawing.generation import Generation
from fluxrun.drawing.inspection import Inspection
from fluxrun.pipeline.prompt_encoder import PromptEncoder
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.record.folder import RunFolder
from fluxrun.record.schema import RunRecord
from fluxrun.runner import run

REAL = ("model=flux2_klein_4b", "model.weights=random", "memory=resident", "steps=4")
FAST = ("+preset=h100_fast", "kernels.text_encoder=fused")
TINY = ("model=tiny", "height=64", "width=64", "steps=4")
PICTURES = 6
TRACED = 2
"""Which of them is looked at; the next one's text ends it."""
GAP_MS = 0.1
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
TEXT = "PromptEncoder._encode"
MARKED: tuple[tuple[type, str], ...] = (
    (PromptEncoder, "_encode"), (PreTrainedTokenizerBase, "apply_chat_template"),
    (PreTrainedTokenizerBase, "__call__"), (Generation, "_draw"), (Generation, "_noise_arguments"),
    (FlowMatchEulerDiscreteScheduler, "set_timesteps"), (FlowMatchEulerDiscreteScheduler, "step"),
    (Generation, "_after_denoising"), (Inspection, "findings"), (RunFolder, "save"),
)  # fmt: skip


def drawn(pool: SessionPool, folder: Path, overrides: Sequence[str]) -> RunRecord:
    """One run of six prompts, none of them drawn before."""
    file = folder / "prompts.txt"
    number = len(list(folder.iterdir()))
    file.write_text("\n".join(f"a lighthouse at dusk, take {number} {n}" for n in range(PICTURES)), encoding="utf-8")
    return run(fluxrun.compose([*overrides, f"prompts_file={file}"]), folder / str(number), pool=pool)


def picture_ms(record: RunRecord) -> float:
    """From the traced picture's text to the next one's."""
    starts = sorted(span.start_s for span in record.spans if span.name == "encode")
    return 1e3 * (starts[TRACED + 1] - starts[TRACED])


def mark(owner: type, name: str) -> None:
    """Let a method show in the trace."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def marked(*given: Any, **named: Any) -> Any:
        with record_function(f"{owner.__name__}.{name}"):
            return method(*given, **named)

    setattr(owner, name, marked)


def traced(pool: SessionPool, folder: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """What happened in a run, as torch's profiler writes it."""
    for owner, name in MARKED:
        mark(owner, name)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        drawn(pool, folder, overrides)
    file = folder / "trace.json"
    profiler.export_chrome_trace(str(file))
    events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return events


def found(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The traced picture: its time, the GPU's busy time, gaps and marks, milliseconds from its text's begin."""
    names = {f"{owner.__name__}.{name}" for owner, name in MARKED}
    marks = sorted((e for e in events if e.get("name") in names and e.get("dur")), key=lambda e: e["ts"])
    texts = [e["ts"] for e in marks if e["name"] == TEXT and e.get("cat") == "user_annotation"]
    begin, end = texts[TRACED], texts[TRACED + 1]
    busy_until, busy, last, gaps = begin, 0.0, "the text's begin", []
    for one in sorted((e for e in events if e.get("cat") in ON_GPU), key=lambda e: e["ts"]):
        start, stop = max(one["ts"], begin), one["ts"] + one["dur"]
        if stop <= begin or start >= end:
            continue
        if start - busy_until > 1e3 * GAP_MS:
            gaps.append(
                {"at_ms": ms(busy_until - begin), "ms": ms(start - busy_until), "from": last, "to": one["name"]}
            )
        busy += max(0.0, stop - max(busy_until, start))
        busy_until, last = max(busy_until, stop), one["name"]
    shown = [e for e in marks if begin <= e["ts"] < end and e.get("cat") == "user_annotation"]
    return {
        "picture_ms": ms(end - begin),
        "gpu_busy_ms": ms(busy),
        "gaps": gaps,
        "marks": [{"name": e["name"], "at_ms": ms(e["ts"] - begin), "ms": ms(e["dur"])} for e in shown],
    }


def ms(microseconds: float) -> float:
    """Milliseconds, to a microsecond."""
    return round(microseconds / 1e3, 3)


def main(line: Sequence[str]) -> None:
    """Trace a picture, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a dry run on any machine")
    given, more = parser.parse_known_args(line)
    overrides = [*(TINY if given.tiny else REAL), *(more or (() if given.tiny else FAST))]
    with SessionPool() as pool, tempfile.TemporaryDirectory(prefix="fluxrun-gaps-") as temporary:
        folder = Path(temporary)
        for _ in range(2):
            record = drawn(pool, folder, overrides)
        plain_ms = picture_ms(record)
        result = found(traced(pool, folder, overrides))
    device = record.environment.get("gpu") or record.environment.get("cpu")
    result = {"overrides": overrides, "device": device, "picture_ms_without_profiler": round(plain_ms, 3), **result}
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for gap in result["gaps"]:
        print(f"{gap['at_ms']:8.2f} ms: nothing for {gap['ms']:.2f} ms, {gap['from'][:50]} -> {gap['to'][:50]}")
    print({name: value for name, value in result.items() if isinstance(value, (int, float))})


if __name__ == "__main__":
    main(sys.argv[1:])
