"""The kernels group's knobs: what is not used is said."""

from __future__ import annotations

import pytest
from helpers import H100, effective, plan_on


@pytest.mark.parametrize("knob", ["kernels.matmuls=fastest", "kernels.text_encoder=fused"])
def test_knobs_of_the_fused_kernels_are_unused_with_diffusers_own(knob):
    plan = plan_on(H100, knob)
    assert effective(plan)["kernels"] == "diffusers"
    assert any(knob.partition("=")[0] in note for note in plan.notes)
    assert not any("kernels." in note for note in plan_on(H100, "kernels=fused", knob).notes)


def test_a_preset_keeps_its_knobs_where_the_kernels_are_swapped():
    plan = plan_on(H100, "+preset=h100_lossless", "kernels.matmuls=fastest", "kernels=diffusers")
    assert effective(plan)["kernels"] == "diffusers"
