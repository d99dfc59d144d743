"""AdaLoRA's numbers by hand: its scale, its penalty, its budget, the importance, what survives and what is trimmed."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.method import Schedule
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach
from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.pruning import Budget, Pruning
from tests.law.cases import Net, jitter
from tests.tolerances import assert_close


def test_the_update_by_hand() -> None:
    method = AdaLoRA(target_rank=1, init_rank=2, alpha=4.0)
    p = {"up": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "gain": torch.tensor([3.0, 5.0]), "down": torch.eye(2)}
    assert_close(method.delta(p, torch.zeros(2, 2)), 4 / 2.00001 * torch.tensor([[3.0, 0.0], [0.0, 10.0]]))


def test_the_scale_stays_when_triplets_go() -> None:
    assert AdaLoRA(2, 6, 16.0).scale == pytest.approx(2.666662, abs=1e-6)
    assert AdaLoRA(2, 6, 16.0, kept=1).scale == AdaLoRA(2, 6, 16.0).scale


def test_the_start_is_normal_and_changes_nothing() -> None:
    model = Net(nn.Linear(300, 200))
    attach(model, AdapterSpec(AdaLoRA(8, 64), Targets("layer")))
    p = adapters_named(model, "default")[0].tensors()
    assert not p["gain"].any()
    assert p["down"].std().item() == pytest.approx(0.02, rel=0.02)
    assert p["up"].std().item() == pytest.approx(0.02, rel=0.02)


def test_the_penalty_by_hand() -> None:
    method = AdaLoRA(1, 2, orthogonal_weight=0.5)
    up, down = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    p = {"up": up, "down": down, "gain": torch.zeros(2)}
    # P^T P = I; Q Q^T - I = diag(3, 0): the norm is 3, not 9; half of the mean of 0 and 3
    assert method.penalty(p, {}).item() == pytest.approx(0.75)
    near_0 = {"up": 1e-4 * torch.randn(9, 6), "down": 1e-4 * torch.randn(6, 9), "gain": torch.zeros(6)}
    assert AdaLoRA(2, 6, orthogonal_weight=1.0).penalty(near_0, {}).item() == pytest.approx(math.sqrt(6))


def test_the_budget_by_hand() -> None:
    budget = Budget(first=12, last=4, tinit=3, end=15, delta_t=1)
    assert [budget.at(t)[0] for t in range(16)] == [12, 12, 12, 12, 10, 8, 7, 6, 5, 5, 4, 4, 4, 4, 4, 4]
    assert [budget.at(t)[1] for t in range(21)] == [False] * 4 + [True] * 17
    sparse = Budget(first=12, last=4, tinit=3, end=15, delta_t=4)
    assert [t for t in range(18) if sparse.at(t)[1]] == [4, 8, 12, 15, 16, 17]


def test_the_importance_by_hand() -> None:
    p = {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    pruning = Pruning({"a": (Site("a", 1, 1), p)}, Budget(1, 1, 9, 10, 1), 0.85, 0.85)
    for step, grad in enumerate((1.0, -2.0), 1):
        for w in p.values():
            w.grad = torch.full_like(w, grad)
        pruning.after_step(step, torch.optim.SGD(p.values()))
    state = pruning.state_dict()
    for name in SHAPES:
        assert state[f"a.{name}/sensitivity"].item() == pytest.approx(0.4275)
        assert state[f"a.{name}/uncertainty"].item() == pytest.approx(0.34425)
        score = state[f"a.{name}/sensitivity"] * state[f"a.{name}/uncertainty"]
        assert score.item() == pytest.approx(0.147167, abs=1e-6)


SHAPES = {"down": (1, 1), "up": (1, 1), "gain": (1,)}


class Course:
    """A little run: three layers, one of them grouped, with gradients anyone can draw again."""

    def __init__(self, method: AdaLoRA, steps: int = 20, order: int = 1) -> None:
        torch.manual_seed(3)
        layers = {"a": nn.Linear(12, 8), "b": nn.Conv2d(12, 8, 3, groups=2), "c": nn.Embedding(12, 8)}
        self.model = nn.ModuleDict(layers)
        attach(self.model, AdapterSpec(method, Targets("*")))
        self.adapters = {a.site.key: (a.site, a.tensors()) for a in adapters_named(self.model, "default")}
        for adapter in adapters_named(self.model, "default"):
            jitter(adapter)
        self.parameters = [w for _, p in self.adapters.values() for w in p.values()]
        self.optimizer = torch.optim.AdamW(self.parameters, 0.01)
        self.schedule: Schedule = method.schedule(dict(list(self.adapters.items())[::order]), steps)

    def go(self, first: int, last: int) -> list[int]:
        """Take steps and return how many triplets acted after each."""
        acting = []
        for step in range(first, last + 1):
            rng = torch.Generator().manual_seed(step)
            for w in self.parameters:
                w.grad = torch.randn(w.shape, generator=rng)
            self.optimizer.step()
            self.schedule.after_step(step, self.optimizer)
            acting.append(sum(int((p["gain"] != 0).sum()) for _, p in self.adapters.values()))
        return acting

    def values(self) -> list[Tensor]:
        return [w.detach().clone() for w in self.parameters]


METHOD = AdaLoRA(target_rank=2, init_rank=6, tinit=3, tfinal=5)


def test_exactly_the_budget_survives_each_step_and_the_last_choice_stays() -> None:
    course = Course(METHOD)
    b = [int((18 - 6) * (1 - (t - 3) / 12) ** 3 + 6) for t in range(4, 15)]
    assert course.go(1, 20) == [18, 18, 18, *b, *[6] * 6]
    assert course.schedule.settled == 15
    last = [p["gain"] != 0 for _, p in course.adapters.values()]
    course.go(21, 25)
    assert set(course.schedule.state_dict()) == {"a/kept", "b/kept", "c/kept"}, "nothing else is needed any more"
    assert all(torch.equal(p["gain"] != 0, m) for (_, p), m in zip(course.adapters.values(), last, strict=True))


def test_the_last_choice_goes_by_the_gradients_before_it() -> None:
    # as PEFT's: at step T - tfinal the importance is no longer updated
    choices = []
    for size in (0.0, 1e6):
        course = Course(METHOD)
        course.go(1, 14)
        for w in course.parameters:
            w.grad = size * torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
        course.schedule.after_step(15, course.optimizer)
        choices.append([p["gain"] != 0 for _, p in course.adapters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*choices, strict=True))


def test_of_equal_scores_exactly_the_budget_survives() -> None:
    course = Course(AdaLoRA(target_rank=2, init_rank=6), steps=2)
    for w in course.parameters:
        w.grad = torch.zeros_like(w)
    course.schedule.after_step(2, course.optimizer)
    assert sum(int((p["gain"] != 0).sum()) for _, p in course.adapters.values()) == 6


def test_a_pruned_triplet_may_come_back_until_the_last_choice() -> None:
    course = Course(METHOD)
    course.go(1, 8)
    pruned = next(p for _, p in course.adapters.values() if (p["gain"] == 0).any())
    i = int((pruned["gain"] == 0).nonzero()[0])
    for step in (9, 10):
        for w in course.parameters:
            w.grad = torch.zeros_like(w)
        pruned["gain"].grad[i] = 1e3  # type: ignore[index]
        course.optimizer.step()
        course.schedule.after_step(step, course.optimizer)
    assert pruned["gain"][i] != 0


def test_the_order_of_the_sites_does_not_matter() -> None:
    forth, back = Course(METHOD), Course(METHOD, order=-1)
    for step in range(1, 21):
        assert forth.go(step, step) == back.go(step, step)
        assert all(torch.equal(a, b) for a, b in zip(forth.values(), back.values(), strict=True))


@pytest.mark.parametrize("stop", [2, 7, 15, 17])  # before pruning, amid it, at the last choice, after it
def test_a_schedule_resumed_in_the_middle_goes_on_bit_for_bit(stop: int) -> None:
    whole = Course(METHOD)
    whole.go(1, 20)
    broken, resumed = Course(METHOD), Course(METHOD)
    broken.go(1, stop)
    with torch.no_grad():
        for w, value in zip(resumed.parameters, broken.values(), strict=True):
            w.copy_(value)
    resumed.optimizer.load_state_dict(broken.optimizer.state_dict())
    resumed.schedule.load_state_dict(broken.schedule.state_dict())
    resumed.go(stop + 1, 20)
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), resumed.values(), strict=True))


def test_a_weight_without_a_gradient_keeps_its_importance() -> None:
    course = Course(METHOD)
    course.go(1, 2)
    before = {name: value.clone() for name, value in course.schedule.state_dict().items()}
    for w in course.parameters:
        w.grad = None
    course.schedule.after_step(3, course.optimizer)
    assert all(torch.equal(value, before[name]) for name, value in course.schedule.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "zero", "kept"),
    [
        (lambda: nn.Linear(12, 8), (1, 2, 5), 3),
        (lambda: nn.Linear(12, 8), (), 6),
        (lambda: nn.Conv2d(12, 8, 3, groups=2), (0, 1, 2), 6),  # all of the first group: the second keeps three
        (lambda: nn.Conv2d(12, 8, 3, groups=2), (0, 2, 4, 5), 2),
        (lambda: nn.Conv2d(12, 8, 3, groups=2), (0, 3, 4), 4),
    ],
)
def test_a_trimmed_update_is_the_same_and_smaller(layer: Any, zero: tuple[int, ...], kept: int) -> None:
    model = Net(layer())
    attach(model, AdapterSpec(AdaLoRA(2, 6, 16.0), Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    jitter(adapter)
    with torch.no_grad():
        adapter.get_parameter("gain")[list(zero)] = 0.0
    trimmed = adapter.method.trimmed(adapter.site, adapter.tensors())  # type: ignore[attr-defined]
    assert trimmed is not None
    method, p = trimmed
    assert method.rank == method.kept == kept
    assert {name: tuple(t.shape) for name, t in p.items()} == {
        name: d.shape for name, d in method.tensors(adapter.site).items()
    }
    weight = torch.zeros(adapter.site.shape)
    assert_close(method.delta(p, weight), adapter.method.delta(adapter.tensors(), weight))  # type: ignore[attr-defined]


def test_where_nothing_acts_nothing_is_left() -> None:
    method = AdaLoRA(2, 6)
    p = {"down": torch.randn(6, 12), "up": torch.randn(8, 6), "gain": torch.zeros(6)}
    assert method.trimmed(Site("layer", 8, 12), p) is None


@pytest.mark.parametrize(("target", "init"), [(8, 8), (12, 8)])
def test_a_target_that_is_not_below_the_start_is_refused(target: int, init: int) -> None:
    with pytest.raises(
        SpecError, match=rf"target_rank {target} must be below init_rank {init}.*raise init_rank .*lora"
    ):
        AdaLoRA(target_rank=target, init_rank=init)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"target_rank": 0}, "target_rank must be a whole number of at least 1, not 0"),
        ({"tinit": -1}, "tinit must be a whole number of at least 0, not -1"),
        ({"delta_t": 0}, "delta_t must be a whole number of at least 1, not 0"),
        ({"kept": 0}, "kept must be a whole number of at least 1, not 0"),
        ({"alpha": 0.0}, r"alpha must be a positive number, not 0\.0; the usual choice is 2 \* init_rank"),
        ({"beta1": 1.0}, r"beta1 must lie between 0 and 1, not 1\.0; the paper's is 0\.85"),
        ({"beta2": 0.0}, "beta2 must lie between 0 and 1"),
        ({"orthogonal_weight": -0.1}, r"orthogonal_weight must be at least 0, not -0\.1; usual are 0\.1 to 0\.5"),
        ({"orthogonal_weight": math.nan}, "orthogonal_weight must be at least 0, not nan"),
    ],
)
def test_a_field_that_cannot_be_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        AdaLoRA(**fields)


def test_a_rank_of_another_type_is_refused_where_no_type_checker_runs() -> None:
    script = (
        "from lorakit import LorakitError\n"
        "from lorakit.methods.adalora import AdaLoRA\n"
        "for rank in (1.5, '8', True):\n"
        "    try: AdaLoRA(target_rank=rank); print('taken')\n"
        "    except LorakitError as e: print(e)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == [
        f"target_rank must be a whole number of at least 1, not {rank}" for rank in ("1.5", "'8'", "True")
    ]


@pytest.mark.parametrize(("tinit", "tfinal", "steps"), [(8, 5, 13), (0, 5, 5), (3, 0, 3)])
def test_a_run_too_short_to_prune_in_is_refused(tinit: int, tfinal: int, steps: int) -> None:
    with pytest.raises(SpecError, match=rf"{steps} steps leaves none to prune in between tinit {tinit} and tfinal"):
        Course(AdaLoRA(2, 6, tinit=tinit, tfinal=tfinal), steps=steps)
