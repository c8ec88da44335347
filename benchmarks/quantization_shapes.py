"""What each quantization costs the bundled model's pictures: distance to the neutral ones, prompts kept, bytes -> JSON.

python benchmarks/quantization_shapes.py                       # every setting below: about half an hour on two cores
python benchmarks/quantization_shapes.py --only "sdnq fp4"     # some of them; the others' results stay
python docs/reference.py                                       # then: the table in docs/quantization.md

Each setting is drawn by ``fluxrun eval`` in a process of its own; nothing here quantizes anything itself.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench
from bench.single_files import write_bfl_fp8, write_gguf
from fluxrun.record.folder import read_record
from fluxrun.report.fidelity import distance

RESULTS = bench.ROOT / "benchmarks" / "results" / "quantization_shapes.json"
SHAPES = bench.ROOT / "models" / "shapes"
BOTH = "quantization.components=[transformer,text_encoder]"
SDNQ = "quantization=sdnq quantization.weights_dtype="
SETTINGS = {
    "none": "quantization=none",
    "sdnq int8": f"{SDNQ}int8",
    "sdnq int8, quantized matmul": f"{SDNQ}int8 quantization.quantized_matmul=on",
    "sdnq int8, text encoder too": f"{SDNQ}int8 {BOTH}",
    "sdnq int6": f"{SDNQ}int6",
    "sdnq uint4": f"{SDNQ}uint4",
    "sdnq uint4, group 32": f"{SDNQ}uint4 quantization.group_size=32",
    "sdnq uint4, SVD rank 32": f"{SDNQ}uint4 quantization.svd_rank=32",
    "sdnq uint4, Hadamard": f"{SDNQ}uint4 quantization.hadamard=true",
    "sdnq dynamic": f"{SDNQ}dynamic",
    "sdnq float8_e4m3fn": f"{SDNQ}float8_e4m3fn",
    "sdnq fp4": f"{SDNQ}fp4",
    "int8, compiled": "quantization=int8 compile=regional",
    "int8_weight_only": "quantization=int8_weight_only",
    "int8_weight_only, text encoder too": f"quantization=int8_weight_only {BOTH}",
    "fp8_weight_only": "quantization=fp8_weight_only",
    "gguf Q8_0": "quantization=gguf quantization.file={Q8_0}",
    "gguf Q5_1": "quantization=gguf quantization.file={Q5_1}",
    "gguf Q4_0": "quantization=gguf quantization.file={Q4_0}",
    "bfl_fp8": "quantization=bfl_fp8 quantization.file={bfl}",
}


def main() -> None:
    """Draw each setting, compare it with the neutral one, write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="settings to measure again")
    parser.add_argument("--per-set", default="8", help="prompts of each of fluxrun eval's three sets")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    prompts = ["--per-set", given.per_set, "--seeds", "0"]
    known = json.loads(given.output.read_text())["settings"] if given.only and given.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        neutral = drawn("none", work, prompts)
        for name in given.only or SETTINGS:
            run = neutral if name == "none" else drawn(name, work, prompts)
            known[name] = compared(name, run, neutral)
            print(name, json.dumps({k: v for k, v in known[name].items() if k != "components"}), flush=True)
            report = {"prompts": " ".join(prompts), "settings": {n: known[n] for n in SETTINGS if n in known}}
            given.output.write_text(json.dumps({**report, "environment": neutral[1]["environment"]}, indent=1) + "\n")


def drawn(name: str, work: Path, prompts: list[str]) -> tuple[Path, dict[str, Any]]:
    """The run folder of a setting and its record."""
    folder, overrides = work / name.replace(" ", "_"), SETTINGS[name]
    if "{" in overrides:
        overrides = overrides.format(**single_files(work))
    # resident and full: what "auto" would take may differ from machine to machine, and so would pixels.
    arguments = [*prompts, "model=shapes", "memory=resident", "vae=full", *overrides.split()]
    subprocess.run([sys.executable, "-m", "fluxrun", "eval", *arguments, f"hydra.run.dir={folder}"], check=True)
    return folder, read_record(folder).model_dump(mode="json")


def single_files(work: Path) -> dict[str, Path]:
    """The bundled transformer in the files that others' programs would have it in."""
    files = {kind: work / f"{kind}.gguf" for kind in ("Q8_0", "Q5_1", "Q4_0")}
    for kind, file in files.items():
        if not file.exists():
            write_gguf(SHAPES, file, kind)
    bfl = work / "bfl.safetensors"
    return {**files, "bfl": bfl if bfl.exists() else write_bfl_fp8(SHAPES, bfl)}


def compared(name: str, run: tuple[Path, dict[str, Any]], neutral: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """A row of the table. Raises RuntimeError where something else was drawn than what was asked for."""
    folder, record = run
    choice = record["options"]["quantization"]
    if choice["fallbacks"]:
        raise RuntimeError(f"{name}: {choice['fallbacks'][0]['reason']}")
    pairs = zip(record["images"], neutral[1]["images"], strict=True)
    found = [distance(folder / a["path"], neutral[0] / b["path"]) for a, b in pairs]
    known = [d for d in found if d is not None and not math.isinf(d.psnr_db)]
    facts = choice["facts"]
    judged = json.loads((folder / "accuracy.json").read_text())
    return {
        "overrides": SETTINGS[name],
        "images": len(found),
        "psnr_db_min": min((d.psnr_db for d in known), default=None),
        "psnr_db_mean": statistics.fmean(d.psnr_db for d in known) if known else None,
        "ssim_mean": statistics.fmean(d.ssim for d in known) if known else 1.0,
        "accuracy": 1 - len(judged["failures"]) / judged["images"],
        "model_bytes": record["options"]["model"]["facts"]["bytes"],
        "components": {name: part for name, part in facts.items() if isinstance(part, dict)},
        "step_s": record["timings"]["steady_step_s"]["median"],
    }


if __name__ == "__main__":
    main()
