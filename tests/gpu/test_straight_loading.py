"""Weights that go to the GPU as they are read are those that are moved there afterwards."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_straight_to_the_gpu_is_the_same(dtype, tmp_path):
    from fluxrun.options.model import Flux2Model
    from fluxrun.weights.loading import load, save_tiny

    model = Flux2Model(path=save_tiny(tmp_path / "tiny", shard_bytes=300_000))
    bases = [load(model, dtype=dtype, device="cuda", straight=straight) for straight in (True, False)]
    assert bases[0].facts == bases[1].facts
    for name in ("transformer", "text_encoder", "vae"):
        one, other = (base.pipeline.components[name] for base in bases)
        assert {parameter.device.type for parameter in one.parameters()} == {"cuda"}
        for tensors in ("named_parameters", "named_buffers"):
            there, here = (dict(getattr(module, tensors)()) for module in (one, other))
            assert there.keys() == here.keys()
            assert all(torch.equal(there[key], here[key]) and there[key].dtype == here[key].dtype for key in there)
