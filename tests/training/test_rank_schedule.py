"""Rank schedules in a run: they act once an optimizer step, survive a crash, and leave an adapter at its budget."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import AdapterSpec, LoRA, Targets, attach, load
from lorakit.core.method import LowRank
from lorakit.core.spec import Override
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named
from lorakit.methods.adalora import AdaLoRA
from lorakit.persist.native import load_native
from lorakit.training.base import load_base
from lorakit.training.checkpoints import checkpoints
from lorakit.training.evaluate import evaluate
from lorakit.training.events import Event, read_events
from lorakit.training.flow import evaluations_since_best
from lorakit.training.rank_schedule import RANKS, RankSchedules
from lorakit.training.recipe import Recipe, load_recipe
from lorakit.training.run import Run, train
from tests.slow import others_slow
from tests.tolerances import assert_close
from tests.training.samples import pairs, recipe_of, write_rows

ADAPTERS: dict[str, dict[str, Any]] = {
    "adalora": {"method": "adalora", "target_rank": 2, "init_rank": 4, "alpha": 8, "tinit": 2, "tfinal": 3},
    "adaptive": {"method": "adaptive", "target_rank": 3, "low": 1, "high": 6, "alpha": 6, "rounds": 3},
}
both = pytest.mark.parametrize("method", ADAPTERS)


def of(base: Path, folder: Path, method: str, **changes: Any) -> Recipe:
    """A recipe of 15 steps, 5 an epoch, two micro-batches each."""
    folder.mkdir(exist_ok=True)
    demanding = {"train__epochs": 3, "train__batch_size": 5, "train__accumulation": 2, "train__save_every": 2}
    return recipe_of(base, folder, **{"adapter": dict(ADAPTERS[method]), **demanding, **changes})


def steps(folder: Path, kind: str = "step") -> list[Event]:
    return [event for event in read_events(folder / "run" / "events.jsonl") if event["event"] == kind]


class Stopped(Exception):
    """Stands for a crash."""


def stop_at(step: int) -> Any:
    def listen(event: Event) -> None:
        if event["event"] == "step" and event["step"] == step:
            raise Stopped

    return listen


def ranks(run: Run) -> list[int]:
    """Return the rank of each of the 14 layers, 0 for one of which nothing is left."""
    found = [update.method.rank for update in load(run.adapter_dir).updates if isinstance(update.method, LowRank)]
    return found + [0] * (14 - len(found))


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, Path]]:
    """A run of each method that was never stopped, and its folder."""
    folders = {method: tmp_path_factory.mktemp(method) for method in ADAPTERS}
    return {method: (train(of(base, folder, method)), folder) for method, folder in folders.items()}


def test_adalora_ends_on_its_budget_and_only_that_is_saved(whole: dict[str, tuple[Run, Path]]) -> None:
    run, folder = whole["adalora"]
    assert sum(ranks(run)) == 2 * 14
    assert len(set(ranks(run))) > 1, "layers differ in what they are worth"
    last = load_native(checkpoints(folder / "run")[-1])
    assert {len(u.tensors["gain"]) for u in last.updates} == {4}, "a checkpoint can be trained on"
    kept = {u.site.path: u for u in load(run.adapter_dir).updates}
    for update in last.updates:
        acting = update.tensors["gain"] != 0
        smaller = kept[update.site.path].tensors["gain"] if acting.any() else torch.zeros(0)
        assert torch.equal(update.tensors["gain"][acting], smaller)


def test_adaptive_spends_at_most_its_budget_and_is_saved_as_plain_lora(whole: dict[str, tuple[Run, Path]]) -> None:
    run, _ = whole["adaptive"]
    adapter = load(run.adapter_dir)
    assert (Path(run.adapter_dir) / "adapter_config.json").is_file()
    assert {update.method.name for update in adapter.updates} == {"lora"}
    uniform, dearest = 3 * sum(u.site.out + u.site.in_ for u in adapter.updates), 48 + 32
    assert uniform - dearest < adapter.parameters <= uniform
    assert min(ranks(run)) >= 1
    assert len(set(ranks(run))) > 1


@both
@pytest.mark.parametrize("step", others_slow([3, 8, 13], [8]))  # AdaLoRA's choice falls at 12, rounds at 4, 8 and 12
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    base: Path, tmp_path: Path, whole: dict[str, tuple[Run, Path]], method: str, step: int
) -> None:
    recipe = of(base, tmp_path, method)
    with pytest.raises(Stopped):
        train(recipe, listen=stop_at(step))
    assert (checkpoints(tmp_path / "run")[-1] / RANKS).is_file()
    torch.rand(7)
    run = train(recipe, resume=True)
    expected, folder = whole[method]
    files = [sorted(Path(each.adapter_dir).glob("*.safetensors")) for each in (run, expected)]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    told = [{e["step"]: e["loss"] for e in steps(each)} for each in (tmp_path, folder)]
    assert told[0] == told[1]


@both
def test_one_batch_of_16_equals_two_of_8_accumulated(base: Path, tmp_path: Path, method: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", pairs(45))  # the last step of an epoch has fewer micro-batches
    shared = {"data__train": data, "train__epochs": 2, "train__save_every": 100}
    runs = [
        train(of(base, tmp_path / str(n), method, **shared, train__batch_size=16 // n, train__accumulation=n))
        for n in (1, 2)
    ]
    whole, halves = ([e["loss"] for e in steps(tmp_path / n)] for n in "12")
    assert whole == pytest.approx(halves, rel=1e-6)
    assert ranks(runs[0]) == ranks(runs[1])
    theirs = {u.site.path: u.tensors for u in load(runs[1].adapter_dir).updates}
    for update in load(runs[0].adapter_dir).updates:
        for name, tensor in update.tensors.items():
            assert_close(tensor, theirs[update.site.path][name], scale=1.0)


def test_the_penalty_counts_once_a_step_and_the_loss_told_is_the_data_s(base: Path, tmp_path: Path) -> None:
    weighed = [
        train(of(base, tmp_path / str(i), "adalora", train__schedule="constant", adapter__orthogonal_weight=weight))
        for i, weight in enumerate((0.0, 0.5))
    ]
    free, held = (steps(tmp_path / n) for n in "01")
    assert free[0]["loss"] == held[0]["loss"], "the penalty is not in it"
    assert free[0]["gradient_norm"] < held[0]["gradient_norm"]
    assert free[-1]["loss"] != held[-1]["loss"]
    off = []
    for run, folder in zip(weighed, "01", strict=True):
        last = load_native(checkpoints(tmp_path / folder / "run")[-1])
        off.append(sum(float(AdaLoRA(2, 4).penalty(u.tensors, {})) for u in last.updates))
        assert run.steps == 15
    assert off[1] < off[0], "factors held to be orthogonal are nearer to it"


def test_the_best_adapter_is_one_that_is_at_its_budget(base: Path, tmp_path: Path) -> None:
    strange = write_rows(tmp_path / "v.jsonl", [{"prompt": "a cab =", "completion": " QXZQXZQXZ"}])
    run = train(
        of(base, tmp_path, "adalora", data__validation=strange, train__lr=0.05, train__evaluate_every=1)
    )  # the longer it trains, the less likely these rows: the best step of all is before the budget is met
    told = {e["step"]: e["loss"] for e in steps(tmp_path, "evaluate")}
    assert min(told, key=lambda step: told[step]) < 12
    assert run.best_step == min((s for s in told if s >= 12), key=lambda step: told[step])
    assert run.validation_loss == told[run.best_step]
    assert sum(ranks(run)) == 2 * 14
    for event in steps(tmp_path, "evaluate"):
        assert (event["best_loss"] is None) == (event["best_step"] is None) == (event["step"] < 12)
    model, tokenizer = load_base(str(base))
    attach(model, load(run.adapter_dir))
    data = load_recipe(tmp_path / "run" / "recipe.yaml").data
    assert evaluate(model, tokenizer, strange, data).loss == pytest.approx(run.validation_loss, rel=1e-5)


def test_patience_begins_when_the_ranks_are_settled(base: Path, tmp_path: Path) -> None:
    strange = write_rows(tmp_path / "v.jsonl", [{"prompt": "a cab =", "completion": " QXZQXZQXZ"}])
    changes = {"train__lr": 0.05, "train__evaluate_every": 1, "train__patience": 1, "train__epochs": 4}
    run = train(of(base, tmp_path, "adalora", data__validation=strange, adapter__tfinal=12, **changes))
    assert 8 <= run.steps < 20
    assert run.best_step is not None
    assert run.best_step >= 8
    history = [{"eval_loss": loss, "step": step} for step, loss in enumerate((1.0, 5.0, 4.0, 6.0), 1)]
    assert evaluations_since_best(history) == 3
    assert evaluations_since_best(history, settled=2) == 1


def net(spec: AdapterSpec) -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12))
    attach(model, spec)
    return model


def test_sites_with_other_fields_have_a_budget_of_their_own() -> None:
    spec = AdapterSpec(AdaLoRA(2, 6), Targets(["0", "1"]), overrides=[Override.of("1", init_rank=4, tfinal=3)])
    schedules = RankSchedules(net(spec), 10)
    assert [schedule.settled for schedule in schedules.schedules] == [10, 7]
    assert schedules.settled == 10


def test_a_skipped_step_prunes_but_teaches_nothing() -> None:
    model = net(AdapterSpec(AdaLoRA(2, 6), Targets(["0", "1"])))
    schedules = RankSchedules(model, 3)
    parameters = [p for a in adapters_named(model, "default") for p in a.parameters()]
    kept = [a.get_parameter("gain") for a in adapters_named(model, "default")]

    def step(number: int, gradient: float, skipped: bool) -> dict[str, torch.Tensor]:
        for p in parameters:
            p.grad = torch.full_like(p, gradient)
        optimizer = torch.optim.SGD(parameters)
        optimizer.step_was_skipped = skipped  # type: ignore[attr-defined]
        state: Any = SimpleNamespace(global_step=number - 1)
        schedules.on_optimizer_step(None, state, None, optimizer=optimizer)  # type: ignore[arg-type]
        return dict(schedules.schedules[0].state_dict())

    with torch.no_grad():
        for gain in kept:
            gain.fill_(1.0)
    before = step(1, 0.5, False)
    after = step(2, float("inf"), True)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert sorted(step(3, float("inf"), True)) == ["0/kept", "1/kept"]
    assert sum(int((gain != 0).sum()) for gain in kept) == 4, "the last step was skipped, and the budget is met"


def test_a_run_without_schedules_keeps_no_state_of_them(tmp_path: Path) -> None:
    ranks = RankSchedules(net(AdapterSpec(LoRA(2), Targets(["0", "1"]))), 10)
    ranks.write(tmp_path)
    ranks.read(tmp_path)
    assert (ranks.settled, list(tmp_path.iterdir())) == (0, [])


def test_a_run_too_short_is_refused_before_its_first_step(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="a run of 5 steps leaves none to prune in between tinit 2 and tfinal 3"):
        train(of(base, tmp_path, "adalora", train__steps=5))
    assert not checkpoints(tmp_path / "run")
