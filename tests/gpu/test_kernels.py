"""The fused kernels and the CUDA graphs on a GPU, against plain torch and plain diffusers."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxrun
from fluxrun.record.schema import RunRecord

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

BATCH, TOKENS, HEADS, SIZE, HIDDEN = 2, 37, 3, 128, 1152
WIDTH = HEADS * SIZE


def error(result, wanted) -> float:
    """Relative L2."""
    result, wanted = (x if isinstance(x, torch.Tensor) else x.data.float() * x.scale for x in (result, wanted))
    return ((result.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.fixture
def random():
    generator = torch.Generator("cuda").manual_seed(0)
    return lambda *shape: torch.randn(*shape, device="cuda", generator=generator).to(torch.bfloat16)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("batch", "width"), [(1, WIDTH), (BATCH, WIDTH), (BATCH, 3072), (1, 4096), (1, 6144)])
def test_norm_modulate_and_gated_add(quantize, batch, width, random):
    import reference

    from fluxrun.kernels.transformer import triton_ops

    x, y, modulation = random(batch, TOKENS, width), random(batch, TOKENS, width), random(batch, 1, 6 * width)
    shift, scale, gate = modulation.chunk(6, -1)[:3]
    for add in (None, (gate, y)):
        summed, rows = triton_ops.norm_modulate(x, shift, scale, 1e-6, quantize=quantize, add=add)
        wanted_sum, wanted = reference.norm_modulate(x, shift, scale, 1e-6, quantize=quantize, add=add)
        assert torch.equal(summed, wanted_sum)
        if quantize or width % 512:
            assert error(rows, wanted) < (5e-3 if quantize else 1e-3)
        else:
            assert torch.equal(rows, wanted)  # sums in the order of torch's own kernel
    assert torch.equal(triton_ops.gated_add(x, y, gate), reference.gated_add(x, y, gate))


@pytest.mark.parametrize(("heads", "size"), [(3, 128), (24, 128), (6, 64), (12, 32)])
def test_split_qkv(heads, size, random):
    import reference

    from fluxrun.kernels.transformer import triton_ops

    projected, norms = random(BATCH * TOKENS, 3 * heads * size + 64), (random(size), random(size))
    rotary = tuple(torch.randn(TOKENS + 5, size // 2, device="cuda").repeat_interleave(2, 1) for _ in range(2))
    rooms = [
        [torch.full((BATCH, TOKENS + 5, heads, size), 7.0, device="cuda").bfloat16() for _ in range(3)] for _ in "ab"
    ]
    for ops, room in zip((triton_ops, reference), rooms, strict=True):
        ops.split_qkv(projected, norms, rotary, room, 1e-6, tokens=TOKENS, offset=5)
    for mine, wanted in zip(*rooms, strict=True):
        assert torch.equal(mine, wanted)
        assert (mine[:, :5] == 7).all()


@pytest.mark.parametrize("quantize", [False, True])
def test_pack(quantize, random):
    import reference

    from fluxrun.kernels.transformer import triton_ops

    rows = random(BATCH * TOKENS, WIDTH + 2 * HIDDEN)
    for attended in (None, random(BATCH, TOKENS, HEADS, SIZE), random(BATCH, HEADS, TOKENS, SIZE).permute(0, 2, 1, 3)):
        for gate_up in (rows[:, WIDTH:], None)[: 1 if attended is None else 2]:
            result = triton_ops.pack(attended, gate_up, quantize=quantize)
            wanted = reference.pack(attended, gate_up, quantize=quantize)
            assert error(result, wanted) < 5e-3 if quantize else torch.equal(result, wanted)


@pytest.mark.parametrize("pipeline", ["klein", "dev"])
def test_a_whole_transformer_is_eager_to_the_bit(pipeline):
    from fluxrun.kernels.transformer import blocks, triton_ops

    transformer, inputs = small_transformer(pipeline)
    with torch.no_grad():
        eager = transformer(**inputs)[0]
        blocks.fuse(transformer, triton_ops, counters := Counter())
        assert torch.equal(transformer(**inputs)[0], eager)
    assert counters["fused_block_calls"] == 4


def small_transformer(pipeline: str):
    """The real class, with heads of 128 and a width that torch's norm kernel reads 512 values at a time."""
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=SIZE, num_attention_heads=8,
        joint_attention_dim=64, timestep_guidance_channels=64, guidance_embeds=pipeline == "dev",
    ).to("cuda", torch.bfloat16).eval()  # fmt: skip
    numbers = {"device": "cuda", "dtype": torch.bfloat16}
    ids = torch.cartesian_prod(*(torch.arange(n, device="cuda") for n in (1, 12, 12, 1))).float()[None]
    text_ids = torch.cartesian_prod(*(torch.arange(n, device="cuda") for n in (1, 1, 1, 33))).float()[None]
    inputs = {
        "hidden_states": torch.randn(1, 144, 16, **numbers), "encoder_hidden_states": torch.randn(1, 33, 64, **numbers),
        "timestep": torch.tensor([0.7], **numbers), "img_ids": ids, "txt_ids": text_ids, "return_dict": False,
        "guidance": torch.tensor([4.0], **numbers) if pipeline == "dev" else None,
    }  # fmt: skip
    return transformer, inputs


