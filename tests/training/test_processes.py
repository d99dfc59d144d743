"""One run in several processes: the same losses and the same adapter as in one, whatever is divided among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import attach, load, load_recipe, merge
from lorakit.cli.launch import launch
from lorakit.errors import LorakitError, RecipeError
from lorakit.training import processes
from lorakit.training.arguments import Plan, share_of
from lorakit.training.base import load_base
from lorakit.training.events import Event, read_events
from lorakit.training.order import Dealt, Shuffled
from lorakit.training.recipe import Recipe
from lorakit.training.run import Run, train
from lorakit.training.sharded import machines
from tests.tolerances import assert_close
from tests.training import two_processes
from tests.training.samples import pairs, recipe_of, write_rows

RUNS: dict[str, dict[str, Any]] = {
    # 45 rows in steps of 16: the last has 13, of which one process takes 7 and the other 6
    "ddp": {"rows": 45, "train__batch_size": 8, "train__accumulation": 2},
    "dropout": {"rows": 48, "train__accumulation": 2, "adapter__dropout": 0.2},
    "last_row": {"rows": 17, "train__batch_size": 4, "train__epochs": 2},  # a step that one process has no row of
    "fsdp": {"rows": 45, "train__parallel": "fsdp", "train__accumulation": 2},
    "hybrid_dora": {
        "rows": 48, "train__parallel": "hybrid", "adapter__method": "dora",
        "train__checkpointing": True, "train__seed": 1,
    },
    "fsdp_adalora": {
        "rows": 48, "train__parallel": "fsdp", "train__steps": 8,
        "adapter": {"method": "adalora", "target_rank": 2, "init_rank": 3, "tinit": 2, "tfinal": 2},
    },
    "fsdp_nf4": {"rows": 48, "train__parallel": "fsdp", "quant": "nf4"},
    # Adam divides by the gradient's size: where that is itself a rounding, as a key's often is, processes differ by a
    # share of the rate; a wrong row differs by the rate
    "stopped": {"rows": 48, "train__save_every": 1, "train__lr": 1e-4},
    "goes_on": {"rows": 48, "train__save_every": 1, "train__accumulation": 2, "adapter__dropout": 0.1},
    "fails": {"rows": 48},
}  # fmt: skip


def recipe(base: Path, folder: Path, name: str) -> Recipe:
    wanted = {**RUNS[name]}
    folder.mkdir(exist_ok=True, parents=True)
    rows = write_rows(folder / f"{name}.jsonl", pairs(wanted.pop("rows")))
    valid = write_rows(folder / f"{name}-v.jsonl", pairs(21, 200))
    return recipe_of(base, folder, data__train=rows, data__validation=valid, output=str(folder / name), **wanted)


def told(folder: Path, kind: str) -> list[Event]:
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == kind]


@pytest.fixture(scope="session")
def together(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes have run every recipe above."""
    folder = tmp_path_factory.mktemp("together")
    for name in RUNS:
        (folder / f"{name}.yaml").write_text(recipe(base, folder, name).to_yaml())
    with pytest.raises(LorakitError, match="stopped at step"):
        train(load_recipe(folder / "goes_on.yaml"), listen=two_processes.interrupt)
    assert launch([str(folder)], 2, [two_processes.__file__]) == 0
    return folder


def assert_same_run(one: Path, other: Path) -> None:
    """The same losses at every step, of training and of validation, and the same adapter, to 1e-6."""
    for kind in ("step", "evaluate"):
        losses = [[e["loss"] for e in told(folder, kind)] for folder in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), kind
        assert losses[0]
    theirs = {(u.site.key, name): t for u in load(other / "adapter").updates for name, t in u.tensors.items()}
    mine = {(u.site.key, name): t for u in load(one / "adapter").updates for name, t in u.tensors.items()}
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert float((tensor - theirs[key]).abs().max()) <= 1e-6 * max(1.0, float(tensor.abs().max())), key


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("stopped", "goes_on", "fails")])
def test_two_processes_make_the_run_of_one(base: Path, together: Path, tmp_path: Path, name: str) -> None:
    alone = train(recipe(base, tmp_path, name))
    assert_same_run(together / name, tmp_path / name)
    shared = Run.read(together / name)
    assert (shared.steps, shared.tokens, shared.trained_tokens) == (alone.steps, alone.tokens, alone.trained_tokens)
    assert told(together / name, "plan")[0]["processes"] == 2


