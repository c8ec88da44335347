"""ComfyUI's own side: its folders, its memory, its progress bar and its interrupt button."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import comfy.model_management as management
import folder_paths
from comfy.utils import ProgressBar
from server import PromptServer

from fluxrun.process.signals import AGAIN

Interrupt = management.InterruptProcessingException
"""What a node raises when it was interrupted; ComfyUI's progress bar raises it, too."""

log = logging.getLogger("fluxrun.comfyui")


def say(text: str, level: str = "info") -> None:
    """A line on ComfyUI's console."""
    log.log(logging.getLevelNamesMapping().get(level.upper(), logging.INFO), "[fluxrun] %s", text)


def folders(kind: str) -> Sequence[str]:
    """The places of ``input``, ``loras`` or ``diffusers``."""
    return [folder_paths.get_input_directory()] if kind == "input" else list(folder_paths.get_folder_paths(kind))


def loras() -> list[str]:
    """The LoRA files that ComfyUI knows and fluxrun reads."""
    return [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]


def temp_folder() -> Path:
    """A folder that ComfyUI empties when it starts and when it ends."""
    return Path(folder_paths.get_temp_directory()) / "fluxrun"


def device() -> str | None:
    """ComfyUI's device where it is not the one that fluxrun takes by itself."""
    chosen = management.get_torch_device()
    return str(chosen) if chosen.type == "cpu" or (chosen.type == "cuda" and chosen.index) else None


def make_room() -> None:
    """Have ComfyUI's own models leave the GPU: fluxrun plans with what is free there."""
    if management.get_torch_device().type != "cpu" and management.current_loaded_models:
        say("ComfyUI's models are unloaded from the GPU to make room")
        management.unload_all_models()
        management.soft_empty_cache()


def take_interrupt() -> bool:
    """Whether the button was pressed since the last look."""
    pressed: bool = management.processing_interrupted()
    if pressed:
        management.interrupt_current_processing(False)
    return pressed


class Display:
    """One node's progress bar and the text on it."""

    def __init__(self, node_id: str) -> None:
        self._node, self._bar, self._steps = node_id, ProgressBar(1), ""

    def show(self, event: dict[str, object]) -> None:
        """What the process that draws reports. Raises Interrupt when the button was pressed."""
        match event:
            case {"event": "line", "text": str(text), "level": str(level)}:
                say(text.removesuffix(AGAIN), level)  # there it would end ComfyUI
            case {"event": "stage", "text": str(text)}:
                self.write(text)
            case {"event": "steps", "text": str(text), "total": int(total)} if total:
                self._steps = text
                self._bar = ProgressBar(total)
            case {"event": "compiling"}:
                self.write(f"{self._steps} · compiling (first run only…)")
                say(f"{self._steps} · compiling (first run only…)")
            case {
                "event": "step",
                "done": int(done),
                "total": int(total),
                "step_s": float(each),
                "left_s": float(left),
            }:
                self.write(f"{self._steps} · step {done}/{total} · {each:.2f} s/step · {left:.0f} s left")
                self._bar.update_absolute(done, total)

    def write(self, text: str) -> None:
        """A text on the node itself, where this ComfyUI can show one."""
        if hasattr(PromptServer.instance, "send_progress_text"):
            PromptServer.instance.send_progress_text(text, self._node)
