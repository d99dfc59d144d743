"""4-bit weights: the bytes of bitsandbytes, the formulas by hand, and the laws of a rounding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorakit.errors import SpecError
from lorakit.hosts import bnb_kernels, nf4
from lorakit.hosts.codebooks import BOOKS

functional = pytest.importorskip("bitsandbytes.functional")

KINDS = tuple(BOOKS)


def theirs(weight: Tensor, block_size: int, double: bool, kind: str) -> tuple[Tensor, Any]:
    packed, state = functional.quantize_4bit(weight, blocksize=block_size, compress_statistics=double, quant_type=kind)
    return packed, state


def weights() -> list[Tensor]:
    """Return 50 weights of random shapes: normal, huge, tiny, mostly zero, 16-bit."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for i in range(50):
        shape = torch.randint(1, 300, (1 + i % 2,), generator=rng).tolist()
        weight = torch.randn(shape, generator=rng) * 10 ** torch.empty(1).uniform_(-3, 2, generator=rng)
        change = (
            lambda w: w, lambda w: w * 1e30, lambda w: w * 1e-37, lambda w: w * (torch.rand(w.shape) < 0.3),
            torch.Tensor.bfloat16, torch.Tensor.half,
        )[i % 6]  # fmt: skip
        found.append(change(weight))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("i", range(50))
