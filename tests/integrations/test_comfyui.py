"""The node in a real ComfyUI: pictures, progress, interrupts, hostile workflows, and a process that is killed."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import urllib.error

import pytest
from comfyui_process import PICTURE, ComfyUI, workflow
from PIL import Image

from fluxrun.paths import PACKAGE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "FLUXRUN_COMFYUI" not in os.environ,
        reason="no ComfyUI: FLUXRUN_COMFYUI names its folder, FLUXRUN_COMFYUI_PYTHON its Python (docs/comfyui.md)",
    ),
]

NIGHT = PACKAGE.parents[1] / "models" / "shapes" / "loras" / "night.safetensors"

SMALL = {"model": "tiny", "width": 64, "height": 64, "steps": 2}
LONG = {**SMALL, "steps": 500}

COMPILERS = ("cc1plus", "g++", "c++")

STEP, COMPILING = "· step ", "compiling"
"""What the node shows on itself meanwhile."""


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    running = ComfyUI(tmp_path_factory.mktemp("comfyui"))
    yield running
    running.close()


def until_shown(comfy, text, since):
    comfy.until(lambda: any(text in shown for shown in comfy.events.of("text", since)))


def test_a_picture_its_record_and_what_a_change_rebuilds(comfy):
    since = len(comfy.events.seen)
    ended = comfy.draw()
    assert ended["status"]["status_str"] == "success"
    record = comfy.record(ended)
    picture = Image.open(io.BytesIO(comfy.picture(ended)))
    assert picture.size == (256, 256)
    assert hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest() == record["images"][0]["sha256"]
    steps = [event["value"] for event in comfy.events.of("progress", since)]
    assert steps == list(range(1, 9))
    assert "[fluxrun] model=shapes attention=sdpa" in comfy.said()
    place = len(comfy.said())
    comfy.draw(seed=4)
    assert "[fluxrun] options, model and size as before: the pipeline is used as it stands" in comfy.said(place)
    place = len(comfy.said())
    assert comfy.record(comfy.draw(seed=4, attention="math"))["options"]["attention"]["effective"] == "math"
    assert "[fluxrun] attention sdpa → math: new shell, weights kept" in comfy.said(place)
    assert "Loading" not in comfy.said(place)
    place = len(comfy.said())
    comfy.draw(seed=4, attention="math")
    comfy.until(lambda: "Prompt executed" in comfy.said(place))
    assert "[fluxrun]" not in comfy.said(place)  # nothing has changed: ComfyUI has the picture already
    place = len(comfy.said())
    comfy.draw(seed=5, use_xformers=True)
    assert "[fluxrun] attention=xformers cannot be used, falling back to sdpa" in comfy.said(place)


def test_references_and_a_lora(comfy):
    shutil.copy(NIGHT, comfy.home / "models" / "loras")
    Image.new("RGB", (64, 64), (200, 10, 10)).save(comfy.home / "input" / "cat.png")
    nodes = workflow(image1=["4", 0], image2=["4", 0], lora_selection="night.safetensors", steps=1)
    nodes["4"] = {"class_type": "LoadImage", "inputs": {"image": "cat.png"}}
    record = comfy.record(comfy.wait(comfy.post(nodes)))
    assert [found["key"] for found in record["inputs"]] == ["reference_images"] * 2
    assert record["options"]["lora"]["effective"] == "adapters"


def test_interrupted_at_a_step(comfy):
    since = len(comfy.events.seen)
    prompt = comfy.post(workflow(**LONG))
    until_shown(comfy, STEP, since)
    comfy.get("/interrupt", {})
    assert comfy.was_interrupted(prompt)
    assert comfy.draw(**SMALL)["status"]["status_str"] == "success"


def test_interrupted_while_compiling(comfy):
    since = len(comfy.events.seen)
    prompt = comfy.post(workflow(use_torch_compile=True, overrides="compile.targets=[transformer,vae_decoder]"))
    until_shown(comfy, COMPILING, since)
    comfy.until(lambda: comfy.runs(COMPILERS))
    comfy.get("/interrupt", {})
    assert comfy.was_interrupted(prompt)
    assert not comfy.events.of("progress", since)
    comfy.until(lambda: not comfy.runs(COMPILERS))
    assert comfy.draw(**SMALL, seed=1)["status"]["status_str"] == "success"
    assert len(comfy.children()) == 1  # nobody is left but the process that draws


def test_interrupted_twice(comfy):
    since = len(comfy.events.seen)
    prompt = comfy.post(workflow(**LONG, seed=1))
    until_shown(comfy, STEP, since)
    comfy.get("/interrupt", {})
    comfy.get("/interrupt", {})
    assert comfy.was_interrupted(prompt)
    assert comfy.draw(**SMALL, seed=2)["status"]["status_str"] == "success"


def test_the_process_that_draws_is_killed(comfy):
    since = len(comfy.events.seen)
    prompt = comfy.post(workflow(**LONG, seed=2))
    until_shown(comfy, STEP, since)
    [worker] = comfy.children()
    worker.send_signal(signal.SIGKILL)
    assert "ended with SIGKILL" in comfy.error(prompt)
    assert comfy.draw(**SMALL, seed=3, keep_loaded=False)["status"]["status_str"] == "success"
    comfy.until(lambda: not comfy.children())
    prompt = comfy.post(workflow(**LONG, seed=4))
    comfy.until(comfy.children)  # it is starting, and imports
    comfy.get("/interrupt", {})
    assert comfy.was_interrupted(prompt)
    assert comfy.draw(**SMALL, seed=4)["status"]["status_str"] == "success"


@pytest.mark.parametrize(
    ("hostile", "key"),
    [
        ("+compile.inductor_options.cpp.cxx=/bin/sh", "compile.inductor_options"),
        ("hydra.searchpath=[file:///tmp]", "hydra.searchpath"),
        ("steps=${oc.env:HOME}", "oc.env:HOME"),
        ("hydra.run.dir=/tmp/elsewhere", "hydra.run.dir"),
        ("image=/etc/passwd", "it names a file"),
    ],
)
def test_a_hostile_workflow_is_refused_before_it_waits(comfy, hostile, key):
    shown = comfy.refusal(workflow(overrides=hostile))
    assert "a workflow may not set" in shown
    assert key in shown
    assert "\n" not in shown
    assert comfy.ask("/queue") == {"queue_running": [], "queue_pending": []}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": 100}, "width=100"),
        ({"cfg": 3.0, **SMALL}, "guidance"),
        ({"overrides": "sede=4"}, "did you mean 'seed'"),
        ({"model": "flux2_klein_4b"}, "FLUXRUN_COMFYUI_DOWNLOAD=1"),
        ({"image5": ["4", 0]}, "no input 'image5'"),
        ({"image1": ["4", 0], "image2": ["5", 0]}, "hold 5 pictures: 4 is the most"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(comfy, changed, message):
    nodes = workflow(**changed)
    nodes["4"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 4, "color": 0}}
    nodes["5"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
    shown = comfy.error(comfy.post(nodes))
    assert message in shown
    assert "\n" not in shown


def test_an_option_that_is_no_more(comfy):
    shown = comfy.refusal(workflow(attention="flash2"))
    assert "attention: 'flash2' not in ['auto', 'cudnn'" in shown
    with pytest.raises(urllib.error.HTTPError):
        comfy.post({PICTURE: {"class_type": "FluxrunFlux9", "inputs": {}}})
