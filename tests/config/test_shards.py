"""A prompt set in parts: every image that is missing, once, and no batch cut."""

from __future__ import annotations

import itertools

import pytest

from fluxrun.config.prompts import Job
from fluxrun.config.shards import MOST_IMAGES, shards


def jobs_of(lines: int, images: int = 1) -> list[Job]:
    pairs = itertools.product(range(1, lines + 1), range(1, images + 1))
    return [Job("a cat", number, line, number, index) for index, (line, number) in enumerate(pairs)]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 128])
@pytest.mark.parametrize("workers", [1, 2, 50])
def test_every_missing_image_is_in_one_part_with_its_batch(batch_size: int, workers: int) -> None:
    jobs = jobs_of(180, 2)
    done = {*range(20), 55, 120, *range(300, 340)}
    parts = shards(jobs, done, batch_size, workers)
    drawn = [job for part in parts for job in part.jobs]
    assert drawn == sorted(set(drawn), key=lambda job: job.index)
    assert {job.index for job in drawn} >= {job.index for job in jobs} - done
    for part in parts:
        for place in range(0, len(part.jobs), batch_size):
            batch = part.jobs[place : place + batch_size]
            first = batch[0].index
            assert first % batch_size == 0
            assert list(batch) == jobs[first : first + batch_size], "as in an unbroken run"
            assert any(job.index not in done for job in batch)


def test_parts_are_of_about_a_hundred_images_and_smaller_where_few_are_left() -> None:
    assert {len(part.jobs) for part in shards(jobs_of(10_000), (), 1, 8)} == {MOST_IMAGES}
    assert len(shards(jobs_of(40), (), 1, 4)) == 14
    assert [part.name for part in shards(jobs_of(150), range(40), 1)] == ["lines 41-140", "lines 141-150"]
    assert shards(jobs_of(5), range(5), 1) == []
