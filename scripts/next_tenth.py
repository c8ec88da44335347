"""What each piece between a step and a picture is worth: before and after in one process, beside plain diffusers.

    python scripts/next_tenth.py OUT.jsonl                               # klein-4B at 1024x1024, then the other groups
    python scripts/next_tenth.py OUT.jsonl --groups klein,dev --seconds 600
    python scripts/next_tenth.py OUT.jsonl --groups klein --settings plain,h100_fast
    python scripts/next_tenth.py OUT.jsonl --groups klein --model tiny    # a dry run on any machine

A JSON row is appended as soon as it is measured, so that a run that is cut off keeps what it has; groups and, in them,
settings come in the order of importance, and none is begun after ``--seconds``. Steps are timed by the program's own
Stopwatch, prompt to PIL by the spans in run.json (from the text encoder's begin to the picture), each in a run of its
own, prompt to PNG by the clock over a whole run of six; plain diffusers is called as a user does. Figures mean
something with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]

from bench.results import Row, fallen_back  # noqa: E402
from bench.section import gpu_state  # noqa: E402
from bench.settings import MODELS, PLAIN, TINY_MODELS, Setting  # noqa: E402
from bench.worker import Job  # noqa: E402

PIECES = {
    "noise": "drawn ahead, on a thread",
    "pil": "pixels through page-locked memory, four bytes each",
    "png": "rows as differences, compressed by isal or zlib's run lengths, instead of Pillow",
    "matmuls": "kernels.matmuls=fastest",
    "text": "kernels.text_encoder=fused",
    "ahead": "the next text behind the pictures that are being decoded",
}
OPTIONS = {"matmuls": "kernels.matmuls=fastest", "text": "kernels.text_encoder=fused"}
ALL = frozenset(PIECES)
LOSSLESS, FAST = "+preset=h100_lossless", "+preset=h100_fast"
PROMPTS = [f"a lighthouse at dusk, {what}" for what in ("oil", "ink", "pastel", "gouache", "fresco", "etching")]


@dataclass(frozen=True)
class Variant:
    """What is measured: plain diffusers, or a preset with some of the pieces."""

    preset: str | None
    on: frozenset[str] = ALL
    batches: tuple[int, ...] = ()
    """Pictures a call, for the sustained rate."""

    @property
    def name(self) -> str:
        """As it stands in the rows."""
        if self.preset is None:
            return "plain"
        preset, off = self.preset.partition("=")[2], sorted(ALL - self.on)
        return preset + (" before" if not self.on else f" without {', '.join(off)}" if off else "")

    def setting(self) -> Setting:
        """For the benchmarks' helpers."""
        if self.preset is None:
            return PLAIN
        options = [OPTIONS[piece] for piece in OPTIONS if piece in self.on]
        return Setting(self.name, " ".join([self.preset, *options]))


def without(preset: str, *pieces: str) -> Variant:
    """A preset with all pieces but these."""
    return Variant(preset, ALL - frozenset(pieces))


BOTH = (Variant(LOSSLESS, frozenset()), Variant(LOSSLESS), Variant(FAST, frozenset()), Variant(FAST))
PLAIN_VARIANT = Variant(None)


@dataclass(frozen=True)
class Group:
    """Variants of one model at one size, in the order of importance."""

    model: str
    variants: tuple[Variant, ...]
    steps: int = 4
    size: tuple[str, ...] = ()
    whole: bool = True
    """Whether whole pictures are drawn, not steps of the transformer alone."""
    edits: bool = False


LARGE = ("height=2048", "width=2048")
GROUPS = {
    "klein": Group(
        "klein_4b",
        (
            replace(PLAIN_VARIANT, batches=(1,)), *BOTH[:3], replace(BOTH[3], batches=(1, 2, 4)),
            without(LOSSLESS, "matmuls"), *(without(FAST, piece) for piece in ("noise", "pil", "png", "text")),
            without(LOSSLESS, "text"),
        ),
    ),
    "dev": Group("dev", (PLAIN_VARIANT, *BOTH), steps=5, whole=False),
    "klein9": Group("klein_9b", (PLAIN_VARIANT, BOTH[1], BOTH[3])),
    "edit": Group("klein_4b", (PLAIN_VARIANT, BOTH[3], BOTH[1]), edits=True),
    "large": Group("klein_4b", (PLAIN_VARIANT, BOTH[3], BOTH[1]), size=LARGE),
    "sustained": Group("klein_4b", (replace(PLAIN_VARIANT, batches=(1,)), replace(BOTH[3], batches=(4, 1)))),
    "large_dev": Group("dev", (PLAIN_VARIANT, BOTH[3]), size=LARGE, whole=False),
}  # fmt: skip


