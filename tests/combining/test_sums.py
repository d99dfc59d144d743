"""Weighted sums of updates: exact where they say so, with the right scale of every layer, and measured where not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.combining import Concat, Factorwise, How, Linear, Svd, combine, negate, truncate
from lorakit.core.method import LowRank, Static
from lorakit.core.site import Site
from lorakit.core.state import AdapterState, check_tensors
from lorakit.errors import CombineError, SpecError
from lorakit.inject.activate import use
from lorakit.inject.attach import attach, state
from lorakit.methods.lora import LoRA
from tests.combining.samples import Q, V, adapter, delta, deltas, pair, product, ranks, summed
from tests.law.cases import KINDS, METHODS, STATIC, Net, inputs, net, weight_of
from tests.tolerances import assert_close

EXACT = (Linear(), Concat())
LOW_RANK = [(kind, name) for kind, name in STATIC if isinstance(METHODS[name], LowRank)]
exact = pytest.mark.parametrize("how", EXACT, ids=lambda how: how.name)
numbers = st.floats(-4, 4).filter(lambda w: abs(w) > 0.01)


@exact
@pytest.mark.parametrize(("kind", "name"), LOW_RANK)
def test_the_sum_does_what_the_adapters_do_attached_together(kind: str, name: str, how: How) -> None:
    model, x = net(kind, name, "lora, rank-stabilised"), inputs(kind)
    use(model, {"n0": 0.7, "n1": -1.3})
    together = combine([state(model, "n0"), state(model, "n1")], how, [0.7, -1.3])
    check_tensors(together.state.updates)
    (made,) = together.state.updates
    made.method.check(made.site)
    twin = Net(KINDS[kind].layer())
    twin.layer.load_state_dict({k: v for k, v in model.layer.state_dict().items() if "adapters" not in k})
    attach(twin, together.state)
    assert_close(twin(x), model(x))
    assert together.error < 1e-6


@exact
def test_each_scale_is_its_own(how: How) -> None:
    # s = 6 / 2 = 3 and, stabilised, 6 / sqrt(4) = 3; weights 1 and 2 on dW = 3 * 2 * 5 and 3 * 1 * 7
    one = pair([[2.0, 0.0]], [[5.0, 0.0], [0.0, 0.0]], LoRA(2, 6.0))
    two = pair([[1.0, 0.0, 0.0, 0.0]], [[7.0, 0.0]] + [[0.0, 0.0]] * 3, LoRA(4, 6.0, stabilised=True))
    assert delta(combine([one, two], how, [1.0, 2.0]).state)[0, 0] == pytest.approx(3 * 10 + 2 * 3 * 7)


@exact
def test_ranks_and_scales_may_differ_from_layer_to_layer(how: How) -> None:
    one = adapter(LoRA(2, 7.0), LoRA(4, 3.0))
    two = adapter(LoRA(3, 5.0, stabilised=True), LoRA(1, 9.0))
    together = combine([one, two], how, [0.25, -2.0])
    for key, wanted in summed([one, two], [0.25, -2.0]).items():
        assert_close(deltas(together.state)[key], wanted, dtype=torch.float32)
    assert ranks(together.state) == [5, 5]


@exact
def test_a_layer_that_one_adapter_leaves_alone_changes_by_0_there(how: How) -> None:
    one, two = adapter(LoRA(2), sites=[Q]), adapter(LoRA(3), sites=[V])
    together = combine([one, two], how, [0.5, 4.0])
    assert [u.site.key for u in together.state.updates] == [Q.key, V.key]
    assert_close(deltas(together.state)[Q.key], 0.5 * delta(one), dtype=torch.float32)
    assert_close(deltas(together.state)[V.key], 4.0 * delta(two), dtype=torch.float32)


def test_weights_are_1_unless_given() -> None:
    one, two = adapter(LoRA(2)), adapter(LoRA(2))
    assert_close(deltas(combine([one, two]).state)[Q.key], deltas(one)[Q.key] + deltas(two)[Q.key], dtype=torch.float32)


def test_an_adapter_of_weight_0_takes_no_part() -> None:
    one, two = adapter(LoRA(2), sites=[Q]), adapter(LoRA(3))
    assert ranks(combine([one, two], "concat", [1.0, 0.0]).state) == [2]


def test_concat_keeps_the_factors_and_linear_the_rank_of_the_sum() -> None:
    one = adapter(LoRA(2, 2.0), sites=[V])
    assert ranks(combine([one, one], "concat").state) == [4]
    assert ranks(combine([one, one], "linear").state) == [2]
    (stacked,) = combine([one, one], "concat", [3.0, -1.0]).state.updates
    a, b = (one.updates[0].tensors[name] for name in ("down", "up"))
    assert torch.equal(stacked.tensors["down"], torch.cat([3 * a, -a]))
    assert torch.equal(stacked.tensors["up"], torch.cat([b, b], 1))


@exact
def test_ranks_beyond_the_weight_s_own_are_multiplied_out(how: How) -> None:
    states = [adapter(LoRA(4), sites=[Q]) for _ in range(3)]
    together = combine(states, how)
    assert ranks(together.state) == [5]
    assert_close(delta(together.state), sum(delta(s) for s in states), dtype=torch.float32)  # type: ignore[arg-type]


@given(w=st.tuples(numbers, numbers, numbers), seed=st.integers(0, 99))
def test_order_does_not_matter_and_sums_can_be_nested(w: tuple[float, float, float], seed: int) -> None:
    torch.manual_seed(seed)
    a, b, c = adapter(LoRA(2, 3.0)), adapter(LoRA(1, 5.0)), adapter(LoRA(3, 4.0, stabilised=True))
    once = combine([a, b, c], weights=w).state
    turned = combine([c, a, b], weights=[w[2], w[0], w[1]]).state
    nested = combine([combine([a, b], weights=w[:2]).state, c], weights=[1.0, w[2]]).state
    for key, wanted in summed([a, b, c], w).items():
        size = sum(abs(x) * float(deltas(s)[key].abs().max()) for s, x in zip((a, b, c), w, strict=True))
        for made in (once, turned, nested):
            assert_close(deltas(made)[key], wanted, dtype=torch.float32, scale=size)


def test_task_arithmetic_is_linear_with_weights_of_any_sign() -> None:
    a, b = adapter(LoRA(2)), adapter(LoRA(3))
    both = combine([a, b]).state
    assert_close(
        deltas(combine([both, a], weights=[1, -1]).state)[Q.key], deltas(b)[Q.key], scale=10.0, dtype=torch.float32
    )
    assert_close(deltas(negate(a).state)[V.key], -deltas(a)[V.key], dtype=torch.float32)
    assert ranks(negate(a).state) == [2, 2]
    analogy = combine([b, both, a], weights=[1, 1, -1]).state  # c + (b - a)
    assert_close(deltas(analogy)[V.key], 2 * deltas(b)[V.key], scale=20.0, dtype=torch.float32)


def test_what_cancels_leaves_a_change_of_0() -> None:
    one = adapter(LoRA(2))
    together = combine([one, one], weights=[1.0, -1.0])
    assert ranks(together.state) == [1, 1]
    assert float(deltas(together.state)[Q.key].abs().max()) < 1e-12
    assert (together.error, together.losses[Q.key].size) == (0.0, 0.0)


def test_an_error_beside_a_sum_of_0_is_infinite() -> None:
    one, two = pair([[1.0], [0.0]], [[1.0, 0.0]]), pair([[2.0], [0.0]], [[0.5, 0.0]])  # the same dW, split otherwise
    apart = combine([one, two], "factorwise", [1.0, -1.0])
    assert delta(apart.state)[0, 0] == pytest.approx((1 + 2) * (1 - 0.5))
    assert apart.error == math.inf


# rank, by Eckart and Young

DIAGONAL = product([[4.0, 0.0, 0.0], [0.0, 3.0, 0.0]])  # singular values 4 and 3


def test_svd_by_hand() -> None:
    # diag(4, 3) + diag(-2, 0) = diag(2, 3): rank 1 leaves 2 of sqrt(13)
    other = product([[-2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    together = combine([DIAGONAL, other], Svd(rank=1))
    assert together.error == pytest.approx(2 / math.sqrt(13))
    assert together.cut == pytest.approx(2 / math.sqrt(13))
    assert_close(delta(together.state), torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 0.0]]).double(), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["linear", "transposed-linear", "embedding", "conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("rank", [4, 8])
def test_the_error_of_svd_is_the_tail_of_the_singular_values(kind: str, rank: int) -> None:
    model = net(kind, "lora", "lora, rank-stabilised")
    states = [state(model, "n0"), state(model, "n1")]
    groups = states[0].updates[0].site.groups
    together = combine(states, Svd(rank), [1.0, -0.5])
    wanted = summed(states, [1.0, -0.5])["layer"]
    values = torch.linalg.svdvals(wanted.reshape(groups, wanted.shape[0] // groups, -1))
    tail = float(values[:, rank // groups :].norm())
    assert together.losses["layer"].size == pytest.approx(float(wanted.norm()), rel=1e-6)
    assert together.losses["layer"].error == pytest.approx(tail, rel=1e-5, abs=1e-5)
    assert together.cuts["layer"].error == pytest.approx(tail, rel=1e-6, abs=1e-12)
    assert float((deltas(together.state)["layer"] - wanted).norm()) == pytest.approx(
        together.losses["layer"].error, rel=1e-6
    )


@given(seed=st.integers(0, 99), rank=st.integers(1, 4))
def test_no_other_product_of_that_rank_is_nearer(seed: int, rank: int) -> None:
    torch.manual_seed(seed)
    states = [adapter(LoRA(3), sites=[V]), adapter(LoRA(2), sites=[V])]
    together = combine(states, Svd(rank))
    wanted = summed(states, [1.0, 1.0])[V.key]
    best = delta(together.state)
    for other in (
        best + 0.1 * torch.randn(6, rank).double() @ torch.randn(rank, 9).double(),
        torch.zeros(6, 9).double(),
    ):
        u, s, vh = torch.linalg.svd(other)
        of_rank = u[:, :rank] @ s[:rank].diag() @ vh[:rank]
        assert float((of_rank - wanted).norm()) >= together.losses[V.key].error * (1 - 1e-6)


def test_without_a_rank_it_is_the_highest_of_the_adapters_at_each_layer() -> None:
    one, two = adapter(LoRA(2), LoRA(4)), adapter(LoRA(3), LoRA(1))
    assert ranks(combine([one, two], "svd").state) == [3, 4]


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (1.0, 2), (1e-9, 1)])
def test_energy_by_hand(energy: float, rank: int) -> None:
    # 16 / 25 = 0.64 of the squared size lies in the first direction
    cut = truncate(DIAGONAL, energy=energy)
    assert ranks(cut.state) == [rank]
    assert cut.error == pytest.approx(0.6 if rank == 1 else 0.0, abs=1e-7)


def test_truncating_to_a_rank_beyond_its_own_changes_nothing() -> None:
    one = adapter(LoRA(3))
    cut = truncate(one, 5)
    assert ranks(cut.state) == [3, 3]
    assert cut.error < 1e-7
    assert_close(deltas(cut.state)[Q.key], deltas(one)[Q.key], dtype=torch.float32)


def test_the_rank_of_a_grouped_convolution_is_shared_by_its_groups() -> None:
    given = state(net("conv2d, grouped, reflected", "lora"), "n0")
    assert ranks(truncate(given, 2).state) == [2]
    with pytest.raises(CombineError, match="layer: rank 3 is not a multiple of its 2 groups"):
        truncate(given, 3)


# factors summed apart


def test_summing_factors_apart_by_hand() -> None:
    # the sum is I, the factors' (1, 1)^T (1, 1): off by two cross terms of size 1, as I is long
    one, two = pair([[1.0], [0.0]], [[1.0, 0.0]]), pair([[0.0], [1.0]], [[0.0, 1.0]])
    apart = combine([one, two], "factorwise")
    assert delta(apart.state).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert apart.error == pytest.approx(1.0)
    assert combine([one, two], "linear").error < 1e-7


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (1.0, -0.7)])
def test_its_error_is_the_size_of_the_cross_terms(weights: tuple[float, float]) -> None:
    one, two = adapter(LoRA(3, 6.0)), adapter(LoRA(3, 2.0, stabilised=True))
    apart = combine([one, two], Factorwise(), weights)
    for key in (Q.key, V.key):
        a, b = [], []
        for given_, weight in zip((one, two), weights, strict=True):
            u = next(u for u in given_.updates if u.site.key == key)
            root = math.sqrt(abs(weight * u.method.scale))  # type: ignore[attr-defined]
            a.append(math.copysign(root, weight) * u.tensors["down"].double())
            b.append(root * u.tensors["up"].double())
        crossed = float((b[0] @ a[1] + b[1] @ a[0]).norm())
        assert apart.losses[key].error == pytest.approx(crossed, rel=1e-6)
    assert apart.error > 0.3, "random factors are nowhere near their sum"


def test_factors_of_other_ranks_cannot_be_summed_apart() -> None:
    with pytest.raises(CombineError, match=r"h\.0\.attn\.q: factors of ranks 2, 3 cannot be added; linear and concat"):
        combine([adapter(LoRA(2)), adapter(LoRA(3))], "factorwise")


# how it is done


class Largest(TorchDispatchMode):
    """Notes the number of values of the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.numel())
        return out


