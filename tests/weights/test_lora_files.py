"""LoRA files: found in a file, a folder, among the bundled ones and on the hub, and read with what their alpha says."""

from __future__ import annotations

import hashlib
import json
import os
from types import SimpleNamespace

import pytest
import torch
from hub import empty_cache, serve, use
from loras import QKV, TINY, write_lora
from safetensors.torch import load_file, save_file

from fluxrun.errors import ConfigError
from fluxrun.options.adapters import Room
from fluxrun.options.lora import Adapters
from fluxrun.weights.lora_files import find_adapters, load_adapters


def option(*files, scale=1.0):
    return Adapters(files=files, scale=scale)


def transformer():
    """A stand-in with the tiny model's linear layers."""
    layers = [(name, torch.nn.Linear(*sizes, device="meta")) for name, sizes in TINY.items()]
    return SimpleNamespace(named_modules=lambda: layers)


def loaded(*files, upcoming=()):
    said = []
    sources = find_adapters(option(*files))
    return load_adapters(sources, [find_adapters(option(*one)) for one in upcoming], transformer(), said.append)


def deltas(lora, scale=1.0):
    """What is added to each layer's weight."""
    tensors = lora.state_dict(scale, torch.float32, torch.device("cpu"))
    return {
        name.removesuffix(".lora_A.weight").removeprefix("transformer."): tensors[name.replace("_A", "_B")] @ down
        for name, down in tensors.items()
        if "lora_A" in name
    }


def test_a_file_a_folder_and_a_name_in_it(tmp_path):
    file = write_lora(tmp_path / "a.safetensors")
    [source] = find_adapters(option(str(file)))
    assert source.file == file
    assert find_adapters(option({"path": tmp_path}))[0].file == file
    other = write_lora(tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match=r"several files, give weight_name: a.safetensors, b.safetensors"):
        find_adapters(option({"path": tmp_path}))
    assert find_adapters(option({"path": tmp_path, "weight_name": "b.safetensors"}))[0].file == other
    usual = write_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert find_adapters(option({"path": tmp_path}))[0].file == usual


def test_what_is_not_there_is_refused(tmp_path):
    refused = {
        "no such file or folder": {"path": tmp_path / "absent.safetensors"},
        "no such file": {"path": tmp_path, "weight_name": "absent.safetensors"},
        "has no .safetensors file": {"path": tmp_path},
        "no LoRA 'absent' comes with fluxrun": {"bundled": "absent"},
    }
    for text, spec in refused.items():
        with pytest.raises(ConfigError, match=text):
            find_adapters(option(spec))


def test_only_safetensors_files_are_read(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "lora.bin")
    with pytest.raises(ConfigError, match="a pickled one could run code"):
        find_adapters(option(str(tmp_path / "lora.bin")))
    with pytest.raises(ConfigError, match=r"only lora.bin and the like"):
        find_adapters(option(str(tmp_path)))
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ConfigError, match="a pipe or a device"):
        find_adapters(option(str(tmp_path / "pipe.safetensors")))


@pytest.mark.parametrize(
    "spec", [{}, {"path": "a", "bundled": "b"}, {"path": "a", "weight": "b"}, {"path": "a", "scale": "inf"}]
)
def test_an_entry_that_names_no_file_or_two_or_unknown_keys(spec):
    with pytest.raises(ValueError, match=r"given by its path|unknown key 'weight': did you mean|finite"):
        option(spec)


def test_reading_keeps_hash_rank_and_alpha(tmp_path):
    file = write_lora(tmp_path / "a.safetensors", ["proj_out", *QKV], rank=4, alpha=2.0)
    lora = loaded({"path": file, "scale": 0.5})
    [adapter] = lora.adapters
    assert adapter.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert adapter.ranks == dict.fromkeys(["proj_out", *QKV], 4)
    tensors = load_file(file)
    plain = tensors["transformer.proj_out.lora_B.weight"] @ tensors["transformer.proj_out.lora_A.weight"]
    torch.testing.assert_close(deltas(lora, 0.5)["proj_out"], plain * (2 / 4) * 0.5 * 0.5)


