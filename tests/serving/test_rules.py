"""What a request may ask for: every way to a file, a program, Hydra or another model is closed."""

from __future__ import annotations

import asyncio
import io

import pytest
from PIL import Image

from fluxrun.errors import ConfigError, TrustError
from fluxrun.serving.limits import Limits, parse_limits
from fluxrun.serving.rules import Rules
from fluxrun.serving.uploads import TooLarge, Uploads

LIMITS = Limits(images=6, steps=50, pixels=512 * 512, overrides=12, override_length=300, prompt_length=500, upload=9000)


@pytest.fixture
def uploads(tmp_path):
    return Uploads(tmp_path / "uploads", LIMITS)


@pytest.fixture
def rules(uploads):
    return Rules(["shapes", "tiny"], LIMITS, uploads)


def take(uploads, data, ending="png"):
    async def chunks():
        yield data[: len(data) // 2]
        yield data[len(data) // 2 :]

    return asyncio.run(uploads.take(ending, chunks()))


def picture(colour=(200, 10, 10)):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "PNG")
    return file.getvalue()


def test_what_may_be_asked(rules):
    accepted = rules.check(
        ["prompt=a, ${b} 'c'", "seed=7", "attention=math", "vae=tiled", "vae.tile_size=128", "+preset=cpu"]
    )
    assert accepted.data["prompt"] == "a, ${b} 'c'"
    assert accepted.data["seed"] == 7
    assert accepted.data["attention"]["name"] == "math"
    assert accepted.data["model"]["dtype"] == "bfloat16"
    # Prompt and seed are set beside Hydra: the same as through it.
    assert rules.check(["seed=8", "prompt=x"]).data == rules.check(["seed=8", "seed=8", "prompt=x"]).data


@pytest.mark.parametrize(
    "override",
    [
        "hydra.run.dir=/tmp/x", "+hydra.callbacks.x._target_=os.system", "hydra/launcher=joblib", "sweep.resume=/tmp",
        "resume=/tmp", "+sweep=kernels", "--config-dir=/tmp", "~attention", "attention@hydra.x=math",
        "attention._target_=os.system",
        "device=${oc.env:HOME}", "device=\\${oc.env:HOME}", "output_format=${hydra:run.dir}", "steps=${${seed}}",
        "+preset=../../etc/x", "attention=[math,sdpa]", "attention={_target_: os.system}", "model=flux2_dev",
        "model.path=/etc", "model.id=someone/else", "model.bundled=../models/shapes", "attention.hub=true",
        "+compile.inductor_options.a=b", "compile.cache_dir=/tmp", "compile.cache_artifacts=/tmp/x",
        "quantization.file=/etc/passwd", "image=/etc/passwd", "mask_image=upload:../../x", "prompts_file=/etc/passwd",
        "reference_images=[/etc/passwd]", "lora.files=[{path: /etc/passwd}]", "lora.files=[x/y]",
        "lora.files=[{bundled: outline, weight_name: ../x}]", "lora.files=[[x]]","steps=51", "workers=2",
        "ray.address=auto", "+ray.address=auto",
        "num_images=7", "width=8192", "batch_size=2000", "measure.repeats=99", "seed=1,2", "nonsense=1", "nothing", "=",
        "prompt=" + "x" * 600, "device=" + "x" * 400, "image=upload:" + "0" * 64 + ".png", "num_images=99999999999999",
        "steps=" + "[" * 200, "width=${width}", "negative_prompt=\ud800", "guidance=${steps}${seed}${",
    ],
)  # fmt: skip
def test_what_may_not(rules, override, monkeypatch):
    monkeypatch.setenv("FLUXRUN_TRUST_CONFIG", "1")  # no request is trusted, however the server was started
    with pytest.raises(ConfigError) as caught:
        rules.check([override])
    assert "\n" not in str(caught.value)


def test_many_overrides(rules):
    with pytest.raises(ConfigError, match="13 overrides"):
        rules.check(["seed=1"] * 13)


def test_random_weights_of_a_real_size_are_another_model(rules):
    with pytest.raises(TrustError, match="this server draws with"):
        rules.check(["model=tiny", "model.architecture=klein_9b"])


def test_models_from_the_list(uploads, tmp_path):
    (tmp_path / "mine").mkdir()
    rules = Rules([str(tmp_path / "mine"), "someone/else", "shapes"], LIMITS, uploads)
    size = ["height=64", "width=64"]
    rules.check(["model=local", f"model.path={tmp_path}/mine", *size])
    rules.check(["model=local", "model.id=someone/else", *size])
    with pytest.raises(TrustError):
        rules.check(["model=local", "model.id=someone/else", "model.revision=evil"])
    with pytest.raises(ConfigError, match="no model option"):
        Rules(["nowhere"], LIMITS, uploads)


def test_uploads_take_the_place_of_paths(rules, uploads):
    name = take(uploads, picture())
    assert name == take(uploads, picture())
    data = rules.check([f"reference_images=[{name},{name}]", f"image={name}", f"mask_image={name}"]).data
    assert data["image"] == str(uploads.path(name))
    assert len(data["reference_images"]) == 2
    data = rules.check(["lora=adapters", "lora.files=[{bundled: outline, scale: 0.5}]"]).data
    assert data["lora"]["files"] == [{"bundled": "outline", "scale": 0.5}]


@pytest.mark.parametrize(
    ("data", "ending"), [(b"no picture", "png"), (b"x", "exe"), (b"", "safetensors"), (b"\xff", "txt")]
)
def test_uploads_are_what_they_say(uploads, data, ending):
    with pytest.raises(ConfigError):
        take(uploads, data, ending)
    assert not list(uploads.folder.iterdir())


def test_uploads_are_limited(uploads):
    with pytest.raises(TooLarge):
        take(uploads, b"a" * 9001, "txt")
    small = Uploads(uploads.folder, Limits(uploads=250))
    names = [take(small, picture((n, 0, 0))) for n in range(4)]
    assert small.path(names[-1]).exists()
    with pytest.raises(ConfigError, match="was removed since"):
        small.path(names[0])


def test_limits():
    assert parse_limits(["queue=2", "body=10"]) == Limits(queue=2, body=10)
    for wrong in ("que=2", "queue=0", "queue=x", "queue"):
        with pytest.raises(ConfigError):
            parse_limits([wrong])
