"""Adapters lined up: rows raised to their layer, kinds told by whoever knows, and what is refused, by name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.combining import Svd, combine
from lorakit.core.method import Method
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.state import AdapterState, Base, Purpose
from lorakit.errors import CombineError
from lorakit.inject.activate import use
from lorakit.inject.attach import adapters_named, attach, detach, state
from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture
from lorakit.methods.vera import VeRA
from tests.combining.samples import Q, V, adapter, deltas, ranks
from tests.law.cases import METHODS, jitter, net
from tests.tolerances import assert_close


class Fused(nn.Module):
    """A fused transposed layer and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.out = Conv1D(12, 8), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return the second layer's output."""
        y: Tensor = self.out(self.fused(x))
        return y


def attached(model: nn.Module, name: str, method: Method, *targets: str) -> AdapterState:
    """Return the state of a method attached to a model, moved off its start."""
    attach(model, AdapterSpec(method, Targets(targets)), name)
    for each in adapters_named(model, name):
        jitter(each)
    return state(model, name)


@pytest.mark.parametrize("how", ["linear", "concat", Svd(rank=8)])
@pytest.mark.parametrize(
    ("first", "second", "keys"),
    [
        (["fused[0:4]"], ["fused[8:12]", "out"], ["fused[0:4]", "fused[8:12]", "out"]),  # apart: they stay rows
        (["fused[0:4]"], ["fused[4:12]"], ["fused[0:4]", "fused[4:12]"]),
        (["fused[0:4]"], ["fused[0:4]"], ["fused[0:4]"]),
        (["fused[0:4]"], ["fused"], ["fused"]),
        (["fused[0:5]"], ["fused[4:12]"], ["fused"]),
    ],
)
def test_rows_and_whole_layers_add_up(first: list[str], second: list[str], keys: list[str], how: str | Svd) -> None:
    model, x = Fused(), torch.randn(3, 8)
    one = attached(model, "a", LoRA(2, 3.0), *first)
    two = attached(model, "b", LoRA(3, 5.0, stabilised=True), *second)
    use(model, {"a": 2.0, "b": -0.5})
    wanted = model(x)
    together = combine([one, two], how, [2.0, -0.5])
    assert [u.site.key for u in together.state.updates] == keys
    detach(model, "a")
    detach(model, "b")
    attach(model, together.state)
    assert_close(model(x), wanted)
    assert together.error < 1e-6


def test_a_layer_that_a_file_calls_linear_may_be_transposed() -> None:
    told, file = (adapter(LoRA(2), sites=[replace(Q, kind=kind)]) for kind in ("transposed-linear", "linear"))
    assert {combine(pair).state.updates[0].site.kind for pair in ([told, file], [file, told])} == {"transposed-linear"}


def test_pruned_parts_are_left_out() -> None:
    whole, site = adapter(AdaLoRA(2, 4), sites=[Q]), Q
    (update,) = whole.updates
    some = replace(update, tensors={**update.tensors, "gain": torch.tensor([0.0, 1.0, 0.0, 2.0])})
    none = replace(update, tensors={**update.tensors, "gain": torch.zeros(4)})
    other = adapter(LoRA(1), sites=[V])
    assert ranks(combine([replace(whole, updates=(some,)), other], "concat").state) == [2, 1]
    together = combine([replace(whole, updates=(none,)), other], "concat").state
    assert [u.site.key for u in together.updates] == [V.key]
    with pytest.raises(CombineError, match="none of the adapters changes anything"):
        combine([replace(whole, updates=(none,))])
    assert site.key in {u.site.key for u in whole.updates}


def test_shared_tensors_are_no_obstacle() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    one = attached(model, "a", VeRA(4), "0", "1")
    two = attached(model, "b", LoRA(2), "1")
    together = combine([one, two], "linear", [1.0, 3.0])
    assert_close(deltas(together.state)["0"], deltas(one)["0"], dtype=torch.float32)
    assert_close(deltas(together.state)["1"], deltas(one)["1"] + 3 * deltas(two)["1"], dtype=torch.float32)


# what is refused


def test_what_is_no_change_of_a_weight_is_refused_by_its_type() -> None:
    for kind, name in (("linear", "mixture"), ("module", "houlsby")):
        states = [state(net(kind, name), "n0"), adapter(LoRA(2))]
        for how in ("linear", "concat", "svd", "ties", "factorwise"):
            with pytest.raises(
                CombineError, match=rf"adapter 1 has 1 update\(s\) that depend on .*\n  - layer: {name}"
            ):
                combine(states, how)


def test_a_mixture_is_refused_though_it_has_factors() -> None:
    assert not hasattr(METHODS["mixture"], "delta")
    one = adapter(Mixture(2, 2))
    with pytest.raises(
        CombineError, match=r"the adapter has 2 update\(s\).* no change of a weight:\n  - h\.0\.attn\.q: "
    ):
        combine([one])


