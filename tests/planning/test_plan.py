"""The plan, on machines that are not here: what would run, what falls back and why, before any weight is read."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from helpers import (
    CPU,
    CPU_WITHOUT_COMPILER,
    H100,
    RTX_4090,
    T4,
    cuda_machine,
    effective,
    every_option,
    option_names,
    plan_on,
    reasons,
)

from fluxrun.config.composition import compose
from fluxrun.errors import ConfigError, OptionUnavailable
from fluxrun.formatting import GIB
from fluxrun.hardware.detection import detect
from fluxrun.hardware.machine import Machine, Proof
from fluxrun.options.conflicts import CONFLICTS
from fluxrun.planning.prepare import make_plan, prepare

REAL_SIZE = ("model.weights=random", "model=flux2_klein_4b")
MACHINES = {"h100": H100, "4090": RTX_4090, "t4": T4, "cpu": CPU, "bare cpu": CPU_WITHOUT_COMPILER}


# --- requires ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize(("group", "name"), [pair for pair in every_option() if pair[0] != "model"])
def test_every_option_can_be_planned_everywhere(machine, group, name):
    plan = plan_on(machine, f"{group}={name}", "batch_size=2", "height=1024", "width=1024")
    choice = plan.choices[group]
    assert choice.requested == name
    if choice.effective != name:
        assert choice.fallbacks or choice.facts["chosen_because"]
    assert all(f.stage == "requires" and f.reason and "\n" not in f.reason for f in choice.fallbacks)
    assert choice.option.requires(plan.machine) is None
    assert not [c for c in CONFLICTS if c.group and c.holds(plan.options)]


def test_the_cards_own_example_on_a_cpu():
    plan = plan_on(CPU, "attention=xformers", "compile=max_autotune")
    assert effective(plan) | {"memory": "resident"} == {
        "model": "shapes", "attention": "sdpa", "compile": "max_autotune", "vae": "full", "memory": "resident",
        "kernels": "diffusers", "quantization": "none", "cache": "none", "lora": "none", "scheduler": "euler",
        "parallel": "single",
    }  # fmt: skip
    assert reasons(plan, "attention") == [("xformers", "requires", "needs a CUDA GPU; this run is on cpu")]


@pytest.mark.parametrize(
    ("machine", "overrides", "group", "expected", "why"),
    [
        (CPU_WITHOUT_COMPILER, ["compile=max_autotune"], "compile", "none", "no C++ compiler"),
        (CPU, ["quantization=fp8"], "quantization", "none", "needs a CUDA GPU"),
        (T4, ["quantization=fp8"], "quantization", "none", "compute capability 8.9"),
        (H100, ["quantization=fp8"], "quantization", "fp8", None),
        (RTX_4090, ["quantization=fp8"], "quantization", "fp8", None),
        (RTX_4090, ["attention=flash3"], "attention", "sdpa", "compute capability 9.0"),
        (H100, ["attention=flash3"], "attention", "sdpa", "flash-attn-3 is not installed"),
        (H100, ["attention=xformers"], "attention", "sdpa", "pip install 'xformers>=0.0.29'"),
        (cuda_machine("H", 80, (9, 0), xformers="0.0.20"), ["attention=xformers"], "attention", "sdpa", "too old"),
        (cuda_machine("H", 80, (9, 0), xformers="0.0.35"), ["attention=xformers"], "attention", "xformers", None),
        (cuda_machine("H", 80, (9, 0), kernels="0.9"), ["attention=flash3", "attention.hub=true"], "attention",
         "flash3", None),
        (H100, ["attention=cudnn"], "attention", "cudnn", None),
        (T4, ["attention=cudnn"], "attention", "sdpa", "compute capability 8.0"),
        (CPU, ["memory=balanced"], "memory", "resident", "nothing to offload"),
        (CPU, ["memory=staged"], "memory", "staged", None),
        (H100, ["memory=sequential"], "memory", "sequential", None),
    ],
)  # fmt: skip
def test_requires(machine, overrides, group, expected, why):
    plan = plan_on(machine, *overrides)
    assert effective(plan)[group] == expected
    assert [why in reason for _, _, reason in reasons(plan, group)] == ([True] * len(plan.choices[group].fallbacks))
    assert bool(plan.choices[group].fallbacks) == (why is not None)


def test_a_machine_without_triton_or_with_a_failed_probe():
    without = replace(H100, packages={k: v for k, v in H100.packages.items() if k != "triton"})
    assert effective(plan_on(without, "compile=regional"))["compile"] == "none"
    failed = replace(H100, proven={"attention=cudnn": Proof("RuntimeError: no engine", "now")})
    plan = plan_on(failed, "attention=cudnn")
    assert "no engine" in reasons(plan, "attention")[0][2]


def test_dtype_that_the_gpu_lacks():
    assert plan_on(T4).dtype in ("float16", "float32") or pytest.raises(OptionUnavailable)
    with pytest.raises((OptionUnavailable, ConfigError), match="float16"):
        plan_on(T4, "model.dtype=bfloat16")
    assert plan_on(H100).dtype == "bfloat16"
    assert plan_on(CPU).dtype == "float32"
    assert plan_on(T4, "model.dtype=float16").dtype == "float16"


def test_devices():
    assert plan_on(H100).machine.device == "cuda"
    assert plan_on(H100, "device=cpu").machine.device == "cpu"
    assert effective(plan_on(H100, "device=cpu", "attention=cudnn"))["attention"] == "sdpa"
    with pytest.raises(ConfigError, match=r"1 GPU"):
        plan_on(H100, "device=cuda:1")
    with pytest.raises(ConfigError, match="CPU build"):
        plan_on(replace(H100, torch_cuda=None), "device=cuda")


# --- strict, notes, knobs ---------------------------------------------------------------------------------------


def test_strict_turns_every_fallback_into_a_refusal():
    for overrides in (["attention=xformers"], ["compile=max_autotune", "compile.scope=blocks"]):
        assert plan_on(CPU, *overrides)
        with pytest.raises(OptionUnavailable, match="strict=true") as caught:
            plan_on(CPU, *overrides, "strict=true")
        assert caught.value.exit_code == 2
    # A choice is not a fallback.
    assert effective(plan_on(CPU, "strict=true", "vae=auto", "memory=auto"))["vae"] == "full"


def test_a_knob_that_is_not_used_is_said():
    assert any("compile.scope" in note for note in plan_on(CPU, "compile.scope=full").notes)
    assert any("memory.group_level" in note for note in plan_on(CPU, "memory.group_level=block").notes)
    assert any("vae.tile_size" in note for note in plan_on(CPU, "vae=full", "vae.tile_size=256").notes)
    assert not plan_on(CPU, "vae=tiled", "vae.tile_size=64").notes
    assert not plan_on(CPU).notes


def test_knobs_survive_a_fallback():
    options = ("compile=max_autotune", "compile.scope=blocks", "compile.dynamic=true", "memory=sequential")
    plan = plan_on(H100, "compile=reduce_overhead", "compile.dynamic=true", "memory=balanced")
    assert plan.choices["compile"].effective == "max_autotune_no_cudagraphs"
    assert plan.choices["compile"].option.dynamic is True
    assert plan.choices["compile"].option.mode == "max-autotune-no-cudagraphs"
    assert plan_on(H100, *options).choices["compile"].effective == "none"
    plan = plan_on(CPU, "memory=group", "memory.group_level=block")
    assert plan.choices["memory"].option.group_level == "block"


# --- conflicts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["compile=regional", "compile.mode=reduce-overhead"], "max_autotune_no_cudagraphs"),
        (["compile=max_autotune_no_cudagraphs", "compile.mode=max-autotune", "compile.scope=blocks"],
         "max_autotune_no_cudagraphs"),
        (["compile=max_autotune", "memory=balanced"], "max_autotune_no_cudagraphs"),
        (["compile=regional", "memory=balanced"], "regional"),
        (["compile=regional", "memory=sequential"], "none"),
        (["compile=default", "memory=group"], "none"),
        (["compile=reduce_overhead", "model=tiny", "model.distilled=false"], "max_autotune_no_cudagraphs"),
        (["compile=reduce_overhead"], "reduce_overhead"),
    ],
)  # fmt: skip
def test_conflicts_end_in_something_that_can_stand(overrides, expected):
    plan = plan_on(H100, *overrides)
    option = plan.choices["compile"].option
    assert option.name == expected
    assert (option.mode == "max-autotune-no-cudagraphs") == (expected == "max_autotune_no_cudagraphs")


def test_a_conflict_that_is_only_said():
    plan = plan_on(H100, "quantization=fp8")
    assert effective(plan)["quantization"] == "fp8"
    assert any("kernels=fused or compile=regional" in note for note in plan.notes)
    assert not plan_on(H100, "quantization=fp8", "compile=regional").notes


def test_options_that_point_at_each_other_are_refused(config_dir, trusted):
    (config_dir / "memory").mkdir()
    for name, other in (("ping", "pong"), ("pong", "ping")):
        text = f"_target_: fluxrun.options.memory.Balanced\nfallback: {other}\n"
        (config_dir / "memory" / f"{name}.yaml").write_text(text)
    with pytest.raises((ConfigError, OptionUnavailable)) as caught:
        prepare(compose(["memory=ping"], config_dir=config_dir), CPU)
    assert caught.value.exit_code == 2


# --- autos and the memory ladder --------------------------------------------------------------------------------


def test_vae_auto():
    assert effective(plan_on(CPU))["vae"] == "full"
    plan = plan_on(CPU, "height=2048", "width=1536")
    assert effective(plan)["vae"] == "tiled"
    assert "larger than 1536x1536" in plan.choices["vae"].facts["chosen_because"]
    assert not plan.choices["vae"].fallbacks
    short = cuda_machine("small", 24, (8, 9), free=1)
    assert effective(plan_on(short, "height=1024", "width=1024"))["vae"] == "tiled"


@pytest.mark.parametrize(
    ("model", "free_gb", "expected"),
    [
        ("flux2_klein_4b", 80, "resident"),
        ("flux2_klein_4b", 24, "resident"),
        ("flux2_klein_4b", 13, "staged"),
        ("flux2_dev", 139, "resident"),
        ("flux2_dev", 78, "staged"),
        ("flux2_dev", 24, "block_swap"),
        ("flux2_dev", 10, "group"),
        ("flux2_dev", 4, "sequential"),
        ("flux2_dev", 1, "sequential"),
    ],
)
def test_memory_auto_takes_the_fastest_rung_that_fits(model, free_gb, expected):
    machine = cuda_machine("some", 141, (9, 0), free=free_gb, torchvision="0.26")
    plan = plan_on(machine, f"model={model}", "model.weights=random")
    choice = plan.choices["memory"]
    assert (choice.requested, choice.effective, choice.fallbacks) == ("auto", expected, [])
    assert "chosen_because" in choice.facts


def test_memory_auto_keeps_to_a_budget_and_counts_quantization():
    budget = plan_on(H100, "model=flux2_dev", "model.weights=random", "memory.budget_gb=24")
    assert effective(budget)["memory"] == "block_swap"
    whole = plan_on(H100, "model=flux2_dev", "model.weights=random").estimate.memory_needs()
    eight_bit = plan_on(H100, "model=flux2_dev", "model.weights=random", "quantization=fp8").estimate.memory_needs()
    assert whole
    assert eight_bit
    assert whole["resident"].bytes - eight_bit["resident"].bytes == pytest.approx(32.2e9, rel=0.01)
    ladder = [need.bytes for need in whole.values()]
    assert ladder == sorted(ladder, reverse=True)
    assert whole["resident"].bytes > 90 * GIB  # 64 GB of transformer, 36 GB of text encoder


# --- the call's arguments ---------------------------------------------------------------------------------------


def test_arguments_that_the_model_has_not_are_refused_not_ignored():
    for overrides in (
        ["guidance=3"],
        ["negative_prompt=x"],
        ["model.pipeline=dev", "negative_prompt=x"],
        ["model.distilled=false", "guidance=1", "negative_prompt=x"],
    ):
        with pytest.raises(ConfigError):
            plan_on(CPU, "model=tiny", *overrides)
    assert plan_on(CPU, "model=tiny", "model.pipeline=dev", "guidance=3")
    assert plan_on(CPU, "model=tiny", "model.distilled=false", "negative_prompt=x")


def test_a_checkpoint_that_says_what_it_is_fills_in_steps_and_guidance():
    plan = plan_on(CPU, "model=tiny", "model.distilled=false", "model.steps=null")
    assert (plan.model.steps, plan.model.guidance) == (50, 4.0)
    assert plan_on(CPU, "model=tiny", "model.steps=null").model.steps == 4


# --- purity -----------------------------------------------------------------------------------------------------


def test_planning_imports_no_torch():
    code = (
        "import sys\n"
        "from fluxrun.planning.prepare import prepare\n"
        "from fluxrun.config.composition import compose\n"
        "prepare(compose(['attention=auto', 'compile=max_autotune']))\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'torchao'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_this_machine_and_summary():
    machine = detect()
    assert machine.packages["torch"]
    assert machine.ram_bytes > 0
    found = make_plan(compose(["attention=xformers"]), CPU).record()
    assert found["attention"].requested == "xformers"
    assert found["attention"].fallbacks[0].stage == "requires"


@pytest.mark.parametrize(
    ("version", "minimum", "enough"),
    [
        ("2.11.0+cu130", "2.11", True), ("0.0.9", "0.0.29", False), ("0.0.29", "0.0.9", True), ("1.12", "1.12.0", True),
        ("0.15.0.dev20260101", "0.15", True), ("4.0.0b4", "4", True), ("1!1.0", "2.0", True), ("unknown", "0.1", False),
    ],
)  # fmt: skip
def test_versions_are_compared_by_their_numbers(version: str, minimum: str, enough: bool) -> None:
    reason = Machine(packages={"torchao": version}).lacks("torchao", minimum)
    assert reason == (None if enough else f"torchao {version} is too old (pip install 'torchao>={minimum}')")


def test_doctor_knows_every_option():
    from fluxrun.config.catalog import Catalog

    assert Catalog().groups()["attention"] == option_names("attention")