@pytest.mark.parametrize("how", ["linear", "concat", Svd(3), Svd(energy=0.5), "factorwise"])
def test_no_matrix_of_the_weight_s_size_is_formed_where_there_are_factors(how: How | str) -> None:
    site = Site("wide", 600, 500)
    states = [adapter(LoRA(4), sites=[site]), adapter(LoRA(4), sites=[site])]
    with Largest() as seen:
        combine(states, how, [1.0, 0.5])
    assert 0 < seen.most <= 600 * 17  # both pairs and the result, [L_1, L_2, L]


@pytest.mark.parametrize("how", ["linear", "concat", Svd(2), "factorwise"])
def test_the_error_is_that_of_what_is_returned(how: How | str) -> None:
    states, weights = [adapter(LoRA(2, 7.0)) for _ in range(3)], [0.3, 1.1, -0.7]
    together = combine(states, how, weights)
    for key, wanted in summed(states, weights).items():
        off = float((deltas(together.state)[key] - wanted).norm())
        assert together.losses[key].error == pytest.approx(off, rel=1e-6)
        assert off > 1e-9 * float(wanted.norm()), "fp32 rounds"


def test_16_bit_factors_are_summed_in_more() -> None:
    site, method = Site("layer", 64, 48), LoRA(4, 7.0)
    states = [adapter(method, sites=[site]) for _ in range(3)]
    short = [as_dtype(s, torch.bfloat16) for s in states]
    together = combine(short)
    assert {t.dtype for u in together.state.updates for t in u.tensors.values()} == {torch.float32}
    assert together.error < 1e-6
    assert combine([as_dtype(s, torch.float64) for s in states]).error < 1e-14


