"""A new process's first image, by the ordinary ``fluxrun`` command."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import command
from bench.results import Measured, Row, markdown, newest
from bench.section import Run, Section
from bench.settings import FAST, LOSSLESS, NEUTRAL


class FirstImage(Section):
    """A new process's first image per setting: nothing compiled before (``cold``), and the same again (``warm``)."""

    def measure(self, run: Run) -> None:
        for setting in (one for one in (LOSSLESS, FAST, NEUTRAL) if run.keep.has(one.name)):
            arguments, log = [*run.models["klein_4b"], *setting.overrides.split()], run.logs / "first_image.log"
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