@pytest.mark.parametrize("shape", [(4608, 3072, 27648), (4096, 3072, 9216), (512, 3072, 9216), (384, 512, 640)])
@pytest.mark.parametrize("float8", [False, True])
def test_cublas_lts_algorithms_also_in_a_cuda_graph(shape, float8, random):
    from fluxrun.kernels.transformer.cublas_lt import Operands, Problem
    from fluxrun.kernels.transformer.matmul_choice import by_torch

    m, k, n = shape
    given = Operands(random(m, k), random(n, k), torch.bfloat16)
    if float8:
        scales = torch.rand(m, 1, device="cuda"), torch.rand(1, n, device="cuda")
        small = (part.to(torch.float8_e4m3fn) for part in given[:2])
        given = Operands(*small, torch.bfloat16, scales)
    assert Problem.suits(given)
    problem, expected = Problem(given), by_torch(given)
    found = problem.algorithms(8)
    assert found
    for algorithm in found:
        assert error(problem.multiply(given, algorithm), expected) < 1e-2
        assert problem.checked(algorithm.data).workspace <= 64 * 2**20
    graph = torch.cuda.CUDAGraph()
    alone = problem.multiply(given, found[0])
    with torch.cuda.graph(graph):
        recorded = problem.multiply(given, found[0])
    recorded.zero_()
    graph.replay()
    assert torch.equal(recorded, alone)


def test_the_chosen_matmuls_leave_a_whole_transformer_eager_to_the_bit(monkeypatch, tmp_path):
    from fluxrun.compilation.cuda_graphs import GraphedForward
    from fluxrun.hardware.kept import Kept
    from fluxrun.kernels.transformer import blocks, matmul_choice, triton_ops

    monkeypatch.setenv("FLUXRUN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(matmul_choice, "LEAST_GAIN", -1e9)  # whatever has the same bits is taken
    transformer, inputs = small_transformer("klein")
    with torch.no_grad():
        eager = transformer(**inputs)[0]
        matmuls = matmul_choice.Matmuls(Kept("matmuls", {"gpu": "this"}))
        blocks.fuse(transformer, triton_ops, Counter(), multiply=matmuls.layer)
        graphed = GraphedForward(transformer.forward)
        for _ in range(3):
            assert torch.equal(graphed(**inputs)[0], eager)
    assert (graphed.graphs, graphed.refused) == (1, None)
    facts = matmuls.facts()
    assert facts["chosen_matmuls"] + facts["torch_matmuls"] == 2 * 8 + 2 * 2
    assert facts["chosen_matmuls"] > 0, facts


@pytest.mark.parametrize("width", [2560, 4096])
def test_the_text_encoders_kernels_have_torchs_bits(width):
    from fluxrun.kernels.text_encoder.proof import Sizes, proven

    sizes = Sizes(width, heads=32, key_heads=8, head_size=128, hidden=9728, eps=1e-6, tokens=512)
    ops = proven(sizes, torch.bfloat16, torch.device("cuda"))
    assert {name: who.partition(",")[0] for name, who in ops.by.items()} == dict.fromkeys(ops.by, "triton")


def test_a_text_encoder_is_transformers_own_to_the_bit():
    from transformers import Qwen3Config, Qwen3Model

    from fluxrun.kernels.text_encoder.layers import fuse

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        head_dim=128, vocab_size=100,
    )  # fmt: skip
    model = Qwen3Model(config).to("cuda", torch.bfloat16).eval()
    ids, mask = torch.randint(0, 100, (1, 128), device="cuda"), (torch.arange(128, device="cuda") < 30)[None].long()
    asked = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        expected = model(**asked).hidden_states
        facts = fuse(model, 128)
        assert facts["text_encoder_layers"] == 3, facts
        assert all(map(torch.equal, model(**asked).hidden_states, expected))


