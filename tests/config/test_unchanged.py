"""fluxrun's own config files are read and merged once in a process; what changes, and what is a stranger's, is not."""

from __future__ import annotations

import os
import shutil

import pytest
from helpers import CONF
from omegaconf import OmegaConf

from fluxrun import paths
from fluxrun.config.composition import compose, compose_node, config_dirs, hydra_for, to_data
from fluxrun.errors import ConfigError, TrustError

COMBINATIONS = ([], ["+preset=cpu"], ["model=tiny", "attention=flex"], ["+preset=h100_fast", "vae=tiled"], ["steps=7"])


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A copy of the conf folder, as this process's own."""
    folder = tmp_path / "conf"
    shutil.copytree(CONF, folder)
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "src" / "fluxrun")
    assert config_dirs() == (folder,)
    return folder


def nodes(overrides):
    dirs = config_dirs()
    with hydra_for(dirs) as hydra:
        return compose_node(hydra, overrides, dirs)


def test_a_second_composition_is_the_first_one_and_reads_nothing(own, monkeypatch):
    first = [OmegaConf.to_yaml(nodes(overrides)) for overrides in COMBINATIONS]
    monkeypatch.setattr(OmegaConf, "load", lambda file: pytest.fail(f"{file} was read again"))
    for _ in range(3):  # what was merged twice is kept
        assert [OmegaConf.to_yaml(nodes(overrides)) for overrides in reversed(COMBINATIONS)] == first[::-1]


def test_what_is_done_to_a_config_is_not_in_the_next_one(own):
    for overrides in COMBINATIONS:
        before = OmegaConf.to_yaml(nodes(overrides))
        for _ in range(4):
            spoiled = nodes(overrides)
            OmegaConf.set_struct(spoiled, False)
            spoiled.steps, spoiled.vae.name, spoiled.hydra.run.dir = 99, "spoiled", "nowhere"
            spoiled.pop("attention")
        assert OmegaConf.to_yaml(nodes(overrides)) == before


def test_files_that_two_configs_share_are_not_changed_by_one(request):
    def data(overrides):
        return to_data(nodes(overrides))

    expected = [data(overrides) for overrides in COMBINATIONS]
    request.getfixturevalue("own")  # from here on nothing has been read
    for overrides, right in [*zip(COMBINATIONS, expected, strict=True)] * 3:
        config = nodes(overrides)
        assert to_data(config) == right
        spoil(config)


def spoil(node):
    """Another value in every place but Hydra's own, which are typed."""
    OmegaConf.set_struct(node, False)
    for key in [key for key in node if key != "hydra"]:
        plain = OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key)
        if not plain and OmegaConf.is_dict(node[key]):
            spoil(node[key])
        else:
            node[key] = "spoiled"


def test_an_edited_file_is_read_again(own):
    file = own / "config.yaml"
    assert compose(["model=tiny"]).seed == 0
    file.write_text(file.read_text(encoding="utf-8").replace("seed: 0", "seed: 41"), encoding="utf-8")
    assert compose(["model=tiny"]).seed == 41
    option = own / "vae" / "tiled.yaml"
    for _ in range(3):
        assert compose(["model=tiny", "vae=tiled"]).vae.tile_size == 512
    before = option.stat()
    option.write_text(option.read_text(encoding="utf-8").replace("tile_size: 512", "tile_size: 256"), encoding="utf-8")
    os.utime(option, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert option.stat().st_size == before.st_size
    assert compose(["model=tiny", "vae=tiled"]).vae.tile_size == 256
    option.unlink()
    with pytest.raises(ConfigError, match="tiled"):
        compose(["model=tiny", "vae=tiled"])


def test_a_users_file_is_read_and_looked_at_each_time(own, tmp_path):
    folder = tmp_path / "mine"
    (folder / "preset").mkdir(parents=True)
    file = folder / "preset" / "mine.yaml"
    for seed in (1, 2):
        file.write_text(f"# @package _global_\nseed: {seed}\n", encoding="utf-8")
        os.utime(file, ns=(1, 1))
        assert compose(["model=tiny", "+preset=mine"], config_dir=folder).seed == seed
    file.write_text("# @package _global_\nprompt: ${oc.env:HOME}\n", encoding="utf-8")
    with pytest.raises(TrustError, match=r"oc\.env"):
        compose(["model=tiny", "+preset=mine"], config_dir=folder)


def test_what_was_let_through_while_all_was_trusted_is_refused_later(own, tmp_path, monkeypatch):
    strangers = tmp_path / "strangers.yaml"
    strangers.write_text("# @package _global_\nprompt: ${oc.env:HOME}\n", encoding="utf-8")
    (own / "preset" / "linked.yaml").symlink_to(strangers)
    monkeypatch.setenv("FLUXRUN_TRUST_CONFIG", "1")
    for _ in range(3):
        assert compose(["model=tiny", "+preset=linked"]).prompt == os.environ["HOME"]
    monkeypatch.delenv("FLUXRUN_TRUST_CONFIG")
    with pytest.raises(TrustError, match=r"oc\.env"):
        compose(["model=tiny", "+preset=linked"])


def test_a_group_that_a_user_shadows_is_the_users(own, tmp_path):
    compose(["model=tiny", "vae=tiled"])
    folder = tmp_path / "mine"
    (folder / "vae").mkdir(parents=True)
    shutil.copy(own / "vae" / "full.yaml", folder / "vae" / "tiled.yaml")
    theirs = to_data_of(["model=tiny", "vae=tiled"], folder)
    assert theirs["vae"] != to_data_of(["model=tiny", "vae=tiled"], None)["vae"]


def to_data_of(overrides, folder):
    dirs = config_dirs(folder)
    with hydra_for(dirs) as hydra:
        return to_data(compose_node(hydra, overrides, dirs))
