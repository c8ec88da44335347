"""Option files of a user's own: read as Hydra reads them everywhere, and a broken one is one line."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from helpers import CPU, draw, option_names, said, small
from rich.console import Console

from fluxrun.cli import doctor, plan
from fluxrun.cli.app import main
from fluxrun.cli.doctor import show_doctor
from fluxrun.config.catalog import Catalog
from fluxrun.config.composition import compose, config_dirs
from fluxrun.errors import ConfigError, TrustError
from fluxrun.planning.fallbacks import fall_back
from fluxrun.planning.prepare import prepare


def write(folder: Path, group: str, name: str, text: str | bytes) -> Path:
    (folder / group).mkdir(exist_ok=True)
    path = folder / group / f"{name}.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def catalog(config_dir: Path) -> Catalog:
    return Catalog(config_dirs(config_dir))


# --- an option that starts from another one ---------------------------------------------------------------------------


@pytest.fixture
def own(config_dir):
    """``attention=mine`` is xformers with another fallback; ``vae=fine`` is what tiled is, with smaller tiles."""
    write(config_dir, "attention", "mine", "defaults: [xformers, _self_]\nfallback: math\n")
    write(config_dir, "vae", "fine", "defaults: [tiled, _self_]\ntile_size: 64\nfallback: sliced\n")
    return config_dir


def test_it_is_what_hydra_composes(own):
    asked = compose(["attention=mine"], config_dir=own)
    assert asked.attention.name == "mine"
    assert asked.source["attention"] == catalog(own).data("attention", "mine")
    assert catalog(own).load("attention", "mine") == asked.attention
    assert asked.attention.package == "xformers"


def test_it_is_planned_and_its_own_fallback_is_taken(own):
    choice = prepare(compose(["attention=mine"], config_dir=own), CPU).plan.choices["attention"]
    assert (choice.requested, choice.effective) == ("mine", "math")


def test_it_runs(own, tmp_path):
    record = draw(tmp_path / "run", "vae=fine", "vae.tile_overlap=0.5", "width=128", config_dir=own)
    assert record.options["vae"].effective == "fine"
    assert record.config["vae"]["tile_size"] == 64
    assert record.status == "completed"


def test_as_a_fallback_it_takes_over_the_knobs_that_were_changed(own):
    write(own, "vae", "first", "defaults: [fine, _self_]\nfallback: fine\n")
    plan = prepare(small("vae=first", "vae.tile_overlap=0.5", "width=128", config_dir=own), CPU).plan
    fall_back(plan, "vae", "apply", "for the test")
    used = plan.choices["vae"].option
    assert (used.name, used.tile_size, used.tile_overlap) == ("fine", 64, 0.5)


def test_it_need_not_say_where_its_own_keys_stand(config_dir):
    write(config_dir, "attention", "it's mine", "defaults: [sdpa]\nfallback: math\n")
    assert catalog(config_dir).load("attention", "it's mine").fallback == "math"


def test_a_file_that_changed_is_read_again_with_what_it_starts_from(own):
    assert catalog(own).load("attention", "mine").fallback == "math"
    path = write(own, "attention", "mine", "defaults: [base, _self_]\n")
    base = write(own, "attention", "base", "defaults: [sdpa, _self_]\nfallback: flex\n")
    assert catalog(own).load("attention", "mine").fallback == "flex"
    base.write_text("defaults: [sdpa, _self_]\nfallback: xformers\n")
    assert catalog(own).load("attention", "mine").fallback == "xformers"
    write(own, "attention", "sdpa", "defaults: [math, _self_]\nfallback: flex\n")
    path.write_text("defaults: [sdpa, _self_]\n")
    assert catalog(own).load("attention", "mine").fallback == "flex", "a file that lies before fluxrun's own"
    assert Catalog().load("attention", "sdpa").fallback == "error", "other folders"


def test_what_was_handed_out_can_be_changed_without_changing_the_option(own):
    catalog(own).data("vae", "fine")["tile_size"] = 16
    assert catalog(own).data("vae", "fine")["tile_size"] == 64


def test_the_trust_rule_applies_to_every_file_that_is_brought_in(own, monkeypatch):
    write(own, "attention", "base", "defaults: [sdpa, _self_]\nhub: true\n")
    write(own, "attention", "mine", "defaults: [base, _self_]\n")
    with pytest.raises(TrustError, match=r"base\.yaml sets 'attention\.hub'"):
        catalog(own).load("attention", "mine")
    monkeypatch.setenv("FLUXRUN_TRUST_CONFIG", "1")
    assert catalog(own).load("attention", "mine").hub
    monkeypatch.delenv("FLUXRUN_TRUST_CONFIG")
    with pytest.raises(TrustError, match="--trust-config"):
        catalog(own).load("attention", "mine")


# --- broken files -----------------------------------------------------------------------------------------------------

BROKEN = {
    "not YAML": ("_target_: [\n", "not valid YAML"),
    "not text": (b"\xff\xfe\n", "UTF-8"),
    "a list": ("- a\n- b\n", "mapping with a _target_"),
    "no target": ("backend: native\n", "mapping with a _target_"),
    "unknown knob": ("defaults: [sdpa, _self_]\nbakend: x\n", "did you mean 'backend'"),
    "wrong type": ("defaults: [sdpa, _self_]\nneeds_cuda: 7x\n", "valid boolean"),
    "raises on import": ("_target_: broken_option.Raises\n", "cannot be imported: no luck"),
    "ends on import": ("_target_: ending_option.Ends\n", "cannot be imported: 3"),
    "another group's": ("_target_: fluxrun.options.vae.Vae\n", "no option of this group"),
    "a circle": ("defaults: [broken, _self_]\n", "leads back to itself"),
    "starts from nothing": ("defaults: [absent, _self_]\n", "attention/absent"),
    "no defaults list": ("defaults: sdpa\n", "must be a list"),
    "half an interpolation": ("defaults: [sdpa, _self_]\nbackend: ${absent}\n", "absent"),
}


def bad_modules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "broken_option.py").write_text("raise RuntimeError('no luck\\nmore of it')\n")
    (folder / "ending_option.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture(params=BROKEN)
def broken(request, config_dir, tmp_path, trusted, monkeypatch):
    """A folder with an option ``attention=broken``, and what is said about it."""
    bad_modules(tmp_path, monkeypatch)
    text, says = BROKEN[request.param]
    write(config_dir, "attention", "broken", text)
    return config_dir, says


def test_a_broken_file_is_one_line_that_names_it(broken):
    folder, says = broken
    with pytest.raises(ConfigError) as caught:
        catalog(folder).load("attention", "broken")
    assert says in str(caught.value)
    assert str(folder / "attention" / "broken.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_with_it_is_refused_in_one_line(broken, capsys):
    folder, says = broken
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config-dir", str(folder), "attention=broken"])
    assert ended.value.code == 2
    (line,) = said(capsys.readouterr().err)
    assert says in line or "absent" in line


def test_doctor_shows_the_rest(config_dir, tmp_path, trusted, monkeypatch):
    """All the broken files at once: one line each."""
    bad_modules(tmp_path, monkeypatch)
    names = {kind: "broken" if kind == "a circle" else f"broken{n}" for n, kind in enumerate(BROKEN)}
    for kind, name in names.items():
        write(config_dir, "attention", name, BROKEN[kind][0])
    text = io.StringIO()
    for module in (doctor, plan):
        monkeypatch.setattr(module, "out", Console(file=text, width=400))
    show_doctor(compose([], config_dir=config_dir))
    shown = text.getvalue()
    for kind, name in names.items():
        (row,) = re.findall(rf"^attention +{name} +no +(.*)$", shown, re.MULTILINE)
        assert BROKEN[kind][1] in row
    for name in option_names("attention"):
        assert re.search(rf"^attention +{name} ", shown, re.MULTILINE)
    assert re.search(r"^cpu +runs as it is", shown, re.MULTILINE)


def test_it_is_listed_and_spoils_no_other_message(broken, tmp_path):
    folder, _ = broken
    assert "broken" in catalog(folder).names("attention")
    assert set(catalog(folder).loadable("attention")) == set(option_names("attention"))
    assert set(catalog(folder).broken("attention")) == {"broken"}
    with pytest.raises(ConfigError, match=r"unknown key .attention\.bakend"):
        compose(["attention.bakend=1"], config_dir=folder)
    with pytest.raises(ConfigError, match="allowed: auto, broken, cudnn"):
        compose(["attention=nothing"], config_dir=folder)


def test_a_preset_that_leads_back_to_itself(config_dir):
    write(config_dir, "preset", "round", "# @package _global_\ndefaults: [round, _self_]\n")
    with pytest.raises(ConfigError, match=r"round\.yaml: its defaults list leads back to itself"):
        compose(["+preset=round"], config_dir=config_dir)
