"""Generate: prompts × seeds → images, each stage timed, interrupts looked at after every step."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from fluxrun.config.prompts import Job, texts_of
from fluxrun.drawing.ahead import encoding_ahead
from fluxrun.drawing.inspection import Finding, Inspection
from fluxrun.drawing.noise import NoiseAhead, Wanted
from fluxrun.drawing.saving import Saver
from fluxrun.drawing.stopwatch import Stopwatch
from fluxrun.errors import Interrupted, NotFinite
from fluxrun.pipeline.neutral_trials import find_culprit, has_suspects
from fluxrun.pipeline.session import Session
from fluxrun.process import spans
from fluxrun.process.clock import DeviceClock
from fluxrun.process.device import peak_bytes, reset_peak, used_bytes
from fluxrun.record.folder import RunFolder
from fluxrun.record.schema import MemoryRecord, Timings, spread

log = logging.getLogger("fluxrun.generate")


@dataclass
class Drawn:
    """One pipeline call's pictures and its times in seconds."""

    images: list[Image]
    step_s: list[float]
    denoise_s: float
    decode_s: float
    findings: list[Finding]

    @property
    def finite(self) -> bool:
        """Whether all of its pictures are made of numbers."""
        return all(finding.finite for finding in self.findings)

    @property
    def spoiled_at(self) -> str:
        """The stage in which values that are no numbers came first; empty where all are."""
        return next((finding.stage for finding in self.findings if not finding.finite), "")


