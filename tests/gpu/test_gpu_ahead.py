"""Texts behind the picture before on a real GPU: the same pixels as alone, and no waiting for the CPU between them."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

import time  # noqa: E402

import fluxrun  # noqa: E402
from fluxrun.pipeline.session_pool import SessionPool  # noqa: E402
from fluxrun.process.clock import DeviceClock  # noqa: E402
from fluxrun.record.schema import RunRecord  # noqa: E402
from fluxrun.runner import run  # noqa: E402

CYCLES = 200_000_000
"""Of a kernel that does nothing, about 0.1 s."""
TEXTS = ["a lighthouse at dusk, oil", "a harbour at noon", "a lighthouse at dusk, ink", "a mill"]
KLEIN = ["model=flux2_klein_4b", "model.weights=random", "height=512", "width=512", "steps=2", "memory=resident"]


def test_a_clock_through_another_one_waits_for_nothing_and_tells_the_same() -> None:
    first = DeviceClock("cuda")
    torch.cuda._sleep(CYCLES)
    begun = time.perf_counter()
    second = DeviceClock("cuda", first)
    mark = second.mark()
    assert not mark.query(), "the device was waited for"
    at = second.at(mark)
    now = time.perf_counter()
    assert begun < at <= now
    assert now - at < 0.005
    third = DeviceClock("cuda", second)
    assert third.at(third.mark()) == pytest.approx(time.perf_counter(), abs=0.005)


@pytest.mark.parametrize("preset", ["h100_fast", "h100_lossless"])
def test_a_sets_pictures_are_those_of_each_text_alone(tmp_path: Path, preset: str) -> None:
    file = tmp_path / "prompts.txt"
    with SessionPool() as pool:

        def drawn(texts: list[str], name: str) -> RunRecord:
            file.write_text("\n".join(texts), encoding="utf-8")
            overrides = [*KLEIN, f"+preset={preset}", "kernels.text_encoder=fused", f"prompts_file={file}"]
            return run(fluxrun.compose(overrides), tmp_path / name, pool=pool)

        drawn(TEXTS[:1], "warm")
        record = drawn(TEXTS, "set")
        alone = [drawn([text], f"alone{number}").images[0].sha256 for number, text in enumerate(TEXTS)]
    assert [image.sha256 for image in record.images] == alone
    texts = sorted(span.start_s for span in record.spans if span.name == "encode")
    decoded = sorted(span.end_s for span in record.spans if span.name == "decode")
    assert len(texts) == len(record.timings.text_encode_s) == len(TEXTS)
    assert all(text < end for text, end in zip(texts[1:], decoded, strict=False)), "the GPU waited for a text"
