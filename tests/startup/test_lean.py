"""A lean start in real processes: less is imported, and what is imported is what it is without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SMALL

pytestmark = pytest.mark.slow

LEAN = "import fluxrun.startup.owner as o, fluxrun.startup.lean as l\no.own_process(); l.start_lean({needed})\n"

CLASSES = """
import inspect, json
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM
found = (AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel,
         BasicTransformerBlock, Qwen2TokenizerFast, Qwen3ForCausalLM)
print(json.dumps([[f"{c.__module__}.{c.__qualname__}", inspect.getsourcefile(c), [b.__qualname__ for b in c.__mro__],
                   sorted(vars(c))] for c in found]))
"""

LATER = """
import diffusers.models.transformers as package
import torch
assert isinstance(torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(1, 2)), torch.Tensor)
import scipy.stats, torch.nn.attention.flex_attention as flex
assert scipy.stats.norm.cdf(0) == 0.5 and callable(flex.flex_attention)
from scipy.integrate import quad
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
assert package.FluxTransformer2DModel is FluxTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, apply_group_offloading
from diffusers import UNet2DConditionModel
print("fine")
"""

QUANTIZED = """
import hashlib, json, sys
from fluxrun.process.switches import import_diffusers
import_diffusers()
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
found = []
for config in (Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig):
    layer = torch.nn.Linear(64, 48, bias=False)
    layer.weight.data = torch.linspace(-1, 1, 64 * 48).view(48, 64)
    quantize_(layer, config(set_inductor_config=False), filter_fn=lambda *_: True)
    drawn = layer(torch.linspace(-2, 3, 64 * 5).view(5, 64)).detach().numpy().tobytes()
    found.append([type(layer.weight).__qualname__, hashlib.sha256(drawn).hexdigest()])
unneeded = ("sympy", "torch._inductor.utils", "torch._dynamo.symbolic_convert")
print(json.dumps([found, [name for name in unneeded if name in sys.modules]]))
"""


BESIDE = (
    "av", "bitsandbytes", "cv2", "deepspeed", "flash_attn", "k_diffusion", "kernels", "librosa", "natten", "onnx",
    "peft", "sageattention", "sdnq", "sklearn", "soundfile", "tensorboard", "timm", "torchao", "torchaudio",
    "torchcodec", "torchsde", "torchvision", "wandb", "xformers",
)  # fmt: skip
"""Libraries that a user may have for other work, and that transformers, diffusers or accelerate look for."""

DRAWS = """
from fluxrun.process.switches import import_diffusers
import_diffusers()
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from transformers import Mistral3ForConditionalGeneration, Qwen2TokenizerFast, Qwen3ForCausalLM
from torch._dynamo.utils import is_compile_supported  # as torchvision does when it is imported
print("fine")
"""


def python(code: str, path: str = "") -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fluxrun(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "fluxrun", *SMALL, *overrides, f"hydra.run.dir={folder}"]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)


def imported(stderr: str) -> set[str]:
    return {line.rpartition("|")[2].strip() for line in stderr.splitlines() if line.startswith("import time:")}


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_every_class_is_the_very_same_one():
    plain = json.loads(python(CLASSES))
    assert json.loads(python(LEAN.format(needed="frozenset()") + CLASSES)) == plain
    assert json.loads(python(LEAN.format(needed="None") + CLASSES)) == plain


def test_what_lies_beside_it_is_not_imported(tmp_path):
    for name in BESIDE:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('{name} was imported for nothing')\n")
        about = tmp_path / f"{name}-99.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    assert python(LEAN.format(needed="frozenset()") + DRAWS, str(tmp_path)) == "fine\n"


def test_torchao_quantizes_the_same_without_the_compiler():
    plain, _ = json.loads(python(QUANTIZED))
    assert json.loads(python(LEAN.format(needed="frozenset({'torchao'})") + QUANTIZED)) == [plain, []]


def test_what_was_not_imported_can_be_later():
    assert python(LEAN.format(needed="frozenset({'torch._dynamo'})") + LATER) == "fine\n"


def test_nothing_happens_in_a_process_that_is_not_our_own():
    start = "import sys, fluxrun.startup.lean as lean\nbefore = sys.meta_path[:]\nlean.start_lean(frozenset())\n"
    assert python(start + "print(sys.meta_path == before, 'torch._dynamo' in sys.modules)") == "True False\n"


def test_a_run_imports_what_its_plan_needs(tmp_path):
    lean, compiled = fluxrun(tmp_path / "a"), fluxrun(tmp_path / "b", "compile=default", "vae=tiled")
    assert (lean.returncode, compiled.returncode) == (0, 0), lean.stderr + compiled.stderr
    modules = imported(lean.stderr)
    # Not sympy: torch itself imports it to fill weights on the meta device.
    unneeded = ("torchao", "peft", "scipy.stats._stats_py", "torch._dynamo", "torch.distributed.tensor")
    assert not modules & set(unneeded)
    assert "diffusers.models.transformers.transformer_flux" not in modules
    assert record(tmp_path / "b")["options"]["compile"]["facts"]["graphs_compiled"] > 0
    assert record(tmp_path / "b")["options"]["compile"]["fallbacks"] == []


def test_the_union_of_a_runs_parts_is_its_time(tmp_path):
    done = fluxrun(tmp_path / "run", "num_images=2")
    assert done.returncode == 0, done.stderr
    spans = record(tmp_path / "run")["spans"]
    names = [
        "interpreter",
        "import",
        "compose",
        "plan",
        "load",
        "apply",
        "encode",
        "first call",
        "steps",
        "decode",
        "save",
    ]
    assert {span["name"] for span in spans} >= set(names)
    assert spans[0] == {"name": "interpreter", "start_s": 0.0, "end_s": spans[0]["end_s"]}
    end, covered = 0.0, 0.0
    for span in spans:
        assert span["start_s"] <= span["end_s"]
        covered += max(0.0, span["end_s"] - max(end, span["start_s"]))
        end = max(end, span["end_s"])
    assert covered >= 0.98 * end
