"""The ComfyUI node without ComfyUI: what it offers, what its inputs mean, and what a workflow may not ask for."""

from __future__ import annotations

import io
import json

import comfyui_node
import pytest
from helpers import SMALL
from PIL import Image

from fluxrun.config.catalog import Catalog, default_choices
from fluxrun.config.schema import GROUPS
from fluxrun.errors import ConfigError, FluxrunError, TrustError

files, inputs, painter, request_ = map(comfyui_node.module, ("files", "inputs", "painter", "request"))

PLAIN = {
    name: about["default"]
    for name, (_, about) in {**inputs.required(()), **inputs.optional(())}.items()
    if "default" in about
}
"""What ComfyUI hands over for a node that nobody has touched."""


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """ComfyUI's folders."""
    home = tmp_path_factory.mktemp("comfy")
    for kind in ("input", "loras/style", "diffusers/mine", "diffusers/a/b/deep"):
        (home / kind).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(home / "input/cat.png")
    (home / "input/secret.json").write_text("{}")
    (home / "outside.png").write_bytes((home / "input/cat.png").read_bytes())
    (home / "loras/style/night.safetensors").write_bytes(b"")
    for name in ("mine", "a/b/deep"):
        (home / f"diffusers/{name}/model_index.json").write_text("{}")
    return home


@pytest.fixture(scope="module")
def painting(comfy):
    return painter.Painter(comfy / "temp", inputs.models(), lambda kind: [str(comfy / kind)])


def words(pictures=(), checkpoints=(), device=None, **changed):
    given = {**PLAIN, **changed}
    return request_.overrides_of(given, pictures=pictures, checkpoints=dict(checkpoints), device=device)


# --- what is offered --------------------------------------------------------------------------------------------------


def test_a_drop_down_for_each_group():
    offered = {**inputs.required(["diffusers/mine"]), **inputs.optional(["a.safetensors"])}
    for group in GROUPS:
        names, about = offered[group]
        expected = [name for name in Catalog().names(group) if name != "local"]
        assert names == expected + (["diffusers/mine"] if group == "model" else [])
        assert about["default"] == default_choices()[group]
        assert all(f"\n{name}: " in about["tooltip"] for name in expected)
    assert offered["lora_selection"][0] == ["[None]", "a.safetensors"]


def test_the_settings_that_a_comfyui_user_knows():
    offered = inputs.optional(())
    for name in ("use_torch_compile", "use_xformers", "enable_vae_tiling"):
        assert offered[name][0] == "BOOLEAN"
        assert offered[name][1]["default"] is False
    assert "11 % slower" in offered["use_xformers"][1]["tooltip"]
    assert "pip install xformers" in offered["use_xformers"][1]["tooltip"]
    assert {"gpu", "balanced", "lowvram"} < set(offered["memory_mode"][0])


# --- what it means ----------------------------------------------------------------------------------------------------


def test_an_untouched_node_asks_for_the_defaults():
    assert words() == ["model=shapes", "seed=0", "prompt=a red circle left of a blue square"]


def test_every_input_becomes_an_override(painting):
    asked = words(
        device="cpu", pictures=["input:cat.png", "input:cat.png"], model="flux2_klein_base_4b", steps=3, cfg=2.5,
        width=64, height=128, seed=7, lora_selection="style/night.safetensors", lora_strength=0.5,
        memory_mode="lowvram", use_torch_compile=True, use_xformers=True, enable_vae_tiling=True, cache="fixed",
        overrides="# a comment\n\n num_images=2 \nnegative_prompt=dark",
    )  # fmt: skip
    assert set(asked) >= {"compile=regional", "attention=xformers", "vae=tiled", "memory=group", "cache=fixed"}
    data = painting.rules.check(asked).data
    chosen = ("device", "steps", "guidance", "width", "height", "seed", "num_images", "negative_prompt")
    assert [data[key] for key in chosen] == ["cpu", 3, 2.5, 64, 128, 7, 2, "dark"]
    assert data["lora"]["name"] == "adapters"
    assert data["lora"]["files"][0]["path"].endswith("loras/style/night.safetensors")
    assert data["lora"]["files"][0]["scale"] == 0.5
    assert len(data["reference_images"]) == 2


