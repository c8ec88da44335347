"""Found cases, each for good: checkpoints with something else in them than should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import hollow_folder, tiny_folder
from helpers import SMALL, fluxrun, said
from robustness.campaign import unclean
from robustness.strategies import DEPTH, HUGE_INTEGER

from fluxrun.errors import ConfigError
from fluxrun.options.model import Flux2Model
from fluxrun.weights.chat_template import check_templates
from fluxrun.weights.find import find_weights

pytestmark = pytest.mark.slow

# --- checkpoints ------------------------------------------------------------------------------------------------------


def broken(folder: Path, name: str, change) -> str:
    """What is said of the tiny checkpoint with one of its JSON files changed."""
    shutil.copytree(tiny_folder("klein"), folder / "m")
    file = folder / "m" / name
    data = json.loads(file.read_text())
    changed = change(data)
    file.write_text(changed if isinstance(changed, str) else json.dumps(data))
    with pytest.raises(ConfigError) as caught:
        find_weights(Flux2Model(path=folder / "m"))
    assert unclean(str(caught.value)) is None
    return str(caught.value)


INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (INDEX, lambda data: data.update(weight_map=[1]), "weight_map must name a file"),
        (INDEX, lambda data: data.update(weight_map={"a": 3}), "weight_map must name a file"),
        (INDEX, lambda data: data.update(weight_map={"a": "../../x"}), "weight_map must name a file"),
        (INDEX, lambda data: data["weight_map"].update(ghost=next(iter(data["weight_map"].values()))),
         "lacks the tensor ghost"),
        ("model_index.json", lambda data: data.update(_class_name={}), "not a FLUX.2 pipeline"),
        ("model_index.json", lambda data: "[" * DEPTH, "is not JSON"),
        ("transformer/config.json", lambda data: data.update(num_layers=1_000_000), "num_layers=1000000 cannot be"),
        ("transformer/config.json", lambda data: data.update(num_layers="many"), "num_layers=many cannot be"),
        ("transformer/config.json", lambda data: data.update(attention_head_dim=10**12), "attention_head_dim"),
        ("vae/config.json", lambda data: data.update(block_out_channels=[32] * 5000), "5,000 entries"),
        ("vae/config.json", lambda data: data.update(layers_per_block=10**6), "layers_per_block"),
        ("text_encoder/config.json", lambda data: data.update(num_hidden_layers=10**6), "num_hidden_layers"),
        ("text_encoder/config.json", lambda data: data.update(num_hidden_layers=[4]), "it is one number"),
        ("text_encoder/config.json", lambda data: HUGE_INTEGER, "more than 4300 digits"),
        ("scheduler/scheduler_config.json", lambda data: data.update(num_train_timesteps=10**12), "at most 1,000,000"),
    ],
)  # fmt: skip
def test_a_checkpoint_with_something_else_in_it(tmp_path, name, change, expected):
    assert expected in broken(tmp_path, name, change)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("[]", "no JSON object"),
        ('{"a": 3}', "no proper shape and offsets"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}', "no proper shape and offsets"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "no proper shape and offsets"),
        ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "no proper shape and offsets"),
        ('{"a": {"dtype": "F32", "shape": [9999999], "data_offsets": [0, 4]}}', "smaller than its shape"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4444]}}', "is truncated"),
        ("[" * DEPTH, "nested too deep"),
    ],
)
def test_a_weight_file_with_something_else_in_its_header(tmp_path, header, expected):
    folder = hollow_folder(tmp_path / "m")
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(16)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=expected):
        find_weights(Flux2Model(path=folder))


def test_a_missing_tensor_is_named_with_its_file(tmp_path):
    """Of a component in one file: there is no index that would promise it."""
    from safetensors.torch import load_file, save_file

    from fluxrun.weights.loading import load, save_tiny

    folder = save_tiny(tmp_path / "m")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, file)
    with pytest.raises(ConfigError) as caught:
        load(Flux2Model(path=folder, text_encoder_out_layers=(1, 2, 3)), dtype="float32", device="cpu")
    assert "diffusion_pytorch_model.safetensors" in str(caught.value)
    assert "decoder.conv_in.weight" in str(caught.value)


def test_a_checkpoint_that_brings_code_is_not_asked_about(tmp_path, here, capsys):
    """A tokenizer's auto_map once made the library ask on the terminal whether to run it."""
    from fluxrun.weights.loading import load

    shutil.copytree(tiny_folder("klein"), tmp_path / "m")
    file = tmp_path / "m" / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {
        "auto_map": {"AutoTokenizer": ["tok.Evil", None]},
        "tokenizer_class": "Evil",
    }
    file.write_text(json.dumps(config))
    (tmp_path / "m" / "tokenizer" / "tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "AutoTokenizer"]
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index))
    model = Flux2Model(path=tmp_path / "m", text_encoder_out_layers=(1, 2, 3))
    with pytest.raises(ConfigError, match="tokenizer cannot be loaded"):
        load(model, dtype="float32", device="cpu", part="text")
    assert "[y/N]" not in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template",
    ["{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**10 }}",
     "{% for i in range(99999) %}{% generation %}{{ messages }}{% endgeneration %}{% endfor %}"],
)  # fmt: skip
def test_a_chat_template_that_never_ends(tmp_path, template):
    with pytest.raises(ConfigError, match="its chat template takes more than"):
        check_templates([template], tmp_path)


@pytest.mark.parametrize("template", ["", "{{ messages[0].content }}", "{{ raise_exception('no') }}", "{% if"])
def test_a_chat_template_that_ends(tmp_path, template):
    check_templates([template], tmp_path)


def test_a_run_on_a_broken_checkpoint(tmp_path):
    """The whole way in a child process: one line, a true record."""
    shutil.copytree(tiny_folder("klein"), tmp_path / "m")
    (tmp_path / "m" / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0", "truncation": 3}')
    done = fluxrun("model=local", f"model.path={tmp_path / 'm'}", "model.text_encoder_out_layers=[1,2,3]",
                   *SMALL[1:], "hydra.run.dir=run", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in said(done.stderr) if line.startswith("error: ")]
    assert "tokenizer cannot be loaded" in line
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_pickle_is_not_read(tmp_path):
    shutil.copytree(tiny_folder("klein"), tmp_path / "m")
    for file in (tmp_path / "m" / "vae").glob("*.safetensors*"):
        file.unlink()
    (tmp_path / "m" / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(ConfigError, match=r"vae/ has no \.safetensors weights"):
        find_weights(Flux2Model(path=tmp_path / "m"))
