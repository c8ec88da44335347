"""Options that cannot stand beside each other: one table of A, B, why, and what is done about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fluxrun.config import Option

Options = Mapping[str, Option]


def _cudagraphs(option: Option) -> bool:
    return bool(getattr(option, "cudagraphs", False)) and option.name != "none"


def _offloads(option: Option) -> bool:
    return bool(getattr(option, "offloads", False))


def _moves_weights(option: Option) -> bool:
    return _offloads(option) and not getattr(option, "swaps_blocks", False)


def _classifier_free(option: Option) -> bool:
    return getattr(option, "pipeline", None) == "klein" and getattr(option, "distilled", True) is False


def _blocks(option: Option) -> bool:
    return getattr(option, "scope", None) == "blocks"


def _compiles_and_records(option: Option) -> bool:
    """Whether a compiled forward is to be recorded as a CUDA graph."""
    return _compiles_anything(option) and bool(getattr(option, "cuda_graph", False))


def _only_records(option: Option) -> bool:
    """Whether a forward is recorded as it is."""
    return not _compiles_anything(option) and option.name != "none" and bool(getattr(option, "cuda_graph", False))


def _compiles_anything(option: Option) -> bool:
    return bool(getattr(option, "compiles", False))


def _with_target(target: str, test: Callable[[Option], bool]) -> Callable[[Option], bool]:
    return lambda option: test(option) and target in getattr(option, "targets", ())


def _compiles(target: str) -> Callable[[Option], bool]:
    return _with_target(target, _compiles_anything)


def _caches_steps(option: Option) -> bool:
    return option.name != "none"


def _one_graph(option: Option) -> bool:
    return option.name != "none" and not _blocks(option) and bool(getattr(option, "fullgraph", False))


def _prefetches(option: Option) -> bool:
    return option.name == "group" and bool(getattr(option, "use_stream", False))


def _named(*names: str) -> Callable[[Option], bool]:
    return lambda option: option.name in names


@dataclass(frozen=True)
class Conflict:
    """When option ``a`` holds and ``b`` holds, ``group`` takes ``instead`` (None: it is only said)."""

    a: tuple[str, Callable[[Option], bool]]
    b: tuple[str, Callable[[Option], bool]]
    why: str
    group: str | None = None
    instead: str | None = None
    drop: tuple[str, ...] = ()
    """Knobs of the replaced option that are not handed on."""
    unless: tuple[str, Callable[[Option], bool]] | None = None
    """A third option that settles it."""
    target: str | None = None
    """The only one of the option's targets that the conflict is about: for its other ones the option stays."""

    def holds(self, options: Options) -> bool:
        """Whether both sides are chosen, and nothing settles it."""
        settled = self.unless is not None and self.unless[1](options[self.unless[0]])
        return not settled and all(test(options[group]) for group, test in (self.a, self.b))

    def narrowed(self, option: Option) -> Option | None:
        """The option for its other targets; None where it has none, or where the conflict is about all of it."""
        others = tuple(target for target in getattr(option, "targets", ()) if target != self.target)
        return option.model_copy(update={"targets": others}) if self.target and others else None


CONFLICTS = (
    Conflict(
        ("kernels", _named("fused")), ("memory", _moves_weights),
        "the fused kernels read the weights where they found them, and offloading moves them (memory=block_swap "
        "changes what lies there instead)",
        "kernels", "diffusers",
    ),
    Conflict(
        ("kernels", _named("fused")), ("compile", _compiles("transformer")),
        "kernels=fused leaves the compiler nothing to fuse in the transformer",
        "compile", "cudagraphs", ("mode", "scope", "fullgraph", "dynamic", "inductor_options", "cuda_graph"),
    ),
    Conflict(
        ("attention", _named("fp8")), ("kernels", lambda o: o.name != "fused"),
        "its inputs are written by the fused kernels (kernels=fused)",
        "attention", "sdpa",
    ),
    Conflict(
        ("vae", _named("fast")), ("compile", _compiles("vae_decoder")),
        "leaves the compiler nothing to fuse in the decoder (take vae_decoder out of compile.targets)",
        "vae", "full",
    ),
    Conflict(
        ("vae", _named("fast")), ("memory", _named("sequential")),
        "sequential offload moves layer by layer, and these are not diffusers' layers",
        "vae", "full",
    ),
    *(
        Conflict(
            ("compile", recorded), ("memory", _offloads),
            "CUDA graphs need weights that stay where they are, offloading moves them",
            "compile", instead, ("cuda_graph",),
        )
        for recorded, instead in ((_only_records, "none"), (_compiles_and_records, "regional"))
    ),
    *(
        Conflict(
            ("compile", _with_target("transformer", recorded)), ("cache", _caches_steps),
            "a CUDA graph of the transformer replays every block, a step cache decides which ones run",
            "compile", instead, ("cuda_graph",), target=target,
        )
        # Where something compiles, the transformer stays a target: out of the targets it would not be compiled either.
        for recorded, instead, target in (
            (_only_records, "none", "transformer"), (_compiles_and_records, "regional", None),
        )
    ),
    Conflict(
        ("compile", _cudagraphs), ("compile", _blocks),
        "CUDA graphs do not go with regional compile: one block's output is overwritten by the next (pytorch#148439)",
        "compile", "max_autotune_no_cudagraphs", ("mode",),
    ),
    Conflict(
        ("compile", _cudagraphs), ("memory", _offloads),
        "CUDA graphs need weights that stay where they are, offloading moves them",
        "compile", "max_autotune_no_cudagraphs", ("mode",),
    ),
    Conflict(
        ("compile", _cudagraphs), ("model", _classifier_free),
        "with classifier-free guidance the second call of a step overwrites the first one's output in a CUDA graph",
        "compile", "max_autotune_no_cudagraphs", ("mode",),
    ),
    Conflict(
        ("compile", lambda o: o.name != "none"), ("memory", _named("block_swap", "group", "sequential")),
        "the weights move inside the compiled region: a graph break per layer or block (memory=balanced moves them "
        "outside of it)",
        "compile", "none",
    ),
    Conflict(
        ("cache", _caches_steps), ("compile", _with_target("transformer", _cudagraphs)),
        "CUDA graphs do not go with a step cache: it keeps outputs that the next call overwrites (pytorch#148439)",
        "compile", "regional", ("mode", "scope"),
    ),
    Conflict(
        ("cache", _caches_steps), ("compile", _with_target("transformer", _one_graph)),
        "a step cache decides between the blocks, so the transformer is no single graph (compile.fullgraph=false runs "
        "with nine graph breaks, blocks one by one with none)",
        "compile", "regional", ("mode", "scope"),
    ),
    Conflict(
        ("cache", _caches_steps), ("memory", _prefetches),
        "group offload with use_stream fetches layers in the order of the first step, which a skipped step does not "
        "follow (memory.use_stream=false keeps both)",
        "cache", "none",
    ),
    Conflict(
        ("quantization", lambda o: o.name != "none"), ("compile", lambda o: not _compiles_anything(o)),
        "dynamic quantization without compile is slower than no quantization (diffusers-torchao: 130 s against 6.6 s); "
        "add kernels=fused or compile=regional",
        unless=("kernels", _named("fused")),
    ),
    Conflict(
        ("attention", _named("flex")), ("compile", _named("none")),
        "FlexAttention is slow without compile; add compile=regional",
    ),
)  # fmt: skip


def find_conflicts(options: Options) -> list[Conflict]:
    """The rows of the table that hold for these options."""
    return [conflict for conflict in CONFLICTS if conflict.holds(options)]
