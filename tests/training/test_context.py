"""A run trains what a model reads as it trains anything else: recipe, checkpoints, scores, answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.core.spec import AdapterSpec
from lorakit.errors import DataError, RecipeError
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.persist import load
from lorakit.persist.native import load_native
from lorakit.training.base import load_base
from lorakit.training.evaluate import evaluate
from lorakit.training.events import Event
from lorakit.training.generate import generate
from lorakit.training.loss import logits_of, summed_loss
from lorakit.training.recipe import load_recipe
from lorakit.training.run import train
from lorakit.training.stage import build_stage, longest_row
from tests.context.samples import decoder, read_by, tokens
from tests.law.cases import CONTEXTS
from tests.slow import others_slow
from tests.training.samples import labelled, pairs, recipe_of, write_rows

ADAPTERS: dict[str, dict[str, Any]] = {
    "prompt-tuning": {"tokens": 6, "text": "a cab"},
    "prefix-embedding": {"before": 4, "after": 2},
    "prefix-layer": {"before": 4, "after": 2},
    "prefix-tuning": {"tokens": 6},
}


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_run_learns_and_what_it_kept_reads_the_same(method: str, base: Path, tmp_path: Path) -> None:
    valid = write_rows(tmp_path / "valid.jsonl", pairs(16, offset=100))
    recipe = recipe_of(base, tmp_path, adapter={"method": method, **ADAPTERS[method]}, data__validation=valid,
                       train__lr=0.1, train__epochs=4)  # fmt: skip
    run = train(recipe)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in events if e["event"] == "step"]
    assert losses[-1] < losses[0] - 0.05, "a random base has little to say, however it is asked"
    assert next(e for e in events if e["event"] == "targets")["patterns"] == {"what the model reads": 1}
    model, tokenizer = load_base(str(base), device="cpu")
    attach(model, load(run.adapter_dir))
    scored = evaluate(model, tokenizer, valid, load_recipe(tmp_path / "run" / "recipe.yaml").data)
    assert scored.loss == pytest.approx(run.validation_loss, rel=1e-4)
    prompts = [tokenizer.encode(row["prompt"]) for row in pairs(5)]
    together = generate(model, tokenizer, prompts, max_new_tokens=6)
    assert together == [generate(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]


@pytest.mark.parametrize("method", others_slow(ADAPTERS, ["prefix-layer"]))
def test_an_encoder_learns_to_classify(method: str, encoder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", labelled(96))
    valid = write_rows(tmp_path / "valid.jsonl", labelled(40, offset=200))
    recipe = recipe_of(encoder, tmp_path, adapter={"method": method, **ADAPTERS[method]}, data__train=rows,
                       data__validation=valid, train__lr=0.03, train__epochs=8)  # fmt: skip
    run = train(recipe)
    assert run.validation_loss is not None
    assert run.validation_loss < 0.62, "a coin's is 0.69"


def test_a_resumed_run_is_the_uninterrupted_one(base: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise KeyError("stands for a crash")

    runs = []
    for name in ("whole", "stopped"):
        recipe = recipe_of(base, tmp_path, adapter={"method": "prefix-tuning", "tokens": 4, "hidden": 8},
                           train__save_every=3, output=str(tmp_path / name))  # fmt: skip
        if name == "stopped":
            with pytest.raises(KeyError):
                train(recipe, listen=stop)
        runs.append(train(recipe, resume=name == "stopped"))
    kept = load_native(tmp_path / "stopped" / "checkpoint-3")
    assert kept.updates[0].tensors.keys() == {"seeds", "w1", "b1", "w2", "b2"}, "a checkpoint keeps the perceptron"
    whole, resumed = (load(run.adapter_dir).updates[0].tensors for run in runs)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_packing_gives_way_and_rows_leave_room(base: Path, tmp_path: Path) -> None:
    adapter = {"method": "prompt-tuning", "tokens": 6}
    recipe = recipe_of(base, tmp_path, adapter=adapter, train={"batch_tokens": 512, "device": "cpu"},
                       data__max_length=1000)  # fmt: skip
    stage = build_stage(recipe)
    assert not stage.packed
    assert stage.why == "prompt-tuning puts virtual positions at the start of a row, so each example has its own"
    assert longest_row(recipe.data, stage.model, stage.tokenizer, stage.spec.method).tokens == 128 - 6
    attach(stage.model, stage.spec)
    assert longest_row(recipe.data, stage.model, stage.tokenizer).tokens == 128 - 6
    with pytest.raises(RecipeError, match="prompt-tuning puts virtual positions at the start of a row; set data.pack"):
        build_stage(recipe_of(base, tmp_path, adapter=adapter, data__packing="always"))
    with pytest.raises(RecipeError, match="the 128 virtual positions of the adapter leave nothing of the model's 128"):
        build_stage(recipe_of(base, tmp_path, adapter={**adapter, "tokens": 128}))
    with pytest.raises(RecipeError, match="the 127 virtual positions of the adapter leave 1 of the model's 128 posi"):
        build_stage(recipe_of(base, tmp_path, adapter={**adapter, "tokens": 127}))


@pytest.mark.parametrize("overlong", ["drop", "cut", "error"])
def test_rows_without_room_beside_the_prefix_are_told_of_its_length(base: Path, tmp_path: Path, overlong: str) -> None:
    for adapter in ({"method": "prompt-tuning", "tokens": 125}, {"method": "prefix-layer", "before": 62, "after": 63}):
        with pytest.raises(DataError) as told:
            build_stage(recipe_of(base, tmp_path, adapter=adapter, data__overlong=overlong))
        assert "the 125 virtual positions of the adapter leave 3 of the model's 128 positions: use fewer" in str(
            told.value
        )
        assert "max_length" not in str(told.value)


def test_rows_longer_than_the_model_s_positions_are_told_so(base: Path, tmp_path: Path) -> None:
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "a", "completion": " cab" * 200}])
    given = {"data__train": long, "data__max_length": 1000, "train": {"batch_tokens": 512, "device": "cpu"}}
    with pytest.raises(DataError, match="the model has 128 positions: shorten the rows, or choose overlong: cut"):
        build_stage(recipe_of(base, tmp_path, **given))
    with pytest.raises(DataError, match=r"a step has 64 tokens \(train.batch_tokens\): raise it, or choose overlong"):
        build_stage(recipe_of(base, tmp_path, **given, train__batch_tokens=64))


def test_a_text_becomes_token_ids_that_the_adapter_remembers(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path, adapter={"method": "prompt-tuning", "tokens": 6, "text": "a cab"})
    stage = build_stage(recipe)
    handle = attach(stage.model, stage.spec)
    ids = stage.tokenizer.encode("a cab", add_special_tokens=False)
    assert state(stage.model).spec.method.ids == tuple(ids)  # type: ignore[union-attr]
    table = stage.model.get_input_embeddings().weight
    assert torch.equal(handle.parameters()[0], table[[ids[i % len(ids)] for i in range(6)]])


def test_a_prompt_that_the_prefix_leaves_no_room_for_is_refused(base: Path) -> None:
    model, tokenizer = load_base(str(base), device="cpu")
    attach(model, AdapterSpec(CONTEXTS["prompt-tuning"]))
    generate(model, tokenizer, [[5] * 100], max_new_tokens=24)
    with pytest.raises(DataError, match="exceed the model's 128 positions, of which the adapter takes 4; shorten"):
        generate(model, tokenizer, [[5] * 100], max_new_tokens=25)


def test_the_answer_starts_behind_the_prompt_s_last_position() -> None:
    model, ids = read_by(decoder("llama"), "prefix-embedding").train(), tokens(2, 7)
    labels = torch.where(torch.arange(7) < torch.tensor([[3], [5]]), -100, ids)
    logits = logits_of(model, {"input_ids": ids}, labels)
    assert torch.equal(logits, model(ids, prompt_ends=torch.tensor([3, 5])).logits)
    summed_loss(logits, labels)[0].backward()
    grad = adapters_named(model, "default")[0].get_parameter("embeddings").grad
    assert grad is not None
    assert grad.abs().sum(-1).gt(0).all()


def test_a_row_whose_labels_are_all_masked_is_all_prompt() -> None:
    model, ids = read_by(decoder("llama"), "prefix-embedding"), tokens(1, 7)
    logits = logits_of(model, {"input_ids": ids}, torch.full_like(ids, -100))
    assert torch.equal(logits, model(ids).logits)
