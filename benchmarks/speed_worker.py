"""The process that measures one setting: imports, then waits; builds, warms up and takes its turns when told to.

A process per setting keeps process-wide switches apart (attention backend, inductor's config, dynamo's caches), and
waiting for its turn keeps the GPU for one at a time: settings are timed side by side, A B C, C B A, on the same device.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speed_settings import REFERENCE, Setting

if TYPE_CHECKING:
    from speed_subject import Subject

Reply = dict[str, Any]
PROMPTS = tuple(f"a lighthouse at dusk, {what}" for what in ("oil", "ink", "pastel", "gouache", "fresco", "etching"))
"""What ``Files`` draws."""


@dataclass(frozen=True)
class Job:
    """What a worker is to measure."""

    setting: Setting
    task: str
    overrides: tuple[str, ...]
    """The model and the size, as fluxrun overrides."""
    references: Path
    """Folder in which plain diffusers leaves its outputs, for the others' errors."""
    log: Path
    steps: int = 4
    """Denoising steps of a timed loop."""


def serve(connection: Connection, job: Job) -> None:
    """The worker's life: import, then one reply per command until ``quit`` or the parent is gone."""
    _write_to(job.log)
    _import_libraries(job)
    work = TASKS[job.task](job)
    connection.send({"ready": True})
    while (command := _next(connection)) is not None:
        connection.send(_answer(work, *command))
    # No farewells: compile workers notice by themselves, and the next worker waits for this one's memory.
    sys.stdout.flush()
    os._exit(0)


def _next(connection: Connection) -> tuple[str, Any] | None:
    try:
        command: tuple[str, Any] = connection.recv()
    except EOFError:
        return None
    return None if command[0] == "quit" else command


def _answer(work: Task, name: str, argument: Any) -> Reply:
    """Do one command; an error is the reply, its traceback is in the log."""
    started = time.perf_counter()
    try:
        reply = {"build": work.build, "warm": work.warm, "turn": work.turn, "facts": work.facts}[name](argument)
        return {**reply, "seconds": time.perf_counter() - started}
    except Exception as error:  # whatever a setting's library throws is its result
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]}


def _write_to(log: Path) -> None:
    """Everything this process prints, autotuning chatter too, goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")


def _import_libraries(job: Job) -> None:
    """Import what building will need: all workers do it at the same time, before anything is timed."""
    if job.setting.recipe is None:
        import fluxrun.models  # noqa: F401
    else:
        import speed_subject  # noqa: F401
        from diffusers import Flux2KleinPipeline  # noqa: F401
    if job.setting.halves and importlib.util.find_spec("torchao") is not None:
        import torchao.quantization  # noqa: F401


class Task:
    """What is measured of a setting. Samples of a turn are lists of numbers whose key ends in their unit."""

    text_encoder = False

    def __init__(self, job: Job) -> None:
        self.job = job
        self.subject: Subject

    def build(self, _: Any) -> Reply:
        """The pipeline, on the device, nothing called yet."""
        from speed_subject import Subject

        self.subject = Subject(self.job.setting, list(self.job.overrides), self.text_encoder)
        self._give_back()
        return {"build_peak_gb": self.subject.peak_gb()}

    def warm(self, _: Any) -> Reply:
        """The first calls: compile, autotune, capture. Their output is compared with plain diffusers' own."""
        raise NotImplementedError

    def turn(self, argument: Any) -> Reply:
        """One turn of timed calls."""
        raise NotImplementedError

    def facts(self, _: Any) -> Reply:
        """What was in effect."""
        return {"options": self.subject.facts(), "peak_gb": self.subject.peak_gb()}

    def _give_back(self) -> None:
        """Leave the memory that torch only keeps in reserve to the workers beside this one."""
        import torch

        if self.subject.cuda:
            torch.cuda.empty_cache()

    def _error(self, output: Any) -> Reply:
        """Relative L2 against what plain diffusers, which comes first, computed from the same inputs."""
        import torch

        file = self.job.references / f"{self.job.task}.pt"
        output = output.float().cpu()
        if self.job.setting.name == REFERENCE:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(output, file)
            return {"rel_l2": 0.0}
        if not file.exists():
            return {"rel_l2": None}
        expected = torch.load(file)
        error = ((output - expected).norm() / expected.norm()).item()
        return {"rel_l2": error if math.isfinite(error) else None, "finite": bool(output.isfinite().all())}


