"""A packed weight multiplies as the plain one and comes back bit for bit; what cannot be packed is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorakit.kernels import prepacked
from tests.tolerances import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_equals_the_plain_one(dtype: torch.dtype, rows: int, bias: bool) -> None:
    weight, x = torch.randn(200, 190).to(dtype), torch.randn(rows, 190).to(dtype)
    b = torch.randn(200).to(dtype) if bias else None
    packed = prepacked.pack(weight)
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert packed is None  # a processor without AVX-512
        return
    assert packed is not None
    assert_close(prepacked.product(x, packed, b), F.linear(x, weight, b), dtype=dtype)
    assert_close(prepacked.product(x[None], packed, b), F.linear(x[None], weight, b), dtype=dtype)
    assert torch.equal(prepacked.unpacked(packed), weight)


def test_a_transposed_weight_is_packed_too() -> None:
    weight = torch.randn(190, 200).T
    packed = prepacked.pack(weight)
    assert packed is not None
    assert torch.equal(prepacked.unpacked(packed), weight)


def test_small_weights_other_dtypes_and_a_torch_without_the_operators_are_left_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert prepacked.pack(torch.randn(10, 10)) is None
    assert prepacked.pack(torch.randn(200, 200, dtype=torch.float64)) is None

    def missing(*args: object) -> torch.Tensor:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(prepacked, "product", missing)
    assert prepacked.pack(torch.randn(200, 200)) is None


def test_operators_that_give_other_numbers_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = prepacked.product
    monkeypatch.setattr(prepacked, "product", lambda x, packed, bias: plain(x, packed, bias) * 1.001)
    assert prepacked.pack(torch.randn(200, 200)) is None
