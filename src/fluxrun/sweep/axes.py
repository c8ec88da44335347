"""The axes of a grid: what each varies, and what each of its values changes in a job's config.

A composition takes a tenth of a second, a grid may have ten thousand jobs. So each distinct value that picks an option
is composed once, beside the first values of all other axes; what it changes there it changes in all jobs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.override_parser.types import Override, QuotedString, RangeSweep, Transformer

from fluxrun.errors import ConfigError
from fluxrun.types import JsonObject

Path_ = tuple[str, ...]
"""Where a key lies in the config."""

Changes = dict[Path_, Any]
"""The values that differ from another config's, by where they lie."""

GONE: Any = object()
"""The value of a key that another config does not have."""


@dataclass(frozen=True)
class Axis:
    """One key of the grid, with the values it takes; most have one."""

    override: Override
    count: int
    """How many values it has; a repeated one counts again."""

    @property
    def key(self) -> str:
        """The key as it is overridden, with its ``+``."""
        return str(self.override.get_key_element())

    def picks_options(self, hydra: Hydra) -> bool:
        """Whether its values are names of files to compose, and not values of the config."""
        return bool(hydra.config_loader.get_group_options(self.override.key_or_group))

    def values(self) -> list[tuple[str, Any]]:
        """Each value as an override of its own, and as Hydra's grammar reads it."""
        if not self.override.is_sweep_override():
            return [(f"{self.key}={self.override.get_value_element_as_str()}", self.override.value())]
        return [(f"{self.key}={Transformer.str(value)}", value) for value in self.override.sweep_iterator()]


def axes_of(overrides: Sequence[Override]) -> list[Axis]:
    """The axes that overrides make, counted and not listed. Raises ConfigError for one that cannot be counted.

    Of two for the same key the later one counts, at the place of the first.
    """
    return list({str(o.get_key_element()): Axis(o, _count(o)) for o in overrides}.values())


def _count(override: Override) -> int:
    if not override.is_sweep_override():
        return 1
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{override.input_line}: Hydra's own sweeper does not support sweep type interval (optuna's does)"
        )
    swept = override.value()
    count = _length(swept) if isinstance(swept, RangeSweep) else sum(1 for _ in override.sweep_iterator())
    if not count:
        raise ConfigError(f"{override.input_line}: there is nothing to vary")
    return count


def _length(swept: RangeSweep) -> int:
    """How many numbers a range has; a large one is never listed."""
    assert swept.start is not None
    assert swept.stop is not None
    try:
        return max(0, math.ceil((swept.stop - swept.start) / swept.step))
    except (ArithmeticError, ValueError) as error:  # a step of 0, nothing finite
        raise ConfigError(f"range({swept.start}, {swept.stop}, {swept.step}) cannot be counted: {error}") from error


# --- what a value changes -------------------------------------------------------------------------------------------


def changes_of(
    axis: Axis,
    values: Sequence[tuple[str, Any]],
    base: JsonObject,
    hydra: Hydra,
    beside: Callable[[str], JsonObject],
) -> list[Changes]:
    """What each value of an axis changes in ``base``, the config of the first values; ``beside`` composes a value
    with the first ones of the other axes."""
    known: dict[str, Changes] = {values[0][0]: {}}
    listed = len(values) == 1 or axis.picks_options(hydra) or not re.fullmatch(r"\+*[\w.]+", axis.key)
    for override, value in values:
        if override in known:
            continue
        if not listed and _stands_as_given(value):
            known[override] = {tuple(axis.key.lstrip("+").split(".")): _text(value)}
        else:
            known[override] = differences(base, beside(override))
    return [known[override] for override, _ in values]


def _stands_as_given(value: Any) -> bool:
    """Whether a value stands in the config just as it is given, and needs no composition."""
    value = _text(value)
    return isinstance(value, int | float | None) or (isinstance(value, str) and not re.search(r"[$\\?]", value))


def _text(value: Any) -> Any:
    return value.text if isinstance(value, QuotedString) else value


def differences(base: Any, other: Any, within: Path_ = ()) -> Changes:
    """What has to be changed in ``base`` to make it ``other``."""
    if not (isinstance(base, dict) and isinstance(other, dict)):
        return {} if _same(base, other) else {within: other}
    found: Changes = {(*within, key): GONE for key in base if key not in other}
    for key, value in other.items():
        found |= differences(base[key], value, (*within, key)) if key in base else {(*within, key): value}
    return found


def _same(one: Any, other: Any) -> bool:
    """1, 1.0 and True are not the same in a config, as they are not in its hash."""
    return repr(one) == repr(other)


def changed(base: JsonObject, changes: Changes) -> dict[str, Any]:
    """``base`` with changes; what they do not touch is shared."""
    data: dict[str, Any] = dict(base)
    for path, value in changes.items():
        node = data
        for key in path[:-1]:
            inner = node.get(key)
            node[key] = dict(inner) if isinstance(inner, dict) else {}
            node = node[key]
        if value is GONE:
            node.pop(path[-1], None)
        else:
            node[path[-1]] = value
    return data
