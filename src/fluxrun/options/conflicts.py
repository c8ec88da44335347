"""Options that cannot stand beside each other: one table of A, B, why, and what is done about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fluxrun.options.attention import AttentionOption
from fluxrun.options.base import O, Option
from fluxrun.options.cache import CacheOption
from fluxrun.options.compile import CompileOption, Target
from fluxrun.options.groups import TABLE
from fluxrun.options.kernels import KernelsOption
from fluxrun.options.lora import LoraOption
from fluxrun.options.memory import MemoryOption
from fluxrun.options.model import Flux2Model
from fluxrun.options.parallel import ParallelOption
from fluxrun.options.quantization import QuantizationOption
from fluxrun.options.scheduler import SchedulerOption
from fluxrun.options.vae import VaeOption

Options = Mapping[str, Option]


@dataclass(frozen=True)
class Side:
    """One side of a conflict: a group, and whether its option is meant."""

    group: str
    holds: Callable[[Option], bool]

    def __call__(self, options: Options) -> bool:
        return self.holds(options[self.group])


def when(base: type[O], test: Callable[[O], bool]) -> Side:
    """The side of the group that ``base`` is the base class of."""
    group = next(row.name for row in TABLE if row.base is base)
    return Side(group, lambda option: isinstance(option, base) and test(option))


def named(base: type[O], name: str) -> Side:
    """The side that one option, by its name, is on."""
    return when(base, lambda option: option.name == name)


def _for(target: Target, test: Callable[[CompileOption], bool]) -> Side:
    return when(CompileOption, lambda option: test(option) and target in option.targets)


def _compiles_and_records(option: CompileOption) -> bool:
    """Whether a compiled forward is to be recorded as a CUDA graph."""
    return option.compiles and option.cuda_graph


def _only_records(option: CompileOption) -> bool:
    """Whether a forward is recorded as it is."""
    return option.active and not option.compiles and option.cuda_graph


def _one_graph(option: CompileOption) -> bool:
    return option.compiles and option.scope != "blocks" and option.fullgraph


FUSED = when(KernelsOption, lambda option: option.fused)
NOT_FUSED = when(KernelsOption, lambda option: not option.fused)
FP8_ATTENTION = when(AttentionOption, lambda option: option.in_fp8)
FAST_VAE = named(VaeOption, "fast")
STEP_CACHE = when(CacheOption, lambda option: option.skips_steps)
OFFLOADING = when(MemoryOption, lambda option: option.offloads)
MOVING_WEIGHTS = when(MemoryOption, lambda option: option.offloads and not option.swaps_blocks)
KLEIN_KV = when(Flux2Model, lambda option: option.pipeline == "klein_kv")
ADAPTED = when(LoraOption, lambda option: option.adapts)
SEVERAL = when(ParallelOption, lambda option: option.engine is not None)
TOKENS_SHARED = when(ParallelOption, lambda option: option.splits_tokens)
WEIGHTS_SHARED = when(ParallelOption, lambda option: option.splits_weights)
CUDAGRAPHS = when(CompileOption, lambda option: option.cudagraphs)

KV_GROWS = "model.pipeline=klein_kv hands keys and values on from the first step to the others: no two are one graph"
CACHE_DECIDES = "a CUDA graph of the transformer replays every block, a step cache decides which ones run"


@dataclass(frozen=True)
class Conflict:
    """When side ``a`` holds and ``b`` holds, ``group`` takes ``instead`` (None: it is only said)."""

    a: Side
    b: Side
    why: str
    group: str | None = None
    instead: str | None = None
    drop: tuple[str, ...] = ()
    """Knobs of the replaced option that are not handed on."""
    unless: Side | None = None
    """A third option that settles it."""
    target: Target | None = None
    """The only one of ``compile.targets`` that the conflict is about: for its other ones the option stays."""

    def holds(self, options: Options) -> bool:
        """Whether both sides are chosen, and nothing settles it."""
        settled = self.unless is not None and self.unless(options)
        return not settled and self.a(options) and self.b(options)

    def narrowed(self, option: Option) -> Option | None:
        """The option for its other targets; None where it has none, or where the conflict is about all of it."""
        if self.target is None or not isinstance(option, CompileOption):
            return None
        others = tuple(target for target in option.targets if target != self.target)
        return option.model_copy(update={"targets": others}) if others else None


CONFLICTS = (
    Conflict(
        SEVERAL, KLEIN_KV,
        "model.pipeline=klein_kv keeps keys and values of the references, and diffusers shares out none of these",
        "parallel", "single",
    ),
    Conflict(
        SEVERAL, OFFLOADING,
        "several GPUs and weights that are moved between the steps: diffusers refuses it for tensor (both decide where "
        "a weight lies), and each process would keep all of them in the computer's memory",
        "parallel", "single",
    ),
    Conflict(
        WEIGHTS_SHARED, when(QuantizationOption, lambda option: option.quantizes or option.inherent),
        "diffusers' tensor parallelism does not split up quantized weights (parallel=ulysses leaves them whole)",
        "parallel", "single",
    ),
    Conflict(
        WEIGHTS_SHARED, ADAPTED,
        "diffusers' tensor parallelism does not split up LoRA layers (parallel=ulysses leaves them whole)",
        "parallel", "single",
    ),
    Conflict(
        FUSED, WEIGHTS_SHARED,
        "the fused kernels read a layer's weights as one tensor, and parallel=tensor makes shares of it (DTensor)",
        "kernels", "diffusers",
    ),
    Conflict(
        FP8_ATTENTION, when(ParallelOption, lambda option: option.needs_lse),
        "cuDNN's float8 attention does not return the log-sum-exp, by which parallel=ring adds up what each GPU has "
        "attended to",
        "attention", "cudnn",
    ),
    Conflict(
        when(AttentionOption, lambda option: option.takes_shares and not option.returns_lse),
        when(ParallelOption, lambda option: option.needs_lse),
        "this kernel does not return the log-sum-exp, by which parallel=ring adds up what each GPU has attended to",
        "attention", "cudnn",
    ),
    Conflict(
        when(AttentionOption, lambda option: not option.takes_shares and not option.in_fp8), TOKENS_SHARED,
        "diffusers has no way to share out this attention kernel's tokens (attention=sdpa, cudnn, flash or sage)",
        "parallel", "single",
    ),
    Conflict(
        when(CacheOption, lambda option: option.skips_steps and option.decides), SEVERAL,
        "each process would decide by its own share of the tokens whether to skip a step, and wait for the others "
        "where they decide otherwise (cache=fixed and magcache skip the same steps everywhere)",
        "cache", "none",
    ),
    Conflict(
        when(SchedulerOption, lambda option: option.solver != "euler"),
        when(Flux2Model, lambda option: option.pipeline == "klein_inpaint"),
        "model.pipeline=klein_inpaint puts the picture back after every step, with as much noise as Euler has there",
        "scheduler", "euler",
    ),
    Conflict(
        FUSED, KLEIN_KV,
        "the fused blocks do not keep the references' keys and values for model.pipeline=klein_kv",
        "kernels", "diffusers",
    ),
    Conflict(
        STEP_CACHE, KLEIN_KV,
        "model.pipeline=klein_kv has the references in its first step only; a step cache would compare it with others",
        "cache", "none",
    ),
    Conflict(
        _for("transformer", _only_records), KLEIN_KV, KV_GROWS,
        "compile", "none", ("cuda_graph",), target="transformer",
    ),
    Conflict(
        _for("transformer", _compiles_and_records), KLEIN_KV, KV_GROWS,
        "compile", "regional", ("cuda_graph",),
    ),
    Conflict(
        _for("transformer", lambda option: option.cudagraphs), KLEIN_KV,
        "a CUDA graph's next replay would overwrite the keys and values that model.pipeline=klein_kv keeps",
        "compile", "max_autotune_no_cudagraphs", ("mode",),
    ),
    Conflict(
        FUSED, MOVING_WEIGHTS,
        "the fused kernels read the weights where they found them, and offloading moves them (memory=block_swap "
        "changes what lies there instead)",
        "kernels", "diffusers",
    ),
    Conflict(
        FUSED, when(QuantizationOption, lambda option: not option.fusable),
        "the fused kernels read plain weights or float8 ones with a scale per row (quantization=fp8)",
        "kernels", "diffusers",
    ),
    Conflict(
        FUSED, ADAPTED,
        "the fused kernels multiply by the weights alone, and LoRA files stand beside them",
        "kernels", "diffusers",
    ),
    Conflict(
        named(QuantizationOption, "gguf"), when(MemoryOption, lambda option: option.swaps_blocks),
        "block swap lays the weights out anew and loses the format that a .gguf file has for each",
        "memory", "group", ("blocks_to_swap",),
    ),
    Conflict(
        FUSED, _for("transformer", lambda option: option.compiles),
        "kernels=fused leaves the compiler nothing to fuse in the transformer",
        "compile", "cudagraphs", ("mode", "scope", "fullgraph", "dynamic", "inductor_options", "cuda_graph"),
    ),
    Conflict(
        FP8_ATTENTION, NOT_FUSED,
        "its inputs are written by the fused kernels (kernels=fused)",
        "attention", "sdpa",
    ),
    Conflict(
        FAST_VAE, _for("vae_decoder", lambda option: option.compiles),
        "leaves the compiler nothing to fuse in the decoder (take vae_decoder out of compile.targets)",
        "vae", "full",
    ),
    Conflict(
        named(QuantizationOption, "gguf"), named(MemoryOption, "sequential"),
        "sequential offload makes parameters anew, and a .gguf file's cannot be (diffusers 0.42.1: KeyError)",
        "memory", "group",
    ),
    Conflict(
        FAST_VAE, named(MemoryOption, "sequential"),
        "sequential offload moves layer by layer, and these are not diffusers' layers",
        "vae", "full",
    ),
    *(
        Conflict(
            when(CompileOption, recorded), OFFLOADING,
            "CUDA graphs need weights that stay where they are, offloading moves them",
            "compile", instead, ("cuda_graph",),
        )
        for recorded, instead in ((_only_records, "none"), (_compiles_and_records, "regional"))
    ),
    Conflict(
        _for("transformer", _only_records), STEP_CACHE, CACHE_DECIDES,
        "compile", "none", ("cuda_graph",), target="transformer",
    ),
    # Where something compiles, the transformer stays a target: out of the targets it would not be compiled either.
    Conflict(
        _for("transformer", _compiles_and_records), STEP_CACHE, CACHE_DECIDES,
        "compile", "regional", ("cuda_graph",),
    ),
    Conflict(
        CUDAGRAPHS, when(CompileOption, lambda option: option.scope == "blocks"),
        "CUDA graphs do not go with regional compile: one block's output is overwritten by the next (pytorch#148439)",
        "compile", "max_autotune_no_cudagraphs", ("mode",),
    ),
    Conflict(
        CUDAGRAPHS, OFFLOADING,
        "CUDA graphs need weights that stay where they are, offloading moves them",
        "compile", "max_autotune_no_cudagraphs", ("mode",),
    ),
    Conflict(
        CUDAGRAPHS, when(Flux2Model, lambda model: model.classifier_free),
        "with classifier-free guidance the second call of a step overwrites the first one's output in a CUDA graph",
        "compile", "max_autotune_no_cudagraphs", ("mode",),
    ),
    Conflict(
        when(CompileOption, lambda option: option.active), when(MemoryOption, lambda option: option.moves_per_layer),
        "the weights move inside the compiled region: a graph break per layer or block (memory=balanced moves them "
        "outside of it)",
        "compile", "none",
    ),
    Conflict(
        STEP_CACHE, _for("transformer", lambda option: option.cudagraphs),
        "CUDA graphs do not go with a step cache: it keeps outputs that the next call overwrites (pytorch#148439)",
        "compile", "regional", ("mode", "scope"),
    ),
    Conflict(
        STEP_CACHE, _for("transformer", _one_graph),
        "a step cache decides between the blocks, so the transformer is no single graph (compile.fullgraph=false runs "
        "with nine graph breaks, blocks one by one with none)",
        "compile", "regional", ("mode", "scope"),
    ),
    Conflict(
        STEP_CACHE, when(SchedulerOption, lambda option: option.calls_twice),
        "a step cache counts a call of the transformer for each step, this scheduler makes two",
        "cache", "none",
    ),
    Conflict(
        STEP_CACHE, when(MemoryOption, lambda option: option.prefetches),
        "group offload with use_stream fetches layers in the order of the first step, which a skipped step does not "
        "follow (memory.use_stream=false keeps both)",
        "cache", "none",
    ),
    Conflict(
        when(QuantizationOption, lambda option: option.dynamic),
        when(CompileOption, lambda option: not option.compiles),
        "dynamic quantization without compile is slower than no quantization (diffusers-torchao: 130 s against 6.6 s); "
        "add kernels=fused or compile=regional",
        unless=FUSED,
    ),
    Conflict(
        named(AttentionOption, "flex"), named(CompileOption, "none"),
        "FlexAttention is slow without compile; add compile=regional",
    ),
)  # fmt: skip


def find_conflicts(options: Options) -> list[Conflict]:
    """The rows of the table that hold for these options."""
    return [conflict for conflict in CONFLICTS if conflict.holds(options)]
