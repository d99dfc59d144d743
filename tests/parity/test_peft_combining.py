"""Parity of combining with PEFT's add_weighted_adapter where it is right; and where it is not, what it makes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.combining import Dare, Factorwise, How, Svd, Ties, combine
from lorakit.core.state import AdapterState
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA
from lorakit.persist.peft import from_peft
from tests.combining.samples import adapter, deltas, pair, summed
from tests.tolerances import assert_close

NAMES, WEIGHTS = ["one", "two"], [0.7, -1.2]


class Several(nn.Module):
    """One layer of each shape."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.fused = nn.Embedding(11, 6), nn.Linear(6, 8), Conv1D(9, 8)
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layers make of ids."""
        y: Tensor = self.conv(self.fused(self.first(self.table(x)))[:, None])
        return y


LAYERS = ["table", "first", "fused", "conv"]


def two_adapters(*settings: dict[str, Any], layers: list[str] = LAYERS) -> tuple[Any, list[AdapterState]]:
    """Return a PEFT model with two adapters of random factors, `one` and `two`, and both as ours."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    configs = [LoraConfig(target_modules=layers, init_lora_weights=False, **chosen) for chosen in settings]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # it sets it right by itself
        model: Any = get_peft_model(Several(), configs[0], adapter_name="one")  # type: ignore[arg-type]
        model.add_adapter("two", configs[1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    states = []
    for name, config in zip(NAMES, configs, strict=True):
        said = {**config.to_dict(), "fan_in_fan_out": False, "init_lora_weights": True}
        said["target_modules"] = list(said["target_modules"])
        states.append(from_peft(said, get_peft_model_state_dict(model, adapter_name=name)))
    return model, states


def theirs(model: Any, name: str) -> dict[str, Tensor]:
    """Return PEFT's dW of an adapter at every layer, as (out, in, ...)."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            change = module.get_delta_weight(name).detach().double()
            found[path] = change.T if path in ("fused", "table") else change
    return found


def made_by_peft(model: Any, weights: list[float], how: str, **options: Any) -> dict[str, Tensor]:
    """Return dW of what add_weighted_adapter makes of both."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        model.base_model.add_weighted_adapter(NAMES, weights, "both", how, **options)
    return theirs(model, "both")


def assert_same(ours: AdapterState, made: dict[str, Tensor]) -> None:
    """Assert that our adapter changes every layer as PEFT's does."""
    found = deltas(ours)
    assert found.keys() == made.keys()
    for key, change in made.items():
        assert_close(found[key].reshape(change.shape), change, dtype=torch.float32)


MIXED = {"r": 3, "lora_alpha": 7}, {"r": 2, "lora_alpha": 5}


def test_our_reading_of_both_adapters_is_theirs() -> None:
    model, states = two_adapters(*MIXED)
    for name, state in zip(NAMES, states, strict=True):
        assert_same(state, theirs(model, name))


@pytest.mark.parametrize("how", ["linear", "concat"])
def test_concatenation_equals_peft_s(how: str) -> None:
    model, states = two_adapters(*MIXED)
    assert_same(combine(states, how, WEIGHTS).state, made_by_peft(model, WEIGHTS, "cat"))


def test_ranks_and_alphas_by_layer_are_peft_s() -> None:
    of_a, of_b = {"rank_pattern": {"first": 4}}, {"rank_pattern": {"conv": 1}, "alpha_pattern": {"conv": 9}}
    model, states = two_adapters({**MIXED[0], **of_a}, {**MIXED[1], **of_b})
    assert_same(combine(states, "linear", WEIGHTS).state, made_by_peft(model, WEIGHTS, "cat"))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_svd_equals_peft_s(rank: int) -> None:
    layers = ["first", "fused"]
    model, states = two_adapters(*MIXED, layers=layers)
    assert_same(combine(states, Svd(rank), WEIGHTS).state, made_by_peft(model, WEIGHTS, "svd", svd_rank=rank))


def test_the_usual_rank_of_svd_is_peft_s() -> None:
    model, states = two_adapters(*MIXED, layers=["first", "fused"])
    assert_same(combine(states, "svd", WEIGHTS).state, made_by_peft(model, WEIGHTS, "svd"))


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_ties_on_the_change_equals_peft_s(density: float) -> None:
    model, states = two_adapters(*MIXED, layers=["first", "fused"])
    ours = combine(states, Ties(density, rank=4), [0.7, 1.2]).state
    assert_same(ours, made_by_peft(model, [0.7, 1.2], "ties_svd", density=density, svd_rank=4))


@pytest.mark.parametrize("elect", [False, True])
def test_dare_equals_peft_s_with_the_same_draws(elect: bool) -> None:
    from peft.utils.merge_utils import dare_linear, dare_ties

    states = [adapter(LoRA(2, 3.0)), adapter(LoRA(3, 4.0))]
    ours = deltas(combine(states, Dare(0.4, rank=9, elect=elect), rng=torch.Generator().manual_seed(7)).state)
    torch.manual_seed(7)
    for key, change in ours.items():
        given = [deltas(s)[key].float() for s in states]
        assert_close(change, (dare_ties if elect else dare_linear)(given, torch.ones(2), 0.4), dtype=torch.float32)


EQUAL = {"r": 3, "lora_alpha": 7}, {"r": 3, "lora_alpha": 2}


@pytest.mark.parametrize("weights", [[0.7, 1.2], WEIGHTS])
def test_factorwise_is_what_peft_calls_linear(weights: list[float]) -> None:
    model, states = two_adapters(*EQUAL)
    assert_same(combine(states, Factorwise(), weights).state, made_by_peft(model, weights, "linear"))


# where PEFT's result is not what it says


def test_peft_s_linear_is_not_the_weighted_sum_and_ours_is() -> None:
    model, states = two_adapters(*EQUAL)
    wanted, made = summed(states, WEIGHTS), made_by_peft(model, WEIGHTS, "linear")
    ours = combine(states, "linear", WEIGHTS)
    assert ours.error < 1e-6
    for key, change in wanted.items():
        assert float((made[key].reshape(change.shape) - change).norm()) > 0.3 * float(change.norm())
    assert combine(states, "factorwise", WEIGHTS).error > 0.3, "and ours of that name says so"


@pytest.mark.parametrize(("how", "rank", "ours"), [("cat", 6, "linear"), ("svd", 3, Svd(3))])
def test_peft_s_result_of_stabilised_adapters_is_too_large_by_the_root_of_its_rank(
    how: str, rank: int, ours: str | How
) -> None:
    model, states = two_adapters(*({**chosen, "use_rslora": True} for chosen in EQUAL), layers=["first", "fused"])
    right = deltas(combine(states, ours, WEIGHTS).state)
    for key, change in made_by_peft(model, WEIGHTS, how).items():
        assert_close(change, math.sqrt(rank) * right[key], dtype=torch.float32)
    assert_same(combine(states, "linear", WEIGHTS).state, summed(states, WEIGHTS))


def test_peft_s_ties_of_one_update_split_in_two_ways_is_not_that_update() -> None:
    from peft.utils.merge_utils import ties

    # the same dW as B A and as (-B)(-A): the entries of the factors vote against each other
    b, a = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, -3.0]])
    weights = torch.ones(2)
    apart = ties([b, -b], weights, 0.999) @ ties([a, -a], weights, 0.999)
    assert float((apart - b @ a).norm()) > 0.5 * float((b @ a).norm())
    states = [pair(b.tolist(), a.tolist()), pair((-b).tolist(), (-a).tolist())]
    assert_close(deltas(combine(states, Ties(density=1.0)).state)["layer"], (b @ a).double(), dtype=torch.float32)


def test_peft_s_sum_of_one_dora_is_not_that_dora_and_ours_is() -> None:
    from peft import get_peft_model_state_dict

    chosen = {"r": 2, "lora_alpha": 4, "use_dora": True}
    model, states = two_adapters(chosen, chosen, layers=["first"])
    layer = model.base_model.model.first
    weight = layer.base_layer.weight.detach()
    base = {"first": weight}
    assert isinstance(states[0].updates[0].method, DoRA)
    assert "magnitude" in states[0].updates[0].tensors
    wanted = deltas(states[0], base)["first"]
    ours = combine([states[0]], Svd(rank=6), base=base)
    assert_close(deltas(ours.state)["first"], wanted, dtype=torch.float32)
    model.base_model.add_weighted_adapter(["one"], [1.0], "both", "linear")
    magnitude = get_peft_model_state_dict(model, adapter_name="both")["base_model.model.first.lora_magnitude_vector"]
    assert not torch.allclose(magnitude, states[0].updates[0].tensors["magnitude"], rtol=0.01)
