"""TIES and DARE on the entries of dW: by hand, by their laws, and with what the rank leaves out said apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.combining import Dare, Ties, combine
from lorakit.combining.sparse import disjoint_mean, dropped, trimmed
from lorakit.core.state import AdapterState, Update
from lorakit.errors import CombineError, SpecError
from lorakit.inject.attach import state
from lorakit.methods.lora import LoRA
from tests.combining.samples import Q, V, adapter, delta, deltas, product, ranks
from tests.law.cases import net, weight_of
from tests.tolerances import assert_close

ONE, TWO = torch.tensor([1.0, -2.0, 3.0, -0.1]), torch.tensor([-2.0, -1.0, 1.0, 0.2])
columns = st.lists(st.integers(-3, 3), min_size=6, max_size=6)


def split_otherwise(given_: AdapterState) -> AdapterState:
    """Return the same dW with every sign of both factors turned: `(-B)(-A)`."""
    from dataclasses import replace

    turned = [Update(u.site, u.method, {name: -t for name, t in u.tensors.items()}) for u in given_.updates]
    return replace(given_, updates=tuple(turned))


def test_ties_by_hand() -> None:
    # trimmed: (1, -2, 3, 0) and (-2, -1, 1, 0); signs of (-1, -3, 4, 0); means -2, (-2 - 1) / 2, (3 + 1) / 2, none
    assert trimmed(ONE, 0.75).tolist() == [1.0, -2.0, 3.0, 0.0]
    assert trimmed(TWO, 0.75).tolist() == [-2.0, -1.0, 1.0, 0.0]
    kept = torch.stack([trimmed(ONE, 0.75), trimmed(TWO, 0.75)])
    assert disjoint_mean(kept, [1.0, 1.0]).tolist() == [-2.0, -1.5, 2.0, 0.0]
    assert disjoint_mean(kept, [1.0, 0.5]).tolist() == [-1.0, -1.25, 1.75, 0.0]  # weights after the vote, over a count


def test_ties_of_two_adapters_by_hand() -> None:
    states = [product([t.tolist(), [0.0] * 4]) for t in (ONE, TWO)]
    # 3 of the 8 entries of each weight: density 3 / 8
    together = combine(states, Ties(density=3 / 8))
    assert_close(delta(together.state), torch.tensor([[-2.0, -1.5, 2.0, 0.0], [0.0] * 4]).double(), dtype=torch.float32)
    assert ranks(together.state) == [1]
    assert together.cut < 1e-6
    # the sum is (-1, -3, 4, 0.1): off by (1, 1.5, 2, 0.1)
    assert together.losses["layer"].error == pytest.approx((1 + 2.25 + 4 + 0.01) ** 0.5)
    assert together.losses["layer"].size == pytest.approx((1 + 9 + 16 + 0.01) ** 0.5)


@given(columns=st.lists(columns, min_size=1, max_size=4))
def test_the_vote_is_by_size_and_turns_with_the_sign(columns: list[list[int]]) -> None:
    changes = torch.tensor(columns).float()
    mean = disjoint_mean(changes, [1.0] * len(columns))
    for entries, made in zip(changes.T.tolist(), mean.tolist(), strict=True):
        total = sum(entries)
        agree = [e for e in entries if e * total > 0]
        assert made == pytest.approx(sum(agree) / len(agree) if agree else 0.0)
    assert torch.equal(disjoint_mean(-changes, [1.0] * len(columns)), -mean)


def test_ties_of_one_adapter_whole_is_that_adapter() -> None:
    one = adapter(LoRA(2, 3.0))
    together = combine([one], Ties(density=1.0))
    assert together.error < 1e-6
    assert_close(deltas(together.state)[V.key], deltas(one)[V.key], dtype=torch.float32)


@pytest.mark.parametrize("how", [Ties(density=0.5, rank=5), Dare(density=0.5, rank=5), Dare(0.5, rank=5, elect=True)])
def test_how_a_product_is_split_does_not_matter(how: Ties | Dare) -> None:
    one, two = adapter(LoRA(2), sites=[Q]), adapter(LoRA(2), sites=[Q])
    made, turned = (
        combine([one, other], how, rng=torch.Generator().manual_seed(3)) for other in (two, split_otherwise(two))
    )
    assert_close(delta(turned.state), delta(made.state), dtype=torch.float32)


def test_only_the_largest_are_kept_and_always_one() -> None:
    change = torch.randn(3, 4, 5)
    for density in (0.001, 0.2, 0.5, 1.0):
        kept = trimmed(change, density)
        count = max(1, round(density * 60))
        assert int((kept != 0).sum()) == count
        assert torch.equal(kept[kept != 0], change[kept != 0])
        left = change[kept == 0].abs()
        assert left.numel() == 0 or left.max() <= kept[kept != 0].abs().min()


def test_dare_keeps_the_mean() -> None:
    ones = torch.ones(100_000)
    kept = dropped(ones, 0.3, torch.Generator().manual_seed(0))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.3])
    # a mean of 1e5 Bernoulli(0.3) / 0.3 has the deviation sqrt(0.7 / 0.3 / 1e5) = 0.0048: four of them
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(dropped(ones, 1.0, torch.Generator()), ones)


def test_dare_is_the_sum_on_average() -> None:
    states, wanted = [adapter(LoRA(2), sites=[Q]) for _ in range(2)], 0.0
    rng = torch.Generator().manual_seed(0)
    made = [delta(combine(states, Dare(0.5, rank=5), [1.0, -0.5], rng=rng).state) for _ in range(400)]
    wanted = delta(states[0]) - 0.5 * delta(states[1])
    spread = torch.stack(made).std(0) / 20  # of the mean of 400
    assert float(((torch.stack(made).mean(0) - wanted).abs() / spread.clamp_min(1e-9)).max()) < 5


def test_a_seed_means_the_same_again() -> None:
    states = [adapter(LoRA(2)) for _ in range(2)]
    once, again, other = (
        combine(states, Dare(0.5), rng=torch.Generator().manual_seed(seed)).state for seed in (1, 1, 2)
    )
    assert torch.equal(deltas(once)[Q.key], deltas(again)[Q.key])
    assert not torch.equal(deltas(once)[Q.key], deltas(other)[Q.key])
    before = torch.get_rng_state()
    combine(states, Dare(0.5), rng=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator was drawn from"


def test_dare_with_election_is_ties_of_what_is_left() -> None:
    one, two = product([[1.0, 2.0], [3.0, -4.0]]), product([[-2.0, 1.0], [1.0, 1.0]])
    rng = torch.Generator().manual_seed(5)
    kept = torch.stack([dropped(delta(s).float()[None], 0.5, rng) for s in (one, two)])
    voted = combine([one, two], Dare(0.5, elect=True), rng=torch.Generator().manual_seed(5))
    assert_close(delta(voted.state), disjoint_mean(kept, [1.0, 1.0])[0].double(), dtype=torch.float32)


@pytest.mark.parametrize("how", [Ties(0.3), Dare(0.7), Ties(0.3, energy=0.9)])
def test_what_the_rank_leaves_out_is_said_apart(how: Ties | Dare) -> None:
    states = [adapter(LoRA(2)) for _ in range(3)]
    from dataclasses import replace

    full = combine(states, replace(how, rank=9, energy=None), rng=torch.Generator().manual_seed(1))
    cut = combine(states, how, rng=torch.Generator().manual_seed(1))
    for key in (Q.key, V.key):
        between = float((deltas(full.state)[key] - deltas(cut.state)[key]).norm())
        assert cut.cuts[key].error == pytest.approx(between, rel=1e-4)
        assert cut.cuts[key].size == pytest.approx(float(deltas(full.state)[key].norm()), rel=1e-5)
    if how.energy is not None:
        assert all(loss.relative**2 <= 0.1 for loss in cut.cuts.values())
    else:
        assert ranks(cut.state) == [2, 2]
    assert full.cut < 1e-6 < cut.cut < 1


def test_ties_takes_changes_that_are_no_products() -> None:
    model = net("linear", "dora", "lora")
    states, base = [state(model, "n0"), state(model, "n1")], {"layer": weight_of(model)}
    together = combine(states, Ties(0.5, rank=8), base=base)
    kept = torch.stack([trimmed(deltas(s, base)["layer"].float(), 0.5) for s in states])
    assert_close(deltas(together.state)["layer"], disjoint_mean(kept, [1.0, 1.0]).double(), dtype=torch.float32)


def test_what_cannot_be_is_refused() -> None:
    states: list[AdapterState] = [adapter(LoRA(2)) for _ in range(2)]
    with pytest.raises(CombineError, match=r"dare drops entries at random; give rng=torch\.Generator"):
        combine(states, "dare")
    cases: tuple[tuple[Any, Any], ...] = ((Ties(), None), (Dare(elect=True), torch.Generator()))
    for how, rng in cases:
        with pytest.raises(CombineError, match=r"weight -0\.5: signs are elected before .* negate\(state\)"):
            combine(states, how, [1.0, -0.5], rng=rng)
    for density in (0.0, 1.5, -1):
        for way in (Ties, Dare):
            with pytest.raises(SpecError, match=f"density is the share of entries that is kept.*not {density}"):
                way(density)
