"""Tensors trained whole: a weighted mean where the weights sum to 1, the base's value where they do not, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lorakit.combining import Ties, average_factors, combine, negate, truncate
from lorakit.core.spec import AdapterSpec
from lorakit.core.state import AdapterState
from lorakit.errors import CombineError
from lorakit.methods.lora import LoRA
from tests.combining.samples import Q, V, adapter
from tests.tolerances import assert_close

HEAD = "score.weight"


def with_head(*values: float, dtype: torch.dtype = torch.float32) -> AdapterState:
    """Return an adapter with a head trained whole."""
    return adapter(LoRA(1), trained={HEAD: torch.tensor(values, dtype=dtype)})


def head(state: AdapterState) -> Tensor:
    """Return the head."""
    return state.trained[HEAD]


ONE, TWO, START = with_head(1.0, 4.0), with_head(3.0, 0.0), torch.tensor([1.0, 1.0])


def test_weights_that_sum_to_1_make_a_mean() -> None:
    assert head(combine([ONE, TWO], weights=[0.25, 0.75]).state).tolist() == [2.5, 1.0]
    assert head(combine([ONE, TWO], "concat", [1.5, -0.5]).state).tolist() == [0.0, 6.0]
    thirds = combine([ONE, TWO, TWO], weights=[1 / 3] * 3)
    assert_close(head(thirds.state), torch.tensor([7 / 3, 4 / 3]))


def test_other_weights_need_the_base_s_own_value() -> None:
    # 1 + (1 - 1) + (3 - 1) and 1 + (4 - 1) + (0 - 1)
    assert head(combine([ONE, TWO], base={HEAD: START}).state).tolist() == [3.0, 3.0]
    assert head(negate(ONE, base={HEAD: START}).state).tolist() == [1.0, -2.0]
    with pytest.raises(CombineError) as caught:
        combine([ONE, TWO])
    assert "score.weight: the weights of the adapters that trained it sum to 2" in str(caught.value)
    assert "replace(state, trained={})" in str(caught.value)


def test_an_adapter_that_left_it_alone_has_the_base_s_value() -> None:
    other = adapter(LoRA(1))
    with pytest.raises(CombineError, match=r"score\.weight: .* sum to 0\.5"):
        combine([ONE, other], weights=[0.5, 0.5])
    assert head(combine([ONE, other], weights=[0.5, 0.5], base={HEAD: START}).state).tolist() == [1.0, 2.5]
    assert head(combine([ONE, other], weights=[1.0, 3.0]).state).tolist() == [1.0, 4.0]
    assert combine([ONE, other], weights=[0.0, 3.0]).state.trained == {}


def test_where_signs_are_elected_it_is_averaged_as_the_changes_are() -> None:
    assert head(combine([ONE, TWO], Ties(0.5)).state).tolist() == [2.0, 2.0]
    assert head(combine([ONE, TWO, adapter(LoRA(1))], Ties(0.5)).state).tolist() == [2.0, 2.0]


def test_clients_heads_are_averaged_and_truncation_leaves_one_alone() -> None:
    assert head(average_factors([ONE, TWO]).state).tolist() == [2.0, 2.0]
    assert torch.equal(head(truncate(ONE, 1).state), head(ONE))


def test_what_differs_in_shape_is_refused() -> None:
    with pytest.raises(CombineError, match=r"score\.weight: shapes \(2,\) and \(3,\)"):
        combine([ONE, with_head(1.0, 2.0, 3.0)], weights=[0.5, 0.5])
    with pytest.raises(CombineError, match=r"score\.weight: shapes \(1,\) and \(2,\)"):
        combine([ONE], weights=[2.0], base={HEAD: torch.ones(1)})


def test_a_layer_is_not_both_changed_and_trained_whole() -> None:
    other = adapter(LoRA(1), trained={f"{Q.path}.bias": torch.zeros(7)}, sites=[V])
    with pytest.raises(CombineError, match=r"one adapter does not do both; merge .*:\n  - h\.0\.attn\.q\.bias$"):
        combine([adapter(LoRA(1)), other])
    assert f"{Q.path}.bias" in combine([adapter(LoRA(1), sites=[V]), other]).state.trained


def test_sums_are_wide_and_the_dtype_stays() -> None:
    states = [with_head(256.0, dtype=torch.bfloat16)] + [with_head(1.0, dtype=torch.bfloat16)] * 7
    mean = head(combine(states, weights=[1 / 8] * 8).state)
    assert mean.dtype == torch.bfloat16
    assert mean.tolist() == [33.0]  # 32 + 7 / 8, rounded once; each eighth by itself would round back to 32


def test_adapters_without_any_update_combine_too() -> None:
    one, two = (
        AdapterState(AdapterSpec(None, train=("biases",)), (), {"a.bias": torch.tensor([x])}) for x in (1.0, 5.0)
    )
    together = combine([one, two], weights=[0.5, 0.5]).state
    assert together.trained["a.bias"].tolist() == [3.0]
    assert together.spec == replace(one.spec)
    assert together.updates == ()
    mixed = combine([one, adapter(LoRA(2))], weights=[1.0, 2.0]).state
    assert (mixed.spec.name, len(mixed.updates), mixed.trained["a.bias"].tolist()) == ("lora", 2, [1.0])
