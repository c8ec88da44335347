"""Adding an option costs one YAML file and one class: no list, no enum, no command line to edit."""

from __future__ import annotations

import re
import sys

import pytest
from helpers import draw, fluxrun

from fluxrun.config.catalog import Catalog
from fluxrun.config.composition import compose, config_dirs
from fluxrun.errors import ConfigError
from fluxrun.record.folder import read_record
from fluxrun.record.picture import read_metadata

CLASS = '''
from pydantic import Field
from fluxrun.options.vae import VaeOption


class Brighter(VaeOption):
    """Scales the latents before they are decoded."""

    by: float = Field(1.5, gt=0)
    """Factor."""

    def requires(self, machine):
        return "needs two cores" if machine.cpu_count < 1 else None

    def apply(self, pipeline, context):
        decode = pipeline.vae.decode

        def brighter(latents, *args, **kwargs):
            context.counters["brightened"] += 1
            return decode(latents * self.by, *args, **kwargs)

        pipeline.vae.decode = brighter
        return {"by": self.by}

    def observe(self, pipeline, context):
        return {"brightened": context.counters["brightened"]}
'''


@pytest.fixture
def own(tmp_path, config_dir, trusted, monkeypatch):
    (tmp_path / "brighter_option.py").write_text(CLASS)
    monkeypatch.syspath_prepend(str(tmp_path))
    (config_dir / "vae").mkdir()
    (config_dir / "vae" / "brighter.yaml").write_text(
        "# When pictures are too dark.\n_target_: brighter_option.Brighter\nby: 1.5\nfallback: full\n"
    )
    yield config_dir
    sys.modules.pop("brighter_option", None)


def test_it_runs_and_is_recorded(own, tmp_path):
    record = draw(tmp_path / "run", "vae=brighter", "vae.by=2", "num_images=2", config_dir=own)
    entry = record.options["vae"]
    assert (entry.requested, entry.effective, entry.fallbacks) == ("brighter", "brighter", [])
    assert entry.facts == {"by": 2.0, "brightened": 2}
    assert read_record(tmp_path / "run").config["vae"]["by"] == 2
    assert read_metadata(tmp_path / "run" / record.images[0].path)["config"]["vae"]["name"] == "brighter"


def test_it_is_validated_and_suggested(own):
    with pytest.raises(ConfigError, match=r"vae\.by=0"):
        compose(["vae=brighter", "vae.by=0"], config_dir=own)
    with pytest.raises(ConfigError, match="did you mean 'brighter'"):
        compose(["vae=brigter"], config_dir=own)
    with pytest.raises(ConfigError, match="allowed: by, channels_last, fallback"):
        compose(["vae=brighter", "+vae.how=0"], config_dir=own)


@pytest.mark.slow
def test_it_is_listed_and_planned(own, tmp_path):
    assert "brighter" in Catalog(config_dirs(own)).names("vae")
    environment = {"PYTHONPATH": str(tmp_path)}
    planned = fluxrun("plan", "--config-dir", str(own), "vae=brighter", cwd=tmp_path, env=environment)
    assert re.search(r"vae +brighter +brighter", planned.stdout), planned.stderr
    listed = fluxrun("--config-dir", str(own), "--help", cwd=tmp_path, env=environment)
    assert re.search(r"^vae: auto, brighter, fast, full", listed.stdout, re.MULTILINE)


def test_without_trust_it_is_refused(own, monkeypatch):
    monkeypatch.delenv("FLUXRUN_TRUST_CONFIG")
    with pytest.raises(ConfigError, match="brighter_option"):
        compose(["vae=brighter"], config_dir=own)
