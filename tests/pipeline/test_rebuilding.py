"""What a pool says of why it builds another pipeline."""

from __future__ import annotations

import json

from fluxrun.pipeline.session_pool import rebuilt_because


def key(attention="sdpa", size=(64, 64), **knobs):
    options = {
        "attention": [attention, json.dumps({"hub": False})],
        "vae": ["tiled", json.dumps({"tile_size": 512, **knobs})],
    }
    return json.dumps({"options": options, "size": size, "steps": None})


def test_what_differs():
    assert rebuilt_because(key(), key("math")) == "attention sdpa → math"
    assert rebuilt_because(key(), key(size=(128, 64), tile_size=256)) == (
        "vae.tile_size 512 → 256, size 64x64 → 128x64"
    )
    assert rebuilt_because(key(), key()) == "prompts that its text encoder is needed for"
