"""prompts.jsonl: what a prompts file asked for when the run began, so that a run that goes on sees what has changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from fluxrun.atomic import write_atomically
from fluxrun.errors import ConfigError
from fluxrun.formatting import shorten
from fluxrun.reading import Unreadable, first_problem, read_text
from fluxrun.record.schema import Asked, RecordModel

ASKED = "prompts.jsonl"


class AskedLine(RecordModel):
    """A line of a prompts file: its text and images."""

    line: int
    prompt: str
    seed: int
    num_images: int = 1

    def __str__(self) -> str:
        images = f", {self.num_images} images" if self.num_images > 1 else ""
        return f"{shorten(repr(self.prompt), 60)} (seed {self.seed}{images})"


def lines_of(jobs: Sequence[Asked]) -> list[AskedLine]:
    """A run's images by the lines that ask for them."""
    found: dict[int, AskedLine] = {}
    for job in jobs:
        if job.line in found:
            found[job.line].num_images += 1
        else:
            found[job.line] = AskedLine(line=job.line, prompt=job.prompt, seed=job.seed)
    return list(found.values())


def write(folder: Path, jobs: Sequence[Asked]) -> None:
    """Write a run's prompts.jsonl."""
    write_atomically(folder / ASKED, "".join(line.model_dump_json() + "\n" for line in lines_of(jobs)))


def read(folder: Path) -> list[AskedLine] | None:
    """A run's prompts.jsonl, or None where it has none. Raises ConfigError in one line."""
    path = folder / ASKED
    try:
        return [AskedLine.model_validate_json(line) for line in read_text(path).split("\n") if line]
    except FileNotFoundError:
        return None
    except Unreadable as error:
        raise ConfigError(f"{path} {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path} is no list of prompts of fluxrun's: {first_problem(error)}") from error
