"""Pictures of NaN, of infinity and of one colour: seen on the device, said, recorded, and never ranked."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from checkpoints import spoiled_folder, tiny_folder
from helpers import draw, fluxrun, hashes
from PIL import Image

from fluxrun.cli.app import dispatch
from fluxrun.drawing.inspection import Inspection, extremes
from fluxrun.errors import ConfigError, Interrupted, NotFinite
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.record.folder import read_record
from fluxrun.record.picture import read_metadata
from fluxrun.record.schema import RunRecord
from fluxrun.report.comparison import compare
from fluxrun.report.rows import by_speed, read_row, read_rows
from fluxrun.sweep.objective import WORTHLESS_S, objective

LOCAL = ("model=local", "model.dtype=float32", "model.text_encoder_out_layers=[1,2,3]")

OWN = '''
import torch
from fluxrun.options.attention import AttentionOption
from fluxrun.options.vae import Vae


class Spoils(AttentionOption):
    """Every picture, or those from the second call on, comes out as NaN, and says so nowhere."""

    from_call: int = 1

    def apply(self, pipeline, context):
        calls = []

        def hook(module, arguments, output):
            calls.append(1)
            return (output[0] * float("nan"), *output[1:]) if len(calls) >= 2 * self.from_call else None

        pipeline.transformer.register_forward_hook(hook)
        return {"hooked": True}


class SpoilsText(AttentionOption):
    def apply(self, pipeline, context):
        encode = pipeline.encode_prompt
        pipeline.encode_prompt = lambda *a, **k: tuple(x * float("inf") for x in encode(*a, **k))
        return {}


class SpoilsPixels(Vae):
    def apply(self, pipeline, context):
        pipeline.vae.decoder.register_forward_hook(lambda module, arguments, output: output * float("nan"))
        return {}


class Harmless(AttentionOption):
    pass
'''


@pytest.fixture
def own(tmp_path, config_dir, trusted, monkeypatch) -> Path:
    """A config dir with options of a user's own that spoil pictures."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "spoiling_options.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    for group, name, rest in (
        ("attention", "Spoils", "from_call: 1\nfallback: sdpa"),
        ("attention", "SpoilsText", "fallback: sdpa"),
        ("attention", "Harmless", "fallback: sdpa"),
        ("vae", "SpoilsPixels", "fallback: tiled"),
    ):
        (config_dir / group).mkdir(exist_ok=True)
        path = config_dir / group / f"{name.lower()}.yaml"
        path.write_text(f"_target_: spoiling_options.{name}\n{rest}\n")
    return config_dir


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> list[str]:
    return hashes(draw(tmp_path_factory.mktemp("plain") / "run", "vae=full", "num_images=2"))


def only_fallback(record: RunRecord, group: str) -> tuple[str, str, str, str]:
    (fallback,) = record.options[group].fallbacks
    return fallback.option, record.options[group].effective, fallback.stage, fallback.reason


# --- the weights are to blame ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "stage"), [("text_encoder", "text_encode"), ("transformer", "denoise"), ("vae", "decode")]
)
def test_spoiled_weights_fail_the_run_and_name_the_stage(tmp_path, caplog, component, stage):
    folder = spoiled_folder(tmp_path / "model", component)
    with caplog.at_level(logging.INFO), pytest.raises(NotFinite, match="the weights or the input"):
        draw(tmp_path / "run", *LOCAL, f"model.path={folder}", "attention=math", "num_images=2")
    record = read_record(tmp_path / "run")
    assert record.status == "failed"
    assert record.error is not None
    assert (record.error.type, record.error.stage) == ("NotFinite", stage)
    assert [image.finite for image in record.images] == [False, False], "saved, and marked"
    for image in record.images:
        assert read_metadata(tmp_path / "run" / image.path)["finite"] is False
    math = record.options["attention"]
    assert (math.effective, math.fallbacks) == ("math", []), "tried without it, to no avail: it stays"
    assert math.facts["processors"], "what is recorded is of the pipeline that drew the picture"
    assert f"image 1/2: the picture is not finite (NaN or infinite), first in {stage}" in caplog.messages


def test_staged_memory_and_batches_too(tmp_path, on_a_cpu):
    folder = spoiled_folder(tmp_path / "model", "text_encoder", only="embed")
    with pytest.raises(NotFinite):
        draw(tmp_path / "run", *LOCAL, f"model.path={folder}", "memory=staged", "num_images=2", "batch_size=2")
    record = read_record(tmp_path / "run")
    assert [image.finite for image in record.images] == [False, False]
    assert record.error is not None
    assert record.error.stage == "text_encode"