def test_pixels_come_through_page_locked_memory_as_they_are():
    from fluxrun.kernels.vae.decoder import on_cpu, pictures

    image = torch.randn(3, 3, 40, 56, device="cuda", dtype=torch.bfloat16)
    assert all(map(torch.equal, on_cpu(image), image.cpu()))
    for there, here in zip(pictures(image), pictures(image.cpu()), strict=True):
        assert np.array_equal(np.asarray(there), np.asarray(here))


def test_fp8_attention(random):
    pytest.importorskip("cudnn")
    from fluxrun.kernels.transformer import triton_ops
    from fluxrun.kernels.transformer.fp8_attention import CudnnFp8Attention

    norms, tokens = (random(SIZE), random(SIZE)), 301
    projected = random(BATCH * tokens, 3 * WIDTH) * 5
    rotary = (torch.ones(tokens, SIZE, device="cuda"), torch.zeros(tokens, SIZE, device="cuda"))
    attend = CudnnFp8Attention(norms[:1], norms[1:])
    scales = attend.scales([projected[:, 2 * WIDTH :]])
    assert torch.allclose(scales.descales[2] * 448, projected[:, 2 * WIDTH :].float().abs().max())
    plain, small = (
        [torch.empty(BATCH, tokens, HEADS, SIZE, dtype=dtype, device="cuda") for _ in range(3)]
        for dtype in (torch.bfloat16, torch.float8_e4m3fn)
    )
    triton_ops.split_qkv(projected, norms, rotary, plain, 1e-6, tokens=tokens, offset=0)
    triton_ops.split_qkv(projected, norms, rotary, small, 1e-6, tokens=tokens, offset=0, multipliers=scales.multipliers)
    q, k, v = (x.transpose(1, 2) for x in plain)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert error(attend(*small, scales).float() * scales.descales[2], wanted) < 0.08


# -- through fluxrun -------------------------------------------------------------------------------------------------

SHAPES = ["model=shapes", "model.dtype=bfloat16", "device=cuda", 'prompt="a red circle left of a blue square"']


def draw(folder: Path, *overrides: str) -> RunRecord:
    record = fluxrun.run(fluxrun.compose([*SHAPES, *overrides]), folder)
    assert record.status == "completed"
    return record


def pixels(folder: Path, record: RunRecord) -> np.ndarray:
    return np.asarray(Image.open(folder / record.images[-1].path)).astype(float)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 1e-9)))


@pytest.mark.parametrize(
    "overrides", [["kernels=fused"], ["compile=cudagraphs"], ["kernels=fused", "compile=cudagraphs"]]
)
def test_lossless_options_draw_the_same_picture(overrides, tmp_path):
    plain = pixels(tmp_path / "a", draw(tmp_path / "a"))
    record = draw(tmp_path / "b", *overrides)
    assert not any(option.fallbacks for option in record.options.values())
    assert psnr(plain, pixels(tmp_path / "b", record)) >= 40
    if "kernels=fused" in overrides:
        assert record.options["kernels"].facts["fused_block_calls"] > 0


