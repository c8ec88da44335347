"""``fluxrun tune``: find the fastest options that keep the picture, by measuring, and write them as a preset.

Options are tried group by group on top of the best so far: kernels first, because they need no compiling, then ways of
compiling, decoding, number formats, which pay only together with compiling, and step caches. At the end come those
that go only in the place of one that was taken: torch.compile in that of fused kernels takes half a minute to be ready,
and what is taken in that time pays more. What would fall back here is left out before anything is loaded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fluxrun.config.catalog import Catalog, is_neutral_option
from fluxrun.config.schema import GROUPS, RunConfig
from fluxrun.errors import ConfigError, FluxrunError, Interrupted, one_line
from fluxrun.formatting import decibels, seconds
from fluxrun.options.base import load_option
from fluxrun.options.groups import SEARCH_ORDER
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.planning.prepare import prepare
from fluxrun.process.console import ConsoleHandler
from fluxrun.record.folder import write_failure
from fluxrun.report.comparison import compare
from fluxrun.report.result import SweepProgress, finish
from fluxrun.report.rows import Row, config_value, read_row, read_rows
from fluxrun.runner import run
from fluxrun.sweep.baseline import neutral_data
from fluxrun.sweep.trials import Trial, together
from fluxrun.types import JsonObject

log = logging.getLogger("fluxrun.tune")

AS_CONFIGURED = tuple(group for group in GROUPS if group not in SEARCH_ORDER)
"""Not searched: which model is the user's choice, and where the weights lie is memory=auto's, by what fits."""

WORTH = 0.02
"""A gain in speed below this share is noise: the simpler option stays."""

MOST_NOISE = 0.1
"""A gain above this share counts however much the repeats differ: their fastest ones are what is compared."""

MOST_STEPS = 8
"""Steps of a measured image when nobody says otherwise: enough to compare, for a model of fifty too."""

UNUSABLE = "not usable here: "


@dataclass
class Tuner:
    """The search: the best config so far, and everything tried."""

    data: dict[str, Any]
    dirs: tuple[Path, ...]
    folder: Path
    min_psnr: float
    fixed: frozenset[str]
    thorough: bool
    minutes: float
    command: list[str]
    pool: SessionPool = field(default_factory=SessionPool)
    trials: list[Trial] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)
    put_off: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    """Options that go only in the place of one that was taken: group, name and data."""
    started: float = field(default_factory=time.perf_counter)

    def search(self) -> tuple[Row, Row]:
        """Measure the neutral options, then group by group what is faster; returns the baseline and the best."""
        asked, self.data = self.data, neutral_data(self.data, self.dirs, keep=AS_CONFIGURED)
        baseline = self._measure(self.data, "the neutral options")
        if baseline.status != "completed" or baseline.image_s is None:
            raise FluxrunError(f"the neutral options could not be measured: {baseline.reason} (see {self.folder})")
        log.info("    %s", _pace(baseline))
        return baseline, self.search_all(self._as_fixed(asked, baseline))

    def search_all(self, best: Row) -> Row:
        """Go through the groups on top of the best so far; returns the best of all."""
        for group in (g for g in SEARCH_ORDER if g not in self.fixed):
            self._note_broken(group)
            best = self._search_group(group, self.candidates(group), best)
        for group, name, candidate in self.put_off:
            best = self._search_group(group, [(name, candidate)], best, in_place_of_others=True)
        return best

    def _as_fixed(self, asked: JsonObject, baseline: Row) -> Row:
        """Where the search starts: the neutral options, but for the groups that the command line names."""
        self.data = {**self.data, **{group: asked[group] for group in GROUPS if group in self.fixed}}
        self.chosen = {group: self.data[group]["name"] for group in GROUPS if group != "model"}
        if all(self.chosen[g] == baseline.options[g].requested for g in self.fixed if g in self.chosen):
            return baseline
        start = self._measure(self.data, "as the command line says")
        if start.status != "completed":
            raise FluxrunError(f"the options of the command line could not be measured: {start.reason}")
        log.info("    %s, PSNR %s", _pace(start), decibels(self.psnr(start)))
        return start

    # -- one group ----------------------------------------------------------------------------------------------

    def _note_broken(self, group: str) -> None:
        broken = Catalog(self.dirs).broken(group)
        self.trials += self._said([Trial(group, name, UNUSABLE + reason) for name, reason in broken.items()])

    def _search_group(
        self, group: str, options: list[tuple[str, dict[str, Any]]], best: Row, *, in_place_of_others: bool = False
    ) -> Row:
        found = []
        for name, candidate in options:
            usable, reason = self.made_usable(group, name, candidate)
            if usable is None:
                found.append(Trial(group, name, reason))
                continue
            if self.given_up(group, usable) and not in_place_of_others:
                self.put_off.append((group, name, candidate))
                continue
            trial = self.attempt(group, name, usable, best)
            found.append(trial)
            if trial.taken and trial.row is not None:
                best = trial.row
                self.take(usable, best)
        self.trials += self._said(found)
        return best

    def _said(self, found: list[Trial]) -> list[Trial]:
        """The trials; on the screen, those in which nothing was measured."""
        for reason, names in together(t for t in found if t.row is None).items():
            log.info("%s: %s %s", found[0].group, ", ".join(names), reason)
        return found

    def candidates(self, group: str) -> list[tuple[str, dict[str, Any]]]:
        """The group's options as they lie in a config, those that are ready soonest first."""
        catalog = Catalog(self.dirs)
        names = [n for n in catalog.loadable(group) if n != "auto" and not is_neutral_option(group, n)]
        data = {name: catalog.data(group, name) for name in names if name != self.chosen[group]}
        return sorted(data.items(), key=lambda item: (item[1].get("scope") == "full", item[0]))

    def made_usable(self, group: str, name: str, option: JsonObject) -> tuple[dict[str, Any] | None, str]:
        """The config in which an option runs, or None and why there is none.

        An option that only does not go with one taken before gets a chance without that one.
        """
        if not self.thorough and load_option(option).autotunes:
            return None, "not tried: its first image may take minutes (--thorough tries it)"
        if time.perf_counter() - self.started > 60 * self.minutes:
            return None, f"not tried: the {self.minutes:g} minutes were over (--minutes)"
        candidate = {**self.data, group: option}
        if (reason := self.falls_back(group, candidate)) is None:
            return candidate, ""
        neutral = neutral_data(self.data, self.dirs, keep=(*AS_CONFIGURED, *self.fixed))
        for other in self.trials:
            without = {**candidate, other.group: neutral[other.group]}
            if other.taken and other.name == self.chosen[other.group] and self.falls_back(group, without) is None:
                return without, ""
        return None, UNUSABLE + reason

    def given_up(self, group: str, data: JsonObject) -> list[str]:
        """The other groups in which a config has not what is taken so far."""
        return [g for g in self.chosen if g != group and config_value(data, g) != self.chosen[g]]

    def falls_back(self, group: str, data: JsonObject) -> str | None:
        """Why a config's option would not run here, or None; nothing is loaded."""
        try:
            choice = prepare(RunConfig.from_dict(data, self.dirs)).plan.choices[group]
        except FluxrunError as error:
            return one_line(error)
        return choice.fallbacks[0].reason if choice.fallbacks else None

    def attempt(self, group: str, name: str, data: JsonObject, best: Row) -> Trial:
        """Measure an option in its config, and say what came of it."""
        also = "".join(f" {g}={config_value(data, g)}" for g in self.given_up(group, data))
        began = time.perf_counter()
        row = self._measure(data, f"{group}={name}{also}")
        verdict, taken = self.judge(group, row, best)
        log.info("    %s (%.0f s)", verdict + (": taken" if taken else ""), time.perf_counter() - began)
        return Trial(group, name, (f"with{also}: " if also else "") + verdict, row, taken)

    def take(self, data: JsonObject, row: Row) -> None:
        """Go on from here; an option of another group that had to give way is given up."""
        catalog = Catalog(self.dirs)
        fell_back = {g: row.options[g].effective for g in self.chosen if row.options[g].fell_back}
        # Loaded anew, an option that only lost a knob would lose its other ones, too.
        gave_way = {g: name for g, name in fell_back.items() if name != config_value(data, g)}
        self.data = {**data, **{g: catalog.data(g, name) for g, name in gave_way.items()}}
        self.chosen = {group: self.data[group]["name"] for group in self.chosen}

    # -- one measurement ----------------------------------------------------------------------------------------

    def _measure(self, data: JsonObject, title: str) -> Row:
        """Draw a config's pictures into a folder of their own; a failure is a row too."""
        number = len(list(self.folder.glob("*/run.json")))
        log.info("[%d, %.0f s] %s …", number, time.perf_counter() - self.started, title)
        folder = self.folder / str(number)
        (folder / ".hydra").mkdir(parents=True)
        # Where the table looks for what a job differs in.
        overrides = [f"{group}={config_value(data, group)}" for group in GROUPS if group != "model"]
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides), encoding="utf-8")
        try:
            with _only_tune_speaks():
                run(RunConfig.from_dict(data, self.dirs), folder, command=self.command, pool=self.pool)
        except Interrupted:
            raise
        except Exception as error:  # the option's failure is the finding; its traceback is in the log
            write_failure(folder, data, error)
        return read_row(folder, self.folder)

    def judge(self, group: str, row: Row, best: Row) -> tuple[str, bool]:
        """What to say of an option, and whether it is taken."""
        if row.status != "completed":
            return f"failed: {row.reason}", False
        if row.options[group].fell_back:
            return f"fell back: {row.options[group].fallbacks[0].reason}", False
        # The fastest of the repeats: another program on the machine makes single ones slow, never fast.
        assert row.fastest_image_s is not None
        assert best.fastest_image_s is not None
        psnr = self.psnr(row)
        figures = f"{_pace(row)}, PSNR {decibels(psnr)}"
        if psnr is None or psnr < self.min_psnr:
            return f"{figures}: the picture changes more than {self.min_psnr:g} dB allows", False
        gain, unsure = 1 - row.fastest_image_s / best.fastest_image_s, max(noise(row), noise(best))
        if gain < WORTH:
            return f"{figures}: not faster than {seconds(best.fastest_image_s)}", False
        if gain < unsure:
            return f"{figures}: {gain:.0%} faster, but the repeats differ by {unsure:.0%}", False
        return figures, True

    def psnr(self, row: Row) -> float | None:
        """How near a row's pictures are to the baseline's, the worst of them."""
        rows = read_rows(self.folder, self.folder)
        if problems := compare(rows, self.folder):
            raise ConfigError(f"tune measures fidelity, and cannot: {problems[0]}")
        return next(found.psnr_db for found in rows if found.job == row.job)

    def finish(self, status: str = "completed") -> dict[str, Row]:
        """Write the table and the page of everything measured; returns the compared rows by job."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        progress = SweepProgress(status, self.command, now, time.perf_counter() - self.started, [])
        progress.loads = self.pool.loads
        return {row.job: row for row in finish(self.folder, progress, "auto").jobs}


def noise(row: Row) -> float:
    """By how much the repeats differ among themselves (median over fastest), which is what a gain has to exceed."""
    if row.image_s is None or not row.fastest_image_s:
        return 0.0
    return min(MOST_NOISE, row.image_s / row.fastest_image_s - 1)


def _pace(row: Row) -> str:
    first = f", first one {seconds(row.first_image_s)}" if row.first_image_s else ""
    return f"{seconds(row.fastest_image_s)} an image{first}"


@contextmanager
def _only_tune_speaks() -> Iterator[None]:
    """A measured run's own lines go to the log file; on the screen there is one line per option."""
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, ConsoleHandler)]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
