"""LoRA files on a pipeline: as strong as they should be, beside every other option, swapped without a build."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import H100, composed, draw, effective, fluxrun, hashes, plan_on, small
from loras import BLOCKS, TINY, write_lora

from fluxrun.config.composition import compose
from fluxrun.errors import ConfigError, OptionUnavailable
from fluxrun.options.lora import Adapters
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.record.folder import read_record

PEFT = {"peft": "0.21.2"}


def files(*names: Path, scale: float = 1.0) -> str:
    return "lora.files=[" + ",".join(f"{{path: {name}, scale: {scale}}}" for name in names) + "]"


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of different ranks for different layers."""
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder / "r2.safetensors", [name for name in BLOCKS if "to_q" in name], rank=2)
    write_lora(folder / "r4.safetensors", BLOCKS, rank=4, seed=1)
    write_lora(folder / "r8.safetensors", ["proj_out", "x_embedder", *BLOCKS[:3]], rank=8, seed=2)
    return folder


@pytest.fixture(scope="module")
def bench() -> Iterator[SessionPool]:
    with SessionPool() as pool:
        yield pool


@pytest.fixture(scope="module")
def plain(bench: SessionPool, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return hashes(draw(tmp_path_factory.mktemp("plain") / "run", pool=bench))


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["lora=[a]", "lora=[{path: a}]", "lora={path: a}", "+lora=[a,b]", "lora=a.safetensors"]
)
def test_files_in_the_place_of_an_option_are_answered_with_the_right_words(text: str) -> None:
    with pytest.raises(ConfigError, match=r"lora=adapters 'lora\.files=\[\{path: FILE\.safetensors, scale: 0\.8\}\]'"):
        compose([text])


def test_a_files_text_is_its_path_and_unknown_keys_are_named() -> None:
    option = composed("lora=adapters", "lora.files=[some/style.safetensors]").lora
    assert isinstance(option, Adapters)
    assert [file.path for file in option.files] == [Path("some/style.safetensors")]
    with pytest.raises(ConfigError, match=r"lora\.files\.0: unknown key 'wieght_name': did you mean 'weight_name'"):
        compose(["lora=adapters", "lora.files=[{path: a, wieght_name: b}]"])
    with pytest.raises(ConfigError, match=r"finite number"):
        compose(["lora=adapters", "lora.scale=inf"])


def test_without_a_file_or_peft_it_falls_back_or_is_refused() -> None:
    plan = plan_on(H100.__class__(packages=PEFT), "lora=adapters")
    assert "no file is given: lora=adapters" in plan.choices["lora"].fallbacks[0].reason
    plan = plan_on(H100, "lora=adapters", "lora.files=[a.safetensors]")
    assert "peft is not installed (pip install 'peft>=0.18')" in plan.choices["lora"].fallbacks[0].reason
    with pytest.raises(OptionUnavailable, match=r"peft is not installed") as caught:
        plan_on(H100, "lora=adapters", "lora.files=[a.safetensors]", "lora.fallback=error")
    assert caught.value.exit_code == 2


def test_files_that_the_option_does_not_use_are_said() -> None:
    notes = plan_on(H100, "lora.files=[a.safetensors]").notes
    assert "lora.files is set, but lora=none does not use it" in notes


def test_fused_kernels_give_way(loras: Path) -> None:
    machine = H100.__class__(**{**vars(H100), "packages": {**H100.packages, **PEFT}})
    plan = plan_on(machine, "kernels=fused", "lora=adapters", files(loras / "r2.safetensors"))
    assert effective(plan)["kernels"] == "diffusers"
    assert "LoRA files stand beside them" in plan.choices["kernels"].fallbacks[0].reason


