"""Runs that start elsewhere: a recipe names it, the first batches are measured, and a resume measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import lorakit.inject.evidence
from lorakit import load
from lorakit.core.state import AdapterState
from lorakit.errors import RecipeError, SpecError
from lorakit.inits.eva import Eva
from lorakit.inits.lora_ga import LoRAGA
from lorakit.inits.pissa import Pissa
from lorakit.inject.attach import attach
from lorakit.persist.native import load_native
from lorakit.training.base import load_base
from lorakit.training.run import Run, train
from tests.tolerances import assert_close
from tests.training.samples import labelled, recipe_of, write_rows
from tests.training.test_resume import Stopped, stop_at

MEASURED = [
    ("eva", Eva()),
    ({"name": "eva", "rho": 2}, Eva(2)),
    ("lora-ga", LoRAGA()),
    ({"name": "lora-ga", "iterations": 4}, LoRAGA(iterations=4)),
]


def run_of(base: Path, folder: Path, init: Any, **changes: Any) -> Run:
    folder.mkdir(exist_ok=True)
    return train(recipe_of(base, folder, adapter__init=init, train__steps=4, train__save_every=2, **changes))


def start_of(run: Run) -> AdapterState:
    """Return the adapter of the first checkpoint."""
    return load_native(Path(run.output) / "checkpoint-2")


@pytest.mark.parametrize(("named", "init"), MEASURED)
def test_a_recipe_may_name_a_start_that_is_measured(base: Path, tmp_path: Path, named: Any, init: Any) -> None:
    run = run_of(base, tmp_path, named)
    kept = start_of(run)
    assert kept.spec.method is not None
    assert kept.spec.method.init_ == init  # type: ignore[attr-defined]
    again = start_of(run_of(base, tmp_path / "again", named))
    for one, other in zip(kept.updates, again.updates, strict=True):
        assert all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())


def test_eva_starts_on_the_directions_of_the_run_s_own_rows(base: Path, tmp_path: Path) -> None:
    # a rate of 1e-9 leaves the start where it was
    for update in start_of(run_of(base, tmp_path, "eva", train__lr=1e-9)).updates:
        down = update.tensors["down"]
        assert_close(down @ down.T, torch.eye(4), scale=2.0)


@pytest.mark.parametrize("named", ["eva", "lora-ga", "pissa"])
def test_a_resumed_run_measures_nothing_and_ends_the_same(
    base: Path, tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_of(base, tmp_path, named)
    other = tmp_path / "other"
    other.mkdir()
    recipe = recipe_of(base, other, adapter__init=named, train__steps=4, train__save_every=2)
    with pytest.raises(Stopped):
        train(recipe, listen=stop_at(3))
    monkeypatch.setattr(lorakit.inject.evidence, "gather", None)
    resumed = train(recipe, resume=True)
    for one, same in zip(load(whole.adapter_dir).updates, load(resumed.adapter_dir).updates, strict=True):
        assert all(torch.equal(t, same.tensors[name]) for name, t in one.tensors.items())


def test_what_pissa_learned_is_saved_as_a_plain_lora_of_rank_2r(base: Path, tmp_path: Path) -> None:
    run = run_of(base, tmp_path, "pissa")
    kept = load_native(Path(run.output) / "checkpoint-4")
    assert kept.spec.method.init_ == Pissa()  # type: ignore[union-attr]
    ids = torch.arange(3, 17).reshape(2, 7)
    trained = load_base(str(base))[0]
    before = trained(ids).logits
    attach(trained, kept)
    theirs: Any = PeftModel.from_pretrained(load_base(str(base))[0], run.adapter_dir)  # type: ignore[arg-type]
    assert theirs.peft_config["default"].r == 8
    assert not torch.allclose(trained(ids).logits, before, atol=1e-3)
    assert_close(theirs(ids).logits, trained(ids).logits)


def test_a_classifier_may_measure_too(encoder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "l.jsonl", labelled(32))
    run = run_of(encoder, tmp_path, "lora-ga", data__train=rows, task="classification")
    assert run.steps == 4


def test_loftq_on_a_dense_base_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="loftq corrects a quantised base, and this weight is the dense one"):
        run_of(base, tmp_path, "loftq")


def test_a_start_there_is_none_of_is_refused_with_the_nearest(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown initialisation 'olra'; did you mean 'olora'"):
        recipe_of(base, tmp_path, adapter__init="olra")
