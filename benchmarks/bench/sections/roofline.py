"""The device's ceilings at FLUX.2's shapes: matmuls in bf16 and fp8, attention, memory bandwidth."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from bench.results import Measured, Row, markdown, median, newest
from bench.section import Run, Section
from bench.settings import Setting
from bench.worker import Job, Worker

MATMULS = {
    "square": (8192, 8192, 8192),
    "dev single block in": (4608, 6144, 55296),
    "dev single block out": (4608, 24576, 6144),
    "klein-4B single block in": (4608, 3072, 27648),
    "klein-4B single block out": (4608, 12288, 3072),
}
"""Rows, inner and outer dimension; 4608 is 4096 image and 512 text tokens."""
ATTENTION = {"dev": 48, "klein-4B": 24}
"""Heads; 4608 tokens, head size 128."""
TOKENS, HEAD, COPIED_BYTES, REPEATS = 4608, 128, 2**30, 12


class Roofline(Section):
    """What the device can do at all; in a process of its own, whose memory is free afterwards."""

    def measure(self, run: Run) -> None:
        row: Row = {"setting": "ceilings", "status": "not measured", "error": None}
        worker = Worker(Job(Setting("ceilings"), ceilings, (), run.work, run.logs / "roofline.log"), row)
        worker.begin("measure")
        worker.wait(run.left)
        worker.end()
        for kernel in row.get("ceilings", [row]):
            run.say(run.add(kernel))

    def entries(self, one: Measured) -> Iterator[Row]:
        yield one.entry(self.label, one.name, one.row["unit"], median(one.row["samples"]))

    def tables(self, rows: Sequence[Measured]) -> dict[str, str]:
        found = newest(rows, self.name).items()
        lines = ([name, f"{median(one.row['samples']):.4g} {one.row['unit']}"] for name, one in found)
        return {self.name: markdown(("what", "measured"), lines)}


ROOFLINE = Roofline(name="roofline", about="what the device can do at all", label="roofline", seconds=60)


def ceilings(job: Job) -> Iterator[Row]:
    """A row for each kernel: what, unit and the rates. On a CPU everything is small and means nothing."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from bench.subject import device_seconds

    rows: list[Row] = []

    def rate(what: str, unit: str, work: float, call: Callable[[], Any]) -> None:
        for _ in range(3):
            call()
        rows.append({"what": what, "unit": unit, "samples": [work / device_seconds(call) for _ in range(REPEATS)]})

    cuda = torch.cuda.is_available()
    device, shrink = ("cuda", 1) if cuda else ("cpu", 32)
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    for name, shape in MATMULS.items():
        m, inner, outer = (size // shrink for size in shape)
        x, w, teraflop = make(m, inner), make(outer, inner), 2 * m * inner * outer / 1e12
        rate(f"bf16 matmul, {name}", "TFLOP/s", teraflop, partial(torch.matmul, x, w.T))
        if cuda and torch.cuda.get_device_capability() >= (8, 9):
            x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn).T
            scales = torch.ones(m, 1, device=device), torch.ones(1, outer, device=device)
            call = partial(torch._scaled_mm, x8, w8, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
            rate(f"fp8 rowwise matmul, {name}", "TFLOP/s", teraflop, call)
    for name, heads in ATTENTION.items() if cuda else ():
        q, k, v = (make(1, heads, TOKENS, HEAD) for _ in range(3))
        work, call = 4 * TOKENS**2 * heads * HEAD / 1e12, partial(scaled_dot_product_attention, q, k, v)
        for kernel, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            with sdpa_kernel(backend):
                rate(f"{kernel} attention, {name}", "TFLOP/s", work, call)
    source = torch.empty(COPIED_BYTES // shrink**2, dtype=torch.uint8, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    rate("device copy, read and written", "GB/s", 2 * source.numel() / 1e9, copy)
    yield {"ceilings": rows}
