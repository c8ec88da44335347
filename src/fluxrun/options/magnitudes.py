"""How much each step changes a picture, against the step before: what MagCache is calibrated with. Imports torch."""

from __future__ import annotations

from typing import Any

import torch


class Magnitudes:
    """Watches a transformer: the norm of what its blocks add to each image token, over the norm a step before.

    ``twice``: guidance calls it twice a step, and each of the two is compared with itself.
    """

    def __init__(self, transformer: Any, steps: int, *, twice: bool) -> None:
        self._steps, self._branches = steps, 2 if twice else 1
        self._entering: torch.Tensor | None = None
        self._before: list[torch.Tensor | None] = [None] * self._branches
        self._calls = 0
        self._sums = [0.0] * steps
        transformer.transformer_blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        transformer.single_transformer_blocks[-1].register_forward_hook(self._leave)

    def _enter(self, block: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._entering = named["hidden_states"] if "hidden_states" in named else arguments[0]

    def _leave(self, block: Any, arguments: tuple[Any, ...], output: Any) -> None:
        entering = self._entering
        assert entering is not None
        leaving = output[-1] if isinstance(output, tuple) else output
        # The last blocks work on text and image in one sequence, the image at its end.
        norms = torch.linalg.norm((leaving[:, -entering.shape[1] :] - entering).float(), dim=-1)
        step, branch = self._calls // self._branches % self._steps, self._calls % self._branches
        before = self._before[branch]
        ratio = 1.0 if step == 0 or before is None else (norms / (before + 1e-8)).mean().item()
        self._sums[step] += ratio
        self._before[branch] = norms
        self._calls += 1

    def ratios(self) -> list[float]:
        """One for each step, the first of which is 1."""
        passes = max(1, self._calls // self._steps)
        return [total / passes for total in self._sums]
