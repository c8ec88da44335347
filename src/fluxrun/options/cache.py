"""The ``cache`` group: step caches, which reuse what most transformer blocks added to an earlier step.

cache-dit does the work. It patches the pipeline's class, so each shell gets a class of its own first: nothing outlives
the shell. Which steps were computed is read from its contexts after every call and never from the knobs.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from fluxrun.hardware.machine import Machine
from fluxrun.options.base import COMPILER, NOTHING_MORE, Context, Facts, Option, Workload, own_class, steps_after
from fluxrun.trust import Open
from fluxrun.types import Pipeline

FEW_STEPS = 4
"""Up to so many steps each one counts: nothing that could be skipped."""

MOST_SKIPPED = 3
"""magcache: steps in a row, where the user says nothing."""

CALLS = "cached_calls"
"""Context counter: pipeline calls whose steps were counted."""


class CacheOption(Option):
    """The knobs all step caches share."""

    skips_steps: ClassVar[bool] = True
    """Whether some steps may be skipped."""

    decides: ClassVar[bool] = False
    """Whether it looks at the picture to know which ones."""

    first_blocks: Open[int] = Field(1, ge=1)
    """Blocks at the start of each block list that always run (cache-dit's Fn, which is at least one)."""

    last_blocks: Open[int] = Field(0, ge=0)
    """Blocks at the end of each block list that always run (cache-dit's Bn)."""

    warmup_steps: Open[int] = Field(4, ge=1)
    """Steps at the start that are always computed."""

    residual_diff_threshold: Open[float] = Field(0.08, gt=0)
    """dbcache: skip a step when the first blocks changed less than this since the last computed one."""

    max_cached_steps: Open[int | None] = Field(None, ge=0)
    """dbcache: the most steps to skip in one image."""

    max_continuous_cached_steps: Open[int | None] = Field(None, ge=1)
    """dbcache: the most steps to skip in a row."""

    compute: Open[float] = Field(0.5, gt=0, le=1)
    """fixed: share of the steps that is computed, the rest is skipped."""

    mask: Open[str | None] = Field(None, pattern=r"^1[01]*$")
    """fixed: the schedule itself, a digit per step (1 computed, 0 skipped), instead of ``compute``."""

    ratios: Open[tuple[float, ...] | None] = Field(None, min_length=1, max_length=1000)
    """magcache: how much each step changes, over the step before it, by ``fluxrun calibrate``; for another number of
    steps the nearest ones."""

    error_threshold: Open[float] = Field(0.06, gt=0)
    """magcache: the most that the changes since the last computed step may add up to, by the ratios."""

    taylor_order: Open[int] = Field(1, ge=0, le=4)
    """Extrapolate a skipped step from so many differences of the last ones (TaylorSeer); 0 reuses the last as it is."""

    force: Open[bool] = False
    """Use it on a few-step model, too."""


class NoCache(CacheOption):
    """Every step is computed."""

    skips_steps: ClassVar[bool] = False

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE

    def unused_knobs(self) -> list[str]:
        return self.changed_knobs()


class StepCache(CacheOption):
    """What both caches do with cache-dit."""

    @property
    def libraries(self) -> frozenset[str] | None:
        return frozenset({"cache_dit", COMPILER})

    def requires(self, machine: Machine) -> str | None:
        return machine.lacks("cache-dit", "1.5.3")

    def inapplicable(self, workload: Workload) -> str | None:
        if workload.steps is not None and workload.steps <= FEW_STEPS and not self.force:
            return f"{workload.steps} steps are too few for a step cache (cache.force=true uses it all the same)"
        return None

    def schedule(self, steps: int) -> list[int] | None:
        """1 for every step to compute, 0 for every one to skip; None: decided while drawing."""
        return None

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """Wrap the blocks of this shell. Facts: blocks that can be skipped; the steps are counted by ``observe``."""
        adapter = _cache_dit()
        blocks = {name: len(blocks) for name, blocks in _block_lists(pipeline).items()}
        always = self.first_blocks + self.last_blocks
        skippable = {name: max(0, count - always) for name, count in blocks.items()}
        if not sum(skippable.values()):
            raise RuntimeError(f"first_blocks and last_blocks leave none of the {sum(blocks.values())} blocks to skip")
        own_class(pipeline, {})
        adapter.apply(pipeline, **self._configs())
        own_class(pipeline, {"__call__": _counted_call(self, type(pipeline), context)})
        pipeline.cached_calls = []
        return {"blocks": blocks, "skippable_blocks": skippable}

    def observe(self, pipeline: Pipeline, context: Context) -> Facts:
        """Steps computed and skipped in each call, and transformer blocks run of all that there were to run."""
        calls = pipeline.cached_calls[-context.counters[CALLS] :] if context.counters[CALLS] else []
        totals: Counter[str] = Counter()
        for call in calls:
            totals.update(call)
        lists = {f"{name}_per_image": [call[name] for call in calls] for name in ("steps_computed", "steps_skipped")}
        return {**lists, **{name: totals[name] for name in COUNTED}}

    def _configs(self) -> dict[str, Any]:
        """cache-dit's configs. What depends on the call (its steps, its guidance) is filled in by ``prepare``."""
        from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

        unlimited = -1
        config = DBCacheConfig(
            Fn_compute_blocks=self.first_blocks,
            Bn_compute_blocks=self.last_blocks,
            max_warmup_steps=self.warmup_steps,
            residual_diff_threshold=self.residual_diff_threshold,
            max_cached_steps=unlimited if self.max_cached_steps is None else self.max_cached_steps,
            max_continuous_cached_steps=self.max_continuous_cached_steps or unlimited,
            enable_separate_cfg=False,
            steps_computation_policy="static",
        )
        if not self.taylor_order:
            return {"cache_config": config}
        return {
            "cache_config": config,
            "calibrator_config": TaylorSeerCalibratorConfig(taylorseer_order=self.taylor_order),
        }

    def prepare(self, pipeline: Pipeline, steps: int, guided: bool) -> None:
        """Before a call: the contexts that cache-dit makes for it follow these configs."""
        for blocks in _block_lists(pipeline).values():
            config = blocks._context_kwargs["cache_config"]
            config.steps_computation_mask = self.schedule(steps)
            config.enable_separate_cfg = guided


class DBCache(StepCache):
    """cache-dit's DBCache: skips a step when the first blocks' output hardly changed."""

    decides: ClassVar[bool] = True

    def unused_knobs(self) -> list[str]:
        return _within(self.changed_knobs(), {"compute", "mask", "ratios", "error_threshold"})


class FixedCache(StepCache):
    """A fixed schedule: the same steps are skipped in every image, so that the time is known beforehand."""

    def unused_knobs(self) -> list[str]:
        others = {"residual_diff_threshold", "max_cached_steps", "max_continuous_cached_steps"}
        return _within(self.changed_knobs(), others | {"ratios", "error_threshold"})

    def inapplicable(self, workload: Workload) -> str | None:
        steps = workload.steps
        if self.mask and steps and len(self.mask) != steps:
            return f"cache.mask has {len(self.mask)} digits, the run has {steps} steps"
        return super().inapplicable(workload)

    def schedule(self, steps: int) -> list[int]:
        if self.mask and len(self.mask) == steps:
            return [int(digit) for digit in self.mask]
        return spread_out(steps, self.compute, self.warmup_steps)


class MagCache(FixedCache):
    """MagCache: a schedule that follows from how much each step of this model changes, measured once.

    Its decision depends on the ratios alone and on no picture, so it is a fixed schedule, known beforehand.
    """

    def unused_knobs(self) -> list[str]:
        return _within(self.changed_knobs(), {"residual_diff_threshold", "max_cached_steps", "compute", "mask"})

    def inapplicable(self, workload: Workload) -> str | None:
        if not self.ratios:
            return "cache.ratios is empty: fluxrun calibrate measures a model's, and writes them as an option file"
        return StepCache.inapplicable(self, workload)

    def schedule(self, steps: int) -> list[int]:
        most = self.max_continuous_cached_steps or MOST_SKIPPED
        return by_magnitude(self.ratios or (), steps, self.warmup_steps, self.error_threshold, most)


class MagCalibration(CacheOption):
    """Every step is computed, and how much it changes is measured: ``fluxrun calibrate`` is a run with it."""

    skips_steps: ClassVar[bool] = False

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """Watch what all blocks together add to the picture's tokens."""
        from fluxrun.options.magnitudes import Magnitudes

        assert context.workload.steps is not None
        pipeline.magnitudes = Magnitudes(pipeline.transformer, context.workload.steps, twice=context.workload.guided)
        return {}

    def observe(self, pipeline: Pipeline, context: Context) -> Facts:
        """The ratios, a step each, averaged over all pictures so far."""
        return {"ratios": [round(ratio, 5) for ratio in pipeline.magnitudes.ratios()]}


def by_magnitude(ratios: Sequence[float], steps: int, warmup: int, threshold: float, most: int) -> list[int]:
    """MagCache's schedule: steps are skipped while their ratios, multiplied up, stay near to 1."""
    last = len(ratios) - 1
    nearest = [ratios[round(step * last / max(1, steps - 1))] for step in range(steps)]
    computed, product, error, skipped = [], 1.0, 0.0, 0
    for step, ratio in enumerate(nearest):
        product, skipped = product * ratio, skipped + 1
        error += abs(1 - product)
        skip = step >= warmup and error <= threshold and skipped <= most
        if not skip:
            product, error, skipped = 1.0, 0.0, 0
        computed.append(int(not skip))
    return computed


def spread_out(steps: int, share: float, warmup: int) -> list[int]:
    """A schedule that computes ``share`` of the steps: the first ones, the last, and the rest spread evenly."""
    wanted = max(1, round(share * steps))
    warmup = min(warmup, max(1, wanted // 2))  # else a short run would skip all its later steps in one go
    rest = wanted - warmup
    left = steps - warmup
    # Counted from the end of the warm-up, the n-th computed step is number n/rest of what is left: the last one is the
    # picture's last step, which sharpens it.
    computed = {warmup - 1 + round(n * left / rest) for n in range(1, rest + 1)} | set(range(warmup))
    return [int(step in computed) for step in range(steps)]


COUNTED = ("steps_computed", "steps_skipped", "steps_partly_skipped", "blocks_run", "blocks_of")


def count_call(pipeline: Pipeline, always: int) -> dict[str, int]:
    """What cache-dit's contexts say about the call that has just ended.

    A step of the double blocks and the same step of the single blocks are skipped or computed separately; with
    classifier-free guidance so are the two calls of a step.
    """
    with_contexts: Any = pipeline  # cache-dit has put its own there
    manager, transformer = with_contexts._context_manager, pipeline.transformer
    skipped: list[set[int]] = []
    run = of = steps = 0
    for name, blocks in zip(transformer._context_names, _block_lists(pipeline).values(), strict=True):
        found = manager.get_context(name)
        parts = [set(found.cached_steps)]
        if found.cache_config.enable_separate_cfg:
            parts.append(set(found.cfg_cached_steps))
        steps = found.executed_steps
        skipped += parts
        for part in parts:
            of += steps * len(blocks)
            run += steps * len(blocks) - len(part) * max(0, len(blocks) - always)
    whole, some = set.intersection(*skipped), set.union(*skipped)
    return {
        "steps_computed": steps - len(some),
        "steps_skipped": len(whole),
        "steps_partly_skipped": len(some - whole),
        "blocks_run": run,
        "blocks_of": of,
    }


def _counted_call(option: StepCache, cls: Any, context: Context) -> Any:
    """The pipeline's ``__call__``: tell cache-dit about the call, draw, count what it did."""

    signature = inspect.signature(cls.__call__)

    def __call__(self: Any, *args: Any, **arguments: Any) -> Any:
        given = signature.bind(self, *args, **arguments)
        given.apply_defaults()
        # Only klein's base models call the transformer twice a step, once with the prompt and once without.
        twice = not self.config.get("is_distilled", True) and (given.arguments["guidance_scale"] or 0) > 1
        steps = len(given.arguments["sigmas"] or ()) or given.arguments["num_inference_steps"]
        if "strength" in given.arguments:
            steps = steps_after(steps, given.arguments["strength"])
        option.prepare(self, steps, twice)
        drawn = cls.__call__(self, *args, **arguments)
        self.cached_calls.append(count_call(self, option.first_blocks + option.last_blocks))
        context.counters[CALLS] += 1
        return drawn

    return __call__


def _block_lists(pipeline: Pipeline) -> dict[str, Any]:
    names = ("transformer_blocks", "single_transformer_blocks")
    return {name: getattr(pipeline.transformer, name) for name in names}


def _cache_dit() -> Any:
    """cache-dit's adapter, imported without what it does to the process.

    Its own ``enable_cache`` may also set an attention backend, which is another group's business.
    """
    before = dict(os.environ)
    adapter = importlib.import_module("cache_dit.caching").CachedAdapter
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name in logging.root.manager.loggerDict:
        if name.partition(".")[0].lower() == "cache_dit":  # each of its modules prints on stdout
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True
    return adapter


def _within(knobs: Sequence[str], names: set[str]) -> list[str]:
    return [knob for knob in knobs if knob in names]
