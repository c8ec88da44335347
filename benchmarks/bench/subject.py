"""One pipeline to be measured, plain or fluxrun's: one way to call both, and fluxrun's own Stopwatch for both."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from bench.plain import RECIPES, plain_pipeline
from bench.results import Row
from bench.settings import REFERENCE
from bench.worker import Job
from fluxrun.config.composition import compose
from fluxrun.drawing.generation import Drawn
from fluxrun.drawing.stopwatch import Stopwatch
from fluxrun.planning.plan import Plan
from fluxrun.planning.prepare import prepare
from fluxrun.process.clock import DeviceClock
from fluxrun.process.console import Steps
from fluxrun.process.device import free_memory, peak_bytes, synchronize
from fluxrun.runner import assembled

T = TypeVar("T")
PROMPT = "a lighthouse at dusk, waves against the rocks, oil on canvas"


class Subject:
    """A job's pipeline; without text encoder the embeddings are random."""

    def __init__(self, job: Job, *, text_encoder: bool = False) -> None:
        # memory=staged builds without the text encoder, which nobody asks to encode here; resident keeps all of it
        # whatever memory the settings measured beside this one leave free.
        placement = "memory=resident" if text_encoder else "memory=staged"
        prepared = prepare(compose([*job.overrides, *job.setting.overrides.split(), placement]))
        self.job, self.plan = job, prepared.plan
        self.device = self.plan.machine.device
        # Not fluxrun.build, which would keep the text encoder.
        self.session = None if job.setting.recipe else assembled(prepared)
        if job.setting.recipe:
            self._plain = plain_pipeline(self.plan, self.device, text_encoder=text_encoder)
            RECIPES[job.setting.recipe](self._plain)
        free_memory()

    @property
    def pipeline(self) -> Any:
        """The pipeline as it stands: a fallback builds fluxrun's anew."""
        return self._plain if self.session is None else self.session.pipeline

    def first(self, call: Callable[[], T]) -> T:
        """A first call, which may fail and fall back, as ``fluxrun`` does it."""
        while True:
            try:
                return call()
            except Exception as error:  # whose failure it was is the session's business; it raises what is nobody's
                if self.session is None:
                    raise
                self.session.recover(error)

    def image(self, **given: Any) -> Any:
        """One picture, with nothing between the stages."""
        return self.pipeline(**arguments(self.plan), **given).images[0]

    def draw(self, **given: Any) -> Drawn:
        """The same from prompt embeddings (random ones if none are given), with the stopwatch riding along."""
        pipeline, given = self.pipeline, arguments(self.plan) | {"prompt_embeds": self.embeddings} | given
        shown = Steps("", given["num_inference_steps"])
        watch = Stopwatch(DeviceClock(self.device), shown, lambda: None, lambda: None, compiles=False)
        try:
            with watch.timing(pipeline):
                images = pipeline(**given, callback_on_step_end=watch.step).images
        finally:
            del pipeline.progress_bar
        return Drawn(images, watch.step_seconds(), watch.denoise_s, watch.decode_s, findings=[])

    def step_ms(self, **given: Any) -> list[float]:
        """Milliseconds of each step, nothing decoded."""
        return [seconds * 1e3 for seconds in self.draw(output_type="latent", **given).step_s]

    @torch.no_grad()
    def encode(self) -> torch.Tensor:
        """The prompt's embedding, by the text encoder; fluxrun's own runs say where, diffusers looks for it."""
        where = {} if self.session is None else {"device": torch.device(self.device)}
        return self.pipeline.encode_prompt(PROMPT, **where, **text_arguments(self.plan))[0]

    @functools.cached_property
    def embeddings(self) -> torch.Tensor:
        """Random embeddings, the same for every setting: [1, tokens, joint_attention_dim]."""
        shape = (1, self.plan.model.max_sequence_length, self.pipeline.transformer.config.joint_attention_dim)
        drawn = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0))
        return drawn.to(self.device, self.pipeline.vae.dtype)  # the transformer's may be that of its quantized weights

    def first_step(self) -> torch.Tensor:
        """What the transformer makes of the first step, as the pipeline hands it to its scheduler."""
        scheduler = self.pipeline.scheduler
        with patch.object(scheduler, "step", wraps=scheduler.step) as step:
            self.step_ms(num_inference_steps=1)
        output: torch.Tensor = step.call_args.args[0]
        return output

    def timed(self, call: Callable[[], T]) -> tuple[float, T]:
        """Seconds of ``call`` by the clock on the wall, the device idle at both ends, and what it returns."""
        synchronize(self.device)
        started = time.perf_counter()
        value = call()
        synchronize(self.device)
        return time.perf_counter() - started, value

    def peak_gb(self) -> float:
        """Peak memory since the last call, in GB (2**30 bytes): allocated on a GPU, the process's on a CPU."""
        return round(peak_bytes(self.device) / 2**30, 2)

    def facts(self) -> Row:
        """What is in effect in each option group, what fell back and why, what was counted; and the peak."""
        if self.session is not None:
            self.session.observe()
        options = {} if self.session is None else self.plan.record()
        return {"options": {g: o.model_dump(mode="json") for g, o in options.items()}, "peak_gb": self.peak_gb()}

    def error(self, output: Any) -> Row:
        """Relative L2 against what plain diffusers, which comes first, computed from the same inputs."""
        output, file = output.float().cpu(), self.job.work / "plain.pt"
        if self.job.setting.name == REFERENCE:
            torch.save(output, file)
        expected = torch.load(file) if file.exists() else torch.tensor(math.nan)
        error = ((output - expected).norm() / expected.norm()).item()
        return {"rel_l2": error if math.isfinite(error) else None}


def arguments(plan: Plan) -> dict[str, Any]:
    """A pipeline call's arguments, the same for both sides, without the prompt."""
    (height, width), generator = plan.size, torch.Generator("cpu").manual_seed(0)
    guidance = {"guidance_scale": 1.0} if plan.model.distilled else {}
    return {"height": height, "width": width, "num_inference_steps": plan.steps, "generator": generator, **guidance}


def text_arguments(plan: Plan) -> dict[str, Any]:
    """How a prompt is encoded."""
    layers = plan.model.text_encoder_out_layers
    read = {"text_encoder_out_layers": layers} if layers else {}
    return {"max_sequence_length": plan.model.max_sequence_length, **read}


def device_seconds(call: Callable[[], Any]) -> float:
    """Seconds of ``call`` on the GPU, by events on it; on a CPU by the clock."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3
