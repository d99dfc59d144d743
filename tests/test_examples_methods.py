"""Every recipe of examples/methods runs: a few steps on the bundled base, or on a model that has what it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lorakit import attach, detach, load, load_recipe, train
from lorakit.core.registry import methods
from lorakit.data.fables import fables
from lorakit.training.base import load_base
from tests.slow import others_slow
from tests.training import samples

ROOT = Path(__file__).parents[1]
RECIPES = {file.stem: file for file in sorted((ROOT / "examples" / "methods").glob("*.yaml"))}
TELLERS = [name for name in RECIPES if name != "bitfit"]  # the bundled base has no biases
READ_ROWS = ["eva", "lora-ga"]
"""Those that begin with rows of the data."""
OFTEN = [*READ_ROWS, "adalora", "dora", "full", "houlsby", "ia3", "lora", "lora-fa", "mixture", "prefix-tuning", "vera"]
"""Those that train in the quick tests: each takes another way through a run."""
SHORTER = {  # what schedules ranks needs steps to do it in
    "adalora": {"adapter.tinit": 0, "adapter.tfinal": 1, "adapter.delta_t": 1},
    "adaptive": {"adapter.rounds": 1},
}


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return load_base("lorakit/tales", dtype="fp32")[0]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The quickstart's records, fewer of them."""
    folder = tmp_path_factory.mktemp("rows")
    for part, count in (("train", 24), ("validation", 8)):
        told = fables("train" if part == "train" else "held-out", count, 0)
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(one.row) + "\n" for one in told))
    return {f"data.{part}": str(folder / f"{part}.jsonl") for part in ("train", "validation")}


@pytest.mark.parametrize("name", [name for name in TELLERS if name not in READ_ROWS])
def test_a_method_s_recipe_finds_what_to_train(name: str, base: nn.Module) -> None:
    handle = attach(base, load_recipe(RECIPES[name]).adapter.spec(seed=0, depth=8))
    trained = {id(parameter) for parameter in handle.parameters()}
    learning = {id(parameter) for parameter in base.parameters() if parameter.requires_grad}
    detach(base)
    assert trained
    assert trained == learning


@pytest.mark.parametrize("name", others_slow(TELLERS, OFTEN))
def test_a_method_s_recipe_trains_and_its_adapter_loads(name: str, rows: dict[str, str], tmp_path: Path) -> None:
    small = {"train.steps": 3, "train.evaluate_every": 3, "train.save_every": 3, "train.batch_size": 4,
             "train.dtype": "fp32", "output": str(tmp_path / "run")}  # fmt: skip
    run = train(load_recipe(RECIPES[name], {**rows, **small, **SHORTER.get(name, {})}))
    assert run.steps == 3
    assert run.trainable_parameters > 0
    model, _ = load_base("lorakit/tales", dtype="fp32")
    adapter, ids = load(run.adapter_dir), torch.arange(100, 116)[None]
    with torch.no_grad():
        before = model.eval()(ids).logits
        attach(model, adapter)
        moved = float((model.eval()(ids).logits - before).abs().max())
    assert 1e-4 < moved < 100, "it has learned something, and has not blown up"
    if adapter.spec.method is not None:
        assert adapter.updates


def test_bitfit_trains_the_biases_of_a_model_that_has_some(tmp_path: Path) -> None:
    encoder = samples.save_encoder(tmp_path / "bert")
    rows = {"data.train": samples.write_rows(tmp_path / "train.jsonl", samples.labelled(16)), "data.validation": None}
    small = {"model": str(encoder), "train.steps": 2, "train.batch_size": 4, "output": str(tmp_path / "run")}
    run = train(load_recipe(RECIPES["bitfit"], {**rows, **small}))
    trained = load(run.adapter_dir).trained
    assert {name.rpartition(".")[2] for name in trained if not name.startswith("classifier")} == {"bias"}


def test_every_method_has_a_recipe() -> None:
    assert set(methods()) <= {load_recipe(file).adapter.method for file in RECIPES.values()}


def test_every_recipe_has_the_best_rate_of_the_study() -> None:
    studied = json.loads((ROOT / "docs" / "results" / "methods.json").read_text())["methods"]
    best = {row["method"]: float(format(row["lr"], ".2g")) for row in studied}
    assert best.keys() == set(TELLERS)
    assert {name: load_recipe(RECIPES[name]).train.lr for name in best} == best