class Steps(Task):
    """Denoising steps: the transformer called by itself, and the pipeline's loop."""

    def warm(self, _: Any) -> Reply:
        subject = self.subject
        first_s = subject.wall(lambda: self._keep(subject.first(subject.step_inputs)))
        reply = self._error(self._forward())
        self._loop()
        self._give_back()
        return {"first_call_s": first_s, **reply}

    def turn(self, argument: Any) -> Reply:
        self._forward()  # the turn before was another process's
        return {"forward_ms": [self.subject.timed(self._forward) for _ in range(3)], "step_ms": self._loop()}

    def _keep(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs

    def _forward(self) -> Any:
        import torch

        with torch.no_grad():
            return self.subject.pipeline.transformer(**self.inputs)[0]

    def _loop(self) -> list[float]:
        subject = self.subject
        given = {"prompt_embeds": subject.embeddings, "output_type": "latent", "num_inference_steps": self.job.steps}
        return subject.watched_draw(**given)[1].step_ms()


class Decode(Task):
    """VAE decode: latents to pixels, as the pipeline calls it."""

    def warm(self, _: Any) -> Reply:
        import torch

        subject, vae = self.subject, self.subject.pipeline.vae
        edge = subject.pipeline.vae_scale_factor
        shape = (1, vae.config.latent_channels, subject.height // edge, subject.width // edge)
        numbers = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0))
        self.latents = numbers.to(subject.device, vae.dtype)
        first_s = subject.wall(lambda: subject.first(self._decode))
        reply = self._error(subject.first(self._decode))  # a CUDA graph is recorded at the second call
        self._decode()
        subject.peak_gb()
        self._decode()
        return {"first_call_s": first_s, "decode_peak_gb": subject.peak_gb(), **reply}

    def turn(self, argument: Any) -> Reply:
        self._decode()
        return {"decode_ms": [self.subject.timed(self._decode) for _ in range(3)]}

    def _decode(self) -> Any:
        import torch

        with torch.no_grad():
            return self.subject.pipeline.vae.decode(self.latents, return_dict=False)[0]


class Image(Task):
    """Prompt to PIL image, text encoder included: in one go, and once more with a clock between the stages."""

    text_encoder = True

    def warm(self, _: Any) -> Reply:
        first_s = self.subject.wall(lambda: self.subject.first(self._draw))
        image = self.subject.first(self._draw)  # a CUDA graph is recorded at the second call
        self._split()
        self._give_back()
        return {"first_call_s": first_s, **self._fidelity(image)}

    def turn(self, argument: Any) -> Reply:
        self._draw()
        return {"total_s": [self.subject.wall(self._draw)], **self._split()}

    def _draw(self) -> Any:
        """Plain diffusers gets the prompt; fluxrun encodes it first, as its ``generate`` does."""
        from speed_subject import PROMPT

        subject = self.subject
        if subject.session is None:
            return subject.draw(prompt=PROMPT, **subject.text_arguments())[0]
        return subject.draw(prompt_embeds=subject.encode())[0]

    def _split(self) -> Reply:
        subject = self.subject
        subject.synchronize()
        started = time.perf_counter()
        embeddings = subject.encode()
        subject.synchronize()
        encoded = time.perf_counter()
        _, loop = subject.watched_draw(prompt_embeds=embeddings)
        ended = time.perf_counter()
        return {
            "text_s": [encoded - started],
            "denoise_s": [loop.ended - loop.started],
            "decode_s": [ended - loop.ended],
            "step_ms": loop.step_ms(),
        }

    def _fidelity(self, image: Any) -> Reply:
        import numpy as np
        import torch

        return self._error(torch.from_numpy(np.asarray(image, dtype=np.float32) / 255))


