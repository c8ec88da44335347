"""vae=fast on a real GPU: the picture of diffusers' decoder at real size, by the Triton kernels."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import fluxrun  # noqa: E402
from fluxrun.kernels.vae import decoder as fast_vae  # noqa: E402


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope="module")
def vae():
    """FLUX.2's sizes, random weights with norms and biases that are not trivial."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    with torch.device("cuda"):
        vae = AutoencoderKLFlux2().to(torch.bfloat16).eval().requires_grad_(False)
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 32, 48), (1, 30, 46)])
def test_as_close_to_float32_as_diffusers(vae, shape):
    latents = torch.randn(shape[0], 32, *shape[1:], device="cuda", dtype=torch.bfloat16)
    exact = copy.deepcopy(vae.decoder).float()(latents.float())
    fast = fast_vae.fast_decoder(vae.decoder, "cuda")
    assert fast.facts()["kernels"] == "triton"
    found, eager = fast(latents), vae.decoder(latents)
    print(shape, "fast", relative(found, exact), "eager", relative(eager, exact), "both", relative(found, eager))
    assert relative(found, exact) < 1.2 * relative(eager, exact)
    assert torch.equal(found, fast(latents))


def test_whole_picture_and_tiles(vae):
    latents = torch.randn(1, 32, 128, 128, device="cuda", dtype=torch.bfloat16)
    shell = copy.deepcopy(vae)
    shell.decoder = fast_vae.fast_decoder(shell.decoder, "cuda")
    for prepare in (lambda part: part.disable_tiling(), lambda part: part.enable_tiling()):
        for part in (vae, shell):
            prepare(part)
            part.tile_sample_min_size, part.tile_latent_min_size = 512, 64
        assert relative(shell.decode(latents).sample, vae.decode(latents).sample) < 5e-2
    vae.disable_tiling()


@pytest.mark.parametrize("tokens", [16, 1000, 16384])
def test_attention_with_large_scores(tokens):
    query, key, value = (torch.randn(1, tokens, 512, device="cuda", dtype=torch.bfloat16) * 2.5 for _ in range(3))
    exact = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert relative(fast_vae.TritonOps().attention(query, key, value), exact) < 5e-3


def test_norm_far_from_zero():
    x = (torch.randn(2, 64, 33, 31, device="cuda") + 1000).contiguous(memory_format=torch.channels_last)
    norm = torch.nn.GroupNorm(32, 64, device="cuda")
    found = fast_vae.TritonOps().norm(fast_vae.Hidden(x), fast_vae.Norm(norm), silu=True)
    assert relative(found, F.silu(norm.double()(x.double()))) < 1e-3


def test_in_a_cuda_graph(vae):
    fast = fast_vae.fast_decoder(vae.decoder, "cuda")
    latents = torch.randn(1, 32, 32, 32, device="cuda", dtype=torch.bfloat16)
    expected = fast(latents)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fast(latents)
    graph.replay()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pictures_are_the_same_bytes_as_diffusers(dtype):
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    image = torch.randn(1, 3, 512, 512, device="cuda").to(dtype)
    expected = Flux2ImageProcessor().postprocess(image, output_type="pil")[0]
    assert np.array_equal(np.asarray(expected), np.asarray(fast_vae.pictures(image)[0]))


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("vae.autotune=true",),
        ("vae.decode=tiled", "vae.tile_size=64"),
        ("compile=cudagraphs", "compile.targets=[vae_decoder]", "measure.repeats=3"),
        ("memory=balanced",),
        ("memory=group",),
        ("memory=sequential",),
    ],
    ids=lambda extra: " ".join(extra) or "plain",
)
def test_runs(extra: tuple[str, ...], tmp_path: Path) -> None:
    tiny = ["model=tiny", "device=cuda", "steps=2", "height=128", "width=128"]
    pixels = []
    for name in ("tiled" if "vae.decode=tiled" in extra else "full", "fast"):
        knobs = [knob for knob in extra if name == "fast" or knob not in ("vae.decode=tiled", "vae.autotune=true")]
        record = fluxrun.run(fluxrun.compose([*tiny, f"vae={name}", *knobs]), tmp_path / name)
        with Image.open(tmp_path / name / record.images[0].path) as image:
            pixels.append(np.asarray(image).astype(float))
    option = record.options["vae"]
    print(extra, option.effective, option.fallbacks, option.facts)
    assert record.status == "completed"
    assert option.effective == ("full" if "memory=sequential" in extra else "fast")
    if option.effective == "fast":
        assert option.facts["kernels"] == "triton"
    assert np.abs(pixels[0] - pixels[1]).mean() < 4  # of 255, random weights in bfloat16
