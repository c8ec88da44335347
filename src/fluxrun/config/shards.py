"""A prompt set in parts, for processes that draw it together: which images are whose. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from fluxrun.config.prompts import Job

MOST_IMAGES = 100
"""So many images are a part, or the next whole batch more: what comes with each part is a hundredth of them."""

PARTS_PER_WORKER = 4
"""A small set is cut smaller, so that nobody waits long for the last one."""


@dataclass(frozen=True)
class Shard:
    """A part of a run's images: whole batches, in the run's order, of which each lacks an image."""

    number: int
    jobs: tuple[Job, ...]

    @property
    def name(self) -> str:
        """Which lines it has, for people."""
        first, last = self.jobs[0].line, self.jobs[-1].line
        return f"line {first}" if first == last else f"lines {first}-{last}"


def shards(jobs: Sequence[Job], done: Collection[int], batch_size: int, workers: int = 1) -> list[Shard]:
    """What is left of a run, cut into parts. ``done``: images that are there, by ``Job.index``.

    A batch is never cut: drawn in another one, an image would be rounded in another way.
    """
    left = [batch for batch in _batches(jobs, batch_size) if not all(job.index in done for job in batch)]
    each = math.ceil(sum(map(len, left)) / (PARTS_PER_WORKER * workers))
    most = max(1, min(MOST_IMAGES, each)) if workers > 1 else MOST_IMAGES
    per_shard = math.ceil(most / batch_size)
    parts = (left[n : n + per_shard] for n in range(0, len(left), per_shard))
    return [Shard(number, tuple(job for batch in part for job in batch)) for number, part in enumerate(parts)]


def _batches(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    return (jobs[n : n + size] for n in range(0, len(jobs), size))
