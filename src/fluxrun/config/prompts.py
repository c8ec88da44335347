"""What to draw: prompts from the command line or a file, times seeds, into a list of images to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError
from fluxrun.formatting import counted, shorten
from fluxrun.paths import expanded
from fluxrun.reading import Unreadable, parse_json, parse_yaml, read_text

ALLOWED_KEYS = ("prompt", "seed", "num_images")

SEEDS = 2**63
"""Seeds are below this: torch's generator takes no larger ones."""


MOST_IMAGES = 10_000
"""More are refused: a run lists its pictures before it draws."""


@dataclass(frozen=True)
class Job:
    """One image to draw."""

    prompt: str
    seed: int
    line: int = 1
    """Its prompt's line in the prompts file (of YAML, and of a list on the command line: its place), from 1."""
    number: int = 1
    """Which image of that prompt it is, from 1. Two equal lines are two images each."""
    index: int = 0
    """Its place among the run's images, which its file is named after."""


def jobs_of(config: RunConfig) -> list[Job]:
    """Every image of a run: prompt by prompt, seeds counting up.

    Raises ConfigError for a bad prompts file, and for more images than a run can have, before any is listed.
    """
    entries = read_prompts(config.prompts_file) if config.prompts_file else _from_command_line(config)
    images = sum(entry.get("num_images", config.num_images) for _, entry in entries)
    if images > MOST_IMAGES:
        raise ConfigError(f"this run has {counted(images)} images, and {MOST_IMAGES:,} are the most that one can have")
    jobs: list[Job] = []
    for line, entry in entries:
        first = entry.get("seed", config.seed)
        count = entry.get("num_images", config.num_images)
        if first + count > SEEDS:
            raise ConfigError(f"seed={first} with num_images={count}: seeds must stay below 2**63")
        prompt, index = _text(entry["prompt"]), len(jobs)
        jobs += [Job(prompt, first + n, line, n + 1, index + n) for n in range(count)]
    return jobs


def texts_of(jobs: Sequence[Job], negative_prompt: str | None) -> list[str]:
    """Every text a run must encode, once each: its prompts, and with guidance the negative one."""
    negative = [] if negative_prompt is None else [negative_prompt]
    return list(dict.fromkeys([*(job.prompt for job in jobs), *negative]))


def _text(prompt: str) -> str:
    """The prompt, if it can be written as UTF-8 (half a surrogate pair or a stray byte of a command line cannot)."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt {ascii(prompt)[:60]} is not text: {error.reason}") from error
    return prompt


def _from_command_line(config: RunConfig) -> list[tuple[int, dict[str, Any]]]:
    prompts = [config.prompt] if isinstance(config.prompt, str) else list(config.prompt or ())
    if not prompts:
        raise ConfigError("nothing to draw: give prompt=… (a text or [a list]) or prompts_file=…")
    return [(number, {"prompt": prompt}) for number, prompt in enumerate(prompts, 1)]


def read_prompts(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Lines and entries ``{prompt, seed?, num_images?}`` of a .txt (one prompt a line), .yaml/.yml or .jsonl file.

    Raises ConfigError when the file is missing, unreadable, empty or of another shape.
    """
    path = expanded(path)
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise ConfigError(f"prompts_file={path}: no such file") from error
    except Unreadable as error:
        raise ConfigError(f"prompts_file={shorten(path)} {error}") from error
    readers = {".txt": _read_lines, ".yaml": _read_yaml, ".yml": _read_yaml, ".jsonl": _read_json_lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"prompts_file={path}: the ending must be one of {', '.join(readers)}")
    entries = [(number, _entry(path, number, raw)) for number, raw in reader(path, text)]
    if not entries:
        raise ConfigError(f"prompts_file={path} holds no prompt")
    return entries


def _read_lines(path: Path, text: str) -> list[tuple[int, Any]]:
    # Not splitlines(): that also breaks at characters such as U+2028, which a prompt may hold.
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _read_json_lines(path: Path, text: str) -> list[tuple[int, Any]]:
    entries = []
    for number, line in _read_lines(path, text):
        try:
            entries.append((number, parse_json(line)))
        except Unreadable as error:
            raise ConfigError(f"prompts_file={path} line {number} {error}") from error
    return entries


def _read_yaml(path: Path, text: str) -> list[tuple[int, Any]]:
    try:
        content = parse_yaml(text)
    except Unreadable as error:
        raise ConfigError(f"prompts_file={path} {error}") from error
    if not isinstance(content, (list, type(None))):
        raise ConfigError(f"prompts_file={path} must hold a list of prompts, got a {type(content).__name__}")
    return list(enumerate(content or [], 1))


def _entry(path: Path, number: int, raw: Any) -> dict[str, Any]:
    entry = {"prompt": raw} if isinstance(raw, str) else raw
    where = f"prompts_file={path}, entry {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ConfigError(f"{where}: must be a text or a mapping with a prompt, got {shorten(raw)}")
    if unknown := sorted(map(str, set(entry) - set(ALLOWED_KEYS))):
        raise ConfigError(f"{where}: unknown key {shorten(unknown[0])!r}, allowed: {', '.join(ALLOWED_KEYS)}")
    for key, least in (("seed", 0), ("num_images", 1)):
        value = entry.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{where}: {key} must be a whole number of at least {least}, got {shorten(value)}")
    return entry
