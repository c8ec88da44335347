"""One process: klein-4B's step with both presets, medians. python steps.py OUT.json"""
import json, sys, tempfile
from pathlib import Path
import fluxrun
found = {}
for preset in ("h100_lossless", "h100_fast"):
    with tempfile.TemporaryDirectory() as folder:
        config = fluxrun.compose([f"+preset={preset}", "model=flux2_klein_4b", "model.weights=random", "model.path=null", "measure.warmup=2", "measure.repeats=8"])
        r = fluxrun.run(config, Path(folder) / "r")
        steps = [s for image in r.timings.step_s for s in image]
        found[preset] = {"median_ms": r.timings.steady_step_s.median * 1e3, "min_ms": min(steps) * 1e3, "n": len(steps), "steps_ms": [round(s * 1e3, 3) for s in steps], "options": {g: o.effective for g, o in r.options.items()}, "sha256": r.images[0].sha256, "gpu": r.environment.get("gpu"), "git_commit": r.environment.get("git_commit"), "decode_s": r.timings.decode_s}
Path(sys.argv[1]).write_text(json.dumps(found, indent=1)); print(sys.argv[1], {k: (round(v["median_ms"], 2), round(v["min_ms"], 2), v["sha256"][:8]) for k, v in found.items()}, flush=True)
