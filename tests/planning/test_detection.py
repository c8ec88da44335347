"""What is installed is looked up once, until something is installed or taken away."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from fluxrun.hardware.detection import detect, installed


def test_a_second_look_reads_no_metadata(monkeypatch):
    before = installed()
    assert before["torch"] == metadata.version("torch")
    monkeypatch.setattr(metadata, "version", lambda name: pytest.fail(f"{name} was looked up again"))
    assert installed() == before
    assert detect().packages == before


def test_what_is_installed_meanwhile_is_seen_and_what_is_taken_away_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = installed()
    assert "sageattention" not in before
    found = tmp_path / "sageattention-9.9.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: sageattention\nVersion: 9.9\n", encoding="utf-8")
    assert installed()["sageattention"] == "9.9"
    (found / "METADATA").unlink()
    found.rmdir()
    assert installed() == before


def test_what_a_caller_does_to_the_answer_stays_with_it():
    installed().clear()
    assert "torch" in installed()
