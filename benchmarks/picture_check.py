"""What looking at a picture's values costs on a GPU: ``python benchmarks/picture_check.py`` prints JSON, a line a case.

``gpu_ms`` is what the kernels take, ``all_ms`` the same with launching, waiting and reading, which a run does not do:
it reads when the pixels have come to the CPU anyway.
"""

from __future__ import annotations

import json
import statistics
import time

import torch

from fluxrun.drawing.inspection import extremes

CALLS = 200

CASES = [(1, 1024, False), (1, 1024, True), (4, 1024, False), (1, 2048, False), (1, 2048, True)]
"""Pictures a call, their edge in pixels, and whether the decoder leaves them channels-last."""


def measured(pictures: int, edge: int, channels_last: bool) -> dict[str, object]:
    """One case's milliseconds a call."""
    latents = torch.randn(pictures, (edge // 16) ** 2, 128, device="cuda", dtype=torch.bfloat16)
    image = torch.rand(pictures, 3, edge, edge, device="cuda", dtype=torch.bfloat16)
    image = image.contiguous(memory_format=torch.channels_last) if channels_last else image
    times = [_whole_ms(latents, image) for _ in range(CALLS)]  # these warm up, too
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        extremes(latents, image)
    end.record()
    torch.cuda.synchronize()
    figures = {"gpu_ms": begin.elapsed_time(end) / CALLS, "all_ms": statistics.median(times)}
    return {"pictures": pictures, "edge": edge, "channels_last": channels_last, **figures}


def _whole_ms(latents: torch.Tensor, image: torch.Tensor) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    extremes(latents, image).tolist()
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    for case in CASES:
        print(json.dumps({"device": torch.cuda.get_device_name(), **measured(*case)}))