class Files(Task):
    """Prompts to PNG files, one by one: text encoder, drawing and saving, as a user waits for them.

    Plain diffusers is given a prompt and saves the picture as PIL does by itself; fluxrun does all of it in one run.
    """

    text_encoder = True

    def build(self, argument: Any) -> Reply:
        """fluxrun builds at its first run."""
        if self.job.setting.recipe is not None:
            return super().build(argument)
        from fluxrun.pipeline.session_pool import SessionPool

        self.bench = SessionPool()
        return {}

    def warm(self, _: Any) -> Reply:
        first_s = self._seconds()
        self._seconds()
        return {"first_call_s": first_s}

    def turn(self, argument: Any) -> Reply:
        return {"file_s": [self._seconds() / len(PROMPTS)]}

    def facts(self, argument: Any) -> Reply:
        """What was in effect, by the last run's record."""
        if self.job.setting.recipe is not None:
            return super().facts(argument)
        options = {group: option.model_dump() for group, option in self.record.options.items()}
        for option in options.values():
            option["fallbacks"] = [f"{f['option']}: {f['reason']} ({f['stage']})" for f in option["fallbacks"]]
        return {"options": options, "peak_gb": round(self.record.memory.peak_allocated_bytes / 2**30, 2)}

    def _seconds(self) -> float:
        with tempfile.TemporaryDirectory(prefix="fluxrun-speed-") as folder:
            started = time.perf_counter()
            (self._plain if self.job.setting.recipe is not None else self._fluxrun)(Path(folder))
            return time.perf_counter() - started

    def _plain(self, folder: Path) -> None:
        for number, prompt in enumerate(PROMPTS):
            self.subject.draw(prompt=prompt, **self.subject.text_arguments())[0].save(folder / f"{number}.png")

    def _fluxrun(self, folder: Path) -> None:
        import fluxrun

        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
        # resident, whatever memory the settings measured beside this one leave free.
        given = [*self.job.overrides, *self.job.setting.overrides, "memory=resident", f"prompts_file={prompts}"]
        self.record = fluxrun.run(fluxrun.compose(given), folder / "run", pool=self.bench)


class Long(Task):
    """Embeddings to PIL image over all of a model's steps; the first image is drawn whole, a cache needs it."""

    def warm(self, _: Any) -> Reply:
        subject = self.subject
        # Plain diffusers has nothing to warm up but its kernels, and its images take half a minute.
        steps = 2 if self.job.setting.name == REFERENCE else self.job.steps
        return {"first_call_s": subject.wall(lambda: subject.first(lambda: self._draw(steps)))}

    def turn(self, argument: Any) -> Reply:
        total_s = self.subject.wall(lambda: self._keep(*self._draw(self.job.steps)))
        return {"total_s": [total_s], "step_ms": self.loop.step_ms(), "decode_s": [self.decode_s]}

    def _keep(self, image: Any, loop: Any) -> None:
        self.loop, self.decode_s = loop, time.perf_counter() - loop.ended

    def _draw(self, steps: int) -> tuple[Any, Any]:
        return self.subject.watched_draw(prompt_embeds=self.subject.embeddings, num_inference_steps=steps)


class Sizes(Task):
    """Picture sizes one after the other in one process: what a step takes, what is compiled or captured again."""

    def warm(self, _: Any) -> Reply:
        return {}

    def turn(self, argument: Any) -> Reply:
        """``argument``: height and width in pixels."""
        before = self._counts()
        first_s = self.subject.wall(lambda: self.subject.first(lambda: self._loop(argument)))
        again = [self._loop(argument) for _ in range(2)]
        after = self._counts()
        return {
            "size": list(argument),
            "first_call_s": first_s,
            "step_ms": [ms for loop in again for ms in loop],
            "counts": {key: after[key] - before.get(key, 0) for key in after},
            "peak_gb": self.subject.peak_gb(),
        }

    def _loop(self, size: tuple[int, int]) -> list[float]:
        subject = self.subject
        given = {"prompt_embeds": subject.embeddings, "output_type": "latent", "num_inference_steps": self.job.steps}
        return subject.watched_draw(**given, height=size[0], width=size[1])[1].step_ms()

    def _counts(self) -> dict[str, float]:
        """What the session has counted: compilations, recompilations, recorded graphs (over all targets)."""
        facts = self.subject.facts().get("compile", {}).get("facts", {})
        graphs = {"cuda_graphs": sum(facts["cuda_graphs"].values())} if "cuda_graphs" in facts else {}
        return {key: value for key, value in facts.items() if type(value) in (int, float)} | graphs


class Roofline(Task):
    """The device's own ceilings, without any model."""

    def build(self, _: Any) -> Reply:
        return {}

    def warm(self, _: Any) -> Reply:
        return {}

    def turn(self, argument: Any) -> Reply:
        from speed_roofline import measure

        return {"ceilings": measure()}

    def facts(self, _: Any) -> Reply:
        return {}


TASKS: dict[str, Callable[[Job], Task]] = {
    "steps": Steps,
    "decode": Decode,
    "image": Image,
    "files": Files,
    "long": Long,
    "sizes": Sizes,
    "roofline": Roofline,
}