@dataclass
class Rows:
    """Where rows go, and until when new ones are begun."""

    file: Path
    ends: float
    sustained_s: float
    group: str = ""
    pixels: dict[str, list[str]] = field(default_factory=dict)
    """Of the first variant of each preset in each group; the others' are compared with them."""

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def add(self, variant: Variant, what: str, unit: str, samples: Sequence[float], **more: Any) -> None:
        """Append a row and say it."""
        middle = statistics.median(samples) if samples else None
        row: Row = {
            "group": self.group, "setting": variant.name, "what": what, "unit": unit, "median": middle,
            "min": min(samples, default=None), "max": max(samples, default=None), "samples": list(samples),
            "off": sorted(ALL - variant.on), "gpu": gpu_state(), **more,
        }  # fmt: skip
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")
        shown = "–" if middle is None else f"{middle:.4g} {unit}"
        said = {key: value for key, value in more.items() if key in ("rel_l2", "same_pixels", "error")}
        print(f"  {variant.name + fallen_back(row):40} {what:32} {shown:14} {said or ''}", flush=True)


# --- what is switched off -------------------------------------------------------------------------------------------


def switched(variant: Variant) -> ExitStack:
    """Within: pieces that are no options are as they were before."""
    stack = ExitStack()
    patches = {
        "noise": lambda: patch("fluxrun.drawing.noise.NoiseAhead.begin", lambda self, wanted: None),
        "pil": lambda: patch("fluxrun.kernels.vae.decoder.pictures", pictures_before),
        "png": lambda: patch("fluxrun.record.png.encode", encode_before),
        "ahead": lambda: patch("fluxrun.drawing.ahead.goes_ahead", lambda session: False),
    }
    for piece, off in patches.items():
        if variant.preset is not None and piece not in variant.on:
            stack.enter_context(off())
    return stack


def pictures_before(image: Any, *, denormalize: bool = True, meanwhile: Any = None) -> list[Any]:
    """Pixels rounded on the device, copied when asked for, three bytes each."""
    import torch
    from PIL import Image

    image = (image * 0.5 + 0.5).clamp(0, 1) if denormalize else image
    rounded = (image.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).contiguous()
    if meanwhile is not None:
        meanwhile()
    return [Image.fromarray(picture) for picture in rounded.cpu().numpy()]


def encode_before(image: Any, texts: dict[str, str]) -> Iterator[bytes]:
    """By Pillow at level 1."""
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        info.add_itxt(key, text)
    image.save(file, format="PNG", pnginfo=info, compress_level=1)
    yield file.getvalue()


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(rows: Rows, group: Group, tiny: bool, settings: Sequence[str]) -> None:
    """Every variant of a group, or those that are asked for, while there is time."""
    models = TINY_MODELS if tiny else MODELS
    size = () if tiny else group.size
    with tempfile.TemporaryDirectory(prefix="fluxrun-next-tenth-") as folder:
        work = Path(folder)
        edited = [f"reference_images=[{reference(work, 64 if tiny else 1024)}]"] if group.edits else []
        overrides = (*models[group.model], f"steps={group.steps}", *size, *edited)
        for variant in (v for v in group.variants if not settings or v.name in settings):
            if rows.left <= 0:
                rows.add(variant, "not measured", "", [], error="out of time")
                continue
            job = Job(variant.setting(), nothing, overrides, work, work / "log")
            try:
                with switched(variant):
                    measure_variant(rows, variant, job, group)
            except Exception as error:  # it is this variant's result; the others are measured all the same
                traceback.print_exc()
                rows.add(variant, "broke", "", [], error=f"{type(error).__name__}: {error}"[:300])
            free()


def nothing(job: Job) -> Iterator[Row]:
    """A job's task is done here, not by a worker."""
    yield {}


