"""Generate: prompts × seeds → images, each stage timed, interrupts looked at after every step."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxrun.build import Session
from fluxrun.context import synchronize
from fluxrun.errors import Interrupted
from fluxrun.progress import Steps
from fluxrun.prompts import Job, texts_of
from fluxrun.record import MemoryRecord, RunFolder, Timings, spread
from fluxrun.saving import Saver

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("fluxrun.generate")


@dataclass
class Drawn:
    """One pipeline call's pictures and its times in seconds."""

    images: list[Image]
    step_s: list[float]
    denoise_s: float
    decode_s: float


class Generation:
    """The loop over a run's images, with one session's pipeline."""

    def __init__(self, session: Session, folder: RunFolder, jobs: Sequence[Job]) -> None:
        self.session = session
        self.session.before_staged_load = lambda: self.embeds.encode_all()  # noqa: PLW0108 - embeds is made below
        self.folder = folder
        self.jobs = list(jobs)
        self.config = session.plan.config
        self.device = session.plan.machine.device
        self.embeds = Embeddings(self)
        self.remaining = Counter(job.prompt for job in jobs)
        self.stage = "load"
        self._fresh = True
        """Whether the next pipeline call is the first after a build: it may compile, and it may fall back."""

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Draw every job. Finished images are on disk and in the record whatever ends the loop."""
        reset_peak(self.device)
        if self.session.ready_for(texts_of(self.session.plan, self.jobs)):
            self._fresh = False
        else:
            self._rebuild(None)
        batches = [self.jobs[n : n + self.config.batch_size] for n in range(0, len(self.jobs), self.config.batch_size)]
        for _ in range(self.config.measure.warmup):
            self._note_first_call(self._draw_or_fall_back(batches[0], "warm-up"))
        with self._saver() as saver:
            for number, batch in enumerate(batches, 1):
                self._draw_and_save(batch, f"image {number}/{len(batches)}", saver)
                self.embeds.forget(batch)
            self.stage = "save"

    def _saver(self) -> Saver:
        """Where pictures go: beside drawing if that leaves the CPU idle, and no repeats are to be timed undisturbed."""
        beside = self.device != "cpu" and self.config.measure.repeats == 1
        return Saver(self.folder, self.config.output_format, beside=beside)

    def _draw_and_save(self, batch: Sequence[Job], text: str, saver: Saver) -> None:
        for repeat in range(self.config.measure.repeats):
            self.session.interrupts.check()
            drawn = self._draw_or_fall_back(batch, text if repeat == 0 else f"{text}, repeat {repeat + 1}")
            self._record(drawn)
            if repeat == 0:
                self.stage = "save"
                for image, job in zip(drawn.images, batch, strict=True):
                    saver.save(image, job, f"denoise {drawn.denoise_s:.2f} s, decode {drawn.decode_s:.2f} s")
        self._summarise()

    def _draw_or_fall_back(self, batch: Sequence[Job], text: str) -> Drawn:
        """One call. A failure of the first call after a build takes a fallback and draws the image again."""
        while True:
            first = self._fresh
            try:
                drawn = self._draw(batch, text)
                self._fresh = False
                return drawn
            except (Interrupted, KeyboardInterrupt):
                raise
            except Exception as error:
                if not first:
                    raise
                self._rebuild(error)

    def _rebuild(self, error: BaseException | None) -> None:
        failed_at, self.stage = self.stage, "load"
        if error is None:
            self.session.assemble()
        else:
            try:
                self.session.recover(error)
            except BaseException as raised:
                if raised is error:  # nobody to blame: the error is where it was
                    self.stage = failed_at
                raise
        self._note_memory("load")
        self._fresh = True

    # -- one call -----------------------------------------------------------------------------------------------

    def _draw(self, batch: Sequence[Job], text: str) -> Drawn:
        pipeline = self.session.pipeline
        self.stage = "text_encode"
        arguments = self._arguments(batch)
        self.stage = "denoise"
        with self.session.reporter.steps(text, self.plan_steps) as shown:
            watch = Watch(self, shown)
            pipeline.progress_bar = watch.progress_bar
            with self._interruptible():
                synchronize(self.device)
                images = pipeline(**arguments, callback_on_step_end=watch.on_step).images
                synchronize(self.device)
            ended = time.perf_counter()
        self._note_memory("decode")
        return Drawn(images, watch.step_seconds(), watch.denoise_s, ended - watch.denoise_ended)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Compiling is interrupted at once; everything else at the next step. Offload hooks are always freed."""
        compiling = self._fresh and self.session.context is not None and self.session.context.compiler.active
        try:
            if compiling:
                with self.session.interrupts.immediate():
                    yield
            else:
                yield
        except BaseException:
            self.session.pipeline.maybe_free_model_hooks()
            raise

    @property
    def plan_steps(self) -> int:
        """Denoising steps of this run."""
        model = self.session.plan.model
        steps = self.config.steps or model.steps
        assert steps is not None  # checkpoint.resolve filled it in
        return steps

    @property
    def guidance(self) -> float | None:
        """Guidance scale of this run; 0 is a value of its own."""
        return self.session.plan.model.guidance if self.config.guidance is None else self.config.guidance

    def _arguments(self, batch: Sequence[Job]) -> dict[str, Any]:
        """The pipeline call's arguments: the same that a user of plain diffusers would give."""
        import torch

        height, width = self.session.plan.size
        generators = [torch.Generator("cpu").manual_seed(job.seed) for job in batch]
        arguments: dict[str, Any] = {
            "prompt_embeds": self.embeds.of([job.prompt for job in batch]),
            "height": height,
            "width": width,
            "num_inference_steps": self.plan_steps,
            "generator": generators[0] if len(generators) == 1 else generators,
        }
        if self.session.plan.model.distilled:
            arguments["guidance_scale"] = 1.0  # a distilled model warns about anything above 1
        elif self.guidance is not None:
            arguments["guidance_scale"] = self.guidance
        if self.embeds.guided():
            arguments["negative_prompt_embeds"] = self.embeds.of([self.config.negative_prompt or ""] * len(batch))
        if self.session.references:
            arguments["image"] = self.session.references
        return arguments

    # -- the record ---------------------------------------------------------------------------------------------

    @property
    def timings(self) -> Timings:
        """The record's timings."""
        return self.folder.record.timings

    @property
    def memory(self) -> MemoryRecord:
        """The record's memory figures."""
        return self.folder.record.memory

    def _record(self, drawn: Drawn) -> None:
        self._note_first_call(drawn)
        self.timings.step_s.append(drawn.step_s)
        self.timings.denoise_s.append(drawn.denoise_s)
        self.timings.decode_s.append(drawn.decode_s)

    def _note_first_call(self, drawn: Drawn) -> None:
        if self.timings.first_call_s is None and drawn.step_s:
            self.timings.first_call_s = drawn.step_s[0]

    def _summarise(self) -> None:
        """Bring options, timings and memory in the record up to date; written with every image."""
        self.session.observe()
        self.folder.plan(self.session.plan)
        for name, seconds in self.session.timings.items():  # import_s, load_s, apply_s
            setattr(self.timings, name, seconds)
        if self.session.context is not None and self.session.context.compiler.active:
            self.timings.compile_s = self.session.context.compiler.seconds()
        steps = [s for image in self.timings.step_s for s in image]
        warm = self.config.measure.warmup > 0
        self.timings.steady_step_s = spread(steps if warm else steps[1:])
        self.folder.write()

    def _note_memory(self, stage: str) -> None:
        """The peak since the last stage's end (on a CPU: since the process began)."""
        used = peak_bytes(self.device)
        self.memory.by_stage[stage] = max(used, self.memory.by_stage.get(stage, 0))
        self.memory.peak_allocated_bytes = max(used, self.memory.peak_allocated_bytes)