def test_the_memory_estimate_counts_the_adapters(loras: Path) -> None:
    machine = replace(H100, packages={**H100.packages, **PEFT})
    two = ("lora=adapters", files(loras / "r2.safetensors", loras / "r4.safetensors"))
    klein = ("model=flux2_klein_4b", "model.weights=random")
    without, beside = (plan_on(machine, *klein, *more).estimate for more in ((), two))
    elements = (2 + 4) * sum(sum(TINY[name]) for name in BLOCKS)
    for placement in ("resident", "balanced", "block_swap"):
        weights = [(e.memory_needs() or {})[placement].bytes - e.working_bytes() for e in (without, beside)]
        assert weights[1] - weights[0] == elements * 2


# --- pictures -----------------------------------------------------------------------------------------------------


def test_facts_and_a_picture_of_its_own(loras: Path, bench: SessionPool, plain: list[str], tmp_path: Path) -> None:
    record = draw(tmp_path / "run", "lora=adapters", files(loras / "r8.safetensors", scale=0.5), pool=bench)
    assert hashes(record) != plain
    facts = dict(record.options["lora"].facts)
    [file] = facts.pop("files")
    assert facts == {
        "adapters": 1, "layers_matched": 5, "rank": 8, "scale": 1.0, "room": {"layers": 5, "rank": 8},
        "hot_swapped": False,
    }  # fmt: skip
    assert len(file["sha256"]) == 64
    assert (file["layers"], file["rank"], file["scale"]) == (5, 8, 0.5)
    assert read_record(tmp_path / "run") == record
    assert bench.loads == ["first load"]


def test_scale_zero_draws_as_without_and_the_weights_stay_as_they_were(
    loras: Path, bench: SessionPool, plain: list[str], tmp_path: Path
) -> None:
    chosen = ("lora=adapters", files(loras / "r4.safetensors"))
    strong = hashes(draw(tmp_path / "strong", *chosen, pool=bench))
    none = draw(tmp_path / "none", *chosen, "lora.scale=0", pool=bench)
    assert none.options["lora"].facts["hot_swapped"]
    assert hashes(none) == plain != strong
    assert hashes(draw(tmp_path / "again", *chosen, pool=bench)) == strong
    assert hashes(draw(tmp_path / "without", pool=bench)) == plain
    assert bench.loads == ["first load"]


def test_the_picture_of_a_swapped_file_is_that_of_a_fresh_build(
    loras: Path, bench: SessionPool, tmp_path: Path
) -> None:
    """What an earlier file, of more layers and a higher rank, has left must be gone."""
    draw(tmp_path / "first", "lora=adapters", files(loras / "r4.safetensors"), pool=bench)
    chosen = ("lora=adapters", files(loras / "r2.safetensors"), "lora.scale=0.7")
    swapped = draw(tmp_path / "swapped", *chosen, pool=bench)
    assert swapped.options["lora"].facts["hot_swapped"]
    assert swapped.options["lora"].facts["room"] == {"layers": len(BLOCKS), "rank": 4}
    assert swapped.timings.apply_s == 0
    assert hashes(swapped) == hashes(draw(tmp_path / "fresh", *chosen))


def test_a_file_without_room_is_built_anew(loras: Path, bench: SessionPool, tmp_path: Path) -> None:
    draw(tmp_path / "first", "lora=adapters", files(loras / "r2.safetensors"), pool=bench)
    record = draw(tmp_path / "second", "lora=adapters", files(loras / "r8.safetensors"), pool=bench)
    assert not record.options["lora"].facts["hot_swapped"]
    assert record.options["lora"].facts["rank"] == 8
    assert bench.loads == ["first load"]


def test_layers_that_are_not_there_end_the_run(bench: SessionPool, tmp_path: Path) -> None:
    file = write_lora(
        tmp_path / "other.safetensors", [*BLOCKS[:1], *(f"transformer_blocks.{n}.attn.to_q" for n in (7, 8))]
    )
    with pytest.raises(ConfigError, match=r"lacks 2 of 3 layers that it names: transformer\.transformer_blocks\.7"):
        draw(tmp_path / "run", "lora=adapters", files(file), pool=bench)
    record = read_record(tmp_path / "run")
    assert (record.status, record.images) == ("failed", [])