def test_both_processes_know_the_run_and_one_has_written_it(together: Path) -> None:
    one, two = (json.loads((together / f"told-{place}.json").read_text()) for place in (0, 1))
    assert one.pop("fails") != two.pop("fails")
    assert one == two
    assert [e["step"] for e in told(together / "ddp", "step")] == [1, 2, 3]


def test_two_processes_go_on_with_a_run_of_one(base: Path, together: Path, tmp_path: Path) -> None:
    train(recipe(base, tmp_path, "goes_on"))
    assert told(together / "goes_on", "start")[-1]["resumed_from_step"]
    assert_same_run(together / "goes_on", tmp_path / "goes_on")


def test_one_process_goes_on_where_two_were_stopped_by_one_ctrl_c(base: Path, together: Path, tmp_path: Path) -> None:
    words = {json.loads((together / f"told-{place}.json").read_text())["stopped"]["error"] for place in (0, 1)}
    assert words == {"stopped at step 2 of 6, and saved; to go on, run the same recipe with resume"}
    train(load_recipe(together / "stopped.yaml"), resume=True)
    train(recipe(base, tmp_path, "stopped"))
    assert_same_run(together / "stopped", tmp_path / "stopped")


def test_an_error_in_one_process_ends_both_and_is_told_by_the_first(together: Path) -> None:
    one, two = (json.loads((together / f"told-{place}.json").read_text())["fails"]["error"] for place in (0, 1))
    assert "absent.jsonl" in two
    assert one == f"process 1: {two}"
    assert told(together / "fails", "error")[0]["message"] == one


def test_the_blocks_are_divided_what_learns_is_not_and_no_merge_is_made_of_shares(together: Path) -> None:
    one, two = (json.loads((together / f"told-{place}.json").read_text())["sharded"] for place in (0, 1))
    assert one["divided"] == two["divided"] == 14  # q, k, v, o, gate, up, down of two blocks
    assert one["local"] + two["local"] == one["whole"]
    assert one["plain"] == two["plain"]
    last = {name.rpartition("_proj.")[2] if ".adapters." in name else name for name in one["plain"]}
    assert {"adapters.by_name.default.down", "adapters.by_name.default.up", "input_layernorm.weight"} <= last
    assert not any(name.endswith("_proj.weight") for name in last)
    assert "merge it with `lorakit merge`" in one["merge"]


def test_an_adapter_of_divided_weights_merges_into_the_base(base: Path, together: Path) -> None:
    model, tokenizer = load_base(str(base))
    ids = tokenizer("a bad cab =", return_tensors="pt").input_ids
    attach(model, load(together / "fsdp" / "adapter"))
    with torch.no_grad():
        adapted = model(ids).logits
        assert merge(model).layers == 14
        assert_close(model(ids).logits, adapted)


def test_a_hybrid_divides_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 64)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (machines(False), machines(True)) == ((1, 64), (8, 8))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    with pytest.raises(RecipeError, match="64 are no multiple of the 6 here"):
        machines(True)


@pytest.mark.parametrize(("rows", "step", "among"), [(48, 16, 2), (45, 16, 4), (17, 4, 4), (5, 8, 2)])
def test_every_row_is_visited_once_by_one_process_in_the_step_it_belongs_to(rows: int, step: int, among: int) -> None:
    order = list(Shuffled([1] * rows, 0))
    shares = [Dealt(Shuffled([1] * rows, 0), step, place, among) for place in range(among)]
    assert len({len(share) for share in shares}) == 1, "all take as many steps"
    each, parts = step // among, [list(share) for share in shares]
    for i in range(-(-rows // step)):
        visited = [row for part in parts for row in part[i * each : (i + 1) * each]]
        assert visited == order[i * step : (i + 1) * step]


@pytest.mark.parametrize(
    ("rows", "accumulation", "among", "share"),
    [(8, 2, 1, (8, 2)), (8, 2, 2, (8, 1)), (8, 8, 4, (8, 2)), (8, 1, 2, (4, 1)), (8, 3, 2, (6, 2)), (4, 3, 4, (3, 1))],
)
def test_a_step_is_as_large_on_any_number_of_processes(
    rows: int, accumulation: int, among: int, share: tuple[int, int]
) -> None:
    plan = Plan(1, 1, rows, accumulation, 1e-3, 1, 1)
    assert share_of(plan, among) == share
    assert share[0] * share[1] * among == rows * accumulation


def test_rows_that_cannot_be_shared_evenly_are_refused_with_what_to_set() -> None:
    with pytest.raises(RecipeError, match="1 x 8 rows, which 3 processes cannot share .* train.accumulation: 3"):
        share_of(Plan(1, 1, 8, 1, 1e-3, 1, 1), 3)
