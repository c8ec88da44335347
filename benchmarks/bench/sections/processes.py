"""Whole ``fluxrun`` processes: a new one's first image, and models under a limit on the GPU's memory."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import command
from bench.results import Measured, Row, markdown, newest
from bench.section import Run, Section
from bench.settings import FAST, LOSSLESS, fluxrun


class FirstImage(Section):
    """A new process's first image per setting: nothing compiled before (``cold``), and the same again (``warm``)."""

    def measure(self, run: Run) -> None:
        for setting in (one for one in (LOSSLESS, FAST, fluxrun("neutral")) if run.keep.has(one.name)):
            arguments, log = [*run.models["klein_4b"], *setting.overrides], run.logs / "first_image.log"
            with tempfile.TemporaryDirectory(prefix="fluxrun-speed-") as folder:
                caches = {"FLUXRUN_CACHE_DIR": f"{folder}/cache", "TRITON_CACHE_DIR": f"{folder}/triton"}
                for state in ("cold", "warm"):
                    line, out = [*command.FLUXRUN, *arguments], Path(folder) / state
                    row = {"setting": setting.name, "state": state, "overrides": arguments}
                    run.say(run.add(row | command.run(line, out, min(120.0, run.left), log, caches)))

    def entries(self, one: Measured) -> Iterator[Row]:
        yield one.entry(self.label, f"{self.metric}, {one.row['state']}", self.unit, self.beyond(one))

    def beyond(self, one: Measured) -> float:
        """Seconds of a run less importing its libraries and loading its weights."""
        return round(one.timings.total_s - one.timings.import_s - one.timings.load_s, 2)

    def tables(self, rows: Sequence[Measured]) -> dict[str, str]:
        header = ("setting", "compiled code", "whole process", "imports", "load", "beyond both", "of it the first step")
        return {self.name: markdown(header, map(self._line, newest(rows, self.name).values()))}

    def _line(self, one: Measured) -> list[str]:
        known = one.timings.import_s, one.timings.load_s, self.beyond(one), one.timings.first_call_s
        return [one.shown, one.row["state"], *(f"{seconds:.1f} s" for seconds in (one.row["process_s"], *known))]


FIRST_IMAGE = FirstImage(
    name="first_image", about="the first image of a new process, compiled code at hand or not", seconds=180,
    metric="first image of a new process beyond imports and load",
)  # fmt: skip


@dataclass(frozen=True)
class Limited:
    """A model under a limit on the GPU's memory, drawn by one process."""

    name: str
    model: str
    budget_gb: int
    overrides: tuple[str, ...] | None
    """None: plain diffusers with ``enable_model_cpu_offload``."""
    steps: int = 4
    seconds: float = 150
    """The longest it may take."""


PLAIN_OFFLOAD = "plain diffusers' model offload"
LIMITED = (
    Limited("klein-9B bf16, auto", "klein_9b", 24, ("memory=auto",)),
    Limited("dev fp8, preset rtx4090_24gb", "dev", 24, ("+preset=rtx4090_24gb",), steps=8),
    Limited("dev bf16, staged", "dev", 80, ("memory=staged", "kernels=fused"), steps=8),
    Limited(f"klein-9B bf16, {PLAIN_OFFLOAD}", "klein_9b", 24, None),
    Limited("dev fp8, group", "dev", 24, ("memory=group", "quantization=fp8"), steps=8),
    Limited("klein-9B bf16, group", "klein_9b", 12, ("memory=group",)),
    Limited("klein-9B bf16, auto", "klein_9b", 12, ("memory=auto", "kernels=fused")),
    Limited("klein-4B bf16, auto", "klein_4b", 12, ("memory=auto",)),
    Limited("klein-9B bf16, staged", "klein_9b", 24, ("memory=staged",)),
    Limited("klein-9B bf16, balanced", "klein_9b", 24, ("memory=balanced",)),
    Limited("klein-9B bf16, group", "klein_9b", 24, ("memory=group",)),
    Limited("dev bf16, auto", "dev", 48, ("memory=auto", "kernels=fused"), steps=8),
    Limited("dev bf16, balanced", "dev", 80, ("memory=balanced",), steps=8),
    Limited(f"dev bf16, {PLAIN_OFFLOAD}", "dev", 80, None, steps=8, seconds=300),
)


class Memory(Section):
    """Every model under its limit; a process's second image counts, the first also pays for what is set up once."""

    def measure(self, run: Run) -> None:
        for one in (one for one in LIMITED if run.keep.has(f"{one.name} {one.budget_gb}")):
            offloaded = one.overrides is None
            line = [sys.executable, "-m", "bench.offloaded"] if offloaded else [*command.FLUXRUN, "measure.repeats=2"]
            given = [*run.models[one.model], f"steps={one.steps}", *(one.overrides or ())]
            given.append(f"memory.budget_gb={one.budget_gb}")
            about = {"setting": one.name, "model": one.model, "budget_gb": one.budget_gb, "steps": one.steps}
            with tempfile.TemporaryDirectory(prefix="fluxrun-speed-") as folder:
                seconds, log = min(one.seconds, run.left), run.logs / "memory.log"
                row = command.run([*line, *given], Path(folder) / "run", seconds, log)
            run.say(run.add({**about, "overrides": given, **row}))

    def entries(self, one: Measured) -> Iterator[Row]:
        label, limit = one.row["setting"].partition(" ")[0], f"under {one.row['budget_gb']:g} GB"
        yield one.entry(label, f"peak memory {limit}", "GB", self.peak_gb(one))
        yield one.entry(label, f"image of {one.row['steps']} steps {limit}", "s", self.image_s(one))

    def peak_gb(self, one: Measured) -> float:
        """Peak memory of a run in GB (2**30 bytes)."""
        return round(one.row["memory"]["peak_allocated_bytes"] / 2**30, 2)

    def image_s(self, one: Measured) -> float:
        """Seconds of a run's last image: text, steps and decode."""
        return round(sum(one.timings.text_encode_s) + one.timings.denoise_s[-1] + one.timings.decode_s[-1], 3)

    def tables(self, rows: Sequence[Measured]) -> dict[str, str]:
        found = newest(rows, self.name, failed=True).values()
        header = ("what", "limit", "placement", "peak", "step", "s per image", "note")
        order = sorted(found, key=lambda one: (one.row["model"], one.row["budget_gb"]))
        return {self.name: markdown(header, map(self._line, order))}

    def _line(self, one: Measured) -> list[str]:
        row, about = one.row, [one.row["setting"], f"{one.row['budget_gb']:g} GB"]
        if not one.done:
            return [*about, "–", "–", "–", "–", f"{row['status']}: {row['error']}"]
        step = f"{one.timings.steady_step_s.median:.3f} s" if one.timings.steady_step_s else "–"
        figures = [f"{self.peak_gb(one):.1f} GB", step, f"{self.image_s(one):.2f} s", f"{row['steps']} steps"]
        return [*about, row["options"]["memory"]["effective"], *figures]


MEMORY = Memory(
    name="memory", about="models under a limit on the GPU's memory, by where their weights lie", seconds=420
)
