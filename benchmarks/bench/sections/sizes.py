"""Picture sizes one after the other in one process: what a step takes, what is compiled or captured again."""

from collections.abc import Iterator, Sequence
from functools import partial

from bench.results import Measured, Row, markdown, median, newest
from bench.section import Run
from bench.settings import FAST, REGIONAL, TINY
from bench.timed import Timed
from bench.worker import Job

SIZES_PX = ((512, 512), (768, 1360), (1024, 1024), (1536, 1536), (2048, 2048))
"""Height and width; one is not square."""
TINY_PX = ((64, 64), (64, 96), (96, 96))
COUNTED = ("graphs_compiled", "recompiles", "graph_breaks", "cudagraphs", "cuda_graphs")


def each_size(job: Job) -> Iterator[Row]:
    """A turn for each size."""
    from bench.subject import Subject

    subject, known, turns = Subject(job), dict[str, float](), list[Row]()
    yield {"build_peak_gb": subject.peak_gb()}
    yield {}
    for size in TINY_PX if TINY[0] in job.overrides else SIZES_PX:
        steps = partial(subject.step_ms, height=size[0], width=size[1])
        first_s, _ = subject.timed(partial(subject.first, steps))
        about = {"size": list(size), "first_call_s": first_s, "step_ms": [*steps(), *steps()]}
        facts = subject.facts()
        before, known = known, _counts(facts["options"]["compile"]["facts"])
        counts = {key: value - before.get(key, 0) for key, value in known.items()}
        turns.append({**about, "counts": counts, "peak_gb": facts.pop("peak_gb")})
        yield {"samples": {}, "turns": turns, **facts}


def _counts(facts: Row) -> dict[str, float]:
    """What the session has counted: compilations, recompilations, recorded graphs (over all targets)."""
    graphs = {"cuda_graphs": sum(facts["cuda_graphs"].values())} if "cuda_graphs" in facts else {}
    return {key: value for key, value in facts.items() if type(value) in (int, float)} | graphs


class Sizes(Timed):
    """Settings one at a time, a line for each size."""

    def turns(self, run: Run) -> int:
        return len(TINY_PX if run.tiny else SIZES_PX)

    def entries(self, one: Measured) -> Iterator[Row]:
        for turn in one.row["turns"]:
            about = f"{self.metric} at {turn['size'][1]}x{turn['size'][0]}"
            yield one.entry(self.label, about, self.unit, median(turn["step_ms"]))

    def tables(self, rows: Sequence[Measured]) -> dict[str, str]:
        header = ("setting", "size", "ms per step", "first call", "compiled or captured")
        found = newest(rows, self.name).values()
        return {self.name: markdown(header, (self._size(one, turn) for one in found for turn in one.row["turns"]))}

    def _size(self, one: Measured, turn: Row) -> list[str]:
        height, width = turn["size"]
        made = {key.replace("_", " "): n for key, n in turn["counts"].items() if n and key in COUNTED}
        counted = ", ".join(f"{key} {n:g}" for key, n in made.items()) or "nothing new"
        ms, first = f"{median(turn['step_ms']):.4g}", f"{turn['first_call_s']:.1f} s"
        return [f"`{one.row['setting']}`", f"{width}×{height}", ms, first, counted]


SIZES = Sizes(
    name="sizes", about="klein-4B at several sizes in one process each", seconds=100,
    key="step_ms", unit="ms", metric="denoising step", task=each_size, overrides=("steps=4",),
    gigabytes=None, passes=1, groups=((FAST, REGIONAL),),
)  # fmt: skip
