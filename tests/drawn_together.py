"""Processes that draw together, for the tests: on a CPU with what stands in the way of it put aside, here alone.

``torchrun … -m drawn_together JOBS``: each of JSON's ``[[folder, [override, …]], …]`` is drawn by all processes.
With a folder instead it is ``fluxrun.sweep.rank_process``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def allow_it() -> None:
    """Let diffusers' parallelism, and our own plan, take a CPU."""
    import torch

    if torch.cuda.is_available():
        return
    from diffusers.hooks import tensor_parallel

    from fluxrun.options import parallel

    # diffusers 0.42.1 computes rank % device_count(), which is 0 without an accelerator: a ZeroDivisionError.
    torch.accelerator.device_count = lambda: 1
    tensor_parallel._SUPPORTED_TP_DEVICES = (*tensor_parallel._SUPPORTED_TP_DEVICES, "cpu")
    parallel.lacks_gpus = lambda machine, size: None


def draw_all(jobs: list[tuple[str, list[str]]]) -> None:
    """Draw each job with the processes that are there."""
    from fluxrun.config.composition import compose
    from fluxrun.pipeline.session_pool import SessionPool
    from fluxrun.runner import run

    with SessionPool() as pool:
        for folder, overrides in jobs:
            run(compose(overrides), Path(folder), pool=pool)


if __name__ == "__main__":
    allow_it()
    if sys.argv[1].startswith("["):
        draw_all(json.loads(sys.argv[1]))
    else:
        from fluxrun.sweep.rank_process import run_as_program

        run_as_program()
