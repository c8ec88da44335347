"""What the training stages share: a wall-clock schedule, averaged weights, the device."""

from __future__ import annotations

import copy
import math
import time

import torch
from torch import nn


class Clock:
    """Training by the clock: `progress` runs from 0 to 1 in `seconds`, counted from the end of the first steps.

    Steps before `start()` (compilation) do not count.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began = seconds, time.monotonic()

    def start(self) -> None:
        self.began = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def progress(self) -> float:
        return min(1.0, self.elapsed / self.seconds)


def rate(progress: float, step: int, warmup: int = 200) -> float:
    """Share of the peak learning rate: linear warm-up by steps, cosine to 1 % by progress."""
    return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Average:
    """An exponential moving average of a module's weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.steps = copy.deepcopy(module).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        mine = list(self.module.parameters())
        torch._foreach_lerp_(mine, [p.detach() for p in module.parameters()], 1 - decay)


def setup(seed: int) -> torch.device:
    """Seed, fast matmuls, and the device: CUDA where there is one, else the CPU."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """bf16 matmuls on a GPU, plain float32 on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def optimizer(module_groups: list[nn.Module], peak: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    parameters = [p for module in module_groups for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-8, fused=fused)
