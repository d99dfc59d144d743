"""Clients' adapters become one: stacking is exact, averaging factors is off by their covariance, to the last digit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorakit.combining import average_factors, combine, stack
from lorakit.core.state import AdapterState
from lorakit.errors import CombineError
from lorakit.methods.lora import LoRA
from tests.combining.samples import Q, V, adapter, delta, deltas, pair, ranks, summed
from tests.tolerances import assert_close

shares = st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5).map(lambda p: [x / sum(p) for x in p])


def covariance(states: list[AdapterState], p: list[float], key: str) -> Tensor:
    """Return `sum_k p_k (B_k - B) (A_k - A)` with B holding its scale, in fp64."""
    updates = [next(u for u in s.updates if u.site.key == key) for s in states]
    a = torch.stack([u.tensors["down"].double() for u in updates])
    b = torch.stack([u.method.scale * u.tensors["up"].double() for u in updates])  # type: ignore[attr-defined]
    weights = torch.tensor(p, dtype=torch.float64).view(-1, 1, 1)
    around = (weights * ((b - (weights * b).sum(0)) @ (a - (weights * a).sum(0)))).sum(0)
    assert isinstance(around, Tensor)
    return around


@given(p=shares, seed=st.integers(0, 99))
def test_averaging_is_off_by_the_covariance(p: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    states = [adapter(LoRA(3, 2.0 + k)) for k in range(len(p))]
    averaged = average_factors(states, p)
    mean = summed(states, p)
    for key in (Q.key, V.key):
        around = covariance(states, p, key)
        largest = max(float(deltas(s)[key].abs().max()) for s in states)
        assert_close(mean[key] - deltas(averaged.state)[key], around, scale=largest, dtype=torch.float32)
        assert averaged.losses[key].error == pytest.approx(float(around.norm()), rel=1e-5)
    assert ranks(averaged.state) == [3, 3]


@given(p=shares, seed=st.integers(0, 99))
def test_stacking_is_exact_whatever_the_ranks(p: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    states = [adapter(LoRA(1 + k % 3, 2.0 + k, stabilised=bool(k % 2))) for k in range(len(p))]
    stacked = stack(states, p)
    for key, wanted in summed(states, p).items():
        largest = max(float(deltas(s)[key].abs().max()) for s in states)
        assert_close(deltas(stacked.state)[key], wanted, scale=largest, dtype=torch.float32)
    assert stacked.error < 1e-6
    assert ranks(stacked.state) == [min(sum(1 + k % 3 for k in range(len(p))), least) for least in (5, 6)]


def test_the_shares_are_on_a_alone() -> None:
    one, two = adapter(LoRA(2, 2.0), sites=[V]), adapter(LoRA(1, 1.0), sites=[V])
    (stacked,) = stack([one, two], [0.25, 0.75]).state.updates
    (a, b), (c, d) = (s.updates[0].tensors.values() for s in (one, two))
    assert torch.equal(stacked.tensors["down"], torch.cat([0.25 * a, 0.75 * c]))
    assert torch.equal(stacked.tensors["up"], torch.cat([b, d], 1))


def test_by_hand() -> None:
    # products 1 and 15: their mean is 8, that of the factors 2 * 3, the covariance ((-1)(-2) + 1 * 2) / 2
    one, two = pair([[1.0]], [[1.0]]), pair([[3.0]], [[5.0]])
    averaged = average_factors([one, two])
    assert delta(averaged.state).item() == pytest.approx(6.0)
    assert averaged.losses["layer"].error == pytest.approx(2.0)
    assert averaged.error == pytest.approx(2 / 8)
    assert delta(stack([one, two]).state).item() == pytest.approx(8.0)
    # by rows: 3 of client 1 and 1 of client 2
    assert delta(stack([one, two], [0.75, 0.25]).state).item() == pytest.approx(0.75 + 0.25 * 15)


def test_clients_alike_lose_nothing() -> None:
    one = adapter(LoRA(3, 6.0, stabilised=True))
    averaged, stacked = average_factors([one] * 4), stack([one] * 4)
    assert averaged.error < 1e-7
    for key, wanted in deltas(one).items():
        assert_close(deltas(averaged.state)[key], wanted, dtype=torch.float32)
        assert_close(deltas(stacked.state)[key], wanted, dtype=torch.float32)


@pytest.mark.parametrize("name", ["down", "up"])
def test_clients_that_share_one_factor_lose_nothing(name: str) -> None:
    one, two = adapter(LoRA(2)), adapter(LoRA(2))
    for mine, yours in zip(one.updates, two.updates, strict=True):
        yours.tensors[name].copy_(mine.tensors[name])
    assert average_factors([one, two], [0.3, 0.7]).error < 1e-7


def test_padded_factors_are_0_where_a_client_has_none() -> None:
    """Products diag(4, 0) of rank 1 and diag(4, 4) of rank 2: the mean is diag(4, 2), that of factors diag(4, 1)."""
    one, two = pair([[2.0], [0.0]], [[2.0, 0.0]]), pair([[2.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 2.0]])
    with pytest.raises(CombineError, match="factors of ranks 1, 2 cannot be added"):
        average_factors([one, two])
    averaged = average_factors([one, two], padded=True)
    assert_close(delta(averaged.state), torch.diag(torch.tensor([4.0, 1.0])), dtype=torch.float32)
    assert averaged.losses["layer"].error == pytest.approx(1.0)
    alike = [adapter(LoRA(3)) for _ in range(2)]
    for one_, other in zip(*(average_factors(alike, padded=way).state.updates for way in (True, False)), strict=True):
        assert all(torch.equal(one_.tensors[name], other.tensors[name]) for name in ("down", "up"))


def test_random_clients_lose_most_of_it() -> None:
    states = [adapter(LoRA(4), sites=[Q]) for _ in range(10)]
    assert average_factors(states).error > 0.5


@pytest.mark.parametrize("way", [average_factors, stack])
@pytest.mark.parametrize("p", [[0.5, 0.6], [1.5, -0.5], [1.0, 0.0]])
def test_shares_sum_to_1_and_are_above_0(way: object, p: list[float]) -> None:
    states = [adapter(LoRA(1)) for _ in range(2)]
    with pytest.raises(CombineError, match=r"the shares .* sum to .*; give each client its part of the whole"):
        way(states, p)  # type: ignore[operator]


def test_equal_shares_are_the_default() -> None:
    states = [adapter(LoRA(2), sites=[Q]) for _ in range(3)]
    assert_close(delta(stack(states).state), delta(combine(states, "concat", [1 / 3] * 3).state))
    for way in (average_factors, stack):
        with pytest.raises(CombineError, match="there is nothing to combine"):
            way([])


def test_what_has_no_mean_is_sent_to_stacking() -> None:
    one, two = adapter(LoRA(2)), adapter(LoRA(2), sites=[Q])
    with pytest.raises(CombineError, match=r"have no mean; stack them:\n  - h\.0\.attn\.v: client 2 has none"):
        average_factors([one, two])
    with pytest.raises(CombineError, match=r"factors of ranks 2, 3 cannot be added"):
        average_factors([adapter(LoRA(2)), adapter(LoRA(3))])
    together = stack([one, two], [0.5, 0.5])
    assert_close(deltas(together.state)[V.key], 0.5 * deltas(one)[V.key], dtype=torch.float32)