def test_chosen_matmuls_and_the_fused_text_encoder_draw_the_same_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXRUN_CACHE_DIR", str(tmp_path / "cache"))
    given = ("kernels=fused", "compile=cudagraphs", "compile.targets=[transformer,text_encoder]", "num_images=2")
    plain = draw(tmp_path / "a", *given)
    for number in range(2):  # the second one finds the choices of the first
        record = draw(tmp_path / f"b{number}", *given, "kernels.matmuls=fastest", "kernels.text_encoder=fused")
        assert [image.sha256 for image in record.images] == [image.sha256 for image in plain.images]
        facts = record.options["kernels"].facts
        assert record.options["kernels"].effective == "fused"
        assert facts["chosen_matmuls"] + facts["torch_matmuls"] > 0
        assert facts["text_encoder_layers"] > 0, facts
        assert "cuda_graphs_refused" not in record.options["compile"].facts


def test_graphs_are_recorded_once_and_replayed(tmp_path):
    targets = "compile.targets=[transformer,vae_decoder,text_encoder]"
    prompts = "prompt=[a red circle, a blue star, a large green ring at the top left]"
    plain = draw(tmp_path / "a", prompts, "steps=4")
    record = draw(tmp_path / "b", "compile=cudagraphs", targets, prompts, "steps=4")
    facts = record.options["compile"].facts
    assert facts["cuda_graphs"] == {"transformer": 1, "vae_decoder": 1, "text_encoder": 1}
    assert facts["cuda_graph_replays"] == (3 * 4 - 1) + 2 + 2
    assert "cuda_graphs_refused" not in facts
    assert psnr(pixels(tmp_path / "a", plain), pixels(tmp_path / "b", record)) >= 40


def test_graphs_used_longest_ago_make_room(monkeypatch):
    from fluxrun.compilation import cuda_graphs

    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 2)
    graphed = cuda_graphs.GraphedForward(lambda x: x * 2)
    for size in (1, 1, 2, 2, 1, 3, 3, 1, 2):  # 3 takes the place of 2, then 2 that of 3
        x = torch.arange(float(size), device="cuda")
        assert torch.equal(graphed(x), x * 2)
    assert (graphed.graphs, graphed.dropped, graphed.replays) == (4, 2, 6)


def test_a_forward_that_cannot_be_recorded_runs_as_it_is():
    from fluxrun.compilation.cuda_graphs import GraphedForward

    graphed = GraphedForward(lambda x: x + 1 if x.sum() > 0 else x - 1)
    stream, x = torch.cuda.current_stream(), torch.ones(8, device="cuda")
    for _ in range(3):
        assert torch.equal(graphed(x), x + 1)
    assert graphed.refused
    assert (graphed.graphs, graphed.replays) == (0, 0)
    assert torch.cuda.current_stream() == stream
    assert torch.randn(8, device="cuda").isfinite().all()
    assert _reuses_what_is_freed()


def _reuses_what_is_freed() -> bool:
    """Whether the allocator still gives unused blocks back when memory runs out: not while it thinks it records."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 5 * 2**28) / total, 0)
    try:
        blocks = [torch.empty(2**28, dtype=torch.uint8, device="cuda") for _ in range(4)]
        del blocks
        return torch.empty(2**30, dtype=torch.uint8, device="cuda").is_cuda
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


@pytest.mark.parametrize("attention", ["sdpa", "fp8"])
def test_fp8_with_fused_kernels_still_draws_what_was_asked(attention, tmp_path):
    plain = pixels(tmp_path / "a", draw(tmp_path / "a"))
    record = draw(tmp_path / "b", "kernels=fused", "quantization=fp8", "compile=cudagraphs", f"attention={attention}")
    assert record.options["attention"].effective == attention or record.options["attention"].fallbacks
    assert record.options["quantization"].effective == "fp8"
    assert record.options["kernels"].effective == "fused"
    assert psnr(plain, pixels(tmp_path / "b", record)) >= 20