def test_several_files_add_up_and_leave_room_for_later_ones(tmp_path):
    a = write_lora(tmp_path / "a.safetensors", ["proj_out"], rank=2)
    b = write_lora(tmp_path / "b.safetensors", ["proj_out", "x_embedder"], rank=3, seed=1)
    c = write_lora(tmp_path / "c.safetensors", QKV, rank=8)
    bad = write_lora(tmp_path / "bad.safetensors", ["nowhere"], rank=9)
    both = loaded(str(a), {"path": b, "scale": -2}, upcoming=[[str(c)], [str(bad)]])
    assert both.room.rank == 8
    assert set(both.room.layers) == {"proj_out", "x_embedder", *QKV}
    added, one, other = deltas(both), deltas(loaded(str(a))), deltas(loaded(str(b)))
    torch.testing.assert_close(added["proj_out"], one["proj_out"] - 2 * other["proj_out"])
    torch.testing.assert_close(added["x_embedder"], -2 * other["x_embedder"])
    assert not added[QKV[0]].any()
    assert both.room.holds(loaded(str(c)).room)
    assert not both.room.holds(Room({"norm_out.linear": TINY["norm_out.linear"]}, 1))
    assert not both.room.holds(Room({"proj_out": TINY["proj_out"]}, 9))


def test_query_key_and_value_of_one_matrix_are_parted(tmp_path):
    tensors = {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.randn(2, 64),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": torch.randn(192, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = deltas(loaded(str(tmp_path / "a.safetensors")))
    down, up = tensors.values()
    torch.testing.assert_close(torch.cat([found[layer] for layer in QKV]), up @ down)


def test_the_last_modulations_halves_change_places(tmp_path):
    """diffusers' own conversion of LoRA files leaves them as they are, that of whole checkpoints swaps them."""
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 64), f"{name}.lora_B.weight": torch.randn(128, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    down, up = tensors.values()
    torch.testing.assert_close(
        deltas(loaded(str(tmp_path / "a.safetensors")))["norm_out.linear"], torch.cat([up[64:], up[:64]]) @ down
    )


def test_alpha_in_the_metadata_and_in_pefts_config_beside_the_file(tmp_path):
    write_lora(tmp_path / "plain.safetensors", ["proj_out"])
    noted = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    write_lora(tmp_path / "noted.safetensors", ["proj_out"], metadata=noted)
    folder = tmp_path / "peft"
    folder.mkdir()
    write_lora(folder / "adapter_model.safetensors", ["proj_out"], prefix="base_model.model.")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_dora": True}))
    plain = deltas(loaded(str(tmp_path / "plain.safetensors")))["proj_out"]
    beside = loaded(str(folder))
    for found in (loaded(str(tmp_path / "noted.safetensors")), beside):
        torch.testing.assert_close(deltas(found)["proj_out"], 2 * plain)
    assert "DoRA" in beside.adapters[0].dropped[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(tmp_path, value):
    file = write_lora(tmp_path / "a.safetensors", ["proj_out"])
    tensors = load_file(file)
    tensors["transformer.proj_out.lora_B.weight"][0, 0] = value
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"lora_B.weight holds what is no number"):
        loaded(str(file))


def test_a_broken_file_is_refused_before_anything_is_loaded(tmp_path):
    file = write_lora(tmp_path / "a.safetensors", ["proj_out"])
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"a.safetensors is truncated"):
        find_adapters(option(str(file)))


def test_from_the_hub_once(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    folder.mkdir()
    write_lora(folder / "style.safetensors", ["proj_out"])
    (folder / "README.md").write_text("a style")
    empty_cache(tmp_path, monkeypatch)
    with serve(folder) as hub:
        use(hub, monkeypatch)
        [source] = find_adapters(option(hub.repo))
        assert source.located is not None
        assert source.located.files == ("style.safetensors",)
        assert source.file is None
        with pytest.raises(ConfigError, match=r"has no other\.safetensors"):
            find_adapters(option({"path": hub.repo, "weight_name": "other.safetensors"}))
        lora = loaded(hub.repo)
        assert lora.adapters[0].name == hub.repo
        asked = len(hub.requests)
        [again] = find_adapters(option({"path": hub.repo, "weight_name": "style.safetensors"}))
        assert again.file is not None
        assert len(hub.requests) == asked
