"""Weights on the hub: what a download takes, that only what is wanted is fetched, and what can go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import hollow_folder, refusal, tiny_folder, write_weights
from hub import COMMIT, REPO, Hub, empty_cache, serve, use

from fluxrun.errors import FluxrunError
from fluxrun.options.model import Flux2Model
from fluxrun.weights import shells
from fluxrun.weights.download import download
from fluxrun.weights.find import find_weights

SRC = Path(__file__).resolve().parents[2] / "src"


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SRC), **changes}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, no token and no offline switch."""
    return empty_cache(tmp_path, monkeypatch)


@pytest.fixture
def hub(tmp_path, cache, monkeypatch) -> Iterator[Hub]:
    """The stand-in hub over a hollow checkpoint with everything around it that a real repository has."""
    folder = hollow_folder(tmp_path / "repository", shards=2)
    for extra in ("flux-2-klein-4b.safetensors", "README.md", "teaser.png", "transformer/model.onnx"):
        (folder / extra).write_bytes(b"not wanted")
    write_weights(folder / "transformer", "diffusion_pytorch_model", "fp16", shards=2)
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"not wanted")
    with serve(folder) as running:
        use(running, monkeypatch)
        yield running


WANTED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


def test_hub_says_what_a_download_takes(hub, cache):
    located = find_weights(Flux2Model(id=REPO))
    assert set(located.files) == WANTED
    sizes = {name: file.stat().st_size for name, file in hub.files().items()}
    assert located.cached_bytes == sizes["model_index.json"]  # fetched to see what the repository is
    assert located.download_bytes == sum(sizes[name] for name in WANTED) - located.cached_bytes
    assert (located.revision, located.pipeline, located.distilled) == (COMMIT, "klein", True)
    announcement = located.announcement()
    assert announcement
    assert announcement.startswith("download: ")
    assert str(cache) in announcement


def test_asking_the_hub_prints_nothing(hub, capfd):
    find_weights(Flux2Model(id=REPO))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "%|" not in printed.err


def test_hub_variant(hub):
    located = find_weights(Flux2Model(id=REPO, variant="fp16"))
    weights = {name for name in located.files if name.startswith("transformer/") and "model" in name}
    assert weights == {
        "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
    }
    assert "vae/diffusion_pytorch_model.safetensors" in located.files
    assert "no bf16 weight files" in refusal(Flux2Model(id=REPO, variant="bf16"))


def test_download_fetches_only_what_is_wanted_and_only_once(hub):
    model, lines = Flux2Model(id=REPO), []
    before = find_weights(model)
    folder = download(before, lines.append)
    assert lines[0].startswith("download: ")
    assert set(hub.fetched()) == WANTED
    hub.requests.clear()
    assert download(before) == folder  # what was known before the download serves as well
    located = find_weights(model)
    assert located.kind == "hub"
    assert located.folder == folder
    assert located.revision == COMMIT
    assert download(located) == folder
    assert hub.requests == []


def test_offline_after_a_download(hub, monkeypatch):
    from huggingface_hub import constants

    assert "and model.offline=true" in refusal(Flux2Model(id=REPO, offline=True))
    download(find_weights(Flux2Model(id=REPO)))
    hub.requests.clear()
    assert find_weights(Flux2Model(id=REPO, offline=True)).download_bytes == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    located = find_weights(Flux2Model(id=REPO))
    assert located.folder
    assert hub.requests == []
    (located.folder / "vae" / "config.json").unlink()
    assert "vae/config.json is missing, and HF_HUB_OFFLINE is set" in refusal(Flux2Model(id=REPO))


def test_broken_off_download_goes_on(hub, cache):
    """Interrupted in the middle of one file: nothing stays running or half-written, finished files are kept."""
    model = Flux2Model(id=REPO)
    hub.stall = "vae/diffusion_pytorch_model.safetensors"
    located = find_weights(model)

    def interrupt() -> None:
        assert hub.stalled.wait(20)
        deadline = time.monotonic() + 10  # let the other files finish
        while len(list((cache / snapshot()).rglob("*.*"))) < len(WANTED) - 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    def snapshot() -> Path:
        return Path(f"models--{REPO.replace('/', '--')}") / "snapshots" / COMMIT

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        download(located)
    assert list(cache.rglob("*.incomplete")) == []
    hub.stall = None
    hub.release.set()
    hub.requests.clear()
    again = find_weights(model)
    assert again.cached_bytes > located.cached_bytes
    folder = download(again)
    assert [name for name in hub.fetched() if name.endswith(".safetensors")] == [
        "vae/diffusion_pytorch_model.safetensors"
    ]
    assert find_weights(model).folder == folder