def measure_variant(rows: Rows, variant: Variant, job: Job, group: Group) -> None:
    """Steps with their error, stages, and whole pictures as a user gets them."""
    if not group.edits:
        with subject_of(job) as subject:
            steps(rows, variant, subject)
    if group.whole and not group.edits and rows.left > 0:
        with subject_of(job, text_encoder=True) as subject:
            stages(rows, variant, subject)
    if group.whole and rows.left > 0:
        (plain_pictures if variant.preset is None else fluxrun_pictures)(rows, variant, job)


@contextmanager
def subject_of(job: Job, *, text_encoder: bool = False) -> Iterator[Any]:
    """A pipeline; afterwards the process is as it was, for the next one."""
    from bench.subject import Subject

    subject = Subject(job, text_encoder=text_encoder)
    try:
        yield subject
    finally:
        if subject.session is not None:
            subject.session.close()
        del subject
        free()


def steps(rows: Rows, variant: Variant, subject: Any) -> None:
    """The transformer alone: its steps, and the first one's error relative to plain diffusers'."""
    first_s, _ = subject.timed(lambda: subject.first(subject.step_ms))
    error = subject.error(subject.first_step())
    subject.step_ms()
    samples = [ms for _ in range(5) for ms in subject.step_ms()]
    rows.add(variant, "denoising step", "ms", samples, first_call_s=first_s, **error, **subject.facts())


def stages(rows: Rows, variant: Variant, subject: Any) -> None:
    """The text encoder and the decoder, the device idle before and after."""
    subject.first(subject.encode)
    for _ in range(2):
        drawn = subject.first(lambda: subject.draw(prompt_embeds=subject.encode()))
    texts = [1e3 * subject.timed(subject.encode)[0] for _ in range(8)]
    rows.add(variant, "text encoder", "ms", texts, **subject.facts())
    drawn = [subject.draw(prompt_embeds=subject.encode()) for _ in range(5)]
    rows.add(variant, "decode to PIL", "ms", [1e3 * one.decode_s for one in drawn])


def fluxrun_pictures(rows: Rows, variant: Variant, job: Job) -> None:
    """Through ``fluxrun.run``, with one pool, as a sweep does it."""
    from fluxrun.config.composition import compose
    from fluxrun.pipeline.session_pool import SessionPool
    from fluxrun.runner import run

    numbers = count()

    def drawn(prompts: Sequence[str], *more: str) -> tuple[float, Any]:
        folder = job.work / f"{variant.name.replace(' ', '_')}_{next(numbers)}"
        file = job.work / "prompts.txt"
        file.write_text("\n".join(prompts), encoding="utf-8")
        given = [*job.overrides, *job.setting.overrides.split(), "memory=resident", f"prompts_file={file}", *more]
        started = time.perf_counter()
        record = run(compose(given), folder, pool=pool)
        return time.perf_counter() - started, record

    with SessionPool() as pool:
        for _ in range(2):
            drawn(PROMPTS[:2])
        singles = [drawn(many(1))[1] for _ in range(8)]
        options = {g: o.model_dump(mode="json") for g, o in singles[-1].options.items()}
        steps = [1e3 * s for one in singles for image in one.timings.step_s for s in image]
        rows.add(variant, "step in a picture", "ms", steps, options=options)
        rows.add(variant, "prompt to PIL", "ms", [1e3 * seconds_of(one) for one in singles], options=options)
        sixes = [drawn(PROMPTS) for _ in range(3)]
        pixels = [image.sha256 for image in sixes[-1][1].images]
        before = rows.pixels.setdefault(f"{rows.group} {variant.preset}", pixels)
        by = sixes[-1][1].images[-1].compressed_by
        each = [1e3 * s / len(PROMPTS) for s, _ in sixes]
        saving = [1e3 * s for s in sixes[-1][1].timings.save_s]
        # Without composing and planning, which a command does once for all of its prompts.
        drawing = [1e3 * seconds_of(record, "save") / len(PROMPTS) for _, record in sixes]
        facts = {"same_pixels": pixels == before, "compressed_by": by, "save_ms": saving, "drawing_ms": drawing}
        rows.add(variant, "prompt to PNG, one of six", "ms", each, **facts)
        for batch in variant.batches:
            if rows.left > rows.sustained_s:
                rate_of_fluxrun(rows, variant, batch, drawn)


