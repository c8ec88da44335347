"""vae=fast: the same picture as diffusers' decoder draws, from the same weights, which stay as they were."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from helpers import CPU, H100, draw, effective, plan_on

from fluxrun.pipeline.session_pool import SessionPool

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKLFlux2  # noqa: E402
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from fluxrun.kernels.vae import decoder as fast_vae  # noqa: E402

SHAPES = {
    "with attention": {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8},
    "as the shapes model": {
        "block_out_channels": (32, 48, 80, 96), "layers_per_block": 1, "norm_num_groups": 16,
        "mid_block_add_attention": False,
    },
    "another decoder": {"decoder_block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4},
}  # fmt: skip


def make(dtype=torch.float32, latent_channels=4, **config):
    torch.manual_seed(0)
    config = {"block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8, **config}
    vae = AutoencoderKLFlux2(latent_channels=latent_channels, **config).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))  # norms of ones and biases of zeros would hide a lost one
    return vae.to(dtype)


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def bytes_of(vae):
    return [tensor.clone() for tensor in vae.state_dict().values()]


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 3)])
def test_same_picture_as_diffusers(config, size):
    vae = make(**config)
    before = bytes_of(vae)
    latents = torch.randn(2, 4, *size)
    expected = vae.decoder(latents)
    fast = fast_vae.fast_decoder(vae.decoder, "cpu")
    assert fast(latents).shape == expected.shape
    assert relative(fast(latents), expected) < 1e-5
    assert all(torch.equal(was, now) for was, now in zip(before, bytes_of(vae), strict=True))


def test_everything_is_replaced():
    decoder = make().decoder
    facts = fast_vae.fast_decoder(decoder, "cpu").facts()
    kinds = [type(module).__name__ for module in decoder.modules()]
    assert facts["upsamplers"] == kinds.count("Upsample2D") == 3
    assert facts["norms"] == kinds.count("GroupNorm")
    assert facts["attentions"] == kinds.count("Attention") == 1
    assert facts["kernels"] == "torch"
    assert facts["derived_bytes"] < 1.5 * sum(weight.numel() * 4 for weight in decoder.parameters())


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 4)])
def test_upsampling_and_convolution_are_one_transposed_convolution(size):
    weight, x = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, *size, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    found = F.conv_transpose2d(x, fast_vae.upsampling_weight(weight), stride=2, padding=1)
    assert found.shape == expected.shape
    assert relative(found, expected) < 1e-6


def test_bfloat16_is_as_close_to_float32_as_diffusers_is():
    vae = make()
    latents = torch.randn(1, 4, 16, 16)
    exact = vae.decoder(latents)
    half = make(torch.bfloat16)
    fast = fast_vae.fast_decoder(half.decoder, "cpu")
    eager = relative(half.decoder(latents.bfloat16()), exact)
    assert relative(fast(latents.bfloat16()), exact) < 1.5 * eager


@pytest.mark.parametrize("decode", ["tiled", "sliced", "full"])
def test_tiles_and_slices(decode):
    vae = make(sample_size=64)
    if decode == "tiled":
        vae.enable_tiling()
    elif decode == "sliced":
        vae.enable_slicing()
    latents = torch.randn(2, 4, 16, 16)  # twice a tile
    expected = vae.decode(latents).sample
    vae.decoder = fast_vae.fast_decoder(vae.decoder, "cpu")
    assert relative(vae.decode(latents).sample, expected) < 1e-5


def test_trial_measures_the_difference_and_refuses_a_wrong_picture():
    decoder = make().decoder
    fast = fast_vae.fast_decoder(decoder, "cpu")
    assert 0 < fast_vae.trial(fast, decoder) < 1e-5
    fast.bias_out = nn.Parameter(fast.bias_out + 100.0, False)  # in place it would reach the original too
    with pytest.raises(RuntimeError, match="differs"):
        fast_vae.trial(fast, decoder)
    fast.bias_out = nn.Parameter(fast.bias_out * torch.nan, False)
    with pytest.raises(RuntimeError, match="differs"):
        fast_vae.trial(fast, decoder)


def _other_activation(decoder):
    decoder.mid_block.resnets[0].nonlinearity = nn.GELU()


def _other_scale(decoder):
    decoder.up_blocks[0].resnets[0].output_scale_factor = 2.0


def _other_upsampler(decoder):
    decoder.up_blocks[0].upsamplers[0].interpolate = False


def _other_heads(decoder):
    decoder.mid_block.attentions[0].heads = 2


@pytest.mark.parametrize("change", [_other_activation, _other_scale, _other_upsampler, _other_heads])
def test_an_unknown_part_is_refused(change):
    decoder = copy.deepcopy(make().decoder)
    change(decoder)
    with pytest.raises(ValueError, match="than FLUX"):
        fast_vae.fast_decoder(decoder, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pictures_are_the_same_bytes_as_diffusers(dtype, layout):
    torch.manual_seed(0)
    image = torch.randn(2, 3, 40, 56).to(dtype).contiguous(memory_format=layout)
    image[0, 0, 0] = torch.linspace(-1.5, 1.5, 56).to(dtype)
    processor = Flux2ImageProcessor()
    expected = [np.asarray(picture) for picture in processor.postprocess(image, output_type="pil")]
    fast_vae.round_on_device(processor)
    found = processor.postprocess(image, output_type="pil")
    assert [picture.mode for picture in found] == ["RGB", "RGB"]
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(set(expected[0].ravel().tolist())) > 200


def test_every_half_way_value_rounds_as_diffusers_does():
    steps = torch.arange(0, 511, dtype=torch.float32) / 255 - 1  # every byte and every half between two
    image = torch.cat([steps, steps.nextafter(torch.tensor(9.0)), steps.nextafter(torch.tensor(-9.0))])
    image = image.expand(1, 3, 1, -1)
    expected = Flux2ImageProcessor().postprocess(image, output_type="pil")[0]
    assert np.array_equal(np.asarray(expected), np.asarray(fast_vae.pictures(image)[0]))


def test_other_output_types_stay_diffusers():
    processor, image = Flux2ImageProcessor(), torch.zeros(1, 3, 8, 8)
    fast_vae.round_on_device(processor)
    assert processor.postprocess(image, output_type="latent") is image
    assert processor.postprocess(image, output_type="np").shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match="pytorch tensor"):
        processor.postprocess([1], output_type="pil")


# --- the option -------------------------------------------------------------------------------------------------


def test_plan():
    assert effective(plan_on(H100, "vae=fast"))["vae"] == "fast"
    assert effective(plan_on(CPU, "vae=fast"))["vae"] == "fast"
    assert effective(plan_on(H100, "vae=fast", "compile=regional"))["vae"] == "fast"
    plan = plan_on(H100, "vae=fast", "compile=regional", "compile.targets=[transformer,vae_decoder]")
    assert effective(plan)["vae"] == "full"
    assert "nothing to fuse" in plan.choices["vae"].fallbacks[0].reason
    plan = plan_on(H100, "vae=fast", "memory=sequential")
    assert effective(plan)["vae"] == "full"
    assert any("vae.channels_last" in note for note in plan_on(CPU, "vae=fast", "vae.channels_last=true").notes)


@pytest.fixture(scope="module")
def bench():
    bench = SessionPool()
    yield bench
    bench.close()


@pytest.mark.parametrize("model", ["tiny", "shapes"])
def test_draws_the_same_picture(model, bench, tmp_path):
    size = () if model == "tiny" else ("steps=1", "height=128", "width=128")
    pixels = {}
    for name in ("full", "fast"):
        record = draw(tmp_path / name, f"model={model}", *size, f"vae={name}", pool=bench)
        assert record.options["vae"].effective == name
        from PIL import Image

        with Image.open(tmp_path / name / record.images[0].path) as image:
            pixels[name] = np.asarray(image).astype(int)
    facts = record.options["vae"].facts
    assert facts["upsamplers"] == 3
    assert facts["norms"] > 10
    assert facts["attentions"] == (model == "tiny")
    assert 0 < facts["difference"] < 1e-4
    assert np.abs(pixels["full"] - pixels["fast"]).max() <= 1


def test_tiles_with_the_fast_decoder(bench, tmp_path):
    overrides = ("vae=fast", "vae.decode=tiled", "vae.tile_size=64", "height=128", "width=128")
    record = draw(tmp_path / "run", *overrides, pool=bench)
    assert record.options["vae"].effective == "fast"
    assert record.options["vae"].facts["tiles_decoded"] > 1
    assert not record.options["vae"].fallbacks
