"""diffusers' solvers for flow matching, each over the very sigmas that FlowMatchEuler would take. Imports torch.

FLUX.2's pipelines hand a scheduler their sigmas and the dynamic shift ``mu``. Of diffusers' own classes Heun takes
neither, DPM-Solver writes the shift into its config, and both multistep solvers get no sigmas at all and round their
timesteps to integers. Here each makes its schedule as Euler does, so that they differ in the solver alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

FIRST_SIGMA = 1 - 1e-6
"""The multistep solvers take logarithms of 1 - sigma."""


def schedule(steps: int, sigmas: Sequence[float] | None, mu: float | None, shift: float | None) -> torch.Tensor:
    """[steps + 1] sigmas as FlowMatchEuler makes them, down to 0: evenly spaced or as given, then shifted.

    ``shift`` is a fixed one, in the place of the dynamic ``mu``.
    """
    given = torch.tensor(sigmas) if sigmas is not None else torch.linspace(1, 1 / steps, steps)
    factor = shift if shift is not None else math.exp(mu) if mu is not None else 1.0
    return torch.cat([factor * given / (1 + (factor - 1) * given), torch.zeros(1)])


class _Flow:
    """What the three solvers share: which sigmas, and nothing rounded."""

    if TYPE_CHECKING:
        config: Any
        sigmas: torch.Tensor
        timesteps: torch.Tensor
        num_inference_steps: int
        _step_index: int | None
        _begin_index: int | None

    own_sigmas: Sequence[float] | None = None
    """Sigmas given by the user: the pipelines drop theirs where the config says ``use_flow_sigmas``."""
    own_shift: float | None = None

    def _take(self, steps: int | None, device: Any, sigmas: Sequence[float] | None, mu: float | None) -> None:
        sigmas = self.own_sigmas or sigmas
        steps = len(sigmas) if sigmas is not None else steps
        assert steps is not None
        self.sigmas = schedule(steps, sigmas, mu, self.own_shift)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)


class FlowHeun(_Flow, FlowMatchHeunDiscreteScheduler):
    """Heun's method: two calls of the transformer a step, one in the last."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        self._take(num_inference_steps, device, sigmas, mu)
        self.num_inference_steps = len(self.timesteps)
        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)])
        self.sigmas = torch.cat([self.sigmas[:1], self.sigmas[1:-1].repeat_interleave(2), self.sigmas[-1:]])
        memory: Any = self
        memory.prev_derivative = memory.dt = memory.sample = None
        self._step_index = self._begin_index = None


class FlowDPMSolver(_Flow, DPMSolverMultistepScheduler):
    """DPM-Solver++(2M)."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        _multistep(self, DPMSolverMultistepScheduler, num_inference_steps, device, sigmas, mu)


class FlowUniPC(_Flow, UniPCMultistepScheduler):
    """UniPC, a predictor and a corrector for one call of the transformer a step."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        _multistep(self, UniPCMultistepScheduler, num_inference_steps, device, sigmas, mu)


def _multistep(
    scheduler: Any, cls: Any, steps: int | None, device: Any, sigmas: Sequence[float] | None, mu: float | None
) -> None:
    """diffusers' own set-up of the solver's memory, and then our sigmas in the place of its own."""
    given = scheduler.own_sigmas or sigmas
    cls.set_timesteps(scheduler, len(given) if given is not None else steps, device=device)
    scheduler._take(steps, device, given, mu)
    scheduler.sigmas = scheduler.sigmas.clamp(max=FIRST_SIGMA)


def made_like(
    scheduler: FlowMatchEulerDiscreteScheduler,
    solver: str,
    sigmas: Sequence[float] | None,
    shift: float | None,
) -> Any:
    """The solver in the place of a pipeline's FlowMatchEuler, with what that one's config says of the schedule."""
    config: Any = scheduler.config
    train = config.num_train_timesteps
    fixed = shift if shift is not None else None if config.use_dynamic_shifting else config.shift
    if solver == "euler":
        changed = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
        return FlowMatchEulerDiscreteScheduler.from_config(config, **changed)
    made: Any
    if solver == "heun":
        made = FlowHeun(num_train_timesteps=train)
    else:
        multistep: Any = {"dpmpp_2m": FlowDPMSolver, "unipc": FlowUniPC}[solver]
        made = multistep(num_train_timesteps=train, prediction_type="flow_prediction", use_flow_sigmas=True)
    made.own_sigmas, made.own_shift = sigmas, fixed
    return made
