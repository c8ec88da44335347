"""The ``compile`` group: torch.compile of the transformer (blocks or whole), VAE decoder and text encoder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from fluxrun.hardware.machine import Machine
from fluxrun.options.base import COMPILER, NOTHING_MORE, Context, Facts, Option
from fluxrun.trust import Closed, Open
from fluxrun.types import Pipeline

if TYPE_CHECKING:
    from fluxrun.compilation.compiler import CountingBackend

AUTOTUNE = ("max_autotune", "max_autotune_gemm", "max_autotune_pointwise", "coordinate_descent_tuning")
"""Inductor settings that time many kernels for each operation."""

log = logging.getLogger("fluxrun.compile")

GAVE_UP = (
    "torch stopped compiling a part of the model after too many recompilations and runs it eagerly "
    "(compile.dynamic=true compiles once for all sizes)"
)

Target = Literal["transformer", "vae_decoder", "text_encoder"]


class CompileOption(Option):
    """The knobs all compile options share, so that a preset's survive when the option is swapped."""

    active: ClassVar[bool] = True
    """Whether a forward is compiled or recorded at all."""

    compiles: ClassVar[bool] = False
    """Whether torch.compile takes part."""

    mode: Open[Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None] = None
    """torch.compile's mode."""

    scope: Open[Literal["blocks", "full"]] = "blocks"
    """``blocks`` compiles the transformer's repeated blocks, ``full`` all of it in one graph."""

    fullgraph: Open[bool] = True
    """A graph break is an error (and then a fallback) instead of silently slow."""

    dynamic: Open[bool | None] = None
    """True: one graph for all sizes; None: torch decides after the second size."""

    targets: Open[tuple[Target, ...]] = Field(("transformer",), min_length=1)
    """What is compiled."""

    inductor_options: Annotated[dict[str, Any], Closed("inductor's options can name programs that it runs")] = Field(
        default_factory=dict
    )
    """Inductor config patches, by torch._inductor.config name."""

    match_eager: Open[bool] = True
    """Round to bf16 where eager does (inductor's emulate_precision_casts): the picture stays the same."""

    cuda_graph: Open[bool] = False
    """Record the whole forward of each target as one CUDA graph and replay it: no gaps between kernels."""

    cache_dir: Annotated[Path | None, Closed("compiled kernels that lie in a cache folder are run")] = None
    """Folder for compiled kernels; None is fluxrun's cache folder."""

    cache_artifacts: Annotated[Path | None, Closed("compiled code that lies in the file is run")] = None
    """File of compiled code to share between machines, the compiler's and, with ``kernels.compile_ahead``, the Triton
    kernels of ``kernels=fused`` and ``vae=fast``: used when it is there, written when something was compiled."""

    @property
    def libraries(self) -> frozenset[str] | None:
        return frozenset({COMPILER}) if self.compiles else NOTHING_MORE

    @property
    def cudagraphs(self) -> bool:
        """Whether the compiler's mode records CUDA graphs."""
        return self.compiles and self.mode in ("reduce-overhead", "max-autotune")

    @property
    def autotunes(self) -> bool:
        """Whether the compiler is told to time many kernels for each operation."""
        asked = any(self.inductor_options.get(name) for name in AUTOTUNE)
        return self.compiles and (asked or bool(self.mode and self.mode.startswith("max-autotune")))


class NoCompile(CompileOption):
    """Eager mode."""

    active: ClassVar[bool] = False

    def unused_knobs(self) -> list[str]:
        return self.changed_knobs("cache_artifacts")


class CudaGraphs(CompileOption):
    """No compiler: each target's forward runs once as it is, is then recorded as a CUDA graph, and replayed."""

    cuda_graph: Open[bool] = True
    """Always on here."""

    def requires(self, machine: Machine) -> str | None:
        return machine.needs_cuda()

    def unused_knobs(self) -> list[str]:
        return self.changed_knobs("targets", "cache_artifacts")

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """Wrap the targets' forward; the second call of a shape records it."""
        return {"cuda_graphs_of": context.graphs.wrap(pipeline, self.targets)}

    def observe(self, pipeline: Pipeline, context: Context) -> Facts:
        """Graphs recorded and replayed."""
        return context.graphs.counted()


