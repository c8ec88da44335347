"""Fused kernels, recorded graphs and compiling in a plan: what stands beside what, and what gives way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import (
    CPU,
    H100,
    SMALL,
    effective,
    plan_on,
    reasons,
)

from fluxrun.config.composition import compose
from fluxrun.errors import OptionUnavailable
from fluxrun.planning.fallbacks import announce, fall_back
from fluxrun.planning.prepare import prepare

REAL_SIZE = ("model.weights=random", "model=flux2_klein_4b")


def test_fused_kernels_and_recorded_graphs_run_together_on_a_hopper():
    plan = plan_on(H100, *REAL_SIZE, "kernels=fused", "compile=cudagraphs", "quantization=fp8")
    assert {"kernels": "fused", "compile": "cudagraphs", "quantization": "fp8"}.items() <= effective(plan).items()
    assert not [note for note in plan.notes if "quantization" in note]


@pytest.mark.parametrize("name", ["regional", "default", "max_autotune"])
def test_fused_kernels_leave_the_compiler_nothing(name):
    plan = plan_on(H100, *REAL_SIZE, "kernels=fused", f"compile={name}")
    assert effective(plan)["compile"] == "cudagraphs"
    assert "nothing to fuse" in reasons(plan, "compile")[0][2]
    other = plan_on(H100, *REAL_SIZE, "kernels=fused", f"compile={name}", "compile.targets=[vae_decoder]")
    assert effective(other)["compile"] in (name, "max_autotune_no_cudagraphs")


@pytest.mark.parametrize("memory", ["balanced", "group", "sequential"])
def test_what_holds_on_to_weights_gives_way_to_offloading(memory):
    plan = plan_on(H100, *REAL_SIZE, "kernels=fused", "compile=cudagraphs", f"memory={memory}")
    assert (effective(plan)["kernels"], effective(plan)["compile"]) == ("diffusers", "none")
    knob = plan_on(H100, *REAL_SIZE, "compile=regional", "compile.cuda_graph=true", f"memory={memory}")
    assert not getattr(knob.options["compile"], "cuda_graph", False)


def test_fused_kernels_stay_where_blocks_are_swapped():
    plan = plan_on(H100, *REAL_SIZE, "kernels=fused", "quantization=fp8", "memory=block_swap")
    assert (effective(plan)["kernels"], plan.notes) == ("fused", [])
    compiled = plan_on(H100, *REAL_SIZE, "compile=regional", "memory=block_swap")
    assert "graph break" in reasons(compiled, "compile")[0][2]


def test_knobs_of_another_placement_are_said_to_be_unused():
    assert any(
        "memory.blocks_to_swap" in note for note in plan_on(H100, "memory=group", "memory.blocks_to_swap=3").notes
    )
    assert not plan_on(H100, "memory=block_swap", "memory.blocks_to_swap=3").notes


WITH_CACHE_DIT = replace(H100, packages={**H100.packages, "cache-dit": "1.5.3"})
STEP_CACHE = (*REAL_SIZE, "cache=fixed", "steps=20")


@pytest.mark.parametrize(
    ("targets", "left"),
    [
        ("transformer,vae_decoder,text_encoder", ("vae_decoder", "text_encoder")),
        ("text_encoder,transformer", ("text_encoder",)),
    ],
)
def test_beside_a_step_cache_only_the_transformers_graph_is_given_up(targets, left):
    asked = (*STEP_CACHE, "compile=cudagraphs", f"compile.targets=[{targets}]")
    plan = plan_on(WITH_CACHE_DIT, *asked)
    assert (effective(plan)["compile"], effective(plan)["cache"]) == ("cudagraphs", "fixed")
    assert plan.options["compile"].targets == left
    ((option, stage, reason),) = reasons(plan, "compile")
    assert (option, stage) == ("cudagraphs", "requires")
    assert "step cache" in reason
    assert reason.endswith("transformer is taken out of compile.targets")
    assert not [note for note in plan.notes if note.startswith("compile.")]
    with pytest.raises(OptionUnavailable, match="step cache"):
        plan_on(WITH_CACHE_DIT, *asked, "strict=true")


def test_the_transformers_graph_alone_gives_way_to_a_step_cache():
    plan = plan_on(WITH_CACHE_DIT, *STEP_CACHE, "compile=cudagraphs")
    assert effective(plan)["compile"] == "none"
    ((option, _, reason),) = reasons(plan, "compile")
    assert option == "cudagraphs"
    assert reason.endswith("which ones run")


@pytest.mark.parametrize("compile", [("compile=cudagraphs",), ("compile=regional", "compile.cuda_graph=true")])
def test_graphs_of_other_targets_stand_beside_a_step_cache(compile):
    plan = plan_on(WITH_CACHE_DIT, *STEP_CACHE, *compile, "compile.targets=[vae_decoder,text_encoder]")
    assert plan.options["compile"].cuda_graph
    assert not reasons(plan, "compile")


def test_a_compiled_transformer_stays_a_target_beside_a_step_cache():
    asked = ("compile=regional", "compile.cuda_graph=true", "compile.targets=[transformer,text_encoder]")
    plan = plan_on(WITH_CACHE_DIT, *STEP_CACHE, *asked)
    option = plan.options["compile"]
    assert (option.name, option.cuda_graph, option.targets) == ("regional", False, ("transformer", "text_encoder"))


@pytest.mark.parametrize("name", ["default", "reduce_overhead"])
def test_what_compiles_another_target_whole_stands_beside_a_step_cache(name):
    plan = plan_on(WITH_CACHE_DIT, *STEP_CACHE, f"compile={name}", "compile.targets=[vae_decoder]")
    assert (effective(plan)["compile"], reasons(plan, "compile")) == (name, [])


def test_narrowed_graphs_fall_back_like_any_option():
    plan = plan_on(WITH_CACHE_DIT, *STEP_CACHE, "compile=cudagraphs", "compile.targets=[transformer,vae_decoder]")
    fall_back(plan, "compile", "first_call", "the driver refused")
    assert effective(plan)["compile"] == "none"


def test_what_stays_in_part_is_announced_as_that(caplog):
    asked = (*SMALL, "cache=fixed", "steps=8", "compile=cudagraphs", "compile.targets=[transformer,vae_decoder]")
    prepared = prepare(compose(asked), WITH_CACHE_DIT)
    with caplog.at_level("WARNING", logger="fluxrun"):
        announce(prepared.plan, {})
    assert "compile=cudagraphs cannot be used, falling back to a part of it (a CUDA graph of the" in caplog.text


def test_cuda_graphs_need_a_gpu():
    plan = plan_on(CPU, "compile=regional", "compile.cuda_graph=true")
    assert "compile.cuda_graph needs a CUDA GPU" in reasons(plan, "compile")[0][2]


def test_fp8_attention_needs_the_fused_kernels():
    plan = plan_on(H100, *REAL_SIZE, "attention=fp8", "kernels=fused")
    if "nvidia-cudnn-frontend" not in H100.packages:
        assert "nvidia-cudnn-frontend is not installed" in reasons(plan, "attention")[0][2]
    machine = replace(H100, packages={**H100.packages, "nvidia-cudnn-frontend": "1.14.1"})
    assert effective(plan_on(machine, *REAL_SIZE, "attention=fp8", "kernels=fused"))["attention"] == "fp8"
    alone = plan_on(machine, *REAL_SIZE, "attention=fp8")
    assert effective(alone)["attention"] == "sdpa"
    assert "kernels=fused" in reasons(alone, "attention")[0][2]


def test_conflicts_go_by_what_an_option_does_not_by_its_name():
    from fluxrun.options.compile import Compile, CudaGraphs
    from fluxrun.options.conflicts import find_conflicts

    options = plan_on(H100, *REAL_SIZE, "kernels=fused").options
    assert not [c for c in find_conflicts({**options, "compile": CudaGraphs(name="mine", fallback="none")}) if c.group]
    found = find_conflicts({**options, "compile": Compile(name="mine", fallback="none")})
    assert [(c.group, c.instead) for c in found] == [("compile", "cudagraphs")]