class Watch:
    """Rides along a pipeline call: where denoising starts and ends, each step's time, interrupts."""

    def __init__(self, generation: Generation, shown: Steps) -> None:
        self._generation = generation
        self._shown = shown
        self._marks: list[Any] = []
        self.denoise_s = 0.0
        self.denoise_ended = time.perf_counter()

    @contextmanager
    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Iterator[Watch]:
        """Stands in for diffusers' own bar, which the pipeline opens around its denoising loop."""
        generation = self._generation
        if generation._fresh and generation.session.context is not None and generation.session.context.compiler.active:
            self._shown.compiling()
        synchronize(generation.device)
        started = time.perf_counter()
        self._mark()
        yield self
        synchronize(generation.device)
        self.denoise_ended = time.perf_counter()
        self.denoise_s = self.denoise_ended - started
        generation._note_memory("denoise")
        generation.stage = "decode"

    def update(self, n: int = 1) -> None:
        """diffusers calls it after each step."""

    def on_step(self, pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """After each step: take the time, show it, and stop here if the user asked to."""
        self._mark()
        self._shown.advance()
        assert self._generation.session.context is not None
        self._generation.session.context.counters["steps"] += 1
        self._generation.session.interrupts.check()
        return {}

    def _mark(self) -> None:
        """A point in time: an event on a GPU (nothing waits for it), the clock elsewhere."""
        if not self._generation.device.startswith("cuda"):
            self._marks.append(time.perf_counter())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def step_seconds(self) -> list[float]:
        """Seconds of each step; the device must have been synchronised since."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._generation.device.startswith("cuda"):
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


@dataclass
class Embeddings:
    """Prompt embeddings: encoded once per prompt, kept while images still need them."""

    generation: Generation
    _known: dict[str, Any] = field(default_factory=dict)

    def guided(self) -> bool:
        """Whether this run uses classifier-free guidance, which needs the negative prompt's embedding too."""
        return self.generation.session.plan.guided

    def of(self, prompts: Sequence[str]) -> Any:
        """Embeddings of a batch: [batch, max_sequence_length, joint_attention_dim]."""
        import torch

        for prompt in prompts:
            if not self._at_hand(prompt):
                self._known[prompt] = self._encode(self.generation.session.pipeline, prompt)
        device = self.generation.device
        return torch.cat([self._known[prompt].to(device) for prompt in prompts])

    def encode_all(self) -> None:
        """memory=staged: every prompt that is not known yet, with the text encoder alone, which then goes."""
        session = self.generation.session
        missing = [prompt for prompt in texts_of(session.plan, self.generation.jobs) if not self._at_hand(prompt)]
        # The text encoder is loaded once more for each run that misses one: a sweep's later prompts go along.
        later = [p for p in dict.fromkeys(session.upcoming) if p not in missing and session.embedding(p) is None]

        def encode(pipeline: Any) -> None:
            for prompt in (*missing, *later):
                session.interrupts.check()
                self._known[prompt] = self._encode(pipeline, prompt)
                session.keep_embedding(prompt, self._known[prompt])

        if missing:
            session.encode_first(encode, len(missing) + len(later))

    def _at_hand(self, prompt: str) -> bool:
        """Whether this run knows the prompt's embedding, or an earlier one with staged memory has left it."""
        session = self.generation.session
        if prompt not in self._known and session.staged and (found := session.embedding(prompt)) is not None:
            self._known[prompt] = found
            session.note_known(1)
        return prompt in self._known

    def forget(self, batch: Sequence[Job]) -> None:
        """Drop what no later image needs, so that ten thousand prompts do not fill the memory."""
        if self.generation.session.staged:
            return
        for job in batch:
            self.generation.remaining[job.prompt] -= 1
            if not self.generation.remaining[job.prompt]:
                self._known.pop(job.prompt, None)

    def _encode(self, pipeline: Any, prompt: str) -> Any:
        import torch

        generation = self.generation
        model = generation.session.plan.model
        arguments: dict[str, Any] = {"max_sequence_length": model.max_sequence_length}
        if model.text_encoder_out_layers:
            arguments["text_encoder_out_layers"] = model.text_encoder_out_layers
        synchronize(generation.device)
        started = time.perf_counter()
        with torch.no_grad():
            embeds, _ = pipeline.encode_prompt(prompt, device=pipeline._execution_device, **arguments)
        synchronize(generation.device)
        generation.timings.text_encode_s.append(time.perf_counter() - started)
        generation._note_memory("text_encode")
        return embeds


def reset_peak(device: str) -> None:
    """Start measuring peak memory anew: a run after another one in the same process has a peak of its own."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # Linux only; elsewhere the peak is the process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Peak memory in bytes: allocated on a GPU since the last call, resident set size of the process on a CPU."""
    import torch

    if device.startswith("cuda"):
        peak = int(torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    import resource  # not on Windows, where no GPU run needs it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