def rate_of_fluxrun(rows: Rows, variant: Variant, batch: int, drawn: Callable[..., tuple[float, Any]]) -> None:
    """Pictures a second to PIL, kept up for so long; every picture has a prompt of its own."""
    size = f"batch_size={batch}"
    for _ in range(2):
        _, record = drawn(many(3 * batch), size)
    pictures = max(2, round(rows.sustained_s * 3 * batch / seconds_of(record) / batch)) * batch
    _, record = drawn(many(pictures), size)
    facts = {"pictures": pictures, "seconds": seconds_of(record), "peak_bytes": record.memory.peak_allocated_bytes}
    rows.add(variant, f"pictures a second, batch {batch}", "1/s", [pictures / seconds_of(record)], **facts)


def seconds_of(record: Any, last: str = "decode") -> float:
    """From the first prompt's encoding to the last picture (``decode``) or file (``save``)."""
    begun = min(span.start_s for span in record.spans if span.name == "encode")
    return float(max(span.end_s for span in record.spans if span.name == last) - begun)


def plain_pictures(rows: Rows, variant: Variant, job: Job) -> None:
    """Plain diffusers with the same weights, given a prompt."""
    from bench.subject import arguments, text_arguments
    from fluxrun.config.composition import compose
    from fluxrun.planning.prepare import prepare

    config = compose(list(job.overrides))
    edited = prepare(config).pictures.arguments(config)
    with subject_of(job, text_encoder=True) as subject:

        def draw(prompts: Sequence[str]) -> Any:
            given = arguments(subject.plan) | text_arguments(subject.plan) | edited
            return subject.pipeline(prompt=list(prompts), **given).images

        def saved() -> None:
            for number, prompt in enumerate(PROMPTS):
                draw([prompt])[0].save(job.work / f"{number}.png")

        for _ in range(2):
            draw(PROMPTS[:1])
        singles = [1e3 * subject.timed(lambda: draw(many(1)))[0] for _ in range(5)]
        rows.add(variant, "prompt to PIL", "ms", singles)
        rows.add(variant, "prompt to PNG, one of six", "ms", [1e3 * subject.timed(saved)[0] / len(PROMPTS)])
        for batch in variant.batches:
            rates = [batch / subject.timed(lambda size=batch: draw(many(size)))[0] for _ in range(5)]
            rows.add(variant, f"pictures a second, batch {batch}", "1/s", rates)


def many(pictures: int) -> list[str]:
    """Prompts, all of them different, and never the same ones again."""
    return [f"{PROMPTS[number % len(PROMPTS)]}, take {next(TAKES)}" for number in range(pictures)]


TAKES = count()


def reference(work: Path, edge: int) -> Path:
    """A picture to edit."""
    import numpy as np
    from PIL import Image

    file = work / "reference.png"
    pixels = np.random.default_rng(0).integers(0, 255, (edge // 8, edge // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((edge, edge)).save(file)
    return file


def free() -> None:
    """Give the last variant's memory back."""
    from fluxrun.process.device import free_memory

    free_memory()


def main(line: Sequence[str]) -> None:
    """Measure the groups asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file to append rows to")
    parser.add_argument("--groups", default=",".join(GROUPS), help=f"of {','.join(GROUPS)}")
    parser.add_argument("--settings", default="", help="by their names in the rows; all when left out")
    parser.add_argument("--seconds", type=float, default=1200.0, help="after which nothing new is begun")
    parser.add_argument("--sustained", type=float, default=20.0, help="seconds of each sustained rate")
    parser.add_argument("--model", choices=("real", "tiny"), default="real", help="tiny: a dry run on any machine")
    given = parser.parse_args(line)
    rows = Rows(given.out, time.monotonic() + given.seconds, given.sustained)
    for name in given.groups.split(","):
        rows.group = name
        print(f"{name}:", flush=True)
        measure(rows, GROUPS[name], given.model == "tiny", [part for part in given.settings.split(",") if part])
        free()


if __name__ == "__main__":
    main(sys.argv[1:])