def test_bytes_and_state_are_those_of_bitsandbytes(kind: str, i: int) -> None:
    weight, block_size = weights()[i], nf4.BLOCK_SIZES[i % 8]
    for double in (False, True):
        packed, state = theirs(weight, block_size, double, kind)
        value = nf4.quantize(weight, block_size, double, kind)
        assert torch.equal(value.packed, packed)
        assert torch.equal(value.absmax, state.absmax)
        if double:
            assert value.nested is not None
            assert torch.equal(value.nested.absmax, state.state2.absmax)
            assert torch.equal(value.nested.offset, state.offset)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(5, 64), torch.zeros(7), torch.full((64, 64), 1e-42), torch.full((3, 40), -1e-38), torch.eye(17)],
    ids=["zeros", "odd zeros", "denormal", "nearly denormal", "odd"],
)
def test_the_edges_are_those_of_bitsandbytes_too(weight: Tensor, double: bool, kind: str) -> None:
    packed, state = theirs(weight, 64, double, kind)
    value = nf4.quantize(weight, 64, double, kind)
    assert torch.equal(value.packed, packed)
    assert torch.equal(value.absmax, state.absmax)
    assert torch.equal(nf4.dequantize(value), functional.dequantize_4bit(packed, state).view(weight.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_values_are_those_of_bitsandbytes(kind: str, double: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(96, 320).to(dtype)
    packed, state = theirs(weight, 64, double, kind)
    assert torch.equal(
        nf4.dequantize(nf4.quantize(weight, 64, double, kind)), functional.dequantize_4bit(packed, state)
    )


def test_rows_of_whole_and_a_half_blocks_are_read_right_where_bitsandbytes_misplaces_their_scales() -> None:
    """Its AVX-512 kernel counts blocks from the start of each row; blocks run on from row to row."""
    weight = torch.randn(4, 96)
    weight[1] *= 100
    value = nf4.quantize(weight, 64, double_quant=False)
    exact = nf4.dequantize(value)
    assert nf4.error(weight, value).relative < 0.12
    assert torch.equal(exact.view(6, 64), nf4.dequantize(nf4.quantize(weight.view(6, 64), 64, double_quant=False)))


def test_two_codes_a_byte_by_hand() -> None:
    """[-1, 1, 0, 0.5]: codes 0, 15, 7, and 12 (0.4407 is nearer to 0.5 than 0.5626), so bytes 0x0f and 0x7c."""
    value = nf4.quantize(torch.tensor([-1.0, 1.0, 0.0, 0.5]), double_quant=False)
    assert value.packed.flatten().tolist() == [0x0F, 0x7C]
    assert value.absmax.tolist() == [1.0]
    assert nf4.quantize(torch.zeros(64), double_quant=False).packed.unique().tolist() == [0x77]


def test_bits_per_weight_are_those_of_the_paper() -> None:
    """4 + 32/64; and 4 + 8/64 + 32/(64 * 256), from the storage of a matrix whose groups are full."""
    weight = torch.randn(1024, 1024)
    assert nf4.quantize(weight, double_quant=False).bits_per_weight == 4.5
    assert nf4.quantize(weight).bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**20, abs=1e-9)
    assert nf4.quantize(weight).bits_per_weight == pytest.approx(4.127, abs=1e-4)


def test_what_nf4_and_fp4_lose_of_a_normal_weight() -> None:
    """The relative errors measured for N(0, 1) in blocks of 64: 0.092 and 0.122; double quantisation adds < 0.1 %."""
    weight = torch.randn(512, 512)
    once = nf4.error(weight, nf4.quantize(weight, double_quant=False))
    twice = nf4.error(weight, nf4.quantize(weight))
    assert once.relative == pytest.approx(0.0920, abs=3e-4)
    assert twice.relative == pytest.approx(once.relative, rel=1e-3)
    assert nf4.error(weight, nf4.quantize(weight, kind="fp4")).relative == pytest.approx(0.1219, abs=5e-4)


@given(n=st.integers(1, 700), size=st.sampled_from([32, 64, 128]), power=st.integers(-20, 20), seed=st.integers(0, 99))
def test_a_rounding_is_near_and_rounding_again_changes_nothing(n: int, size: int, power: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(n) * 10.0**power
    value = nf4.quantize(weight, size, double_quant=False)
    back = nf4.dequantize(value)
    largest_gap = 0.30381  # from -1 to -0.696
    for start in range(0, n, size):
        block = slice(start, start + size)
        absmax = float(weight[block].abs().max())
        assert float((weight[block] - back[block]).abs().max()) <= largest_gap / 2 * absmax * (1 + 1e-6)
        assert float(back[block].abs().max()) == pytest.approx(absmax)
    again = nf4.quantize(back, size, double_quant=False)
    assert torch.equal(again.packed, value.packed)
    assert torch.equal(nf4.dequantize(again), back)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_torch_gives_the_bits_of_the_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.randn(256, 1100), torch.randn(2**17 + 65)]  # more than a chunk, and an odd end
    for dtype in (torch.float32, torch.bfloat16):
        values = [nf4.quantize(weight.to(dtype), kind=kind) for weight in weights]
        fast = [nf4.dequantize(value) for value in values]
        monkeypatch.setattr(nf4, "kernels", lambda: None)
        for value, wanted in zip(values, fast, strict=True):
            assert torch.equal(nf4.dequantize(value), wanted)
        monkeypatch.undo()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", nf4.KERNEL_DTYPES)
def test_the_c_function_gives_the_bits_of_its_operator(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    assert bnb_kernels._cpu_unpack(kind, dtype) is not None, "this version calls it otherwise: the detour is slower"
    value = nf4.quantize(torch.randn(64, 256).to(dtype), kind=kind)
    direct = nf4.dequantize(value)
    monkeypatch.setattr(bnb_kernels, "_cpu_unpack", lambda *_: None)
    assert torch.equal(nf4.dequantize(value), direct)


def test_a_part_is_the_part_of_the_whole() -> None:
    value = nf4.quantize(torch.randn(40, 100))
    whole = nf4.dequantize(value).flatten()
    for start, stop in ((0, 4000), (64, 1000), (640, 641), (3968, 4000)):
        part = torch.empty(stop - start)
        nf4.unpack(value, start, part)
        assert torch.equal(part, whole[start:stop])
        assert torch.equal(
            nf4.maxima(value, start // 64, -(-stop // 64)), nf4.maxima(value)[start // 64 : -(-stop // 64)]
        )


def test_quantised_maxima_are_near() -> None:
    weight = torch.randn(300, 300)
    plain, double = nf4.quantize(weight, double_quant=False), nf4.quantize(weight)
    assert torch.equal(plain.packed, double.packed)
    spread = float((plain.absmax - plain.absmax.mean()).abs().max())
    assert float((nf4.maxima(double) - plain.absmax).abs().max()) < 0.015 * spread  # half the map's widest gap


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 48}, "block size 48 is none of 32, 64, 128, 256, 512, 1024, 2048, 4096"),
        ({"kind": "nf3"}, "unknown 4-bit kind 'nf3'; one of nf4, fp4"),
        ({"weight": torch.randn(8, 8, dtype=torch.float64)}, "only fp32, bf16 and fp16 weights can be quantised, not"),
        ({"weight": torch.ones(8, dtype=torch.int32)}, "only fp32, bf16 and fp16 weights can be quantised, not"),
        ({"weight": torch.empty(0, 8)}, "a weight without values cannot be quantised"),
        ({"weight": torch.tensor([1.0, math.nan, 2.0])}, "1 of 3 weights are NaN or infinite"),
        ({"weight": torch.tensor([[1.0, -math.inf]]).repeat(64, 1)}, "64 of 128 weights are NaN or infinite"),
        ({"weight": torch.full((3, 100), 3e38)}, "overflow the mean of their block maxima; set double_quant to false"),
    ],
)
def test_what_cannot_be_quantised_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        nf4.quantize(**{"weight": torch.randn(8, 8), **change})


def test_a_value_moves_between_devices() -> None:
    moved = nf4.quantize(torch.randn(8, 8)).to("meta")
    assert moved.nested is not None
    assert {moved.packed.device.type, moved.absmax.device.type, moved.nested.absmax.device.type} == {"meta"}
