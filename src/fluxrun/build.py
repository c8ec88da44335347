"""Build: weights → shell → options in one order → pipeline, with fallbacks at apply and at the first call."""

from __future__ import annotations

import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fluxrun.blame import blame, is_out_of_memory
from fluxrun.config import Facts, RunConfig
from fluxrun.context import Context
from fluxrun.errors import ConfigError, Interrupted, OptionUnavailable, OutOfMemory, chain, one_line
from fluxrun.interrupt import Interrupts
from fluxrun.machine import GIB
from fluxrun.plan import APPLY_ORDER, BLAME_ORDER, Fallback, Plan, stand_in
from fluxrun.progress import Reporter

if TYPE_CHECKING:
    from fluxrun.checkpoint import Located
    from fluxrun.models import Base, Part, WeightsKey, WeightStore
    from fluxrun.options.memory import MemoryKnobs
    from fluxrun.options.quantization import Quantization
    from fluxrun.runner import Prepared

log = logging.getLogger("fluxrun.build")


class Session:
    """A plan and the pipeline built from it, rebuilt from the same weights whenever an option falls back.

    As a context manager it puts every process-wide switch back when it is left.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        store: WeightStore | None = None,
        reporter: Reporter | None = None,
        interrupts: Interrupts | None = None,
        references: Sequence[Any] = (),
        located: Located | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        started = time.perf_counter()
        from fluxrun.state import ProcessState, import_diffusers

        self._broken = import_diffusers()
        from fluxrun.models import WeightStore, pipeline_class

        if located is not None:
            pipeline_class(located.pipeline)
        imported = time.perf_counter() - started

        self.plan = plan
        self.store = WeightStore() if store is None else store
        self.reporter = reporter or Reporter()
        self.interrupts = interrupts or Interrupts()
        self.references = list(references)
        self.located = located
        self.timings = {"import_s": imported, "load_s": 0.0, "apply_s": 0.0}
        self.pipeline: Any = None
        self.context: Context | None = None
        self._on_change = on_change
        self.before_staged_load: Callable[[], None] = lambda: None
        """memory=staged: what must be encoded before everything but the text encoder is loaded."""
        self.whole = False
        """Whether the pipeline is handed out: then it keeps its text encoder, and memory=staged is not for it."""
        self.upcoming: Sequence[str] = ()
        """Prompts of later runs over the same weights: memory=staged encodes them while its text encoder is there."""
        self._staged_counts: Counter[str] = Counter()
        self._state = ProcessState()

    def __enter__(self) -> Session:
        self._state.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self._state.__exit__(kind, error, trace)

    def close(self) -> None:
        """Leave: the shell is dropped, every process-wide switch is put back."""
        self.__exit__(None, None, None)

    @property
    def compiled(self) -> bool:
        """Whether torch.compile was asked to work on the pipeline as it stands."""
        return self.context is not None and self.context.compiler.active

    def ready_for(self, prompts: Iterable[str]) -> bool:
        """Whether a pipeline stands that can draw these; a staged one has no text encoder left for new ones."""
        known = not self.staged or all(self.embedding(prompt) is not None for prompt in prompts)
        return self.pipeline is not None and known

    def carry_on(
        self, plan: Plan, *, reporter: Reporter, interrupts: Interrupts, on_change: Callable[[], None]
    ) -> None:
        """Draw another run's pictures with the pipeline as it stands: options, model and size must be the same.

        The choices stay this session's, with every fallback found so far; counts and times start anew.
        """
        assert self.context is not None
        self.plan.config, self.plan.notes = plan.config, plan.notes
        self.reporter, self.interrupts, self._on_change = reporter, interrupts, on_change
        self.timings = dict.fromkeys(self.timings, 0.0)
        self._staged_counts.clear()
        self.context.start_counting()
        on_change()

    # -- assembling ---------------------------------------------------------------------------------------------

    def assemble(self) -> None:
        """Build until it works: every failure at ``apply`` takes that option's fallback and starts afresh."""
        while True:
            try:
                self._assemble()
                self._on_change()
                return
            except _Failed as failed:
                self._fall_back(failed.group, "apply", failed.error)

    def recover(self, error: BaseException) -> None:
        """After a failed first call: take the fallback of the option to blame and build again.

        Re-raises ``error`` when no option is left to blame, or when the user interrupted.
        """
        self.interrupts.check()
        if isinstance(error, (Interrupted, KeyboardInterrupt)):
            raise error
        group = "memory" if is_out_of_memory(error) else blame(error, self._suspects())
        if group is None:
            raise error
        self._fall_back(group, "first_call", error)
        self.assemble()

    def _suspects(self) -> list[str]:
        """Groups whose option can fall back, the likeliest culprit first."""
        return [group for group in BLAME_ORDER if self.plan.choices[group].option.fallback != "error"]

    def release(self) -> None:
        """Let go of the shell; the weights stay in the store."""
        if self.context is not None:
            self.context.graphs.clear()
        self.pipeline = None
        self.context = None

    def observe(self) -> None:
        """Add to each option's facts what only shows after pictures were drawn."""
        assert self.context is not None
        for choice in self.plan.choices.values():
            choice.facts = {**choice.facts, **choice.option.observe(self.pipeline, self.context)}

    def _assemble(self) -> None:
        from fluxrun.compiler import Compiler

        self.release()
        self._state.restore()
        self._state.use_device(self.plan.machine.device)
        self._memory.limit(self.plan.machine.device)
        if self.staged:
            self.before_staged_load()
        self.context = Context(self.plan, self._state, Compiler())
        self.context.counters.update(self._staged_counts)
        base = self._load("image" if self._memory.staged else "all")
        self.context.weight_facts, self.context.pins = base.facts, base.pins
        self.plan.choices["model"].facts = base.facts
        started = time.perf_counter()
        with self.interrupts.immediate():
            self.pipeline = self._shell(base)
            for group in APPLY_ORDER:
                self._apply(group)
        self.timings["apply_s"] += time.perf_counter() - started

    def _apply(self, group: str) -> None:
        """One option: let it choose (auto), apply it, keep its facts; a failure names the group."""
        assert self.context is not None
        choice = self.plan.choices[group]
        try:
            if chosen := choice.option.choose(self.pipeline, self.context):
                self.plan.switch(group, *chosen)
            choice.facts = {**choice.facts, **choice.option.apply(self.pipeline, self.context)}
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:  # an option may fail in any way its library likes; it is recorded, never hidden
            raise _Failed(group, error) from error

    def _shell(self, base: Base) -> Any:
        from fluxrun.models import shell

        pipeline = shell(base)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # -- weights ------------------------------------------------------------------------------------------------

    @property
    def _memory(self) -> MemoryKnobs:
        return self.plan.choices["memory"].option  # type: ignore[return-value]

    @property
    def _quantization(self) -> Quantization:
        return self.plan.choices["quantization"].option  # type: ignore[return-value]

    def _key(self, part: Part) -> WeightsKey:
        from fluxrun.models import WeightsKey

        placement = "cpu" if self._memory.offloads else self.plan.machine.device
        quantization = self._quantization.model_dump_json(exclude={"fallback"})
        return WeightsKey.of(
            self.plan.model, dtype=self.plan.dtype, device=placement, part=part, quantization=quantization
        )

    def _load(self, part: Part) -> Base:
        """The stored weights of ``part``, loaded on first use; other weights are freed first."""
        from fluxrun.models import load

        key = self._key(part)
        self.store.keep_only([key])
        loads = len(self.store.reasons)
        started = time.perf_counter()
        try:
            with self.interrupts.immediate():
                base = self.store.get(key, lambda: self._announce_load(load, part, key))
        except (Interrupted, KeyboardInterrupt, _Failed):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise _Failed("memory", error) from error
            raise
        finally:
            if len(self.store.reasons) > loads:  # else the weights were there
                self.timings["load_s"] += time.perf_counter() - started
        if 0 < loads < len(self.store.reasons) and self.store.reasons[-1] != "first load":
            self.plan.note(f"weights loaded again: {self.store.reasons[-1]}")
            log.info("weights loaded again: %s", self.store.reasons[-1])
        return base

    def _announce_load(self, load: Callable[..., Base], part: Part, key: WeightsKey) -> Base:
        what = {"all": "model", "text": "text encoder", "image": "transformer and VAE"}[part]
        with self.reporter.stage(f"Loading {self.plan.model.name} ({what}, {key.dtype}, {key.placement})"):
            return load(
                self.plan.model, dtype=key.dtype, device=key.placement, part=part, quantize=self._quantize,
                progress=_say_load, located=self.located,
            )  # fmt: skip

    def _quantize(self, component: Any, name: str) -> Facts:
        try:
            return self._quantization.quantize(component, name, self._key("all").placement)
        except Exception as error:  # a library's failure to convert is this option's failure
            raise _Failed("quantization", error) from error

    @property
    def staged(self) -> bool:
        """Whether prompts are encoded first, with the text encoder alone."""
        return self._memory.staged

    def encode_first(self, encode: Callable[[Any], None], prompts: int) -> None:
        """For staged memory: load the text encoder alone, encode with it, free it before the rest is loaded."""
        base = self._load("text")
        encode(self._shell(base))
        self._staged_counts |= Counter(prompts_encoded_first=prompts, freed_bytes=base.bytes)
        del base
        self.store.keep_only([])

    def embedding(self, prompt: str) -> Any:
        """memory=staged: the embedding an earlier run has left of ``prompt``, or None."""
        return self.store.embeddings.get(self._embedding_key(prompt))

    def note_known(self, prompts: int) -> None:
        """memory=staged: count prompts that an earlier run has encoded."""
        self._staged_counts["prompts_known_before"] += prompts
        if self.context is not None:
            self.context.counters["prompts_known_before"] += prompts

    def keep_embedding(self, prompt: str, embedding: Any) -> None:
        """memory=staged: leave an embedding to later runs."""
        self.store.embeddings[self._embedding_key(prompt)] = embedding.cpu()

    def _embedding_key(self, prompt: str) -> str:
        model = self.plan.model
        weights = replace(self._key("text"), quantization="", distilled=None)  # neither is the text encoder's
        return f"{weights} {model.max_sequence_length} {model.text_encoder_out_layers} {prompt}"

    # -- falling back -------------------------------------------------------------------------------------------

    def _fall_back(self, group: str, stage: str, error: BaseException) -> None:
        known = {name: len(choice.fallbacks) for name, choice in self.plan.choices.items()}
        if is_out_of_memory(error):
            self._step_down(stage, error)
        else:
            try:
                self.plan.fall_back(group, stage, one_line(error), type(error).__name__)
            except OptionUnavailable as refused:
                raise refused from error
        self.plan.settle()
        self._say_fallbacks(known, "".join(traceback.format_exception(error)).rstrip())
        self._let_go(error)

    def _say_fallbacks(self, known: Mapping[str, int], trace: str) -> None:
        """One line for each fallback beyond those known, also of options that cannot stand beside the new one.

        The log file has the traceback with the line of the option that failed; the console leaves it out.
        """
        for group, choice in self.plan.choices.items():
            for fallback in choice.fallbacks[known[group] :]:
                instead = stand_in(fallback.option, choice.effective)
                _warn(
                    f"{group}={fallback.option} cannot be used, falling back to {instead} "
                    f"({fallback.stage}: {fallback.reason})",
                    "" if fallback.stage == "requires" else trace,
                )

    def _let_go(self, error: BaseException) -> None:
        """Free the failed pipeline's memory before another one is built.

        The error's frames still hold all they were working on; the traceback is in the log, nobody needs them now.
        """
        from fluxrun.models import free_memory

        self.release()
        for one in chain(error):
            one.__traceback__ = None
        free_memory()

    def _step_down(self, stage: str, error: BaseException) -> None:
        """Out of memory: with memory=auto the next rung of the ladder, else say what would fit."""
        from fluxrun.options.memory import LADDER

        choice = self.plan.choices["memory"]
        below = LADDER[LADDER.index(choice.effective) + 1 :]
        rungs = [n for n in below if self._usable("memory", n) and not (self.whole and n == "staged")]
        if choice.requested != "auto" or not rungs or self.plan.config.strict:
            raise OutOfMemory(self._advice(rungs)) from error
        choice.fallbacks.append(Fallback(choice.effective, stage, one_line(error), type(error).__name__))
        self.plan.switch("memory", rungs[0], {"chosen_because": "the rung above ran out of memory"})

    def _usable(self, group: str, name: str) -> bool:
        return self.plan.catalog.load(group, name).requires(self.plan.machine) is None

    def _advice(self, rungs: Sequence[str]) -> str:
        gpu = self.plan.machine.gpu
        where = f"{gpu.name} ({gpu.memory_bytes / GIB:.0f} GB)" if gpu else f"{self.plan.machine.device}"
        ideas = [f"memory={name}" for name in rungs[:2]]
        if self._memory.blocks_to_swap is not None and self._memory.swaps_blocks:
            ideas.insert(0, "a larger memory.blocks_to_swap, or null")
        ideas += (
            ["quantization=fp8"] if self._quantization.name == "none" and self._usable("quantization", "fp8") else []
        )
        height, width = self.plan.size
        ideas += [f"height={height // 32 * 16} width={width // 32 * 16}"] if min(height, width) >= 64 else []
        return f"out of memory on {where} with memory={self._memory.name}; try {' or '.join(ideas[:3])}"


