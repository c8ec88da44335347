"""The ``kernels`` group: who computes what lies between the matmuls of the transformer's blocks."""

from __future__ import annotations

from typing import ClassVar

from fluxrun.hardware.machine import Machine
from fluxrun.options.attention import AttentionOption
from fluxrun.options.base import NOTHING_MORE, Context, Facts, Option, Workload
from fluxrun.options.memory import MemoryOption
from fluxrun.types import Pipeline


class KernelsOption(Option):
    """What is asked of every kernels option."""

    fused: ClassVar[bool] = False
    """Whether kernels of our own stand between the matmuls: they read the weights where they found them."""

    joins_projections: ClassVar[bool] = False
    """Whether a copy is kept of projections over the same input, side by side: the memory estimate counts it."""

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE


class DiffusersKernels(KernelsOption):
    """diffusers' own blocks: one kernel for each operation, or what torch.compile makes of them."""


class FusedKernels(KernelsOption):
    """Triton kernels for norm and modulation, query-key norm and rotary, SwiGLU and concatenation.

    They round where diffusers' eager code rounds. With ``quantization=fp8`` they also write the float8 rows that the
    next matmul reads, so that quantizing costs no pass of its own.
    """

    fused: ClassVar[bool] = True
    joins_projections: ClassVar[bool] = True

    def requires(self, machine: Machine) -> str | None:
        if reason := machine.needs_cuda((8, 0)):
            return reason
        return None if "triton" in machine.packages else "triton is not installed; it comes with torch's CUDA builds"

    def inapplicable(self, workload: Workload) -> str | None:
        return "the fused kernels do not clip as diffusers does in float16" if workload.dtype == "float16" else None

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """Give every block its fused forward. Facts: how many blocks of each kind."""
        from fluxrun.kernels.transformer import triton_ops
        from fluxrun.kernels.transformer.blocks import fuse

        return dict(
            fuse(
                pipeline.transformer, triton_ops, context.counters,
                fp8_attention=context.option(AttentionOption, "attention").in_fp8,
                in_place=context.option(MemoryOption, "memory").swaps_blocks,
            )
        )  # fmt: skip

    def observe(self, pipeline: Pipeline, context: Context) -> Facts:
        """Calls of fused blocks from Python; the replays of a CUDA graph are the ``compile`` group's to count."""
        return {"fused_block_calls": context.counters["fused_block_calls"]}
