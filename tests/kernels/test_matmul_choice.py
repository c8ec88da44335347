"""The choice among cublasLt's algorithms, with a stand-in for the library: same bits or not at all, kept, counted."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from fluxrun.hardware.kept import Kept
from fluxrun.kernels.transformer import cublas_lt
from fluxrun.kernels.transformer.cublas_lt import Algorithm, CublasError, Operands
from fluxrun.kernels.transformer.matmul_choice import Matmuls

GIVEN = Operands(torch.randn(6, 4), torch.randn(8, 4), torch.float32)
RESULT = F.linear(GIVEN.rows, GIVEN.weight)

EXACT, FAST, WRONG, BROKEN = (Algorithm(bytes([number]) * 64, 0) for number in range(4))
SECONDS = {EXACT: 1.2, FAST: 0.8, WRONG: 0.1, BROKEN: 0.1, None: 1.0}


class Library:
    """A problem whose algorithms are known by their first byte."""

    suggested: ClassVar[list[Algorithm]] = []
    asked: ClassVar[int] = 0
    running: ClassVar[Algorithm | None] = None

    def __init__(self, operands: Operands) -> None:
        assert operands.shape == (6, 4, 8)

    @staticmethod
    def suits(operands: Operands) -> bool:
        return operands.dtype == torch.float32

    def algorithms(self, most: int) -> list[Algorithm]:
        Library.asked += 1
        return self.suggested[:most]

    def checked(self, data: bytes) -> Algorithm:
        if len(data) != 64 or data[0] == 3:
            raise CublasError("not for this matmul")
        return Algorithm(data, 0)

    def multiply(self, operands: Operands, algorithm: Algorithm) -> torch.Tensor:
        Library.running = algorithm
        if algorithm == BROKEN:
            raise CublasError("cublasLtMatmul returned 15")
        return F.linear(operands.rows, operands.weight) + (1e-6 if algorithm == WRONG else 0)


def timer(call: Any, long: float) -> float:
    Library.running = None
    call()
    return SECONDS[Library.running]


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FLUXRUN_CACHE_DIR", str(tmp_path))
    Library.asked = 0
    return Kept("matmuls", {"gpu": "H100", "driver": "580", "cublas_lt": 130000})


def made(kept: Kept, *suggested: Algorithm) -> tuple[Matmuls, list[Any]]:
    """Three layers, the last one never called."""
    Library.suggested = list(suggested)
    matmuls = Matmuls(kept, problem=Library, timer=timer)  # type: ignore[arg-type]
    return matmuls, [matmuls.layer() for _ in range(3)]


def test_the_fastest_with_the_same_bits_is_used_by_every_layer_of_the_shape(kept):
    matmuls, (first, second, _) = made(kept, EXACT, WRONG, BROKEN, FAST)
    for layer in (first, second):
        assert torch.equal(layer(GIVEN), RESULT)
        assert Library.running == FAST
    assert Library.asked == 1
    facts = {"chosen_matmuls": 2, "torch_matmuls": 0, "matmul_shapes": {"6x4x8": "20.0 % faster, the same bits"}}
    assert matmuls.facts() == facts


@pytest.mark.parametrize(
    ("suggested", "why"),
    [([WRONG, BROKEN], "none of cublasLt's 2 algorithms"), ([EXACT], "torch's own is the fastest"), ([], "none of")],
)
def test_torchs_own_stays_where_no_algorithm_is_better(kept, suggested, why):
    matmuls, (layer, *_) = made(kept, *suggested)
    Library.running = None
    assert torch.equal(layer(GIVEN), RESULT)
    assert why in matmuls.facts()["matmul_shapes"]["6x4x8"]
    assert (matmuls.facts()["chosen_matmuls"], matmuls.facts()["torch_matmuls"]) == (0, 1)


def test_a_choice_is_kept_for_the_next_process_and_its_bits_compared_again(kept):
    made(kept, FAST)[1][0](GIVEN)
    matmuls, (layer, *_) = made(kept, EXACT)
    layer(GIVEN)
    assert Library.running == FAST
    assert (Library.asked, matmuls.facts()["chosen_matmuls"]) == (1, 1)
    for useless in ({"algorithm": WRONG.data.hex(), "gain": 0.5}, {"algorithm": "xyz"}, {"algorithm": "03" * 64}, {}):
        kept.keep("6x4x8", useless)
        made(kept, EXACT, FAST)[1][0](GIVEN)
        assert Library.running == FAST
    assert Library.asked == 5
    assert Kept("matmuls", {"gpu": "H200"}).get("6x4x8") is None


def test_that_torch_is_best_is_kept_too(kept):
    made(kept, EXACT)[1][0](GIVEN)
    matmuls, (layer, *_) = made(kept, FAST)
    layer(GIVEN)
    assert Library.asked == 1
    assert matmuls.facts()["torch_matmuls"] == 1


def test_operands_of_another_kind_are_torchs(kept):
    matmuls, (layer, *_) = made(kept, FAST)
    double = Operands(GIVEN.rows.double(), GIVEN.weight.double(), torch.float64)
    expected = F.linear(double.rows, double.weight)
    assert torch.equal(layer(double), expected)
    assert matmuls.facts()["torch_matmuls"] == 1
    _, (layer, *_) = made(kept, FAST)
    layer(GIVEN)
    assert torch.equal(layer(double), expected), "of a shape that has a choice"


def test_no_library_is_said_and_torch_multiplies(kept, monkeypatch):
    if torch.version.cuda is None:
        with pytest.raises(OSError, match="without CUDA"):
            cublas_lt.version()

    def absent(*_):
        raise OSError("libcublasLt.so.13: cannot open shared object file")

    monkeypatch.setattr(Library, "__init__", absent)
    matmuls, (layer, *_) = made(kept, FAST)
    assert torch.equal(layer(GIVEN), RESULT)
    assert "cannot open" in matmuls.facts()["matmul_shapes"]["6x4x8"]


def test_a_cache_folder_that_cannot_be_used_costs_nothing_but_the_finding(kept, caplog):
    kept.file.parent.write_text("")
    kept.keep("6x4x8", {"gain": 1})
    assert "cannot be written" in caplog.text
    assert kept.get("6x4x8") is None


@pytest.mark.parametrize("text", ["", "[]", '{"found": 3}', '{"found": {"6x4x8": 3}}'])
def test_a_file_that_something_else_has_written_holds_nothing(kept, text):
    kept.file.parent.mkdir()
    kept.file.write_text(text)
    assert kept.get("6x4x8") is None