class Compile(CompileOption):
    """torch.compile, in place, so that hooks and offloading keep working."""

    compiles: ClassVar[bool] = True

    def requires(self, machine: Machine) -> str | None:
        if self.cuda_graph and (reason := machine.needs_cuda()):
            return f"compile.cuda_graph {reason}"
        if machine.accelerated:
            return None if "triton" in machine.packages else "triton is not installed; inductor needs it on a GPU"
        if machine.cxx_compiler is None:
            return "no C++ compiler found (g++, clang++ or $CXX); inductor needs one on a CPU"
        return None

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """Mark the regions to compile; the first call compiles them. Facts: ``regions`` by target."""
        context.compiler.use_cache(self.cache_dir)
        if self.cache_artifacts and (note := context.compiler.share(self.cache_artifacts, context.machine)):
            log.warning("%s", note)
            context.note(note)
        backend = context.compiler.backend(self.mode, self._options())
        regions = {target: self._compile(pipeline, target, backend) for target in self.targets}
        if not sum(regions.values()):
            raise RuntimeError(f"nothing to compile in {', '.join(self.targets)}")
        graphs = {"cuda_graphs_of": context.graphs.wrap(pipeline, self.targets)} if self.cuda_graph else {}
        return {"regions": regions, "scope": self.scope, "mode": self.mode or "default", **graphs}

    def observe(self, pipeline: Pipeline, context: Context) -> Facts:
        """Dynamo's own counters since the option was applied, and how many graphs ran compiled per forward call."""
        counts = context.compiler.counted()
        if counts["recompile_limit_hits"]:
            context.note(GAVE_UP)
        steps = context.counters["steps"]
        return {
            **counts,
            **context.compiler.shared(),
            **(context.graphs.counted() if self.cuda_graph else {}),
            "graphs_run_per_step": round(counts["graph_calls"] / steps, 2) if steps else 0,
        }

    def _options(self) -> dict[str, Any]:
        emulate = {"emulate_precision_casts": True} if self.match_eager else {}
        return {**emulate, **self.inductor_options}

    def _compile(self, pipeline: Pipeline, target: Target, backend: CountingBackend) -> int:
        kwargs = {"backend": backend, "dynamic": self.dynamic, "fullgraph": self.fullgraph}
        if target == "vae_decoder":
            pipeline.vae.decoder.compile(**kwargs)
            return 1
        if target == "text_encoder":
            if pipeline.text_encoder is None:
                return 0
            # Its forward collects hidden states in Python: a break there costs little and is no reason to give up.
            pipeline.text_encoder.compile(**{**kwargs, "fullgraph": False})
            return 1
        if self.scope == "full":
            pipeline.transformer.compile(**kwargs)
            return 1
        pipeline.transformer.compile_repeated_blocks(**kwargs)
        return sum(module._compiled_call_impl is not None for module in pipeline.transformer.modules())


def autotune_note(option: CompileOption) -> str | None:
    """What is said, before it is paid, about the cost of autotuning."""
    if not option.autotunes:
        return None
    return (
        f"compile={option.name}: expect minutes before the first image: many kernels are timed for every matmul "
        "(H100: dev not done after 200 s, and cuBLAS won every large one; compile=regional takes 4-19 s)"
    )


def expected_wait(option: CompileOption, machine: Machine) -> str:
    """The wait with nothing cached, as it was measured (H100 at real size; two CPU cores with model=shapes)."""
    if option.autotunes:
        return "minutes"
    if not machine.accelerated:
        return "about 10-25 s"
    wait = "about 4-19 s" if option.scope == "blocks" else "about 10-40 s"
    return f"{wait}, and 10 s for the decoder" if "vae_decoder" in option.targets else wait
