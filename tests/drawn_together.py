"""Processes that draw together, for the tests: on a CPU with what stands in the way of it put aside, here alone.

``torchrun … -m drawn_together JOBS``: each of JSON's ``[[folder, [override, …]], …]`` is drawn by all processes.
With a folder instead it is ``fluxrun.sweep.rank_process``.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any


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


class OutOfLuck(RuntimeError):
    """What the second process's decoder fails with; by its place the failure is the ``vae`` group's."""

    __module__ = "fluxrun.kernels.vae.decoder"


def draw_all(jobs: list[tuple[str, list[str]]]) -> None:
    """Draw each job with the processes that are there; with ``seed=4242`` the second one fails once, at its decoder."""
    from fluxrun.config.composition import compose
    from fluxrun.pipeline.session_pool import SessionPool
    from fluxrun.runner import run

    with SessionPool() as pool:
        for folder, overrides in jobs:
            if overrides[0] in APART:
                APART[overrides[0]](Path(folder))
                continue
            if "seed=4242" in overrides and os.environ["RANK"] == "1":
                fail_once()
            run(compose(overrides), Path(folder), pool=pool)


def compare_fused(folder: Path) -> None:
    """The largest difference of the fused blocks' output, by all processes, to that of one without them."""
    import torch
    from diffusers import ContextParallelConfig
    from torch import distributed

    sys.path.insert(0, str(Path(__file__).parent / "kernels"))
    import reference
    from small_transformer import inputs, transformer

    from fluxrun.kernels.transformer.blocks import fuse

    found = []
    for batch in (1, 2):
        plain, fused = transformer(torch.float32, heads=4), transformer(torch.float32, heads=4)
        fuse(fused, reference, Counter())
        fused.enable_parallelism(config=ContextParallelConfig(ulysses_degree=distributed.get_world_size()))
        torch.manual_seed(1)
        arguments = inputs(torch.float32, batch, text=8)
        arguments |= {name: arguments[name][None] for name in ("img_ids", "txt_ids")}  # only then they are shared out
        with torch.no_grad():
            found.append(float((plain(**arguments)[0] - fused(**arguments)[0]).abs().max()))
    if distributed.get_rank() == 0:
        folder.write_text(json.dumps(found))


def compare_meshes(folder: Path) -> None:
    """How many processes are a ring, and how many share heads, where runs with both come after each other."""
    from fluxrun.process.ranks import Group

    ranks, names = Group.join("cpu", 10), ("ring", "ulysses")
    found = [[ranks.mesh(shape, names)[name].size() for name in names] for shape in ((1, 2), (2, 1), (1, 2))]
    if ranks.rank == 0:
        folder.write_text(json.dumps(found))


APART = {"fused": compare_fused, "meshes": compare_meshes}


def fail_once() -> None:
    """Let this process's next decoding fail: after the last step, when no other process waits for it."""
    from diffusers import AutoencoderKLFlux2

    decode = AutoencoderKLFlux2.decode

    def failing(*arguments: Any, **named: Any) -> Any:
        AutoencoderKLFlux2.decode = decode
        raise OutOfLuck("out of luck")

    AutoencoderKLFlux2.decode = failing


if __name__ == "__main__":
    allow_it()
    if sys.argv[1].startswith("["):
        draw_all(json.loads(sys.argv[1]))
    else:
        from fluxrun.sweep.rank_process import run_as_program

        run_as_program()
