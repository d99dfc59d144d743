"""Dropout made again from its seed, and the random bits its masks are made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernels.dropout import draw_seed, dropout, keep_mask, random_words


def dropped(x: Tensor, rate: float, seed: int = 0) -> Tensor:
    """Return `dropout(x, rate)` with the mask that a seed of torch's generator leads to."""
    torch.manual_seed(seed)
    return dropout(x, rate)


def test_half_of_the_ones_become_twos_and_their_gradient_is_the_same() -> None:
    x = torch.ones(40, 25, requires_grad=True)
    y = dropped(x, 0.5)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert x.grad is not None
    assert torch.equal(x.grad, y), "the mask of the backward is that of the forward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_does_to_an_average_what_torch_s_does(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 2**18, dtype=dtype).view(2, 2**9, 2**8)
    ours, theirs = dropped(x, 0.1), F.dropout(x, 0.1)
    assert ours.dtype == dtype
    assert ours.shape == x.shape
    for power in (1, 2):
        one, other = (float(made.double().pow(power).mean()) for made in (ours, theirs))
        assert one == pytest.approx(other, abs=0.02)
    assert float((ours[x != 0] == 0).double().mean()) == pytest.approx(0.1, abs=3e-3)


def test_its_derivative_is_exact_and_nothing_is_kept() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64).transpose(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: dropped(t, 0.3), (x,))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropped(x, 0.3)
    assert not kept


def test_the_mask_has_the_rate_in_every_lane_and_on_the_average_over_calls() -> None:
    """A word of 64 random bits gives eight values; the highest bit is a sign, which a careless draw leaves out.

    0.05 lies between 12/256 and 13/256, at four fifths of the way.
    """
    like = torch.empty(1000, 1001)
    mask, factor = keep_mask(like, 1001, 0.05, 3)
    assert factor in (256 / 244, 256 / 243)
    for lane in range(8):
        assert float(mask.view(-1)[lane::8].float().mean()) == pytest.approx(1 / factor, abs=2e-3)
    assert torch.equal(mask, keep_mask(like, 1001, 0.05, 3)[0])
    assert not torch.equal(mask, keep_mask(like, 1001, 0.05, 4)[0])
    torch.manual_seed(0)
    factors = [keep_mask(torch.empty(1, 8), 8, 0.05, draw_seed(like))[1] for _ in range(4000)]
    assert sum(1 - 1 / f for f in factors) / 4000 == pytest.approx(0.05, abs=1e-4)


def test_the_random_words_are_those_of_the_published_generator() -> None:
    """The first outputs of SplitMix64 for two seeds, as its authors' code prints them."""
    first = [int(word) % 2**64 for word in random_words(3, 0, torch.device("cpu"))]
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert int(random_words(1, 1234567, torch.device("cpu"))) == 6457827717110365317


@pytest.mark.parametrize(("rate", "factors"), [(0.001, {1.0, 256 / 255}), (0.0, {1.0}), (0.999, {256.0})])
def test_a_mask_is_ones_and_zeros_at_any_rate(rate: float, factors: set[float]) -> None:
    masks = [keep_mask(torch.empty(40, 1), 30, rate, draw_seed(torch.empty(1))) for _ in range(20)]
    assert {factor for _, factor in masks} <= factors
    for mask, factor in masks:
        assert set(mask.unique().tolist()) <= {0, 1}
        assert float(mask.float().mean()) == pytest.approx(1 / factor, abs=0.02)
