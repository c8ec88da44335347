"""The table of option groups: a new group is a field of RunConfig and a row here.

Rows stand in the order in which a traceback is searched for a culprit: compiled code shows up in everybody's, so
``compile`` comes last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fluxrun.options.attention import AttentionOption
from fluxrun.options.base import Option
from fluxrun.options.cache import CacheOption
from fluxrun.options.compile import CompileOption
from fluxrun.options.kernels import KernelsOption
from fluxrun.options.lora import LoraOption
from fluxrun.options.memory import MemoryOption
from fluxrun.options.model import Flux2Model
from fluxrun.options.parallel import ParallelOption
from fluxrun.options.quantization import QuantizationOption
from fluxrun.options.quantization_file import SingleFile  # noqa: F401 - with it the group has its options
from fluxrun.options.scheduler import SchedulerOption
from fluxrun.options.vae import VaeOption


@dataclass(frozen=True)
class Group:
    """One option group; a rank of None leaves it out of that order."""

    name: str
    base: type[Option]
    """What every option of the group is: it says what may be asked of them."""
    apply_rank: int | None
    """When it touches the pipeline: compile last, so that it captures what the others did."""
    blame_rank: int | None
    """When it is suspected, if a first call fails and the error does not say whose failure it was."""
    search_rank: int | None
    """When ``fluxrun tune`` searches it; None: it stays as it was asked for."""
    loads_weights: bool = False
    """Whether another option of it means that other weights, or the same ones elsewhere, are loaded."""
    marks: tuple[str, ...] = ()
    """Parts of file names and error types in a traceback that show its code at work."""


TABLE = (
    Group("model", Flux2Model, None, None, None, loads_weights=True),
    Group("memory", MemoryOption, 3, None, None, loads_weights=True),
    # After attention, whose kernel it looks at, and before what wraps the transformer's forward.
    Group(
        "parallel", ParallelOption, 8, 8, None, loads_weights=True,
        marks=("diffusers/hooks/context_parallel", "diffusers/hooks/tensor_parallel", "torch/distributed/"),
    ),
    Group("kernels", KernelsOption, 6, 3, 1, marks=("fluxrun/kernels/transformer/", "fluxrun/kernels/text_encoder/")),
    Group("vae", VaeOption, 7, 6, 4, marks=("fluxrun/kernels/vae/", "autoencoder")),
    Group(
        "attention", AttentionOption, 5, 4, 2,
        marks=("attention_dispatch", "xformers", "flash_attn", "sageattention", "flex_attention"),
    ),
    Group(
        "quantization", QuantizationOption, 1, 5, 5, loads_weights=True,
        marks=("torchao", "sdnq", "bitsandbytes", "gguf"),
    ),
    # Before memory, which then places the adapters with the weights. Never suspected: what it draws is asked for.
    Group("lora", LoraOption, 2, None, None),
    Group("scheduler", SchedulerOption, 4, 7, None, marks=("diffusers/schedulers/", "flow_schedulers")),
    Group("cache", CacheOption, 9, 2, 6, marks=("cache_dit",)),
    Group(
        "compile", CompileOption, 10, 1, 3,
        marks=("torch/_inductor", "torch/_dynamo", "torch/_functorch", "triton"),
    ),
)  # fmt: skip


def by_rank(rank: Callable[[Group], int | None]) -> tuple[str, ...]:
    """The names of the groups that have this rank, in its order."""
    ranked = [(number, group.name) for group in TABLE if (number := rank(group)) is not None]
    return tuple(name for _, name in sorted(ranked))


APPLY_ORDER = by_rank(lambda group: group.apply_rank)
BLAME_ORDER = by_rank(lambda group: group.blame_rank)
SEARCH_ORDER = by_rank(lambda group: group.search_rank)
ROWS = {group.name: group for group in TABLE}
