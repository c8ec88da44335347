"""What the runs of one process share: the loaded weights, and the built pipeline while nothing of it changes.

A single run has a pool of its own. The jobs of a sweep share one: a job that differs from the last one only in
prompt, seed, steps or guidance draws with the pipeline as it stands; any other job gets a fresh shell over the stored
weights, after everything process-wide was put back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict

from fluxrun.errors import Interrupted
from fluxrun.formatting import shorten
from fluxrun.options.base import Option
from fluxrun.options.lora import Adapters
from fluxrun.pipeline.session import Session
from fluxrun.planning.prepare import Prepared
from fluxrun.process.console import Reporter
from fluxrun.process.device import free_memory
from fluxrun.process.ranks import ALONE, Ranks
from fluxrun.process.signals import Interrupts

if TYPE_CHECKING:
    from fluxrun.weights.lora_files import LoraSource
    from fluxrun.weights.store import WeightStore

log = logging.getLogger("fluxrun.sessions")


class Caller(TypedDict):
    """What a session needs of the run that uses it now."""

    reporter: Reporter
    interrupts: Interrupts
    on_change: Callable[[], None]


class SessionPool:
    """One session at a time; ``close`` puts the process back as it was, leaving the block frees weights."""

    def __init__(self) -> None:
        self._store: WeightStore | None = None
        self._session: Session | None = None
        self._key = ""
        self._graphs: str | None = None
        self._compiled = False
        self.interrupted: Interrupted | None = None
        """A signal that came when a run was all but done: the runs that follow are not begun."""
        self.upcoming: Sequence[str] = ()
        """Prompts of the runs still to come over the same weights, where that is known."""
        self.upcoming_adapters: Callable[[], Sequence[Sequence[LoraSource]]] = tuple
        """Finds the LoRA files of each of them."""
        self.ranks: Ranks = ALONE
        """This process among those that draw the pictures together."""

    def __enter__(self) -> SessionPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop the pipeline and the weights: other processes are to have the memory."""
        self.close()
        if self._store is not None:
            self._store.clear()

    @property
    def loads(self) -> list[str]:
        """Why weights were loaded, one line per load, in order."""
        return list(self._store.reasons) if self._store is not None else []

    @contextmanager
    def session(
        self, prepared: Prepared, *, reporter: Reporter, interrupts: Interrupts, on_change: Callable[[], None]
    ) -> Iterator[Session]:
        """A session for this run. One that an error or an interrupt has left is not used again."""
        caller = Caller(reporter=reporter, interrupts=interrupts, on_change=on_change)
        try:
            with interrupts.immediate():  # it imports torch and diffusers
                session = self._take(prepared, caller)
            yield session
        except BaseException:
            self.close()
            raise

    def _take(self, prepared: Prepared, caller: Caller) -> Session:
        key = build_key(prepared)
        if self._session is not None and key == self._key and self._carries_on(self._session, prepared, caller):
            return self._session
        why = "the last run ended early" if self._session is None else rebuilt_because(self._key, key)
        self.close()
        graphs = graphs_key(prepared)
        self._clear_up(keep_graphs=graphs is not None and graphs == self._graphs)
        before, self._session = self._key, self._open(prepared, caller)
        self._key, self._graphs = key, graphs
        if before:
            kept = self._session.loader.key("image" if prepared.plan.memory.staged else "all") in self._session.store
            log.info("%s: new shell, weights %s", why, "kept" if kept else "loaded anew")
        return self._session

    def _carries_on(self, session: Session, prepared: Prepared, caller: Caller) -> bool:
        """Go on with the pipeline as it stands, if it can draw this run: LoRA files are swapped in place."""
        option = prepared.plan.choices["lora"].option
        if not session.ready_for(prepared.texts) or not session.can_swap_to(option):
            return False
        session.carry_on(prepared.plan, prepared.pictures, **caller)
        if not session.swap(option, prepared.adapters):
            return False
        log.info("options, model and size as before: the pipeline is used as it stands")
        caller["on_change"]()
        return True

    def _clear_up(self, keep_graphs: bool) -> None:
        """Free what the last pipeline left behind, so that a job starts with the weights' memory and nothing more."""
        if self._compiled and not keep_graphs:
            from fluxrun.compilation.compiler import Compiler

            # Also keeps a long sweep below the number of recompilations at which dynamo quietly goes eager.
            Compiler.forget()
            self._compiled = False
        if self._store is not None:
            free_memory()

    def _open(self, prepared: Prepared, caller: Caller) -> Session:
        session = Session(
            prepared.plan, store=self._store, pictures=prepared.pictures, located=prepared.located,
            adapters=prepared.adapters, **caller,
        )  # fmt: skip
        self._store, session.prompts.upcoming = session.store, self.upcoming
        session.loader.ranks = self.ranks
        session.loader.upcoming = self.upcoming_adapters() if prepared.adapters else ()
        session.__enter__()
        return session

    def close(self) -> None:
        """Drop the pipeline and put every process-wide switch back; the weights stay in the store."""
        if self._session is None:
            return
        session, self._session = self._session, None
        self._compiled = self._compiled or session.compiles
        session.close()


def graphs_key(prepared: Prepared) -> str | None:
    """What must agree for compiled code to serve another size: all options, with graphs for every size; else None.

    Without ``compile.dynamic=true`` each size gets graphs of its own, so that a job is as fast as it is alone.
    """
    option = prepared.plan.compile
    if not option.dynamic or option.cudagraphs:
        return None
    key = json.loads(build_key(prepared))
    return json.dumps({name: value for name, value in key.items() if name not in ("size", "batch_size", "pictures")})


def build_key(prepared: Prepared) -> str:
    """What must agree for a built pipeline to be used again: everything but prompts, seeds, steps and guidance.

    Of LoRA files only that there are some: which ones, and how strong, is swapped in.
    """
    config = prepared.config
    return json.dumps(
        {
            "options": {group: _knobs(option) for group, option in config.options().items()},
            "source": prepared.located.source,
            "size": prepared.plan.size,
            "batch_size": config.batch_size,
            "device": prepared.plan.machine.device,
            "strict": config.strict,
            "guidance_batched": prepared.plan.guidance_batched,
            "pictures": prepared.pictures.sizes,
            # A step cache is set up for the steps it will see.
            "steps": prepared.plan.steps_made if config.cache.skips_steps else None,
        }
    )


def rebuilt_because(before: str, now: str) -> str:
    """What differs between two builds' keys, for people: ``attention sdpa → math, size 64x64 → 128x64``."""
    old, new = json.loads(before), json.loads(now)
    texts = [_difference(group, old["options"].get(group), knobs) for group, knobs in new.pop("options").items()]
    texts += [f"{name} {_text(old[name])} → {_text(value)}" for name, value in new.items() if value != old[name]]
    return ", ".join(text for text in texts if text) or "prompts that its text encoder is needed for"


def _difference(group: str, before: list[str] | None, now: list[str]) -> str:
    if before is None or before == now:
        return ""
    if before[0] != now[0]:
        return f"{group} {before[0]} → {now[0]}"
    old, new = json.loads(before[1]), json.loads(now[1])
    return ", ".join(
        f"{group}.{k} {shorten(old.get(k), 40)} → {shorten(v, 40)}" for k, v in new.items() if v != old.get(k)
    )


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _knobs(option: Option) -> list[str]:
    swapped = {"files", "scale"} if isinstance(option, Adapters) else None
    return [option.name, option.model_dump_json(exclude=swapped)]
