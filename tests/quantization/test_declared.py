"""What a component's config.json says of its quantization."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import hollow_folder
from helpers import CPU, H100, effective, fluxrun, plan_on, said

from fluxrun.errors import ConfigError, OptionUnavailable
from fluxrun.hardware.machine import Machine
from fluxrun.quantization.declared import declared_by

SDNQ = {"quant_method": "sdnq", "weights_dtype": "uint4", "group_size": 0, "use_svd": True, "svd_rank": 32}
WITH_SDNQ = replace(CPU, packages={**CPU.packages, "sdnq": "0.2.8", "torchao": "0.18.0"})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (SDNQ, "sdnq uint4, SVD rank 32"),
        ({**SDNQ, "use_svd": False, "group_size": 32, "use_hadamard": True}, "sdnq uint4, group 32, Hadamard"),
        ({**SDNQ, "use_svd": False, "use_dynamic_quantization": True}, "sdnq uint4, dynamic"),
        ({"quant_method": "sdnq", "group_size": "many", "svd_rank": None, "use_svd": True}, "sdnq SVD rank 0"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
         "torchao Int8WeightOnlyConfig"),
        ({"quant_method": "gptq"}, "gptq"),
        ({}, "a method that it does not name"),
    ],
)  # fmt: skip
def test_it_is_described(config, said):
    assert str(declared_by({"quantization_config": config})) == said


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": "sdnq"}])
def test_ordinary_weights_declare_nothing(config):
    assert declared_by(config) is None


def declaring(folder: Path, **components: dict[str, object]) -> Path:
    """A hollow checkpoint whose components declare these quantizations."""
    hollow_folder(folder)
    for name, config in components.items():
        (folder / name / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def planned(folder: Path, *overrides: str, machine: Machine = WITH_SDNQ):
    return plan_on(machine, f"model.path={folder}", *overrides)


def test_the_plan_names_it_and_says_why(tmp_path):
    folder = declaring(tmp_path / "model", transformer=SDNQ, text_encoder={"quant_method": "sdnq"})
    choice = planned(folder).choices["quantization"]
    assert (choice.requested, choice.effective, choice.fallbacks) == ("none", "checkpoint", [])
    assert choice.facts["chosen_because"] == "text_encoder: sdnq; transformer: sdnq uint4, SVD rank 32"


@pytest.mark.parametrize("name", ["sdnq", "int8", "int8_weight_only", "fp8_weight_only"])
def test_nothing_goes_on_top_of_it(tmp_path, name):
    folder = declaring(tmp_path / "model", transformer=SDNQ)
    choice = planned(folder, f"quantization={name}").choices["quantization"]
    assert (choice.requested, choice.effective) == (name, "checkpoint")
    reason = "the checkpoint is quantized already (transformer: sdnq uint4, SVD rank 32)"
    assert [fallback.reason for fallback in choice.fallbacks] == [reason]
    with pytest.raises(OptionUnavailable, match="quantized already"):
        planned(folder, f"quantization={name}", "strict=true")


def test_asked_for_where_nothing_is_declared(tmp_path):
    choice = planned(hollow_folder(tmp_path / "model"), "quantization=checkpoint").choices["quantization"]
    assert (choice.effective, choice.fallbacks[0].reason) == (
        "none", "no component of this checkpoint declares a quantization of its own",
    )  # fmt: skip


def test_fused_kernels_do_not_read_it(tmp_path):
    folder = declaring(tmp_path / "model", transformer=SDNQ)
    machine = replace(H100, packages={**H100.packages, "sdnq": "0.2.8"})
    plan = planned(folder, "kernels=fused", machine=machine)
    assert effective(plan)["kernels"] == "diffusers"
    assert "plain weights" in plan.choices["kernels"].fallbacks[0].reason
    assert effective(plan)["quantization"] == "checkpoint"


def test_its_library_is_missed_before_anything_is_loaded(tmp_path):
    folder = declaring(tmp_path / "model", transformer=SDNQ)
    with pytest.raises(ConfigError, match=r"the transformer of .* is quantized with sdnq: sdnq is not installed"):
        planned(folder, machine=CPU)
    other = declaring(tmp_path / "other", text_encoder={"quant_method": "gptq"})
    with pytest.raises(ConfigError, match=r"the text_encoder of .* gptq, which fluxrun does not load \(it loads sdnq"):
        planned(other)


@pytest.mark.slow
def test_in_one_line_on_the_command_line(tmp_path):
    folder = declaring(tmp_path / "model", transformer={"quant_method": "quanto"})
    done = fluxrun(f"model.path={folder}", cwd=tmp_path)
    assert (done.returncode, len(said(done.stderr))) == (2, 1)
    assert "quanto, which fluxrun does not load" in done.stderr


@pytest.mark.parametrize(
    ("model", "architecture"),
    [("flux2_dev_sdnq", "dev"), ("flux2_klein_4b_sdnq", "klein_4b"), ("flux2_klein_9b_sdnq", "klein_9b")],
)
def test_the_models_of_the_hub(model, architecture):
    from fluxrun.config.composition import compose

    config = compose([f"model={model}"])
    assert config.model.architecture == architecture
    assert config.model.id is not None
    assert config.model.id.startswith("Disty0/FLUX.2-")