def test_download_that_fails_says_so(hub):
    located = find_weights(Flux2Model(id=REPO))
    hub.gated = True
    with pytest.raises(FluxrunError, match=r"broke off \(.*run again") as caught:
        download(located)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_gated(hub):
    hub.gated = True
    text = refusal(Flux2Model(id=REPO))
    assert f"https://huggingface.co/{REPO}" in text
    assert "hf auth login" in text
    assert "licence" in text


def test_not_found(hub):
    assert "somebody/nothing was not found" in refusal(Flux2Model(id="somebody/nothing"))
    assert "no such branch, tag or commit" in refusal(Flux2Model(id=REPO, revision="v9"))
    assert "not a hub id" in refusal(Flux2Model(id="a/b/c"))


def test_repository_that_is_no_flux2(hub):
    index = hub.folder / "model_index.json"
    content = index.read_text()
    index.unlink()
    assert "not a diffusers repository" in refusal(Flux2Model(id=REPO))
    index.write_text(content.replace("Flux2KleinPipeline", "StableDiffusionPipeline"))
    assert "holds a StableDiffusionPipeline" in refusal(Flux2Model(id=REPO))


def test_unreachable(cache, hub, monkeypatch):
    monkeypatch.setattr(hub, "url", "http://127.0.0.1:9")
    use(hub, monkeypatch)
    text = refusal(Flux2Model(id=REPO))
    assert "cannot be reached" in text
    assert "model.path=FOLDER" in text


def test_disk_too_small(hub, monkeypatch):
    monkeypatch.setattr("fluxrun.weights.hub.free_disk", lambda path: 100)
    text = refusal(Flux2Model(id=REPO))
    assert "0.1 kB free" in text
    assert "HF_HOME" in text


def test_environment_of_a_real_process(hub, tmp_path):
    """The same through the environment only, as users set it."""
    code = (
        "from fluxrun.weights.find import find_weights\nfrom fluxrun.weights.download import download\n"
        "from fluxrun.options.model import Flux2Model\n"
        f"located = find_weights(Flux2Model(id={REPO!r}))\n"
        "print(located.announcement())\nprint(download(located))"
    )
    env = environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert str(tmp_path / "home" / "hub") in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[1].endswith(COMMIT)


def test_download_load_draw(cache, monkeypatch):
    """A real checkpoint from the stand-in hub ends in a picture."""
    import torch

    from fluxrun.weights import loading as models

    with serve(tiny_folder("klein")) as running:
        use(running, monkeypatch)
        model = Flux2Model(id=REPO)
        base = models.load(model, dtype="float32", device="cpu")
    assert base.facts["source"] == f"hub {REPO}"
    assert base.facts["revision"] == COMMIT
    pipeline = shells.shell(base)
    picture = pipeline(
        prompt="a red circle",
        num_inference_steps=1,
        guidance_scale=1.0,
        height=64,
        width=64,
        max_sequence_length=16,
        text_encoder_out_layers=(1, 2, 3),
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert picture.shape == (1, 3, 64, 64)


def test_announcement_counts_in_gigabytes(hub):
    located = replace(
        find_weights(Flux2Model(id=REPO)),
        download_bytes=15_800_000_000,
        cached_bytes=0,
        free_disk_bytes=412 * 10**9,
        cache=Path("/cache"),
    )
    assert located.announcement() == "download: 15.8 GB to /cache (412 GB free)"


def test_light():
    """Looking at a folder or at the hub's cache imports nothing heavy."""
    code = (
        "import sys\n"
        "from fluxrun.errors import ConfigError\n"
        "from fluxrun.options.model import Flux2Model\n"
        "from fluxrun.weights.find import find_weights\n"
        "try: find_weights(Flux2Model(id='a/b', offline=True))\n"
        "except ConfigError: pass\n"
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