class _Failed(Exception):
    """An option's failure, with the group it belongs to."""

    def __init__(self, group: str, error: BaseException) -> None:
        super().__init__(one_line(error))
        self.group, self.error = group, error


def _warn(text: str, trace: str) -> None:
    """A warning with a traceback as text: a handler that keeps a record's ``exc_info`` would keep the frames, too."""
    if log.isEnabledFor(logging.WARNING):
        fields = {"name": log.name, "levelno": logging.WARNING, "levelname": "WARNING", "msg": text}
        log.handle(logging.makeLogRecord({**fields, "exc_text": trace or None}))


def _say_load(text: str) -> None:
    """A download's lines are for the user; each component's are for the log."""
    log.log(logging.INFO if text.startswith("download") else logging.DEBUG, "%s", text)


def build(config: RunConfig) -> Session:
    """The optimized pipeline of a config, with what was applied; for notebooks and node graphs.

    ``session.pipeline`` is an ordinary diffusers pipeline, ``session.plan.choices`` says what is in effect and why.
    Process-wide switches stay set until ``session.close()``. ``memory=staged`` is refused: it throws the text encoder
    away after the prompts it was told; where ``auto`` would take it, balanced memory takes its place.
    """
    from fluxrun.runner import prepare

    prepared = prepare(config)
    _keep_whole(prepared.plan)
    return assembled(prepared, whole=True)


def assembled(prepared: Prepared, *, whole: bool = False) -> Session:
    """A session with its pipeline built; ``whole`` keeps the text encoder whatever has to fall back."""
    session = Session(prepared.plan, references=prepared.references, located=prepared.located)
    session.whole = whole
    session.__enter__()
    try:
        session.assemble()
    except BaseException:
        session.close()
        raise
    return session


def _keep_whole(plan: Plan) -> None:
    """No staged memory for a pipeline that will be asked to encode prompts later."""
    choice = plan.choices["memory"]
    if choice.effective != "staged":
        return
    if choice.requested != "auto":
        raise ConfigError(
            "memory=staged frees the text encoder, so that a pipeline of your own could encode no prompt; use "
            "memory=balanced, or fluxrun.run, which knows its prompts beforehand"
        )
    plan.switch("memory", "balanced", {"chosen_because": "a pipeline that is handed out keeps its text encoder"})
    plan.settle()
