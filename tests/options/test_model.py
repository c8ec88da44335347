"""The model options: every YAML shows every knob, and what a machine lacks is said in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from fluxrun.errors import ConfigError
from fluxrun.hardware.machine import Gpu, Machine
from fluxrun.options import model as module
from fluxrun.options.base import load_option
from fluxrun.options.model import Flux2Model

FILES = sorted((Path(__file__).resolve().parents[2] / "conf" / "model").glob("*.yaml"))
H100 = Machine(gpus=(Gpu("H100", 80, 80, (9, 0)),), device="cuda")
T4 = Machine(gpus=(Gpu("T4", 16, 16, (7, 5)),), device="cuda")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_yaml_is_valid_and_shows_every_knob(file):
    text = file.read_text()
    assert text.startswith("# ")
    node = yaml.safe_load(text)
    option = load_option({**node, "name": file.stem})
    assert isinstance(option, Flux2Model)
    assert set(Flux2Model.model_fields) - {"name", "fallback", "bundled"} <= set(node)


def test_unknown_knob_is_refused():
    with pytest.raises(ValidationError, match="extra"):
        Flux2Model(stepz=4)  # type: ignore[call-arg]


def test_architecture_and_pipeline_must_agree():
    with pytest.raises(ValidationError, match="belongs to pipeline klein"):
        Flux2Model(architecture="klein_9b", pipeline="dev")


@pytest.mark.parametrize(
    ("dtype", "machine", "expected"),
    [
        ("auto", Machine(), "float32"),
        ("auto", H100, "bfloat16"),
        ("auto", T4, "float16"),
        ("float16", Machine(), "float16"),
    ],
)
def test_dtype(dtype, machine, expected):
    assert Flux2Model(dtype=dtype).dtype_on(machine) == expected


def test_old_gpu_has_no_bfloat16():
    reason = Flux2Model(dtype="bfloat16").requires(T4)
    assert reason
    assert "T4" in reason
    assert "model.dtype=float16" in reason
    assert Flux2Model(dtype="bfloat16").requires(H100) is None


def test_dev_from_the_hub_needs_torchvision(tmp_path):
    dev = {"pipeline": "dev", "dtype": "auto"}
    assert "fluxrun[dev]" in str(Flux2Model(id="black-forest-labs/FLUX.2-dev", **dev).requires(H100))
    with_it = Machine(packages={"torchvision": "0.28"})
    assert Flux2Model(id="black-forest-labs/FLUX.2-dev", **dev).requires(with_it) is None
    assert Flux2Model(path=tmp_path, **dev).requires(H100) is None  # the folder's own tokenizer decides
    assert Flux2Model(weights="random", architecture="dev", **dev).requires(H100) is None


def test_bundled(tmp_path, monkeypatch):
    wheel, repository = tmp_path / "wheel", tmp_path / "repository"
    monkeypatch.setattr(module, "BUNDLED", (wheel, repository))
    model = Flux2Model(bundled="shapes")
    with pytest.raises(ConfigError, match=r"model.bundled=shapes: .* give model.path"):
        model.folder()
    (repository / "shapes").mkdir(parents=True)
    assert model.folder() == repository / "shapes"
    (wheel / "shapes").mkdir(parents=True)
    assert model.folder() == wheel / "shapes"
    assert Flux2Model(bundled="shapes", path=tmp_path).folder() == tmp_path


@pytest.mark.parametrize(
    ("steps", "guidance", "distilled", "expected"),
    [
        (None, None, True, (4, None)),
        (None, None, False, (50, 4.0)),
        (8, 2.5, False, (8, 2.5)),
        (8, 2.5, True, (8, None)),
    ],
)
def test_defaults_follow_the_checkpoint(steps, guidance, distilled, expected):
    model = Flux2Model(steps=steps, guidance=guidance)
    assert (model.default_steps(distilled), model.default_guidance(distilled)) == expected
