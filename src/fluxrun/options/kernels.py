"""The ``kernels`` group: who computes what lies between the matmuls of the transformer's blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fluxrun.errors import one_line
from fluxrun.hardware.kept import Kept
from fluxrun.hardware.machine import Machine
from fluxrun.options.attention import AttentionOption
from fluxrun.options.base import NOTHING_MORE, Context, Facts, Option, Workload
from fluxrun.options.cache import CacheOption
from fluxrun.options.compile import CompileOption
from fluxrun.options.memory import MemoryOption
from fluxrun.options.model import Flux2Model
from fluxrun.trust import Open
from fluxrun.types import Pipeline

if TYPE_CHECKING:
    from fluxrun.kernels.transformer.matmul_choice import Matmuls

UNTESTED = "torch's own matmuls are used: cublasLt's choice is not tested beside a step cache"


class KernelsOption(Option):
    """What is asked of every kernels option."""

    fused: ClassVar[bool] = False
    """Whether kernels of our own stand between the matmuls: they read the weights where they found them."""

    joins_projections: ClassVar[bool] = False
    """Whether a copy is kept of projections over the same input, side by side: the memory estimate counts it."""

    matmuls: Open[Literal["torch", "fastest"]] = "torch"
    """fused: by whose choice matmuls are computed. ``fastest``: the fastest of cublasLt's algorithms that gives the
    bits of torch's own on this machine; chosen at a shape's first call, and kept in the cache folder."""

    text_encoder: Open[Literal["transformers", "fused"]] = "transformers"
    """fused: whose kernels stand between the matmuls of klein's text encoder. ``fused``: ours, those of them that give
    the bits of transformers' operations on this machine, which is tried when the pipeline is built."""

    compile_ahead: Open[bool] = True
    """fused: compile the Triton kernels of the run, ours and those of ``vae=fast``, on threads while weights load."""

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE


class DiffusersKernels(KernelsOption):
    """diffusers' own blocks: one kernel for each operation, or what torch.compile makes of them."""

    def unused_knobs(self) -> list[str]:
        return self.changed_knobs()


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

        if self.matmuls == "fastest":
            context.matmuls = _matmuls(context)
        chosen = {} if context.matmuls is None else {"multiply": context.matmuls.layer}
        blocks = fuse(
            pipeline.transformer, triton_ops, context.counters,
            fp8_attention=context.option(AttentionOption, "attention").in_fp8,
            in_place=context.option(MemoryOption, "memory").swaps_blocks,
            **chosen,
        )  # fmt: skip
        return {**blocks, **(_text_encoder(pipeline, context) if self.text_encoder == "fused" else {})}

    def observe(self, pipeline: Pipeline, context: Context) -> Facts:
        """Calls of fused blocks from Python; the replays of a CUDA graph are the ``compile`` group's to count."""
        chosen = {} if context.matmuls is None else context.matmuls.facts()
        return {"fused_block_calls": context.counters["fused_block_calls"], **chosen}


def _text_encoder(pipeline: Pipeline, context: Context) -> Facts:
    """Fuse its layers, where nothing else has a hand in them."""
    from fluxrun.kernels.text_encoder.layers import fuse

    compiling = context.option(CompileOption, "compile")
    if compiling.compiles and "text_encoder" in compiling.targets:
        return {"text_encoder_layers": 0, "text_encoder": "left to the compiler"}
    if context.option(MemoryOption, "memory").swaps_blocks:
        return {"text_encoder_layers": 0, "text_encoder": "not tried where its layers are streamed"}
    return fuse(pipeline.text_encoder, context.option(Flux2Model, "model").max_sequence_length)


def _matmuls(context: Context) -> Matmuls | None:
    """The choice among cublasLt's algorithms; None, which is said, where it is not to be made."""
    from fluxrun.kernels.transformer import cublas_lt
    from fluxrun.kernels.transformer.matmul_choice import Matmuls

    if context.option(CacheOption, "cache").skips_steps:
        context.note(UNTESTED)
        return None
    try:
        cublas = cublas_lt.version()
    except (OSError, AttributeError) as error:  # torch works with another library, or with one of another form
        context.note(f"torch's own matmuls are used: its cublasLt cannot be called ({one_line(error)})")
        return None
    machine = context.machine
    holds_for = {
        "gpu": machine.gpu.name if machine.gpu else None, "driver": machine.driver, "cublas_lt": cublas,
        "torch": machine.packages.get("torch"),
    }  # fmt: skip
    return Matmuls(Kept("matmuls", holds_for))
