"""Tries a checkpoint's chat template out in a process with limits: it is a program that may never end.

``python -m fluxrun.weights.chat_template`` is that process. transformers renders in a sandbox, where a template can
reach nothing; but its loops have no limit that matters (two nested ones of 100,000 turns each take hours).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxrun.errors import ConfigError

MOST_SECONDS = 5
MOST_BYTES = 2**30
MOST_CHARACTERS = 1_000_000
"""What a template may take, and write, for one prompt: a hundred times what any real one does."""

PROMPT = "a cat and a dog, " * 100

TOO_MUCH = 3
"""Exit code of a trial that ran out of what it was given."""


def templates_of(tokenizer: Any) -> list[str]:
    """The templates of a tokenizer or processor: one, several by name, or none."""
    found = getattr(tokenizer, "chat_template", None)
    candidates = found.values() if isinstance(found, dict) else [found]
    return [template for template in candidates if isinstance(template, str)]


def check_templates(templates: Sequence[str], where: Path) -> None:
    """Refuse templates that do not write a prompt out with little time and memory. Raises ConfigError."""
    for template in templates:
        if not _tried(template):
            raise ConfigError(
                f"{where}: its chat template takes more than {MOST_SECONDS} s, {MOST_BYTES // 2**20:,} MB or "
                f"{MOST_CHARACTERS:,} characters to write a prompt out; it is not used"
            )


def _tried(template: str) -> bool:
    """Whether a trial ends by itself, well or with an error in the template: that, the tokenizer will report."""
    trial = [sys.executable, "-m", "fluxrun.weights.chat_template"]
    try:
        done = subprocess.run(
            trial, input=template.encode(), capture_output=True, timeout=2 * MOST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return 0 <= done.returncode != TOO_MUCH


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows: the time is limited from outside
        return
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _render(template: str) -> int:
    """How many characters the template writes for a prompt, in either of the forms in which the pipelines give it."""
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """transformers' tag for what a model answers: its body, here as there."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's way

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value)
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda format: format}
    ready = environment.from_string(template)
    entries = [{"type": "text", "text": PROMPT}]
    plain = [{"role": "user", "content": PROMPT}]
    typed = [{"role": "system", "content": entries}, {"role": "user", "content": entries}]
    written = 0
    for messages, settings in ((plain, {"add_generation_prompt": True, "enable_thinking": False}), (typed, {})):
        try:
            written += len(ready.render(messages=messages, **settings))
        except MemoryError:
            raise
        except (
            Exception
        ):  # a template that takes only one of the forms; the tokenizer says what is wrong with the other
            continue
    return written


def _raise(message: str) -> None:
    raise ValueError(message)


def _main() -> int:
    template = sys.stdin.buffer.read().decode()
    _limit()
    try:
        return TOO_MUCH if _render(template) > MOST_CHARACTERS else 0
    except MemoryError:
        return TOO_MUCH
    except Exception as error:
        print(type(error).__name__, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(_main())