def test_nan_is_refused_with_the_name_of_the_module() -> None:
    for bad in (math.nan, math.inf):
        one, two = adapter(LoRA(2)), adapter(LoRA(2), trained={"score.weight": torch.tensor([1.0, bad])})
        two.updates[1].tensors["up"][2, 1] = bad
        with pytest.raises(CombineError) as caught:
            combine([one, two], weights=[0.5, 0.5])
        assert "adapter 2: 1 adapter tensor(s) do not fit" in str(caught.value)
        assert "h.0.attn.v.up: holds NaN or infinity" in str(caught.value)
        assert "score.weight" in str(caught.value)


def test_misshaped_tensors_and_unknown_widths_are_refused() -> None:
    one = adapter(LoRA(2))
    (u, rest) = one.updates
    short = replace(one, updates=(replace(u, tensors={**u.tensors, "up": torch.zeros(6, 2)}), rest))
    with pytest.raises(CombineError, match=r"h\.0\.attn\.q\.up: shape \(6, 2\), expected \(7, 2\)"):
        combine([short])
    wide = replace(one, updates=(replace(u, site=replace(u.site, in_=0)), rest))
    with pytest.raises(CombineError, match="does not tell how wide these layers are; name the base:\n  - h.0.attn.q"):
        combine([wide])


def test_a_sum_beyond_the_dtype_is_refused() -> None:
    one = adapter(LoRA(1), sites=[Q])
    with pytest.raises(CombineError, match=r"h\.0\.attn\.q: the sum is beyond what torch\.float32 holds"):
        combine([one], "concat", [1e40])


def test_layers_of_other_shapes_or_kinds_are_refused_together() -> None:
    one, two = adapter(LoRA(1)), adapter(LoRA(1), sites=[Site(Q.path, 8, 5), Site(V.path, 6, 9, kind="embedding")])
    with pytest.raises(CombineError) as caught:
        combine([one, two])
    said = str(caught.value)
    assert "2 layer(s) do not line up" in said
    assert "h.0.attn.q: weights of other shapes, (7, 5) and (8, 5); combine adapters of one base" in said
    assert "h.0.attn.v: layers of other kinds, embedding and linear" in said


def test_rows_that_do_not_tell_their_layer_are_refused_where_they_overlap() -> None:
    loose = replace(Q, rows=(0, 7))
    with pytest.raises(CombineError, match=r"h\.0\.attn\.q: rows that overlap, of a layer whose height"):
        combine([adapter(LoRA(1), sites=[loose]), adapter(LoRA(1), sites=[replace(Q, out=9)])])


def on(base: Base) -> AdapterState:
    """Return an adapter that remembers this base."""
    return replace(adapter(LoRA(1)), base=base)


def test_adapters_of_other_bases_are_refused() -> None:
    one = Base("some/base", {"h.0": (0.5, -0.25), "h.1": (1.0,)})
    two = Base("other/base", {"h.0": (0.5, -0.15), "h.2": (1.0,)})
    with pytest.raises(
        CombineError, match=r"adapters 1 \(some/base\) and 3 \(other/base\) .*weights differ.*\n  - h\.0$"
    ):
        combine([on(one), on(Base()), on(two)])
    with pytest.raises(CombineError, match=r"and 2 \(unnamed\)"):
        combine([on(one), on(replace(two, name=None))])
    with pytest.raises(CombineError, match="adapters 1 and 2 name other bases, some/base and other/base, and remember"):
        combine([on(Base("some/base")), on(Base("other/base"))])


def test_one_base_under_two_names_and_in_two_dtypes_is_one() -> None:
    one = Base("some/base", {"h.0": (0.5, -0.25), "h.1": (1.0,)})
    rounded = Base("/models/base", {"h.0": (0.501, -0.249), "h.2": (3.0,)})
    base = combine([on(one), on(rounded)]).state.base
    assert base == Base("some/base", {"h.0": (0.5, -0.25), "h.1": (1.0,), "h.2": (3.0,)})
    assert combine([on(Base()), on(Base("some/base"))]).state.base.name == "some/base"


def test_classifiers_of_other_classes_are_refused() -> None:
    one, two = (
        replace(adapter(LoRA(1)), purpose=Purpose("classification", "classification", None, labels))
        for labels in (("no", "yes"), ("bad", "good", "so-so"))
    )
    with pytest.raises(CombineError, match="other classes, so their heads do not add up: bad, good, so-so and no, yes"):
        combine([one, two])


def test_weights_are_checked() -> None:
    one = adapter(LoRA(1))
    for states, weights, said in (
        ([], None, "there is nothing to combine"),
        ([one, one], [1.0], "1 weights for 2 adapters"),
        ([one], [math.nan], "weights must be finite numbers, not nan"),
        ([one], [True], "weights must be finite numbers, not True"),
        ([one, one], [0.0, 0], "every weight is 0"),
    ):
        with pytest.raises(CombineError, match=said):
            combine(states, weights=weights)


def test_an_unknown_way_is_answered_with_the_near_ones() -> None:
    with pytest.raises(CombineError, match="unknown way to combine 'tie'; did you mean 'ties'.*known: linear, concat"):
        combine([adapter(LoRA(1))], "tie")
