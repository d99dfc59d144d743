"""Adaptive LoRA by hand: its scale, its scores, and a reallocation that moves rank and keeps what was learned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.core.adapters import Adapter
from lorakit.core.method import Schedule
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach
from lorakit.methods.adaptive import Adaptive
from lorakit.methods.lora import LoRA
from lorakit.methods.reallocation import SCORES
from tests.tolerances import assert_close

METHOD = Adaptive(target_rank=4, low=2, high=8, alpha=8.0, rounds=2)
SIZES = {"a": 10.0, "b": 3.0, "c": 1.0}


def course(method: Adaptive = METHOD, order: int = 1) -> tuple[list[Adapter], torch.optim.AdamW, Schedule]:
    """Return three adapted layers that have learned differently much, their optimizer, and a run of 9 steps."""
    model = nn.ModuleDict({name: nn.Linear(12, 10) for name in SIZES})
    attach(model, AdapterSpec(method, Targets("*")))
    adapters = adapters_named(model, "default")
    optimizer = torch.optim.AdamW([p for a in adapters for p in a.parameters()], 1e-3, weight_decay=0.0)
    for adapter in adapters:
        for parameter in adapter.parameters():
            parameter.grad = torch.ones_like(parameter)
        up = adapter.get_parameter("up")
        with torch.no_grad():
            up.copy_(torch.randn(up.shape))
            up.copy_(SIZES[adapter.site.key] * up / (up[:, :4] @ adapter.get_parameter("down")[:4]).norm())
    optimizer.step()
    live = {a.site.key: (a.site, a.tensors()) for a in adapters[::order]}
    return adapters, optimizer, method.schedule(live, 9)


def ranks(adapters: list[Adapter]) -> list[int]:
    return [int(a.get_buffer("gate").sum()) for a in adapters]


def deltas(adapters: list[Adapter]) -> list[torch.Tensor]:
    return [a.delta(torch.zeros(10, 12)).detach() for a in adapters]


def test_the_scale_is_that_of_the_target_whatever_the_rank() -> None:
    p = {"down": torch.eye(3), "up": torch.eye(3), "gate": torch.tensor([1.0, 1.0, 0.0])}
    delta = Adaptive(target_rank=2, high=3, alpha=6.0).delta(p, torch.zeros(3, 3))
    assert_close(delta, torch.diag(torch.tensor([3.0, 3.0, 0.0])))


def test_a_fresh_adapter_has_the_target_rank_everywhere_and_learns_as_lora_does() -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(12, 10), torch.randn(5, 12)
    grads = []
    for method in (Adaptive(target_rank=4, high=8, alpha=8.0), LoRA(rank=4, alpha=8.0)):
        model = nn.Sequential(base)
        attach(model, AdapterSpec(method, Targets("0")))
        adapter = adapters_named(model, "default")[0]
        with torch.no_grad():
            adapter.get_parameter("down").copy_(torch.arange(8 * 12.0).view(8, 12)[: adapter.method.rank])  # type: ignore[attr-defined]
        model(x).square().sum().backward()
        grads.append(adapter.get_parameter("up").grad)
    assert grads[0] is not None
    assert grads[1] is not None
    assert_close(grads[0][:, :4], grads[1])
    assert not grads[0][:, 4:].any(), "what does not act does not learn"


def test_the_scores_by_hand() -> None:
    sigma = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert SCORES["norm"](sigma).item() == pytest.approx(math.sqrt(6))
    assert SCORES["entropy"](sigma).item() == pytest.approx(math.sqrt(6) * 2.828427)
    assert SCORES["entropy"](torch.zeros(3)).item() == 0.0


def test_rank_moves_to_the_layers_with_the_largest_updates() -> None:
    adapters, optimizer, schedule = course()
    before = deltas(adapters)
    schedule.after_step(2, optimizer)
    assert ranks(adapters) == [4, 4, 4], "between the rounds nothing moves"
    schedule.after_step(3, optimizer)
    # 12 in all, at most 8, at least 2: sizes 10, 3, 1 -> 8, 2, 2
    assert ranks(adapters) == [8, 2, 2]
    after = deltas(adapters)
    assert (after[0] - before[0]).norm() <= 1e-6 * before[0].norm(), "growing keeps the update"
    for i in (1, 2):
        tail = torch.linalg.svdvals(before[i])[2:].square().sum()
        assert_close((after[i] - before[i]).square().sum(), tail)
    assert schedule.settled == 6


def test_the_moments_of_a_turned_pair_are_forgotten_and_others_kept() -> None:
    adapters, optimizer, schedule = course(Adaptive(target_rank=4, low=1, high=8, rounds=2))
    with torch.no_grad():  # sizes in the ratio 5 : 4 : 3 -> ranks 5, 4, 3
        for adapter, size in zip(adapters, (5.0, 4.0, 3.0), strict=True):
            up, down = adapter.get_parameter("up"), adapter.get_parameter("down")
            up.mul_(size / (up[:, :4] @ down[:4]).norm())
    values = [p.detach().clone() for p in adapters[1].parameters()]
    schedule.after_step(3, optimizer)
    assert ranks(adapters) == [5, 4, 3]
    kept = [[bool(optimizer.state.get(p)) for p in a.parameters()] for a in adapters]
    assert kept == [[False, False], [True, True], [False, False]]
    assert all(torch.equal(a, b) for a, b in zip(values, adapters[1].parameters(), strict=True))
    optimizer.step()
    assert optimizer.state[adapters[0].get_parameter("up")]["step"] == 1


def test_the_order_of_the_sites_does_not_matter() -> None:
    results = []
    for order in (1, -1):
        torch.manual_seed(5)
        adapters, optimizer, schedule = course(order=order)
        schedule.after_step(3, optimizer)
        results.append([ranks(adapters), deltas(adapters)])
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_the_rounds_are_spread_over_the_run() -> None:
    adapters = {"a": (adapters_named(single(), "default")[0].site, {})}
    for steps, rounds, settled in ((100, 4, 80), (5, 4, 4), (9, 2, 6), (7, 1, 4)):
        schedule: Any = Adaptive(rounds=rounds).schedule(adapters, steps)
        assert schedule.settled == settled


def single() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16))
    attach(model, AdapterSpec(Adaptive(), Targets("0")))
    return model


def test_the_budget_is_the_parameters_of_the_target_rank() -> None:
    model = nn.ModuleDict({"wide": nn.Linear(40, 20), "narrow": nn.Linear(10, 10)})
    method = Adaptive(target_rank=4, high=8, rounds=1)
    attach(model, AdapterSpec(method, Targets("*")))
    adapters = adapters_named(model, "default")
    with torch.no_grad():
        adapters[1].get_parameter("up").normal_()  # only the narrow one has learned anything
    live = {a.site.key: (a.site, a.tensors()) for a in adapters}
    method.schedule(live, 4).after_step(2, torch.optim.SGD(adapters[0].parameters()))
    # 4 * (60 + 20) = 320 parameters: 8 narrow ones cost 160, the other 160 buy 2 wide ones of 60
    assert ranks(adapters) == [2, 8]


def test_a_trimmed_update_is_a_plain_lora() -> None:
    adapters, optimizer, schedule = course()
    schedule.after_step(3, optimizer)
    for adapter, rank in zip(adapters, (8, 2, 2), strict=True):
        method, p = METHOD.trimmed(adapter.site, adapter.tensors())
        assert isinstance(method, LoRA)
        assert (method.rank, method.alpha) == (rank, 2.0 * rank)
        assert_close(method.delta(p, torch.zeros(10, 12)), adapter.delta(torch.zeros(10, 12)))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"target_rank": 20}, r"target_rank 20 must lie in 1 to 16 \(low to high\).*change it, or move the limits"),
        ({"low": 9}, "target_rank 8 must lie in 9 to 16"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1, not 0"),
        ({"low": 0}, "low must be a whole number of at least 1, not 0"),
        ({"alpha": -1.0}, r"alpha must be a positive number, not -1\.0; the usual choice is 2 \* target_rank"),
        ({"score": "nrom"}, "unknown score 'nrom'; did you mean 'norm'\\?; known: norm, entropy"),
    ],
)
def test_a_field_that_cannot_be_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        Adaptive(**fields)


def test_a_run_too_short_for_its_rounds_is_refused() -> None:
    with pytest.raises(SpecError, match="4 steps have no room for 4 rounds; lower rounds, or train longer"):
        Adaptive().schedule({}, 4)


def test_a_limit_above_the_weight_s_rank_is_refused_with_its_path() -> None:
    with pytest.raises(SpecError, match=r"0: rank 16 exceeds min\(out, in\) = 12"):
        attach(nn.Sequential(nn.Linear(12, 16)), AdapterSpec(Adaptive(), Targets("0")))