@pytest.mark.slow
def test_the_command_says_it_and_exits_with_1(tmp_path):
    folder = spoiled_folder(tmp_path / "model", "transformer")
    small = ("height=64", "width=64", "steps=2", "model.max_sequence_length=32")
    done = fluxrun(*LOCAL, *small, f"model.path={folder}", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 1
    assert "first in denoise" in done.stderr
    assert "error: 1 of 1 picture(s) not finite" in done.stderr
    assert "Traceback" not in done.stderr


# --- an option is to blame ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["spoils", "spoilstext"])
def test_an_option_without_which_the_picture_is_finite_falls_back(tmp_path, own, plain, option):
    record = draw(tmp_path / "run", f"attention={option}", "vae=full", "num_images=2", config_dir=own)
    reason = "the picture is not finite; with attention=sdpa it is"
    assert only_fallback(record, "attention") == (option, "sdpa", "first_call", reason)
    assert record.status == "completed"
    assert hashes(record) == plain
    assert all(image.finite for image in record.images)
    assert read_record(tmp_path / "run") == record
    assert len(record.timings.denoise_s) == 2, "drawings that only looked for the culprit are not among the times"


def test_the_neutral_option_takes_over_and_not_the_one_named_as_fallback(tmp_path, own, plain):
    """What was shown to be finite is what is used."""
    record = draw(tmp_path / "run", "vae=spoilspixels", "num_images=2", config_dir=own)
    assert only_fallback(record, "vae")[:2] == ("spoilspixels", "full")
    assert hashes(record) == plain


def test_the_one_to_blame_is_found_among_others(tmp_path, own, plain):
    """kernels and attention are suspected before vae; both are as they were when it is found."""
    record = draw(tmp_path / "run", "attention=harmless", "vae=spoilspixels", "num_images=2", config_dir=own)
    assert only_fallback(record, "vae")[1] == "full"
    assert (record.options["attention"].effective, record.options["attention"].fallbacks) == ("harmless", [])


def test_a_later_picture_falls_back_too(tmp_path, own, plain):
    overrides = ("attention=spoils", "attention.from_call=2", "vae=full", "num_images=2")
    record = draw(tmp_path / "run", *overrides, config_dir=own)
    assert only_fallback(record, "attention")[1] == "sdpa"
    assert hashes(record) == plain


def test_strict_allows_no_fallback(tmp_path, own):
    with pytest.raises(NotFinite, match="strict=true"):
        draw(tmp_path / "run", "attention=spoils", "strict=true", config_dir=own)
    record = read_record(tmp_path / "run")
    assert record.status == "failed"
    assert record.options["attention"].fallbacks == []
    assert [image.finite for image in record.images] == [False]


def test_an_interrupt_while_looking_for_the_culprit_is_an_interrupt(tmp_path, own, monkeypatch):
    from fluxrun.planning import fallbacks

    def interrupted(*_):
        raise Interrupted("interrupted")

    monkeypatch.setattr(fallbacks, "give_way_to_neutral", interrupted)
    with pytest.raises(Interrupted):
        draw(tmp_path / "run", "attention=spoils", config_dir=own)
    assert read_record(tmp_path / "run").status == "interrupted"


# --- one colour -----------------------------------------------------------------------------------------------------


def test_a_picture_of_one_colour_is_a_warning(tmp_path, caplog):
    folder = spoiled_folder(tmp_path / "model", "vae", value=0.0, only="decoder.conv_out")
    record = draw(tmp_path / "run", *LOCAL, f"model.path={folder}")
    assert record.status == "completed"
    assert [(image.finite, image.constant) for image in record.images] == [(True, True)]
    assert "image 1/1: all pixels have one colour" in caplog.messages


def test_an_ordinary_picture_is_neither(tmp_path):
    record = draw(tmp_path / "run", *LOCAL, f"model.path={tiny_folder()}")
    assert [(image.finite, image.constant) for image in record.images] == [(True, False)]


# --- what is looked at ----------------------------------------------------------------------------------------------


class Processor:
    def postprocess(self, image, output_type="pil"):
        pixels = (image.float() * 127.5 + 127.5).clamp(0, 255).round().nan_to_num().to(torch.uint8)
        return [Image.fromarray(p.permute(1, 2, 0).contiguous().numpy()) for p in pixels]


class Pipeline:
    def __init__(self):
        self.image_processor = Processor()


def findings(image: torch.Tensor, latents: torch.Tensor, embeddings: torch.Tensor):
    pipeline, inspection = Pipeline(), Inspection()
    with inspection.of(pipeline):
        inspection.step({"latents": latents})
        images = pipeline.image_processor.postprocess(image)
    assert "postprocess" not in vars(pipeline.image_processor), "put back as it was"
    return inspection.findings(images, [embeddings])


def sound(pictures: int = 3):
    torch.manual_seed(0)
    return torch.rand(pictures, 3, 8, 8) * 2 - 1, torch.randn(pictures, 16, 4), torch.randn(pictures, 5, 6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("part", "stage"), [(0, "decode"), (1, "denoise"), (2, "text_encode")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bad_value_in_one_picture_of_a_batch(value, part, stage, dtype):
    tensors = [tensor.to(dtype) for tensor in sound()]
    for number in range(part + 1):  # what comes after the first bad value is spoiled, too
        tensors[number][1].view(-1)[3] = value
    found = findings(*tensors)
    assert [f.finite for f in found] == [True, False, True]
    assert found[1].stage == stage


def test_constant_is_what_the_bytes_say():
    image, latents, embeddings = sound(4)
    image[0] = torch.tensor([0.5, -0.25, 0.0])[:, None, None]  # a colour
    image[1] = 2 + image[1]  # different, and white all over
    image[2] = 0.001 * image[2]  # around zero, which lies between two bytes
    found = findings(image, latents, embeddings)
    assert [f.constant for f in found] == [True, True, False, False]
    image[2] = 0.3 + 0.0001 * image[2].clamp(-1, 1)
    assert findings(image, latents, embeddings)[2].constant


def test_channels_last_and_no_latents():
    image, _, _ = sound()
    found = extremes(None, image.to(memory_format=torch.channels_last))
    assert torch.equal(found[:, 2:5], image.amin(dim=(2, 3)))
    assert torch.equal(found[:, 5:], image.amax(dim=(2, 3)))


# --- nothing ranks it -----------------------------------------------------------------------------------------------


def test_no_table_objective_or_baseline_ranks_it(tmp_path, own):
    pytest.importorskip("skimage", reason="the extra 'report'")
    folder = spoiled_folder(tmp_path / "model", "transformer")
    with SessionPool() as pool:
        draw(tmp_path / "s" / "0", "vae=full", pool=pool)
        for name, attention in (("1", "sdpa"), ("2", "math")):
            with pytest.raises(NotFinite):
                draw(tmp_path / "s" / name, *LOCAL, f"model.path={folder}", f"attention={attention}", "vae=full")
    rows = read_rows(tmp_path / "s", tmp_path / "s")
    assert compare(rows, tmp_path / "s") == []
    good, *bad = by_speed(rows)
    assert good.job == "0"
    assert good.is_baseline
    assert all(row.image_s is row.speedup is row.psnr_db is row.fastest_image_s is None for row in bad)
    assert not any(row.is_baseline for row in bad)
    from fluxrun.config.schema import SweepConfig

    assert all(objective(row, rows, tmp_path / "s", SweepConfig()) > WORTHLESS_S for row in bad)
    elsewhere = SweepConfig(baseline=str(tmp_path / "s" / "1"), min_psnr=30)
    assert objective(good, rows[:1], tmp_path / "s", elsewhere) > WORTHLESS_S, "no baseline"


@pytest.mark.slow
def test_a_sweep_with_such_a_job_goes_on_and_fails(tmp_path, monkeypatch):
    folder = spoiled_folder(tmp_path / "model", "transformer")
    monkeypatch.setattr("sys.argv", ["fluxrun"])
    small = ("height=64", "width=64", "steps=2", "model.max_sequence_length=32")
    paths = f"model.path={folder},{tiny_folder()}"
    assert dispatch(["--multirun", *LOCAL, *small, paths, f"hydra.sweep.dir={tmp_path / 's'}"]) == 1
    first, second = (read_row(tmp_path / "s" / name, tmp_path / "s") for name in "01")
    assert (first.status, second.status) == ("failed", "completed")
    assert [image.finite for image in (*first.images, *second.images)] == [False, True]
    page = tmp_path / "s" / "report.html"
    assert not page.exists() or "not finite (NaN or infinite)" in page.read_text()


@pytest.mark.parametrize("guidance", ["inf", "nan", ".inf", "-inf"])
def test_a_guidance_that_is_no_number_is_refused(guidance, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="guidance"):
        dispatch(["model=tiny", "model.distilled=false", f"guidance={guidance}"])
    assert list(tmp_path.iterdir()) == []
