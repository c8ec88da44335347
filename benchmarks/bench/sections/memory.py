"""Models under a limit on the GPU's memory, by where their weights lie."""

import time
from collections.abc import Iterator, Sequence

from bench.results import Measured, Row, markdown, newest
from bench.section import Run, Section
from bench.settings import Models, Setting
from bench.worker import Job, Worker

PLAIN_OFFLOAD = "plain diffusers' model offload"
SDNQ = "quantization=sdnq quantization.weights_dtype"
LIMITED = (
    ("klein-9B bf16, auto", 24, "memory=auto"),
    ("dev fp8, preset rtx4090_24gb", 24, "+preset=rtx4090_24gb"),
    ("dev bf16, staged", 80, "memory=staged kernels=fused"),
    (f"klein-9B bf16, {PLAIN_OFFLOAD}", 24, ""),
    ("dev fp8, group", 24, "memory=group quantization=fp8"),
    ("klein-9B bf16, group", 12, "memory=group"),
    ("klein-9B bf16, auto", 12, "memory=auto kernels=fused"),
    ("klein-4B bf16, auto", 12, "memory=auto"),
    ("klein-9B bf16, staged", 24, "memory=staged"),
    ("klein-9B bf16, balanced", 24, "memory=balanced"),
    ("klein-9B bf16, group", 24, "memory=group"),
    ("dev bf16, auto", 48, "memory=auto kernels=fused"),
    ("dev bf16, balanced", 80, "memory=balanced"),
    (f"dev bf16, {PLAIN_OFFLOAD}", 80, ""),
    ("klein-4B fp8, preset low_vram_12gb", 12, "+preset=low_vram_12gb"),
    ("klein-9B fp8, preset low_vram_12gb", 12, "+preset=low_vram_12gb"),
    ("klein-9B sdnq uint4", 12, f"memory=auto {SDNQ}=uint4"),
    ("klein-9B nf4", 12, "memory=auto quantization=nf4"),
    ("klein-9B fp8", 16, "memory=auto kernels=fused quantization=fp8"),
    ("klein-9B sdnq int8", 16, f"memory=auto {SDNQ}=int8"),
    ("klein-9B fp8, preset rtx4090_24gb", 24, "+preset=rtx4090_24gb"),
    ("dev sdnq uint4", 24, f"memory=auto {SDNQ}=uint4"),
    ("dev sdnq uint4", 32, f"memory=auto {SDNQ}=uint4"),
    ("dev fp8", 32, "memory=auto kernels=fused quantization=fp8"),
)
"""What begins with the model's name; the limit in GB; what fluxrun is told."""
LONGEST_S, SHORT_S = 300.0, 30.0
"""The most for one of them, and plain diffusers' image that is short enough to draw a second, which then counts."""


def by_fluxrun(job: Job) -> Iterator[Row]:
    """A run; its second image counts."""
    from bench.subject import compose
    from fluxrun.runner import run

    record = run(compose([*job.overrides, "measure.repeats=2"]), job.work)
    yield {"samples": {}, **record.model_dump(mode="json", include={"options", "notes", "timings", "memory"})}


def by_offloading(job: Job) -> Iterator[Row]:
    """What a user without fluxrun does with a model that does not fit: ``enable_model_cpu_offload``."""
    import torch

    from bench.subject import PROMPT, arguments, compose, peak_bytes, plain_pipeline, prepare, text_arguments

    plan = prepare(compose(job.overrides)).plan
    plan.memory.limit(plan.machine.device)
    pipeline = plain_pipeline(plan, "cpu", text_encoder=True)
    if torch.cuda.is_available():
        pipeline.enable_model_cpu_offload()
    images: list[float] = []
    while len(images) < (2 if sum(images) < SHORT_S else 1):
        started = time.perf_counter()
        pipeline(prompt=PROMPT, **arguments(plan), **text_arguments(plan))
        images.append(time.perf_counter() - started)
    options = {"memory": {"requested": "model offload", "effective": "diffusers' model offload"}}
    memory = {"peak_allocated_bytes": peak_bytes(plan.machine.device)}
    timings = {"denoise_s": images, "decode_s": [0.0] * len(images)}
    yield {"samples": {}, "options": options, "memory": memory, "timings": timings}


def by_name(models: Models, name: str, limit: int, told: str) -> tuple[Row, tuple[str, ...]]:
    """A row's own keys, and all that its process is told."""
    model = name.split(maxsplit=1)[0].lower().replace("-", "_")
    steps = 8 if model == "dev" else 4
    about = {"setting": name, "model": model, "budget_gb": limit, "steps": steps}
    return about, (*models[model], f"steps={steps}", *told.split(), f"memory.budget_gb={limit}")


class Memory(Section):
    """Every model under its limit, in a process of its own; that a placement does not fit is a result, too."""

    def measure(self, run: Run) -> None:
        for name, limit, told in (one for one in LIMITED if run.keep.has(f"{one[0]} {one[1]}")):
            about, given = by_name(run.models, name, limit, told)
            row = run.add({**about, "overrides": given, "status": "not measured", "error": None})
            task, number = by_fluxrun if told else by_offloading, f"memory_{len(run.rows)}"
            worker = Worker(Job(Setting(name), task, given, run.work / number, run.logs / f"{number}.log"), row)
            if run.left <= 0:
                worker.give_up("out of time", "not measured")
            worker.begin("draw")
            worker.wait(min(LONGEST_S, run.left))
            worker.end()
            run.say(row)

    def entries(self, one: Measured) -> Iterator[Row]:
        label, limit = one.row["setting"].partition(" ")[0], f"under {one.row['budget_gb']:g} GB"
        peak, image = self._figures(one)
        yield one.entry(label, f"peak memory {limit}", "GB", peak)
        yield one.entry(label, f"image of {one.row['steps']} steps {limit}", "s", image)

    def _figures(self, one: Measured) -> tuple[float, float]:
        """Peak in 2**30 bytes; seconds of the last image: text, steps and decode."""
        last = sum(one.timings.text_encode_s) + one.timings.denoise_s[-1] + one.timings.decode_s[-1]
        return round(one.row["memory"]["peak_allocated_bytes"] / 2**30, 2), round(last, 3)

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
        (peak, image), placement = self._figures(one), row["options"]["memory"]["effective"]
        return [*about, placement, f"{peak:.1f} GB", step, f"{image:.2f} s", f"{row['steps']} steps"]


MEMORY = Memory(
    name="memory", about="models under a limit on the GPU's memory, by where their weights lie", seconds=420
)