def test_the_adapters_given_stay_as_they_were() -> None:
    states = [adapter(LoRA(2), trained={"score.weight": torch.ones(2)}) for _ in range(2)]
    before = [{name: t.clone() for u in s.updates for name, t in u.tensors.items()} for s in states]
    together = combine(states, "concat", [0.5, 0.5]).state
    for u in together.updates:
        for tensor in u.tensors.values():
            tensor.zero_()
    together.trained["score.weight"].zero_()
    for s, kept in zip(states, before, strict=True):
        assert all(torch.equal(kept[name], t) for name, t in s.updates[-1].tensors.items())
        assert torch.equal(s.trained["score.weight"], torch.ones(2))


def test_rank_and_energy_are_checked() -> None:
    for bad, said in (
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"energy": 1.5}, "energy must lie above 0 and up to 1, not 1.5"),
        ({"rank": 2, "energy": 0.5}, "rank and energy both say how much to keep"),
    ):
        with pytest.raises(SpecError, match=said):
            truncate(DIAGONAL, **bad)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="truncate to what"):
        truncate(DIAGONAL)


# changes that are no product of factors


@pytest.mark.parametrize(
    ("kind", "name"),
    [("linear", name) for name in ("dora", "dora of ia3", "ia3", "loha", "lokr", "krona")]
    + [("conv2d, grouped, reflected", "dora"), ("conv3d", "ia3")],
)
def test_svd_takes_every_change_of_a_weight(kind: str, name: str) -> None:
    model = net(kind, name, "lora")
    states, base = [state(model, "n0"), state(model, "n1")], {"layer": weight_of(model)}
    together = combine(states, Svd(rank=8), [0.5, 2.0], base=base)
    wanted = sum(w * deltas(s, base)["layer"] for s, w in zip(states, (0.5, 2.0), strict=True))
    assert isinstance(wanted, Tensor)
    assert_close(deltas(together.state)["layer"], wanted, dtype=torch.float32)
    groups = states[0].updates[0].site.groups
    cut = combine(states, Svd(rank=groups), [0.5, 2.0], base=base)
    tail = float(torch.linalg.svdvals(wanted.reshape(groups, 8 // groups, -1))[:, 1:].norm())
    assert cut.losses["layer"].error == pytest.approx(tail, rel=1e-4)


@exact
def test_an_exact_sum_needs_factors(how: How) -> None:
    model = net("linear", "dora", "lora")
    states = [state(model, "n0"), state(model, "n1")]
    with pytest.raises(CombineError, match=r"layer: a change that is no product of factors.*how=Svd\(rank="):
        combine(states, how, base={"layer": weight_of(model)})


@pytest.mark.parametrize("name", ["dora", "ia3"])
def test_a_change_that_depends_on_the_weight_asks_for_it(name: str) -> None:
    given_ = state(net("linear", name), "n0")
    with pytest.raises(CombineError, match="layer: .*change of this weight depends on the weight; give it, base="):
        combine([given_], Svd(rank=2))


def test_averaging_the_tensors_of_dora_would_not_average_its_changes() -> None:
    model = net("linear", "dora", "dora")
    one, two, weight = state(model, "n0"), state(model, "n1"), weight_of(model)
    base = {"layer": weight}
    mean = combine([one, two], Svd(rank=8), [0.5, 0.5], base=base)
    assert mean.error < 1e-6
    method = one.updates[0].method
    assert isinstance(method, Static)
    halves = [{name: 0.5 * t for name, t in s.updates[0].tensors.items()} for s in (one, two)]
    naive = method.delta({name: halves[0][name] + halves[1][name] for name in halves[0]}, weight)
    assert float((naive - deltas(mean.state)["layer"]).norm()) > 0.1 * float(naive.norm())


def test_a_rank_must_be_given_where_a_change_tells_none() -> None:
    with pytest.raises(CombineError, match="layer: a change that is no product of factors tells no rank; give rank"):
        combine([state(net("linear", "lokr"), "n0")], "svd")


def as_dtype(given_: AdapterState, dtype: torch.dtype) -> AdapterState:
    """Return an adapter kept in another dtype."""
    from dataclasses import replace

    updates = [replace(u, tensors={name: t.to(dtype) for name, t in u.tensors.items()}) for u in given_.updates]
    return replace(given_, updates=tuple(updates))
