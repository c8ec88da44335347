"""The ``scheduler`` group: who goes from noise to picture, over which sigmas."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from fluxrun.options.base import NOTHING_MORE, Context, Facts, Option
from fluxrun.trust import Open
from fluxrun.types import Pipeline

Solver = Literal["euler", "heun", "dpmpp_2m", "unipc"]


class SchedulerOption(Option):
    """The knobs all schedulers share, and what they do."""

    solver: ClassVar[Solver] = "euler"

    sigmas: Open[tuple[float, ...] | None] = Field(None, min_length=1, max_length=1000)
    """Noise levels to step through, falling, from 1 or below to above 0 (0 is added): one for each step. The shift is
    applied to them; with ``shift: 1`` they stay as they are."""

    shift: Annotated[Open[float | None], Field(gt=0, le=1000, allow_inf_nan=False)] = None
    """A fixed time shift in the place of the model's own, which grows with the picture and falls with the steps."""

    calls_twice: ClassVar[bool] = False
    """Whether a step calls the transformer twice."""

    @property
    def libraries(self) -> frozenset[str] | None:
        return NOTHING_MORE

    @field_validator("sigmas")
    @classmethod
    def _falling(cls, sigmas: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if sigmas and not (sigmas[0] <= 1 and sigmas[-1] > 0 and all(a > b for a, b in pairwise(sigmas))):
            raise ValueError("sigmas fall, from 1 or below to above 0, each below the one before it")
        return sigmas

    def calls(self, steps: int) -> int:
        """How often the transformer is called in so many steps (guidance apart)."""
        return 2 * steps - 1 if self.calls_twice else steps

    def apply(self, pipeline: Pipeline, context: Context) -> Facts:
        """Put the solver in the place of the pipeline's scheduler, unless that is it already."""
        if self.solver != "euler" or self.shift is not None:
            from fluxrun.options.flow_schedulers import made_like

            pipeline.scheduler = made_like(pipeline.scheduler, self.solver, self.sigmas, self.shift)
        return {"class": type(pipeline.scheduler).__name__}

    def observe(self, pipeline: Pipeline, context: Context) -> Facts:
        """The sigmas of the last picture, and how many times it called the transformer (guidance apart)."""
        sigmas = [round(float(sigma), 4) for sigma in pipeline.scheduler.sigmas]
        return {"sigmas": list(dict.fromkeys(sigmas)), "transformer_calls": len(pipeline.scheduler.timesteps)}


class Euler(SchedulerOption):
    """diffusers' FlowMatchEuler, which FLUX.2 comes with."""


class Heun(SchedulerOption):
    """Heun's method: the slope at both ends of a step."""

    solver: ClassVar[Solver] = "heun"
    calls_twice: ClassVar[bool] = True


class DpmSolver(SchedulerOption):
    """DPM-Solver++(2M): the slopes of the last two steps."""

    solver: ClassVar[Solver] = "dpmpp_2m"


class UniPC(SchedulerOption):
    """UniPC: predicts with the last slopes, and corrects with the new one in the next step."""

    solver: ClassVar[Solver] = "unipc"
