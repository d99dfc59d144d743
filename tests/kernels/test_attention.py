"""Attention with dropout as one function against the formula written out, and against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernels.attention import DropsInAttention, dropped_attention
from lorakit.kernels.dropout import draw_seed, keep_mask

BATCH, HEADS, LENGTH, WIDTH = 3, 2, 7, 4


def made(dtype: torch.dtype = torch.float64, keys: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as a model makes them: heads are columns of one row."""
    rng = torch.Generator().manual_seed(0)
    shapes = (LENGTH, keys, keys)
    q, k, v = (torch.randn(BATCH, n, HEADS, WIDTH, dtype=torch.float64, generator=rng) for n in shapes)
    return tuple(t.to(dtype).transpose(1, 2).requires_grad_() for t in (q, k, v))  # type: ignore[return-value]


def sees() -> Tensor:
    """Return which keys are seen: the first row of the batch sees four, a query of the second none."""
    seen = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    seen[0, :, :, 4:] = False
    seen[1, :, 2] = False
    return seen


def ours(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, rate: float) -> Tensor:
    torch.manual_seed(4)
    return dropped_attention(q, k, v, seen, rate, 0.7)


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, rate: float) -> Tensor:
    """Return the formula with the mask that `ours` draws."""
    torch.manual_seed(4)
    scores = 0.7 * q @ k.mT
    p = torch.softmax(scores if seen is None else scores.masked_fill(~seen, -1e30), -1)
    mask, factor = keep_mask(torch.empty(BATCH * HEADS * LENGTH, 1, dtype=q.dtype), k.shape[2], rate, draw_seed(q))
    kept = p * mask.view(p.shape) * factor
    return (kept if seen is None else kept * seen) @ v


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_values_and_gradients_are_the_formula_s(rate: float, masked: bool) -> None:
    seen = sees() if masked else None
    one, other = made(), made()
    y, wanted = ours(*one, seen, rate), written_out(*other, seen, rate)
    torch.testing.assert_close(y, wanted)
    pull = torch.randn(y.shape, dtype=y.dtype)
    for found, exact in zip(torch.autograd.grad(y, one, pull), torch.autograd.grad(wanted, other, pull), strict=True):
        torch.testing.assert_close(found, exact)
    assert torch.autograd.gradcheck(lambda *t: ours(*t, seen, rate), one)


def test_keys_may_be_more_than_queries() -> None:
    torch.testing.assert_close(ours(*made(keys=9), None, 0.3), written_out(*made(keys=9), None, 0.3))


def test_where_nothing_is_dropped_it_is_torch_s() -> None:
    """A rate below 1/256 drops nothing in most calls; a query that sees nothing gets zeros from both."""
    q, k, v = made(torch.float32)
    y = ours(q, k, v, sees(), 1e-6)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, sees(), scale=0.7), rtol=1e-5, atol=1e-6)
    assert not y[1, :, 2].any()


def test_in_16_bits_it_is_no_further_from_the_exact_than_torch_s() -> None:
    rng = torch.Generator().manual_seed(1)
    exact = [2 * torch.randn(8, 4, 40, 32, dtype=torch.float64, generator=rng) for _ in range(3)]
    wanted = F.scaled_dot_product_attention(*exact)
    narrow = [t.bfloat16().requires_grad_() for t in exact]
    torch.manual_seed(4)
    mine, theirs = dropped_attention(*narrow, None, 1e-6, 32**-0.5), F.scaled_dot_product_attention(*narrow)
    assert mine.dtype == torch.bfloat16
    assert (mine.double() - wanted).norm() < 1.2 * (theirs.double() - wanted).norm()


def test_what_is_kept_is_the_probabilities_once() -> None:
    def kept(drops: bool) -> int:
        q, k, v = made(torch.float32)
        own, found = {t.untyped_storage().data_ptr() for t in (q, k, v)}, {}

        def note(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            dropped_attention(q, k, v, None, 0.3, 0.5) if drops else F.scaled_dot_product_attention(
                q, k, v, dropout_p=0.3
            )
        return sum(found.values())

    rows = BATCH * HEADS * LENGTH
    assert kept(True) == 4 * rows * (LENGTH + 3 * WIDTH), "P, and Q, K, V as matrices"
    assert kept(True) < kept(False)


def test_only_what_is_known_is_taken_over() -> None:
    q, k, v = made(torch.float32)
    table = torch.zeros(LENGTH, LENGTH)
    wide = [t.repeat(1, 2, 1, 1) for t in (q, k, v)]
    with DropsInAttention():
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        causal = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True)
        plain = [
            F.scaled_dot_product_attention(q, k, v),
            F.scaled_dot_product_attention(q, k, v, attn_mask=table, dropout_p=0.5),
            F.scaled_dot_product_attention(wide[0], k, v, dropout_p=0.5, enable_gqa=True),
        ]
    assert "DroppedAttention" in str(found.grad_fn)
    assert "DroppedAttention" in str(causal.grad_fn)
    assert not any("DroppedAttention" in str(y.grad_fn) for y in plain)
    first = causal[:, :, 0] / v[:, :, 0]
    assert ((first - 2).abs().lt(1e-5) | first.eq(0)).all(), "the first query sees the first key alone"


def test_autocast_leaves_the_scores_wide() -> None:
    q, k, v = made(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(q, k, v, None, 0.3)
    torch.testing.assert_close(y, ours(q, k, v, None, 0.3), rtol=0, atol=0)