def test_the_text_comes_before_a_drop_down_and_that_before_a_setting():
    both = {"use_xformers": True, "attention": "math", "memory_mode": "gpu"}
    assert "attention=math" in words(**both)
    assert request_.overruled({**PLAIN, **both}) == ["use_xformers is not used: the drop-down says attention=math"]
    asked = words(**both, overrides="attention=flex\nseed=5\nprompt=another")
    assert [word for word in asked if word.startswith(("attention", "seed", "prompt"))] == [
        "attention=flex", "seed=5", "prompt=another",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "prompt", ["", "null", "[a (cat:1.2), b]", "a ${oc.env:HOME} 'quoted' \"twice\", = {x}", "two\nlines", "[it's]"]
)
def test_a_prompt_is_drawn_as_typed(painting, prompt):
    found = painting.rules.check(words(prompt=prompt)).data["prompt"]
    assert found in (prompt, [prompt])


def test_nothing_is_downloaded(painting):
    asked = painting.rules.check(words(model="flux2_klein_4b", overrides="model.offline=false"))
    assert request_.without_downloads(asked).data["model"]["offline"] is True


def test_an_unknown_input_is_refused():
    request_.check_names({**PLAIN, "image4": None})
    with pytest.raises(ConfigError, match="no input 'image5': did you mean 'image"):
        request_.check_names({**PLAIN, "image5": None})


# --- what may not be asked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hostile",
    [
        "compile=regional\n+compile.inductor_options.cpp.cxx=/bin/sh", "hydra.searchpath=[file:///tmp]",
        "hydra.run.dir=/tmp/elsewhere", "steps=${oc.env:HOME}", "attention._target_=os.system",
        "compile=regional\ncompile.cache_dir=/tmp", "model.path=/etc", "model.id=someone/else", "attention.hub=true",
        "reference_images=[/etc/passwd]", "lora=adapters\nlora.files=[someone/else]", "--config-dir=/tmp",
        "+sweep=kernels",
    ],
)  # fmt: skip
def test_a_workflow_is_a_strangers_file(painting, hostile, monkeypatch):
    monkeypatch.setenv("FLUXRUN_TRUST_CONFIG", "1")
    with pytest.raises(TrustError) as caught:
        painting.rules.check(words(overrides=hostile))
    assert "\n" not in str(caught.value)
    assert "server" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("input:../outside.png", "leads out of ComfyUI's input folder"), ("input:/etc/x.png", "leads out"),
        ("input:secret.json", "allowed in ComfyUI's input folder: .png"), ("input:cat.png\0.png", "allowed"),
        ("input:dog.png", "no such file in ComfyUI's input folder; did you mean 'cat.png'"),
        ("loras:cat.png", "safetensors"), ("loras:../input/cat.png", "safetensors"),
        ("upload:" + "0" * 64 + ".png", "was not uploaded"),
    ],
)  # fmt: skip
def test_files_come_from_comfyuis_own_folders(painting, comfy, name, why):
    own = files.ComfyFiles(painting.uploads, lambda kind: [str(comfy / kind)])
    assert own.path("input:cat.png") == comfy / "input/cat.png"
    with pytest.raises(ConfigError, match=why):
        own.path(name)


def test_checkpoints_come_from_comfyuis_own_folders(painting, comfy):
    found = files.checkpoints([str(comfy / "diffusers")])
    assert sorted(found) == ["diffusers/a/b/deep", "diffusers/mine"]
    asked = words(model="diffusers/mine", checkpoints=found, width=64, height=64)
    with pytest.raises(TrustError, match="models/diffusers"):
        painting.rules.check(asked)
    painting.rules.add_models([str(path) for path in found.values()])
    assert painting.rules.check(asked).data["model"]["path"] == str(comfy / "diffusers/mine")


# --- the process that draws -------------------------------------------------------------------------------------------


def test_a_process_that_cannot_be_started(comfy, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXRUN_PYTHON", str(tmp_path / "python"))
    painting = painter.Painter(tmp_path, inputs.models(), lambda kind: [str(comfy / kind)])
    for _ in range(2):
        run = painting.start(painting.rules.check(SMALL))
        with pytest.raises(FluxrunError, match="the process that draws could not be started"):
            list(painting.events(run))


@pytest.mark.slow
def test_drawing_and_stopping(painting):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 10, 10)).save(file, "PNG")
    small = ("model=tiny", "device=cpu", *SMALL[1:])
    run = painting.start(painting.rules.check([*small, f"reference_images=['{painting.keep(file.getvalue())}']"]))
    events = [event.get("event") for event in painting.events(run)]
    assert run.state == "completed", run.error
    assert {"line", "steps", "step", "picture"} < set(events)
    record = json.loads((run.folder / "run.json").read_text())
    assert [Image.open(path).size for path in painter.pictures_of(run, record)] == [(64, 64)]
    long = painting.start(painting.rules.check([*small[:4], "steps=500"]))
    for event in painting.events(long):
        if event.get("event") == "step":
            painting.stop(long)
    assert long.state == "interrupted"
    assert long.weights_loaded == 0
    painting.release()
