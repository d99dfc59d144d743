"""8-bit rows: the bytes of bitsandbytes, and one row by hand."""

from __future__ import annotations

import pytest
import torch

from lorakit.errors import SpecError
from lorakit.hosts import int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in ((1, 1), (7, 33), (64, 128)):
        weight = torch.randn(shape).to(dtype)
        codes, absmax, _ = functional.int8_vectorwise_quant(weight)
        value = int8.quantize(weight)
        assert torch.equal(value.codes, codes)
        assert torch.equal(value.absmax, absmax)
        assert torch.equal(int8.dequantize(value, torch.float32), functional.int8_vectorwise_dequant(codes, absmax))


def test_a_row_by_hand() -> None:
    """absmax 2, so 1 -> round(63.5) = 64 (to even), which reads as 64 * 2 / 127."""
    value = int8.quantize(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    assert value.codes.tolist() == [[64, -127, 32], [0, 0, 0]]
    assert int8.dequantize(value)[0].tolist() == pytest.approx([128 / 127, -2.0, 64 / 127])
    assert int8.dequantize(value)[1].tolist() == [0.0, 0.0, 0.0]


def test_what_cannot_be_quantised_says_why() -> None:
    with pytest.raises(SpecError, match=r"a weight of shape \(3,\) is no matrix"):
        int8.quantize(torch.ones(3))
    with pytest.raises(SpecError, match="1 of 4 weights are NaN or infinite"):
        int8.quantize(torch.tensor([[1.0, torch.nan], [1.0, 2.0]]))