def test_dropped_tensors_are_noted(bench: SessionPool, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = write_lora(tmp_path / "dora.safetensors", ["proj_out"])
    save_file(load_file(file) | {"transformer.proj_out.dora_scale": load_file(file).popitem()[1]}, file)
    record = draw(tmp_path / "run", "lora=adapters", files(file), pool=bench)
    assert any("it is a DoRA: transformer.proj_out.dora_scale" in note for note in record.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "beside", [["memory=staged"], ["memory=balanced"], ["memory=block_swap", "memory.blocks_to_swap=1"],
               ["memory=group", "memory.use_stream=false"], ["cache=fixed", "steps=6"],
               ["batch_size=2", "num_images=2"],
               ["model.dtype=bfloat16"]],
)  # fmt: skip
def test_beside_other_options(beside: list[str], loras: Path, on_a_cpu: None, tmp_path: Path) -> None:
    """The same pixels as without the option where it promises them, and always others than without the file."""
    given = [*beside, "vae=full"]
    with SessionPool() as pool:
        without = draw(tmp_path / "without", *given, pool=pool)
        record = draw(tmp_path / "run", *given, "lora=adapters", files(loras / "r4.safetensors"), pool=pool)
        again = draw(
            tmp_path / "again", *given, "lora=adapters", files(loras / "r4.safetensors"), "lora.scale=0", pool=pool
        )
    assert record.status == "completed"
    assert not any(option.fallbacks for option in record.options.values())
    assert hashes(record) != hashes(without) == hashes(again)
    if "memory" in beside[0]:
        resident = draw(tmp_path / "resident", "vae=full", "lora=adapters", files(loras / "r4.safetensors"))
        assert hashes(record) == hashes(resident)


@pytest.mark.slow
def test_over_quantized_weights(loras: Path) -> None:
    """torchao's tensors in the place of weights: the adapters are added to what they compute."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from fluxrun.planning.prepare import prepare
    from fluxrun.runner import assembled
    from fluxrun.weights.lora_files import find_adapters, load_adapters

    with assembled(prepare(small())) as session:
        transformer = session.pipeline.transformer
        quantize_(transformer, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith("attn.to_q"))
        layer = transformer.transformer_blocks[0].attn.to_q
        x = torch.randn(3, TINY["transformer_blocks.0.attn.to_q"][0])
        before = layer(x)
        option = Adapters(files=[loras / "r2.safetensors"])
        assert session.context is not None
        session.context.lora = load_adapters(find_adapters(option), [], transformer, print)
        option.apply(session.pipeline, session.context)
        one = session.context.lora.adapters[0].layers["transformer_blocks.0.attn.to_q"]
        added = x @ one.down.T @ one.up.T
        torch.testing.assert_close(transformer.transformer_blocks[0].attn.to_q(x), before + added)


# --- a sweep ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_over_ranks_and_scales_loads_once_and_compiles_once(loras: Path, tmp_path: Path) -> None:
    names = ",".join(f"[{loras / name}]" for name in ("r2.safetensors", "r4.safetensors", "r8.safetensors"))
    done = fluxrun(
        "--multirun", "model=tiny", "height=64", "width=64", "steps=2", "model.max_sequence_length=32",
        "compile=regional", "lora=adapters", f"lora.files={names}", "lora.scale=0.5,1,1.5", "hydra.sweep.dir=s",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert result["loads"] == ["first load"]
    records = [read_record(tmp_path / "s" / str(job)) for job in range(9)]
    compiled = [record.options["compile"].facts for record in records]
    assert [facts["recompiles"] for facts in compiled] == [0] * 9
    assert compiled[0]["graphs_compiled"] > 0
    assert [facts["graphs_compiled"] for facts in compiled[1:]] == [0] * 8
    adapted = [record.options["lora"].facts for record in records]
    assert [facts["hot_swapped"] for facts in adapted] == [False, *[True] * 8]
    assert {facts["room"]["rank"] for facts in adapted} == {8}
    assert len({image for record in records for image in hashes(record)}) == 9
