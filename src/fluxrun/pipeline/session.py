"""A session: a plan and the pipeline built from it, rebuilt from the same weights whenever an option falls back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from fluxrun.errors import Interrupted, OptionFailed, OptionUnavailable, OutOfMemory, chain, one_line
from fluxrun.options.adapters import LoraWeights
from fluxrun.options.base import Context, Facts, Option
from fluxrun.options.groups import APPLY_ORDER
from fluxrun.options.lora import Adapters
from fluxrun.pipeline.blame import AgreedFailure, Failure, blame, is_out_of_memory
from fluxrun.planning import fallbacks
from fluxrun.planning.editing import Pictures
from fluxrun.planning.plan import Plan
from fluxrun.process import spans
from fluxrun.process.console import Reporter
from fluxrun.process.device import free_memory
from fluxrun.process.ranks import RankFailed, Ranks
from fluxrun.process.signals import Interrupts
from fluxrun.process.switches import ProcessState, import_diffusers
from fluxrun.record.schema import Stage
from fluxrun.types import Pipeline
from fluxrun.weights.location import Located
from fluxrun.weights.lora_files import LoraSource

if TYPE_CHECKING:
    from fluxrun.pipeline.ahead import KernelsAhead
    from fluxrun.pipeline.guidance import BatchedGuidance
    from fluxrun.weights.store import Base, WeightStore

log = logging.getLogger("fluxrun.build")


class Session:
    """A plan and the pipeline built from it: options applied in one order, fallbacks taken where one fails.

    As a context manager it puts every process-wide switch back when it is left. Making one imports torch, diffusers
    and transformers.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        store: WeightStore | None = None,
        reporter: Reporter | None = None,
        interrupts: Interrupts | None = None,
        pictures: Pictures | None = None,
        located: Located | None = None,
        adapters: Sequence[LoraSource] = (),
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        started = time.perf_counter()
        with spans.span("import"):
            import_diffusers()
            from fluxrun.pipeline.prompt_encoder import PromptEncoder
            from fluxrun.pipeline.weights_loader import WeightsLoader
            from fluxrun.weights.loading import pipeline_class
            from fluxrun.weights.store import WeightStore

            if plan.model.pipeline is not None:
                pipeline_class(plan.model.pipeline)
        self.import_s = time.perf_counter() - started
        self.apply_s = 0.0

        self.plan = plan
        self.store = WeightStore() if store is None else store
        self.loader = WeightsLoader(plan, self.store, located)
        self.loader.adapters = adapters
        self.prompts = PromptEncoder(self.loader)
        self.reporter = reporter or Reporter()
        self.interrupts = interrupts or Interrupts()
        self.pictures = pictures or Pictures()
        self._pipeline: Pipeline | None = None
        self.context: Context | None = None
        self.guidance: BatchedGuidance | None = None
        """Where a step of classifier-free guidance is one call of the transformer."""
        self.whole = False
        """Whether the pipeline is handed out: then it keeps its text encoder, and memory=staged is not for it."""
        self._on_change = on_change
        self._state = ProcessState()
        self._ahead: KernelsAhead | None = None
        """Kernels that are being compiled while the weights are loaded."""

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        self._state.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        if self._ahead is not None:
            self._ahead.stop()
        self._state.__exit__(kind, error, trace)

    def close(self) -> None:
        """Leave: the shell is dropped, every process-wide switch is put back."""
        self.__exit__(None, None, None)

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline as it is built; there is none before ``assemble`` and after ``release``."""
        assert self._pipeline is not None
        return self._pipeline

    @property
    def ranks(self) -> Ranks:
        """This process among those that draw the pictures together."""
        return self.loader.ranks

    @property
    def compiles(self) -> bool:
        """Whether torch.compile was asked to work on the pipeline as it stands."""
        return self.context is not None and self.context.compiler.active

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of this run so far, under the record's names."""
        return {"import_s": self.import_s, "load_s": self.loader.seconds, "apply_s": self.apply_s}

    def ready_for(self, texts: Iterable[str]) -> bool:
        """Whether a pipeline stands that can draw these; a staged one has no text encoder left for new ones."""
        return self._pipeline is not None and (not self.plan.memory.staged or self.prompts.knows(texts))

    def carry_on(
        self,
        plan: Plan,
        pictures: Pictures,
        *,
        reporter: Reporter,
        interrupts: Interrupts,
        on_change: Callable[[], None],
    ) -> None:
        """Draw another run's pictures with the pipeline as it stands: options, model and sizes must be the same.

        The choices stay this session's, with every fallback found so far; counts and times start anew.
        """
        assert self.context is not None
        self.plan.config, self.plan.notes, self.pictures = plan.config, plan.notes, pictures
        self.reporter, self.interrupts, self._on_change = reporter, interrupts, on_change
        self.import_s = self.apply_s = self.loader.seconds = 0.0
        self.prompts.counts.clear()
        self.context.start_counting()
        if self.guidance is not None:
            self.guidance.calls = 0
        on_change()

    def can_swap_to(self, option: Option) -> bool:
        """Whether the pipeline as it stands can draw with another ``lora`` option's files and scales.

        Where weights are copied to and fro, what is written to the copies would be lost.
        """
        current = self.plan.choices["lora"].option
        return option == current or (
            isinstance(option, Adapters) and isinstance(current, Adapters) and not self.plan.memory.offloads
        )

    def swap(self, option: Option, adapters: Sequence[LoraSource]) -> bool:
        """Put other LoRA files and scales in the place of the present ones; False where there is no room for them."""
        choice = self.plan.choices["lora"]
        if option == choice.option:
            return True
        assert self.context is not None
        assert self.context.lora is not None
        assert isinstance(option, Adapters)
        self.loader.adapters = adapters
        lora, room = self.loader.read_adapters(self.pipeline.transformer), self.context.lora.room
        if lora is None or not room.holds(lora.room):
            return False
        self.context.lora = replace(lora, room=room)
        choice.option = option
        choice.facts = option.swap(self.pipeline, self.context)
        return True

    def release(self) -> None:
        """Let go of the shell; the weights stay in the store."""
        if self.context is not None:
            self.context.graphs.clear()
        self._pipeline = None
        self.context = self.guidance = None

    def observe(self) -> None:
        """Add to each option's facts what only shows after pictures were drawn."""
        assert self.context is not None
        for choice in self.plan.choices.values():
            choice.facts = {**choice.facts, **choice.option.observe(self.pipeline, self.context)}
        if self._ahead is not None:
            compiling = self.plan.choices["compile"]
            compiling.facts = {**compiling.facts, **self._ahead.share()}
        if self.guidance is not None:
            self.plan.choices["model"].facts["guidance_batched_calls"] = self.guidance.calls

    # -- building -----------------------------------------------------------------------------------------------------

    def assemble(self) -> None:
        """Build until it works: every failure at ``apply`` takes that option's fallback and starts afresh."""
        while True:
            failed: OptionFailed | None = None
            try:
                self.assemble_once()
            except OptionFailed as error:
                failed = error
            failure = self.ranks.agreed(None if failed is None else self._failure(failed.error, failed.group))
            if failure is None:
                self._on_change()
                return
            self._fall_back(failure, "apply", RankFailed(failure.reason) if failed is None else failed.error)

    def agreed(self, error: Exception | None) -> Exception | None:
        """After a first call: the failure, if there was one in any of the processes that draw the picture."""
        if self.ranks.size == 1:
            return error
        own = None if error is None else self._failure(error, self._to_blame(error))
        failure = self.ranks.agreed(own)
        return None if failure is None else AgreedFailure(failure, error)

    def recover(self, error: BaseException) -> None:
        """After a failed first call: take the fallback of the option to blame and build again.

        Re-raises ``error`` when no option is left to blame, or when the user interrupted.
        """
        self.interrupts.check()
        if isinstance(error, (Interrupted, KeyboardInterrupt)):
            raise error
        if isinstance(error, AgreedFailure):
            failure, own = error.failure, error.own or RankFailed(error.failure.reason)
        else:
            failure, own = self._failure(error, self._to_blame(error)), error
        if failure.group is None:
            raise own
        self._fall_back(failure, "first_call", own)
        self.assemble()

    def _failure(self, error: BaseException, group: str | None) -> Failure:
        failure = Failure.of(error, group)
        return replace(failure, reason=f"rank {self.ranks.rank}: {failure.reason}") if self.ranks.rank else failure

    def _to_blame(self, error: BaseException) -> str | None:
        return "memory" if is_out_of_memory(error) else blame(error, fallbacks.suspects(self.plan))

    def note_change(self) -> None:
        """Tell the run's record that the choices are others now."""
        self._on_change()

    def assemble_once(self) -> None:
        """Build with the options as they are chosen. Raises OptionFailed for the first that fails at ``apply``."""
        from fluxrun.pipeline.guidance import batch_guidance
        from fluxrun.weights.shells import shell

        memory, device = self.plan.memory, self.plan.machine.device
        self.release()
        self._state.restore()
        self._state.use_device(device)
        memory.limit(device)
        self._begin_kernels()
        if memory.staged:
            self.prompts.encode_first(self.reporter, self.interrupts)
        base = self.loader.load("image" if memory.staged else "all", self.reporter, self.interrupts)
        self.plan.choices["model"].facts = base.facts
        lora = self.loader.read_adapters(base.pipeline.transformer)
        started = time.perf_counter()
        with self.interrupts.immediate(), spans.span("apply"):
            self._wait_for_kernels()
            self.context = self._new_context(base, lora)
            self._pipeline = shell(base, self.plan.model.pipeline)
            for group in APPLY_ORDER:
                self._apply(group)
            if self.plan.guidance_batched:
                self.guidance = batch_guidance(self._pipeline)
        self.apply_s += time.perf_counter() - started

    def _begin_kernels(self) -> None:
        """Compile what will be launched while weights are loaded: not where they are there already."""
        if self._ahead is not None or self.store.reasons or self.loader.located is None:
            return
        with self.interrupts.immediate(), spans.span("import"):
            from fluxrun.pipeline.ahead import begin

            self._ahead = begin(self.plan, self.loader.located)
        if self._ahead is None and self.plan.compile.cache_artifacts and not self.plan.compile.compiles:
            self.plan.note("compile.cache_artifacts is not used: nothing of this run is compiled")

    def _wait_for_kernels(self) -> None:
        if self._ahead is not None:
            self._ahead.wait()
            if self._ahead.failed:
                self.plan.note(
                    f"kernels were not compiled while loading ({self._ahead.failed}), but at their first call"
                )

    def _new_context(self, base: Base, lora: LoraWeights | None) -> Context:
        from fluxrun.compilation.compiler import Compiler
        from fluxrun.compilation.cuda_graphs import Graphs

        return Context(
            workload=self.plan.workload,
            options=self.plan.options,
            state=self._state,
            compiler=Compiler(),
            graphs=Graphs(),
            load_option=self.plan.catalog.load,
            note=self.plan.note,
            prompt_counts=self.prompts.counts,
            weight_facts={**base.facts, "components": self.loader.components},
            pins=base.pins,
            lora=lora,
            ranks=self.ranks,
        )

    def _apply(self, group: str) -> None:
        """One option: let it choose (auto), apply it, keep its facts; a failure names the group."""
        assert self.context is not None
        choice = self.plan.choices[group]
        try:
            if chosen := self._chosen(choice.option):
                self.plan.switch(group, *chosen)
                self.context.options = self.plan.options
            choice.facts = {**choice.facts, **choice.option.apply(self.pipeline, self.context)}
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:  # an option may fail in any way its library likes; it is recorded, never hidden
            raise OptionFailed(group, error) from error

    def _chosen(self, option: Option) -> tuple[str, Facts] | None:
        """What an ``auto`` option measured to be best; of several processes the first one's word counts."""
        assert self.context is not None
        if self.ranks.size == 1 or not option.alternatives:
            return option.choose(self.pipeline, self.context)
        chosen, problem = None, ""
        try:
            chosen = option.choose(self.pipeline, self.context)
        except Exception as error:  # of this process alone, perhaps: the others must hear of it
            problem = one_line(error)
        chosen, problem = self.ranks.first((chosen, problem))
        if problem:
            raise RuntimeError(problem)
        return chosen

    # -- falling back -------------------------------------------------------------------------------------------------

    def _fall_back(self, failure: Failure, stage: Stage, error: BaseException) -> None:
        """Take a fallback; ``error`` is what it looks like in this process."""
        said = fallbacks.known(self.plan)
        try:
            if failure.out_of_memory or failure.group is None:
                fallbacks.step_down(self.plan, stage, failure.reason, failure.kind, whole=self.whole)
            else:
                fallbacks.fall_back(self.plan, failure.group, stage, failure.reason, failure.kind)
        except (OptionUnavailable, OutOfMemory) as refused:
            raise refused from error
        fallbacks.settle(self.plan)
        fallbacks.announce(self.plan, said, failure.trace)
        self.let_go(error)

    def let_go(self, error: BaseException) -> None:
        """Free the failed pipeline's memory before another one is built.

        The error's frames still hold all they were working on; the traceback is in the log, nobody needs them now.
        """
        self.release()
        for one in chain(error):
            one.__traceback__ = None
        free_memory()