class Generation:
    """The loop over a run's images, with one session's pipeline."""

    def __init__(
        self, session: Session, folder: RunFolder, jobs: Sequence[Job], done: Collection[int] = frozenset()
    ) -> None:
        """``done``: images that are there already, by ``Job.index``. A batch that lacks one is drawn as a whole."""
        self.session = session
        self.plan = session.plan
        self.config = session.plan.config
        self.device = session.plan.machine.device
        self.folder = folder
        self.done = session.ranks.first(done)
        size = self.config.batch_size
        batches = [jobs[n : n + size] for n in range(0, len(jobs), size)]
        self.batches = {n: batch for n, batch in enumerate(batches, 1) if not self._is_done(batch)}
        self.jobs = [job for batch in self.batches.values() for job in batch]
        self.remaining = Counter(job.prompt for job in self.jobs)
        self._last = len(batches)
        self._earlier_calls = len(folder.record.timings.step_s)
        """How many of the pipeline's calls in the record are an earlier command's."""
        self.stage = "load"
        self._fresh = True
        """Whether the next pipeline call is the first after a build: it may compile, and it may fall back."""
        self._nobody_to_blame = self.config.strict
        """Whether no option is, or may be, looked for any more when a picture is not finite."""
        self._spoiled_at = ""
        """The stage in which values that are no numbers first came, in a picture that stayed like that."""
        self._noise = NoiseAhead()
        self._upcoming: Sequence[Job] = ()
        """The batch that comes after the one being drawn."""
        self._clock: DeviceClock | None = None

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Draw every job. Finished images are on disk and in the record whatever ends the loop."""
        reset_peak(self.device)
        texts = texts_of(self.jobs, self.plan.negative_prompt)
        self.session.prompts.begin(texts, lambda: self._note_memory("text_encode"), self.timings.text_encode_s.append)
        if self.session.ready_for(texts):
            self._fresh = False
            if first := next(iter(self.batches.values()), None):
                self._begin_noise(first, getattr(torch, self.plan.dtype))
        else:
            self._rebuild(None)
        self.memory.start_bytes = used_bytes(self.device)
        try:
            with self._noise, self._saver() as saver:
                self._draw_all(saver)
                self.stage = "save"
            self._note_options()
        finally:
            self._summarise()
        self._fail_for_pictures_that_are_not_finite()

    def _is_done(self, batch: Sequence[Job]) -> bool:
        return all(job.index in self.done for job in batch)

    def _draw_all(self, saver: Saver) -> None:
        batches = list(self.batches.values())
        for _ in range(self.config.measure.warmup):
            self._note_first_call(self._draw_or_fall_back(batches[0], "warm-up"))
        for (number, batch), upcoming in zip(self.batches.items(), [*batches[1:], ()], strict=True):
            self._upcoming = upcoming
            self._draw_and_save(batch, f"image {number}/{self._last}", saver)
            self._forget(batch)

    def _saver(self) -> Saver:
        """Where pictures go: beside drawing if that leaves the CPU idle, and no repeats are to be timed undisturbed."""
        beside = self.device != "cpu" and self.config.measure.repeats == 1
        told = self.session.reporter.saved
        return Saver(self.folder, self.config.output_format, beside=beside, on_saved=told)

    def _draw_and_save(self, batch: Sequence[Job], text: str, saver: Saver) -> None:
        for repeat in range(self.config.measure.repeats):
            self.session.ranks.check(self.session.interrupts)
            drawn = self._draw_or_fall_back(batch, text if repeat == 0 else f"{text}, repeat {repeat + 1}")
            self._record(drawn)
            self._spoiled_at = self._spoiled_at or drawn.spoiled_at
            if repeat == 0 and self.session.ranks.rank == 0:
                self.stage = "save"
                about = f"denoise {drawn.denoise_s:.2f} s, decode {drawn.decode_s:.2f} s"
                for image, job, finding in zip(drawn.images, batch, drawn.findings, strict=True):
                    if job.index not in self.done:
                        _warn_of_a_constant(finding, text)
                        saver.save(image, job, about, finding)
        self._write_if_due()

    def _forget(self, batch: Sequence[Job]) -> None:
        """Let go of the embeddings that no later image needs."""
        self.remaining.subtract(job.prompt for job in batch)
        self.session.prompts.forget(job.prompt for job in batch if not self.remaining[job.prompt])

    def _draw_or_fall_back(self, batch: Sequence[Job], text: str) -> Drawn:
        """One call. A failure of the first call after a build takes a fallback and draws the image again."""
        while True:
            first, drawn, failed = self._fresh, None, None
            try:
                drawn = self._draw(batch, text)
            except (Interrupted, KeyboardInterrupt):
                raise
            except Exception as error:
                if not first:
                    raise
                failed = error
            if first:
                failed = self.session.agreed(failed)
            if drawn is not None and failed is None:
                self._fresh = False
                # All go by what the first process has found. Not before all have drawn: one that failed is not here.
                drawn.findings = self.session.ranks.first(drawn.findings)
                return drawn if drawn.finite else self._without_culprit(drawn, batch, text)
            self._rebuild(failed)

    def _without_culprit(self, drawn: Drawn, batch: Sequence[Job], text: str) -> Drawn:
        """A picture that is not finite, drawn again without the option that makes it so, if there is such a one."""
        log.warning("%s: the picture is not finite (NaN or infinite), first in %s", text, drawn.spoiled_at)
        if self._nobody_to_blame or not has_suspects(self.session):
            return drawn
        self.session.prompts.forget_ahead()
        found = find_culprit(
            self.session,
            lambda how: self._draw_once(batch, f"{text}, {how}"),
            lambda again: again.finite,
            "the picture is not finite",
        )
        if found is not None:
            return found
        self._nobody_to_blame = True
        self._rebuild(None)  # as it was asked for: what is recorded of the options is of this picture, too
        return self._draw_once(batch, text)

    def _draw_once(self, batch: Sequence[Job], text: str) -> Drawn:
        """The first call of a fresh build; whatever it raises is the caller's."""
        self._fresh = True
        drawn = self._draw(batch, text)
        self._fresh = False
        drawn.findings = self.session.ranks.first(drawn.findings)
        return drawn

    def _fail_for_pictures_that_are_not_finite(self) -> None:
        """Raise NotFinite if a picture stayed like that. All of them are drawn and saved: the next one may be sound."""
        if not self._spoiled_at:
            return
        self.stage = self._spoiled_at
        images = self.folder.record.images
        spoiled = sum(not image.finite for image in images)
        cause = (
            "strict=true allows no fallback, so no other option was tried"
            if self.config.strict
            else "no option is to blame, so it is the weights or the input"
        )
        raise NotFinite(f"{spoiled} of {len(images)} picture(s) not finite (NaN or infinite): {cause}")

    def _rebuild(self, error: BaseException | None) -> None:
        self.session.prompts.forget_ahead()
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
        pipeline, compiles = self.session.pipeline, self._fresh and self.session.compiles
        inspection = Inspection()
        self.stage = "text_encode"
        clock = self._clock = DeviceClock(self.device, self._clock if self.session.prompts.has_begun_the_next else None)
        with self.session.interrupts.immediate():
            arguments = self._arguments(batch, clock)
        if self.session.guidance is not None:
            self.session.guidance.begin(arguments.get("negative_prompt_embeds"))
        self.stage = "denoise"
        assert self.plan.steps_made is not None
        with self.session.reporter.steps(text, self.plan.scheduler.calls(self.plan.steps_made)) as display:
            watch = Stopwatch(clock, display, self._after_step, self._after_denoising, compiles=compiles)

            def after_step(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
                inspection.step(values)
                return watch.step(pipeline, step, timestep, values)

            ahead = encoding_ahead(self.session, self._texts_ahead, clock, lambda: self._note_memory("decode"))
            with self._interruptible(compiles), watch.timing(pipeline), inspection.of(pipeline), ahead:
                images = pipeline(**arguments, callback_on_step_end=after_step).images
                watch.arrived()
        self.session.prompts.tell_times()
        self._note_spans(watch)
        self._note_memory("decode")
        embeddings = [value for name, value in arguments.items() if name.endswith("prompt_embeds")]
        findings = inspection.findings(images, embeddings)
        return Drawn(images, watch.step_seconds(), watch.denoise_s, watch.decode_s, findings)

    @property
    def _texts_ahead(self) -> list[str]:
        """The next batch's; none in the first call after a build, which may end in another one."""
        return [] if self._fresh else [job.prompt for job in self._upcoming]

    def _note_spans(self, watch: Stopwatch) -> None:
        """The call's parts; the first step of a fresh pipeline, which may compile, is one of its own."""
        begun, steps = watch.started_at, watch.step_seconds()
        if self._fresh and steps:
            first = min(watch.denoising_at + steps[0], watch.denoised_at)
            spans.add("first call", begun, first)
            begun = first
        spans.add("steps", begun, watch.denoised_at)
        spans.add("decode", watch.denoised_at, watch.ended_at)

    def _after_step(self) -> None:
        assert self.session.context is not None
        self.session.context.counters["steps"] += 1
        self.session.ranks.check(self.session.interrupts)

    def _after_denoising(self) -> None:
        self._note_memory("denoise")
        self.stage = "decode"

    @contextmanager
    def _interruptible(self, compiles: bool) -> Iterator[None]:
        """Compiling is interrupted at once; everything else at the next step. Offload hooks are always freed."""
        try:
            if compiles:
                with self.session.interrupts.immediate():
                    yield
            else:
                yield
        except BaseException:
            self.session.pipeline.maybe_free_model_hooks()
            raise

    def _arguments(self, batch: Sequence[Job], clock: DeviceClock) -> dict[str, Any]:
        """The pipeline call's arguments: those that a user of plain diffusers would give, and the noise drawn ahead."""
        height, width = self.plan.size
        self._begin_noise(batch, getattr(torch, self.plan.dtype))
        embeddings = self._embeddings([job.prompt for job in batch], clock)
        arguments: dict[str, Any] = {
            "prompt_embeds": embeddings,
            "height": height,
            "width": width,
            "num_inference_steps": self.plan.steps,
            **self._noise_arguments(batch, embeddings.dtype),
        }
        self._begin_noise(self._upcoming, embeddings.dtype)
        if self.plan.scheduler.sigmas is not None:
            arguments["sigmas"] = list(self.plan.scheduler.sigmas)
        if self.plan.model.pipeline == "klein_kv":
            pass  # it has no guidance
        elif self.plan.model.distilled:
            arguments["guidance_scale"] = 1.0  # a distilled model warns about anything above 1
        elif self.plan.guidance is not None:
            arguments["guidance_scale"] = self.plan.guidance
        if self.plan.negative_prompt is not None:
            arguments["negative_prompt_embeds"] = self._embeddings([self.plan.negative_prompt] * len(batch), clock)
        return arguments | self.session.pictures.arguments(self.config)

    def _noise_arguments(self, batch: Sequence[Job], dtype: torch.dtype) -> dict[str, Any]:
        """The generators, and what was drawn ahead from them."""
        wanted = self._wanted(batch, dtype)
        ahead = {"latents": self._noise.of(wanted)} if self._draws_ahead else {}
        return {"generator": wanted.generators(), **ahead}

    def _begin_noise(self, batch: Sequence[Job], dtype: torch.dtype) -> None:
        if batch and self._draws_ahead:
            self._noise.begin(self._wanted(batch, dtype))

    @property
    def _draws_ahead(self) -> bool:
        """Whether the pipeline takes noise as its latents: to inpaint it mixes its own with the picture."""
        return self.plan.model.pipeline != "klein_inpaint"

    def _wanted(self, batch: Sequence[Job], dtype: torch.dtype) -> Wanted:
        """The noise of a batch; diffusers draws it in its embeddings' dtype."""
        return Wanted.of(self.session.pipeline, [job.seed for job in batch], self.plan.size, dtype)

    def _embeddings(self, texts: Sequence[str], clock: DeviceClock) -> torch.Tensor:
        return self.session.prompts.of(texts, self.session.pipeline, clock)

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

    def _write_if_due(self) -> None:
        """Bring the record up to date, and write it now and then: an image's own line is written with it."""
        if self.session.ranks.size > 1:
            self.memory.by_rank_bytes = self.session.ranks.gather(self.memory.peak_allocated_bytes)
        if self.folder.is_due:
            self._note_options()
            self._summarise()
            self.folder.write()

    def _note_options(self) -> None:
        self.session.observe()
        self.folder.note_options(self.plan.record(), self.plan.notes)

    def _summarise(self) -> None:
        """Bring the timings in the record up to date. What it costs grows with the run."""
        self.session.prompts.tell_times()  # of a call that failed after its texts
        for name, seconds in self.session.timings.items():  # import_s, load_s, apply_s
            setattr(self.timings, name, seconds)
        if self.session.context is not None and self.session.compiles:
            self.timings.compile_s = self.session.context.compiler.seconds()
        steps = [s for call in self.timings.step_s[self._earlier_calls :] for s in call]
        warm = self.config.measure.warmup > 0
        self.timings.steady_step_s = spread(steps if warm else steps[1:])
        self.folder.note_spans(spans.recorded())

    def _note_memory(self, stage: str) -> None:
        """The peak since the last stage's end (on a CPU: since the process began)."""
        used = peak_bytes(self.device)
        self.memory.by_stage[stage] = max(used, self.memory.by_stage.get(stage, 0))
        self.memory.peak_allocated_bytes = max(used, self.memory.peak_allocated_bytes)


def _warn_of_a_constant(finding: Finding, text: str) -> None:
    if finding.constant and finding.finite:
        log.warning("%s: all pixels have one colour", text)
