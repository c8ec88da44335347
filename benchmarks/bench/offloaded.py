"""Plain diffusers with its own model offloading under a memory limit: ``-m bench.offloaded override … DIR``.

What a user without fluxrun does with a model that does not fit: ``enable_model_cpu_offload``, the prompt given to the
pipeline each time. Leaves a run.json as fluxrun does; without steps, which are not timed here.
"""

from __future__ import annotations

import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import torch

from bench.plain import plain_pipeline
from bench.subject import PROMPT, arguments, text_arguments
from fluxrun.config.composition import compose
from fluxrun.planning.prepare import prepare
from fluxrun.record.folder import RunFolder
from fluxrun.record.schema import OptionRecord, Timings

SHORT_S = 30.0
"""An image that takes less is drawn once more: what the first one pays for kernels and memory counts then."""


def main() -> None:
    """Load to the computer's memory, draw, and write what it took."""
    *overrides, folder = sys.argv[1:]
    config = compose(overrides)
    plan = prepare(config).plan
    plan.memory.limit(plan.machine.device)
    imported_s, started = time.time() - psutil.Process().create_time(), time.perf_counter()
    pipeline = plain_pipeline(plan, "cpu", text_encoder=True)
    if cuda := plan.machine.device.startswith("cuda"):
        pipeline.enable_model_cpu_offload()
        torch.cuda.reset_peak_memory_stats()
    times = [time.perf_counter()]
    while len(times) == 1 or (len(times) == 2 and times[1] - times[0] < SHORT_S):
        pipeline(prompt=PROMPT, **arguments(plan), **text_arguments(plan))
        times.append(time.perf_counter())
    images = [after - before for before, after in pairwise(times)]
    run = RunFolder(Path(folder.removeprefix("hydra.run.dir=")), config.source, sys.argv)
    run.record.timings = Timings(
        import_s=imported_s,
        load_s=times[0] - started,
        denoise_s=images,
        decode_s=[0.0] * len(images),
        total_s=imported_s + times[-1] - started,
    )
    run.record.memory.peak_allocated_bytes = torch.cuda.max_memory_allocated() if cuda else 0
    run.note_options({"memory": OptionRecord(requested="model offload", effective="diffusers' model offload")}, [])
    run.finish("completed")


if __name__ == "__main__":
    main()
