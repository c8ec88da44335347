"""The ``kernels`` group: who computes what lies between the matmuls of the transformer's blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from fluxrun.config import Facts, Option
from fluxrun.machine import Machine

if TYPE_CHECKING:
    from fluxrun.context import Context
    from fluxrun.plan import Plan


class DiffusersKernels(Option):
    """diffusers' own blocks: one kernel for each operation, or what torch.compile makes of them."""


class FusedKernels(Option):
    """Triton kernels for norm and modulation, query-key norm and rotary, SwiGLU and concatenation.

    They round where diffusers' eager code rounds. With ``quantization=fp8`` they also write the float8 rows that the
    next matmul reads, so that quantizing costs no pass of its own.
    """

    joins_projections: ClassVar[bool] = True
    """Keeps a copy of projections over the same input, side by side: the memory estimate counts it."""

    def requires(self, machine: Machine) -> str | None:
        if reason := machine.needs_cuda((8, 0)):
            return reason
        return None if "triton" in machine.packages else "triton is not installed; it comes with torch's CUDA builds"

    def inapplicable(self, plan: Plan) -> str | None:
        return "the fused kernels do not clip as diffusers does in float16" if plan.dtype == "float16" else None

    def apply(self, pipeline: Any, context: Context) -> Facts:
        """Give every block its fused forward. Facts: how many blocks of each kind."""
        from fluxrun.kernels import triton_ops
        from fluxrun.kernels.blocks import fuse

        return dict(
            fuse(
                pipeline.transformer, triton_ops, context.counters,
                fp8_attention=getattr(context.options["attention"], "in_fp8", False),
                in_place=getattr(context.options["memory"], "swaps_blocks", False),
            )
        )  # fmt: skip

    def observe(self, pipeline: Any, context: Context) -> Facts:
        """Calls of fused blocks from Python; the replays of a CUDA graph are the ``compile`` group's to count."""
        return {"fused_block_calls": context.counters["fused_block_calls"]}
