"""The ``parallel`` group: one picture on several GPUs, by diffusers' own parallelism, a process for each GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from fluxrun.hardware.machine import Machine
from fluxrun.options.base import COMPILER, NOTHING_MORE, Context, Facts, Option, Workload
from fluxrun.trust import Open
from fluxrun.types import Pipeline

if TYPE_CHECKING:
    from diffusers.models._modeling_parallel import ContextParallelConfig, TensorParallelConfig

    from fluxrun.process.ranks import Ranks

Engine = Literal["ulysses", "ring", "tensor"]


class ParallelOption(Option):
    """What is asked of every option of the group."""

    engine: ClassVar[Engine | None] = None
    """By what GPUs draw a picture together; None: one GPU draws it."""

    splits_tokens: ClassVar[bool] = False
    """Whether each GPU has a share of the tokens, so that they compute attention together."""

    splits_weights: ClassVar[bool] = False
    """Whether each GPU has a share of the transformer's weights."""

    needs_lse: ClassVar[bool] = False
    """Whether attention's kernel has to say what it has summed up (the log-sum-exp)."""

    degree: Open[int | None] = Field(None, ge=2)
    """How many GPUs draw one picture; None: every one there is, or as many processes as torchrun has started."""

    timeout_minutes: Open[float] = Field(10, gt=0)
    """How long a GPU waits for the others in one operation before the run fails."""

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE if self.engine is None else frozenset({COMPILER})  # DTensor is made of its parts

    def unused_knobs(self) -> list[str]:
        return self.changed_knobs() if self.engine is None else []

    def size(self, machine: Machine) -> int:
        """How many processes draw one picture."""
        if self.engine is None:
            return 1
        return self.degree or (machine.place.size if machine.place else max(1, len(machine.gpus)))

    def tensor_config(self, ranks: Ranks) -> TensorParallelConfig | None:
        """For what the transformer's weights are to be split up while they are loaded."""
        return None


class Single(ParallelOption):
    """One GPU, or the CPU."""


class Several(ParallelOption):
    """What the options for several GPUs share."""

    def requires(self, machine: Machine) -> str | None:
        return lacks_gpus(machine, self.size(machine))

    def inapplicable(self, workload: Workload) -> str | None:
        size, heads = self.size(workload.machine), workload.heads
        if self.engine != "ring" and heads is not None and heads % size:
            return f"{heads} attention heads cannot be shared by {size} GPUs"
        if not self.splits_tokens:
            return None
        image = workload.tokens - workload.text_tokens
        parts = {"image tokens": image, "text tokens": workload.text_tokens}
        wrong = next((f"{count} {name}" for name, count in parts.items() if count % size), None)
        return None if wrong is None else f"{wrong} cannot be shared by {size} GPUs (another size, or another degree)"

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """Let this process's transformer work with the others'. Raises where it is alone, or cannot be shared."""
        ranks, size = context.ranks, self.size(context.machine)
        if ranks.size != size:
            raise RuntimeError(f"{size} processes are to draw together, this is one of {ranks.size} (see fluxrun.run)")
        heads = int(pipeline.transformer.config["num_attention_heads"])
        if self.engine != "ring" and heads % size:
            raise ValueError(f"{heads} attention heads cannot be shared by {size} GPUs")
        self._enable(pipeline, ranks)
        return {
            "engine": self.engine,
            "degree": size,
            "backend": ranks.backend,
            "tokens_per_rank": context.workload.tokens // (size if self.splits_tokens else 1),
            "heads_per_rank": heads // (1 if self.engine == "ring" else size),
        }

    def _enable(self, pipeline: Pipeline, ranks: Ranks) -> None:
        raise NotImplementedError


class TokenParallel(Several):
    """diffusers' context parallelism."""

    splits_tokens: ClassVar[bool] = True

    def _config(self, ranks: Ranks) -> ContextParallelConfig:
        from diffusers.models._modeling_parallel import ContextParallelConfig

        degrees = {"ring": 1, "ulysses": 1, str(self.engine): ranks.size}
        mesh = ranks.mesh(tuple(degrees.values()), tuple(degrees))
        arguments: dict[str, Any] = {f"{name}_degree": degree for name, degree in degrees.items()}
        return ContextParallelConfig(**arguments, mesh=mesh)

    def _enable(self, pipeline: Pipeline, ranks: Ranks) -> None:
        pipeline.transformer.enable_parallelism(config=self._config(ranks))


class Ulysses(TokenParallel):
    """Each GPU has a share of the tokens; for attention they exchange them for a share of the heads."""

    engine: ClassVar[Engine | None] = "ulysses"


class Ring(TokenParallel):
    """Each GPU has a share of the tokens; keys and values of the others come to it."""

    engine: ClassVar[Engine | None] = "ring"
    needs_lse: ClassVar[bool] = True

    def requires(self, machine: Machine) -> str | None:
        return machine.needs_cuda((8, 0)) or super().requires(machine)  # no other kernel returns the log-sum-exp


class Tensor(Several):
    """Each GPU has a share of every layer's weights in the transformer's blocks."""

    engine: ClassVar[Engine | None] = "tensor"
    splits_weights: ClassVar[bool] = True

    def tensor_config(self, ranks: Ranks) -> TensorParallelConfig | None:
        from diffusers.models._modeling_parallel import TensorParallelConfig

        if ranks.size == 1:
            return None
        return TensorParallelConfig(tp_degree=ranks.size, mesh=ranks.mesh((ranks.size,), ("tp",)))

    def _enable(self, pipeline: Pipeline, ranks: Ranks) -> None:
        """The weights were split up when they were loaded."""
        if pipeline.transformer._parallel_config is None:
            raise RuntimeError("the transformer's weights were loaded whole")


def lacks_gpus(machine: Machine, size: int) -> str | None:
    """Why so many processes cannot have a GPU each, or None."""
    if reason := machine.needs_cuda():
        return reason
    if machine.place is not None:
        started = machine.place.size
        return None if size == started else f"degree={size}, and torchrun has started {started} process(es)"
    if ":" in machine.device:
        return f"device={machine.device} is one GPU"
    if size > len(machine.gpus) or size < 2:
        return f"needs {max(size, 2)} GPUs, this machine has {len(machine.gpus)}"
    return None
