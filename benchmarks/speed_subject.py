"""One pipeline to be measured, plain or fluxrun's, with one way to call both and one clock for both."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from speed_plain import RECIPES, plain_pipeline
from speed_settings import Setting

T = TypeVar("T")
SEED = 0
PROMPT = "a lighthouse at dusk, waves against the rocks, oil on canvas"


class Subject:
    """A setting's pipeline. ``overrides`` choose model and size; without text encoder the embeddings are random."""

    def __init__(self, setting: Setting, overrides: list[str], text_encoder: bool) -> None:
        import fluxrun
        from fluxrun.planning.prepare import prepare
        from fluxrun.runner import assembled

        # memory=staged builds without the text encoder, which nobody asks to encode here; resident keeps all of it
        # whatever memory the settings measured beside this one leave free.
        placement = "memory=resident" if text_encoder else "memory=staged"
        self.config = fluxrun.compose([*overrides, *setting.overrides, placement])
        model: Any = self.config.model
        self.model = model
        self.session: Any = None
        if setting.recipe is None:
            # Not fluxrun.build, which would keep the text encoder.
            self.session = assembled(prepare(self.config))
            self.device = self.session.plan.machine.device
        else:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
            self._plain = plain_pipeline(self.model, self.device, text_encoder)
            RECIPES[setting.recipe](self._plain)
        self.height: int = self.config.height or model.height
        self.width: int = self.config.width or model.width
        self.steps = self.config.steps or model.steps

    @property
    def pipeline(self) -> Any:
        """The pipeline as it stands: a fallback builds fluxrun's anew."""
        return self._plain if self.session is None else self.session.pipeline

    @property
    def cuda(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device.startswith("cuda")

    def facts(self) -> dict[str, Any]:
        """What is in effect in each option group, what fell back and why, and what was counted."""
        if self.session is None:
            return {}
        self.session.observe()
        return {
            group: {
                "requested": choice.requested,
                "effective": choice.effective,
                "fallbacks": [f"{f.option}: {f.reason} ({f.stage})" for f in choice.fallbacks],
                "facts": choice.facts,
            }
            for group, choice in self.session.plan.choices.items()
        }

    def first(self, call: Callable[[], T]) -> T:
        """A first call, which may fail and fall back, as ``fluxrun`` does it."""
        while True:
            try:
                return call()
            except Exception as error:  # whose failure it was is the session's business; it raises what is nobody's
                if self.session is None:
                    raise
                self.session.recover(error)

    # -- calls --------------------------------------------------------------------------------------------------

    def draw(self, **given: Any) -> Any:
        """One pipeline call with the arguments both sides use; ``given`` adds to them. Returns what was drawn."""
        arguments = {
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.steps,
            "generator": torch.Generator("cpu").manual_seed(SEED),
            **({"guidance_scale": 1.0} if self.model.distilled else {}),
        }
        return self.pipeline(**{**arguments, **given}).images

    def text_arguments(self) -> dict[str, Any]:
        """How the prompt is encoded."""
        read = {"text_encoder_out_layers": self.model.text_encoder_out_layers}
        layers = read if self.model.text_encoder_out_layers else {}
        return {"max_sequence_length": self.model.max_sequence_length, **layers}

    @torch.no_grad()
    def encode(self) -> torch.Tensor:
        """The prompt's embedding, by the text encoder."""
        pipeline = self.pipeline
        return pipeline.encode_prompt(PROMPT, device=pipeline._execution_device, **self.text_arguments())[0]

    @functools.cached_property
    def embeddings(self) -> torch.Tensor:
        """Random embeddings, the same for every setting: [1, tokens, joint_attention_dim]."""
        width = self.pipeline.transformer.config.joint_attention_dim
        numbers = torch.Generator("cpu").manual_seed(SEED)
        drawn = torch.randn(1, self.model.max_sequence_length, width, generator=numbers)
        return drawn.to(self.device, self.pipeline.vae.dtype)  # the transformer's may be that of its quantized weights

    def step_inputs(self) -> dict[str, Any]:
        """What a pipeline call hands to the transformer at its first step."""
        recorder = _Recorder(self.pipeline.transformer)
        # Past diffusers' __setattr__, which would note the stand-in as a component of the pipeline.
        self.pipeline.__dict__["transformer"] = recorder
        try:
            self.draw(prompt_embeds=self.embeddings, output_type="latent", num_inference_steps=2)
        finally:
            self.pipeline.__dict__["transformer"] = recorder.module
        assert recorder.inputs is not None
        return recorder.inputs

    # -- clocks -------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """A point in time on the device: an event on a GPU (nothing waits for it), the clock elsewhere."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks; the device must have been synchronised since."""
        return float(start.elapsed_time(end)) if self.cuda else (end - start) * 1e3

    def timed(self, call: Callable[[], Any]) -> float:
        """Milliseconds of ``call`` on the device."""
        self.synchronize()
        start = self.mark()
        call()
        end = self.mark()
        self.synchronize()
        return self.between(start, end)

    def wall(self, call: Callable[[], Any]) -> float:
        """Seconds of ``call`` by the clock on the wall, the device idle at both ends."""
        self.synchronize()
        started = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - started

    def watched_draw(self, **given: Any) -> tuple[Any, Loop]:
        """``draw``, with its denoising loop watched."""
        loop = Loop(self)
        pipeline = self.pipeline
        pipeline.progress_bar = loop.bar
        try:
            images = self.draw(**given, callback_on_step_end=loop.on_step)
        finally:
            del pipeline.progress_bar
        self.synchronize()
        return images, loop

    def peak_gb(self) -> float | None:
        """Peak of the memory torch allocated on the GPU since the last call, in GB (2**30 bytes)."""
        if not self.cuda:
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 2)


class Loop:
    """Stands in for diffusers' progress bar and step callback: a mark at the start and after every step."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._marks: list[Any] = []

    @contextmanager
    def bar(self, *_: Any, **__: Any) -> Iterator[Loop]:
        """What the pipeline opens around its loop."""
        self._subject.synchronize()
        self.started = time.perf_counter()
        self._marks.append(self._subject.mark())
        yield self
        self._subject.synchronize()
        self.ended = time.perf_counter()

    def update(self, n: int = 1) -> None:
        """diffusers calls it after each step."""

    def on_step(self, pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """After each step."""
        self._marks.append(self._subject.mark())
        return {}

    def step_ms(self) -> list[float]:
        """Milliseconds of each step."""
        return [self._subject.between(a, b) for a, b in zip(self._marks, self._marks[1:], strict=False)]


class _Recorder:
    """A transformer that keeps a copy of the first call's inputs."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.inputs: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, **inputs: Any) -> Any:
        if self.inputs is None:
            self.inputs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        return self.module(**inputs)
