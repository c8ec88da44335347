"""Which algorithm multiplies which shape: torch's own, unless a faster one gives the very same bits."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from fluxrun.errors import one_line
from fluxrun.kernels.transformer.cublas_lt import Algorithm, CublasError, Operands, Problem

log = logging.getLogger("fluxrun.build")

MOST_ALGORITHMS = 16
"""Suggestions of cublasLt that are looked at."""

FINALISTS = 4
"""Of those with the right bits, the fastest ones, which are timed once more."""

LEAST_GAIN = 0.01
"""A smaller share of the time is noise, and torch's own algorithm stays."""

SHORT_S, LONG_S = 0.004, 0.025
"""How long each algorithm is kept running: to find the finalists, and to choose among them."""

Multiply = Callable[[Operands], torch.Tensor]

Timer = Callable[[Callable[[], Any], float], float]
"""(what to keep running, for how many seconds) -> seconds of one call."""


def by_torch(operands: Operands) -> torch.Tensor:
    """``rows @ weight.T`` as torch computes it."""
    if operands.scales is None:
        return F.linear(operands.rows, operands.weight)
    rows, weight = operands.scales
    return torch._scaled_mm(
        operands.rows, operands.weight.t(), scale_a=rows, scale_b=weight, out_dtype=operands.dtype, use_fast_accum=True
    )


class Kept(Protocol):
    """What was chosen earlier on such a machine, by the shape's text; it may forget."""

    def get(self, shape: str) -> dict[str, Any] | None: ...

    def keep(self, shape: str, choice: dict[str, Any]) -> None: ...


class Choice(NamedTuple):
    """What became of one shape."""

    problem: Problem | None = None
    algorithm: Algorithm | None = None
    """None: torch's own."""
    gain: float = 0.0
    """Share of the time that it saves."""
    why: str = ""
    """Why it is torch's own."""


class Matmuls:
    """The choices of one device, made at a shape's first call and used by every layer of that shape."""

    def __init__(self, kept: Kept, *, problem: type[Problem] = Problem, timer: Timer | None = None) -> None:
        self._kept, self._problem, self._timer = kept, problem, timer or seconds_of
        self._choices: dict[str, Choice] = {}
        self._layers: list[Layer] = []

    def layer(self) -> Layer:
        """The matmul of one more layer."""
        self._layers.append(Layer(self))
        return self._layers[-1]

    def choice(self, operands: Operands) -> Choice:
        """The shape's choice; the first call makes it, with these operands, unless a CUDA graph is being recorded."""
        shape = text_of(operands)
        if shape not in self._choices:
            if operands.rows.is_cuda and torch.cuda.is_current_stream_capturing():
                return Choice(why="first met while a CUDA graph was recorded")
            self._choices[shape] = self._choose(shape, operands)
        return self._choices[shape]

    def facts(self) -> dict[str, Any]:
        """Layers by whose algorithm they use, and each shape's gain, or why it has none."""
        used = Counter(layer.used for layer in self._layers)
        shapes = {
            shape: choice.why or f"{100 * choice.gain:.1f} % faster, the same bits"
            for shape, choice in self._choices.items()
        }
        return {"chosen_matmuls": used["chosen"], "torch_matmuls": used["torch"], "matmul_shapes": shapes}

    def _choose(self, shape: str, operands: Operands) -> Choice:
        if not self._problem.suits(operands):
            return Choice(why="neither contiguous bfloat16 nor float8 rows on a GPU")
        try:
            problem = self._problem(operands)
            return self._remembered(problem, shape, operands) or self._raced(problem, shape, operands)
        except (CublasError, OSError, AttributeError) as error:  # no library, or one without these functions
            log.warning("cublasLt's algorithms cannot be tried for %s: %s", shape, one_line(error))
            return Choice(why=one_line(error))

    def _remembered(self, problem: Problem, shape: str, operands: Operands) -> Choice | None:
        """An earlier process's choice; its bits are compared again."""
        kept = self._kept.get(shape)
        if kept is None:
            return None
        try:
            if kept["algorithm"] is None:
                return Choice(why=str(kept["why"]))
            algorithm = problem.checked(bytes.fromhex(kept["algorithm"]))
            if _same_bits(problem, algorithm, operands, by_torch(operands)):
                return Choice(problem, algorithm, float(kept["gain"]))
        except (CublasError, KeyError, TypeError, ValueError) as error:
            log.info("what was chosen for %s earlier is of no use: %s", shape, one_line(error))
        return None

    def _raced(self, problem: Problem, shape: str, operands: Operands) -> Choice:
        choice = self._race(problem, operands)
        data = choice.algorithm and choice.algorithm.data.hex()
        self._kept.keep(shape, {"algorithm": data, "gain": round(choice.gain, 4), "why": choice.why})
        return choice

    def _race(self, problem: Problem, operands: Operands) -> Choice:
        expected = by_torch(operands)
        found = problem.algorithms(MOST_ALGORITHMS)
        same = [algorithm for algorithm in found if _same_bits(problem, algorithm, operands, expected)]
        del expected

        def seconds(algorithm: Algorithm | None, long: float) -> float:
            if algorithm is None:
                return self._timer(lambda: by_torch(operands), long)
            return self._timer(lambda: problem.multiply(operands, algorithm), long)

        finalists = sorted(same, key=lambda algorithm: seconds(algorithm, SHORT_S))[:FINALISTS]
        runners = [None, *finalists]
        there = [seconds(runner, LONG_S) for runner in runners]
        back = [seconds(runner, LONG_S) for runner in reversed(runners)][::-1]
        torchs, *times = [min(pair) for pair in zip(there, back, strict=True)]
        if not times:
            return Choice(why=f"none of cublasLt's {len(found)} algorithms gives torch's bits")
        gain = 1 - min(times) / torchs
        if gain < LEAST_GAIN:
            return Choice(why="torch's own is the fastest with its bits")
        return Choice(problem, finalists[times.index(min(times))], gain)


def seconds_of(call: Callable[[], Any], long: float) -> float:
    """Seconds of one call on the GPU, which is kept running with it for about so long."""

    def run(times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / times

    return run(max(3, round(long / run(2))))


def text_of(operands: Operands) -> str:
    """``4608x3072x27648``: rows, inner and outer dimension; with ``float8`` behind it if they are that."""
    return "x".join(map(str, operands.shape)) + ("" if operands.scales is None else " float8")


def _same_bits(problem: Problem, algorithm: Algorithm, operands: Operands, expected: torch.Tensor) -> bool:
    try:
        return torch.equal(problem.multiply(operands, algorithm), expected)
    except CublasError:  # a suggestion that does not run
        return False


class Layer:
    """One layer's matmul: ``rows @ weight.T``."""

    def __init__(self, matmuls: Matmuls) -> None:
        self._matmuls = matmuls
        self.used = ""
        """By whom the last call was computed: chosen, torch, or nobody yet."""

    def __call__(self, operands: Operands) -> torch.Tensor:
        choice = self._matmuls.choice(operands)
        if choice.problem is None or choice.algorithm is None or not choice.problem.suits(operands):
            self.used = "torch"
            return by_torch(operands)
        self.used = "chosen"
        return choice.problem.multiply(operands, choice.algorithm)
