"""The node itself: inputs in, pictures and the record out; whatever goes wrong is an error that ComfyUI shows."""

from __future__ import annotations

import functools
import json
import os
import threading
from typing import Any

from fluxrun.errors import ConfigError, FluxrunError, TrustError
from fluxrun.serving.child import WorkerDied
from fluxrun.serving.runs import Run

from . import host
from .files import checkpoints
from .inputs import IMAGES, MOST_PICTURES, Inputs, models, optional, required
from .painter import Painter, pictures_of
from .pictures import as_batch, png_files
from .request import check_names, overrides_of, overruled, typed, without_downloads

DOWNLOAD = "FLUXRUN_COMFYUI_DOWNLOAD"
"""Environment variable: 1 lets a workflow download one of the models that fluxrun knows by name."""

STOPPING = "stopping at the next step; press again to end at once"

MAKING = threading.Lock()
"""ComfyUI checks workflows on one thread and runs them on another."""


def painter() -> Painter:
    """The one that all nodes share: weights are loaded once."""
    with MAKING:
        return _painter()


@functools.cache
def _painter() -> Painter:
    return Painter(host.temp_folder(), models(), host.folders)


class Flux2:
    """Draws with FLUX.2 in a process of fluxrun's own."""

    CATEGORY = "fluxrun"
    DESCRIPTION = "FLUX.2 by fluxrun: drawn in a process of its own that stays warm; the record says what really ran."
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "record")
    OUTPUT_TOOLTIPS = ("The pictures.", "run.json: what was asked, what ran, why they differ, where the time went.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Inputs | dict[str, str]]:
        """What ComfyUI shows; its folders are looked at anew each time."""
        found = required(list(checkpoints(host.folders("diffusers"))))
        return {"required": found, "optional": optional(host.loras()), "hidden": {"node_id": "UNIQUE_ID"}}

    @classmethod
    def VALIDATE_INPUTS(cls, overrides: str | None = None) -> bool | str:
        """Refuse at once, before anything of the workflow runs, what no workflow may set."""
        try:
            if words := typed(overrides):
                painter().rules.check(words)
        except TrustError as error:
            return str(error)
        except ConfigError:
            return True  # it may be right together with the other inputs: judged when it is drawn
        return True

    def draw(self, node_id: str = "", **inputs: Any) -> tuple[Any, str]:
        """Draw; raises ComfyUI's own exception when it was interrupted, a FluxrunError of one line else."""
        check_names(inputs)
        run, display = self._start(inputs), host.Display(node_id)
        try:
            follow(run, display)
        finally:
            if run.ended and not died(run) and not inputs.get("keep_loaded", True):
                painter().release()
        if run.state != "completed":
            raise FluxrunError(why(run))
        text = (run.folder / "run.json").read_text(encoding="utf-8")
        pictures = as_batch(pictures_of(run, json.loads(text)))
        display.write(f"{len(pictures)} picture(s) · {(run.ended_at or 0) - (run.started_at or 0):.1f} s")
        return pictures, text

    def _start(self, inputs: dict[str, Any]) -> Run:
        found = checkpoints(host.folders("diffusers"))
        painter().rules.add_models([str(path) for path in found.values()])
        words = overrides_of(inputs, pictures=_references(inputs), checkpoints=found, device=host.device())
        accepted = painter().rules.check(words)
        for line in overruled(inputs):
            host.say(line, "warning")
        host.make_room()
        return painter().start(accepted if os.environ.get(DOWNLOAD) == "1" else without_downloads(accepted))


def died(run: Run) -> bool:
    """Whether the process that draws has ended in the middle of a run; another one is being started then."""
    return run.error_type == WorkerDied.__name__


def why(run: Run) -> str:
    """What has ended a run, and what to do about it here."""
    text = run.error or f"the run was {run.state}"
    if died(run):
        return f"{text}; what it printed: {painter().log}"
    if "model.offline=true" in text:
        return f"{text}; or start ComfyUI with {DOWNLOAD}=1, then a workflow may download it"
    return text


def follow(run: Run, display: host.Display) -> None:
    """Show what happens until the run has ended. Raises ComfyUI's Interrupt when its button was pressed."""
    stopped = False
    for event in painter().events(run):
        try:
            display.show(event)
            pressed = host.take_interrupt()
        except host.Interrupt:  # the progress bar has seen it first
            pressed = True
        if pressed:
            stopped = True
            painter().stop(run)
            if not run.begun:
                break  # nothing is drawn yet: it is taken back as soon as the process can be told
            display.write(STOPPING)
    if stopped:
        raise host.Interrupt


def _references(inputs: dict[str, Any]) -> list[str]:
    """The pictures that are linked, as files; each one of a batch counts."""
    batches = [inputs[name] for name in IMAGES if inputs.get(name) is not None]
    count = sum(len(batch) for batch in batches)
    if count > MOST_PICTURES:
        raise ConfigError(f"{', '.join(IMAGES)} hold {count} pictures: {MOST_PICTURES} is the most")
    return [painter().keep(png) for batch in batches for png in png_files(batch)]
