"""A run from recipe to folder: what it promises about batches, losses, the best adapter, and bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakit import attach, load, load_recipe, state
from lorakit.errors import (
    AliveError,
    AttachError,
    DataError,
    DeviceError,
    LorakitError,
    MissingExtraError,
    RecipeError,
    TargetError,
)
from lorakit.persist.native import load_native
from lorakit.training.base import load_base
from lorakit.training.checkpoints import checkpoints
from lorakit.training.evaluate import evaluate
from lorakit.training.events import Event, read_events
from lorakit.training.run import Run, train
from tests.tolerances import assert_close, tolerance
from tests.training.samples import labelled, pairs, recipe_of, write_rows

STRANGE = [{"prompt": f"a {word} =", "completion": " QXZQXZQXZ"} for word in ("cab", "bed", "face")]
"""Validation rows that get less likely the more of `pairs` is learned: the best step is an early one."""


def told(folder: Path, kind: str) -> list[Event]:
    return [event for event in read_events(folder / "run" / "events.jsonl") if event["event"] == kind]


def run_in(base: Path, folder: Path, **changes: Any) -> tuple[Run, list[float]]:
    folder.mkdir(exist_ok=True)
    run = train(recipe_of(base, folder, **changes))
    return run, [event["loss"] for event in told(folder, "step")]


def adapter_tensors(run: Run) -> dict[str, torch.Tensor]:
    return {f"{u.site.path}.{name}": t for u in load(run.adapter_dir).updates for name, t in u.tensors.items()}


def test_a_run_leaves_an_adapter_its_recipe_its_events_and_a_summary(base: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    recipe = recipe_of(base, tmp_path, data__validation=write_rows(tmp_path / "v.jsonl", pairs(12, 200)))
    run = train(recipe, listen=heard.append)
    folder = tmp_path / "run"
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert load_recipe(folder / "recipe.yaml").train == recipe.train
    assert heard == read_events(folder / "events.jsonl")
    kinds = [event["event"] for event in heard]
    assert kinds[:7] == ["start", "data", "data", "example", "targets", "fused", "plan"]
    assert kinds[-1] == "end"
    assert kinds.count("step") == run.steps == 6
    assert Run.read(folder) == run
    assert json.loads((folder / "run.json").read_text())["trainable_parameters"] == 3712
    assert told(tmp_path, "targets")[0]["patterns"] == {"all-linear": 14}
    assert told(tmp_path, "plan")[0]["loss"] == "fused, the logits never exist whole"
    for event in told(tmp_path, "step"):
        for number in ("loss", "lr", "gradient_norm", "tokens_per_second", "eta_seconds", "peak_memory_bytes"):
            assert isinstance(event[number], float | int), number
        assert event["gradient_norm"] > 0
    report = run.data["train"]
    assert run.tokens == report["tokens"]
    assert run.trained_tokens == report["trained_tokens"]


def test_a_run_leaves_nothing_outside_its_output(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train(recipe_of(base, tmp_path))
    assert list((tmp_path / "here").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"here", "run", "train.jsonl"}


def test_a_run_puts_the_settings_of_transformers_back(base: Path, tmp_path: Path) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    train(recipe_of(base, tmp_path))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("rows", [48, 45])  # 45: the last step of an epoch has fewer rows, and fewer micro-batches
def test_one_batch_of_16_equals_two_of_8_accumulated(base: Path, tmp_path: Path, rows: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    data = write_rows(tmp_path / "rows.jsonl", pairs(rows))
    shared = {"data__train": data, "train__epochs": 2}
    whole, losses = run_in(base, tmp_path / "a", train__batch_size=16, **shared)
    halves, accumulated = run_in(base, tmp_path / "b", train__batch_size=8, train__accumulation=2, **shared)
    assert losses == pytest.approx(accumulated, rel=1e-6)  # the same sum of fp32 numbers, in two parts
    theirs = adapter_tensors(halves)
    for name, tensor in adapter_tensors(whole).items():
        assert_close(tensor, theirs[name])


def test_a_step_weighs_every_trained_token_alike(base: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a =", "completion": " a"},
        {"prompt": "a cab =", "completion": " a cab fade deaf cafe face bed"},
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    _, (loss,) = run_in(base, tmp_path, data__train=data, train__batch_size=1, train__accumulation=2)
    model, tokenizer = load_base(str(base))
    scored = evaluate(model, tokenizer, data, recipe_of(base, tmp_path).data)
    assert loss == pytest.approx(scored.loss, rel=1e-6)


def test_validation_does_not_change_the_training(base: Path, tmp_path: Path) -> None:
    validation = write_rows(tmp_path / "v.jsonl", pairs(12, 200))
    _, alone = run_in(base, tmp_path / "a", adapter__dropout=0.1)
    _, watched = run_in(
        base, tmp_path / "b", adapter__dropout=0.1, data__validation=validation, train__evaluate_every=1
    )
    assert watched == alone


def test_two_runs_of_one_recipe_are_equal_and_another_seed_is_not(base: Path, tmp_path: Path) -> None:
    first, losses = run_in(base, tmp_path / "a")
    second, again = run_in(base, tmp_path / "b")
    _, other = run_in(base, tmp_path / "c", train__seed=1)
    assert losses == again != other
    assert Path(first.adapter_dir, "adapter_model.safetensors").read_bytes() == (
        Path(second.adapter_dir, "adapter_model.safetensors").read_bytes()
    )


def test_a_head_that_starts_random_starts_from_the_seed(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", labelled(16))
    _, losses = run_in(base, tmp_path / "a", data__train=data)
    torch.rand(7)
    _, again = run_in(base, tmp_path / "b", data__train=data)
    assert losses == again


def test_the_best_adapter_is_the_one_that_is_saved(base: Path, tmp_path: Path) -> None:
    validation = write_rows(tmp_path / "v.jsonl", STRANGE)
    run, _ = run_in(
        base,
        tmp_path,
        data__validation=validation,
        train__lr=0.05,
        train__schedule="constant",  # at full rate to the end, so that it overshoots what it has not seen
        train__epochs=6,
        train__save_every=100,
        train__evaluate_every=1,
    )
    losses = {event["step"]: event["loss"] for event in told(tmp_path, "evaluate")}
    assert run.best_step == min(losses, key=lambda step: losses[step]) < run.steps
    assert run.validation_loss == losses[run.best_step]
    best = {u.site.path: u for u in load_native(tmp_path / "run" / f"checkpoint-{run.best_step}").updates}
    for update in load(run.adapter_dir).updates:
        assert torch.equal(update.tensors["up"], best[update.site.path].tensors["up"])
    model, tokenizer = load_base(str(base))
    attach(model, load(run.adapter_dir))
    data = load_recipe(tmp_path / "run" / "recipe.yaml").data
    assert evaluate(model, tokenizer, validation, data).loss == pytest.approx(run.validation_loss, rel=1e-5)


def test_patience_stops_a_run_that_no_longer_improves(base: Path, tmp_path: Path) -> None:
    validation = write_rows(tmp_path / "v.jsonl", STRANGE)
    run, _ = run_in(base, tmp_path, data__validation=validation, train__lr=0.05, train__epochs=5,
                    train__evaluate_every=1, train__patience=2)  # fmt: skip
    (stop,) = told(tmp_path, "early_stop")
    assert run.steps == stop["step"] < 30
    assert stop["best_step"] == run.best_step == run.steps - 2


def test_warm_up_and_schedule_are_those_of_the_recipe(base: Path, tmp_path: Path) -> None:
    run_in(base, tmp_path / "a", train__steps=10, train__warmup=0.2, train__schedule="linear", train__lr=8e-3)
    rates = [event["lr"] for event in told(tmp_path / "a", "step")]
    assert rates == pytest.approx([0, 4e-3, 8e-3, 7e-3, 6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3])
    run_in(base, tmp_path / "b", train__steps=10, train__warmup=0.0, train__schedule="cosine", train__lr=8e-3)
    rates = [event["lr"] for event in told(tmp_path / "b", "step")]
    assert rates == pytest.approx([4e-3 * (1 + math.cos(math.pi * t / 10)) for t in range(10)])
    run_in(base, tmp_path / "c", train__steps=4, train__warmup=0.0, train__schedule="constant", train__lr=8e-3)
    assert [event["lr"] for event in told(tmp_path / "c", "step")] == [8e-3] * 4


def test_rows_are_packed_where_that_is_proved_isolated_and_the_loss_is_the_same(base: Path, tmp_path: Path) -> None:
    one_step = {"train__batch_size": None, "train__batch_tokens": 100_000, "data__max_length": 128}
    packed, (loss,) = run_in(base, tmp_path / "a", **one_step)
    plain, (unpacked,) = run_in(base, tmp_path / "b", data__packing="never", **one_step)
    assert told(tmp_path / "a", "plan")[0]["packed"] is True
    assert packed.data["train"]["packs"] < 10
    assert loss == pytest.approx(unpacked, rel=1e-6)
    assert packed.trained_tokens == plain.trained_tokens


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"train__batch_tokens": 256}, 256),
        ({"train__batch_tokens": 32}, 32),
        ({"train__batch_tokens": 256, "data__packing": "never"}, 9 * 27),  # the longest of the rows has 27 tokens
        ({}, 4096),
    ],
)
def test_a_batch_is_measured_in_tokens(base: Path, tmp_path: Path, changes: dict[str, Any], tokens: int) -> None:
    run, _ = run_in(base, tmp_path, **{"train__batch_size": None, "data__share_prompts": "never", **changes})
    length = run.data["train"]["row_length"] or run.data["train"]["longest"]
    assert 0.9 * tokens < told(tmp_path, "plan")[0]["batch_rows"] * length <= tokens


def test_a_long_text_is_limited_by_the_positions_of_the_model(base: Path, tmp_path: Path) -> None:
    run, _ = run_in(base, tmp_path, data__max_length=1000)
    assert run.data["train"]["max_length"] == 128


@pytest.mark.parametrize(
    ("option", "value"), [("packing", "always"), ("share_prompts", "always"), ("loss", "all"), ("separator", " ")]
)
def test_what_means_nothing_to_a_classifier_is_refused(encoder: Path, tmp_path: Path, option: str, value: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", labelled(8))
    recipe = recipe_of(encoder, tmp_path, data__train=rows, **{f"data__{option}": value})
    with pytest.raises(RecipeError, match=f"data.{option}.*: nothing of a classifier"):
        train(recipe)


def test_patience_without_anything_to_evaluate_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="train.patience counts evaluations, and there are none: name data.validation"
    ):
        recipe_of(base, tmp_path, train__patience=2)


def test_a_classifier_learns_and_its_head_is_saved(encoder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", labelled(96))
    validation = write_rows(tmp_path / "v.jsonl", labelled(24, 300))
    changes = {"data__train": data, "data__validation": validation, "train__batch_size": None, "train__epochs": 8}
    run, losses = run_in(encoder, tmp_path, train__lr=5e-3, **changes)
    assert run.task == "classification"
    assert run.labels == ("high", "low")
    assert losses[-1] < 0.5 * losses[0]
    assert told(tmp_path, "plan")[0]["batch_rows"] == 16
    adapter = load(run.adapter_dir)
    assert {"classifier.weight", "classifier.bias"} <= adapter.trained.keys()
    model, tokenizer = load_base(str(encoder), task="classification", labels=run.labels)
    attach(model, adapter)
    scored = evaluate(model, tokenizer, validation, load_recipe(tmp_path / "run" / "recipe.yaml").data)
    assert scored.loss == pytest.approx(run.validation_loss, rel=1e-5)
    assert scored.accuracy is not None
    assert scored.accuracy > 0.9
    assert sum(counts.correct for counts in scored.classes.values()) == round(scored.accuracy * 24)


def test_a_decoder_can_classify_too(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", labelled(32))
    run, losses = run_in(base, tmp_path, data__train=data, train__batch_size=8, train__epochs=4)
    assert load(run.adapter_dir).trained.keys() == {"score.weight"}
    assert losses[-1] < losses[0]


def test_modules_the_checkpoint_had_no_weights_for_are_trained_whole(encoder: Path, tmp_path: Path) -> None:
    bare = transformers.BertModel.from_pretrained(encoder, add_pooling_layer=False)
    bare.save_pretrained(tmp_path / "bare")
    transformers.AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "bare")
    data = write_rows(tmp_path / "rows.jsonl", labelled(16))
    run, _ = run_in(tmp_path / "bare", tmp_path, data__train=data, adapter__targets="all-linear")
    adapter = load(run.adapter_dir)
    assert "bert.pooler.dense.weight" in adapter.trained
    assert "bert.pooler.dense" not in {update.site.path for update in adapter.updates}
    asked = {"data__train": data, "adapter__train": "pooler.dense", "output": str(tmp_path / "asked")}
    with pytest.raises(AttachError, match=r"both adapted and trained whole(.|\n)*bert\.pooler\.dense"):
        run_in(tmp_path / "bare", tmp_path, **asked)


def test_a_bf16_base_trains_its_adapter_in_fp32(base: Path, tmp_path: Path) -> None:
    _, wide = run_in(base, tmp_path / "a", train__epochs=2)
    run, losses = run_in(base, tmp_path / "b", train__epochs=2, train__dtype="bf16")
    assert losses == pytest.approx(wide, rel=tolerance(torch.bfloat16))
    assert losses[-1] < losses[0]
    assert {tensor.dtype for tensor in adapter_tensors(run).values()} == {torch.float32}


def test_a_head_on_a_bf16_base_is_trained_and_kept_in_fp32(encoder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", labelled(64))
    changes = {"data__train": data, "train__dtype": "bf16", "train__epochs": 6, "data__validation": data}
    run, _ = run_in(encoder, tmp_path, **changes)
    head = load(run.adapter_dir).trained["classifier.weight"]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float()), "steps finer than bf16 were kept"
    losses = [event["loss"] for event in told(tmp_path, "evaluate")]
    assert losses[-1] < 0.9 * losses[0]


def test_gradient_checkpointing_changes_no_loss(base: Path, tmp_path: Path) -> None:
    _, plain = run_in(base, tmp_path / "a")
    _, recomputed = run_in(base, tmp_path / "b", train__checkpointing=True)
    assert recomputed == pytest.approx(plain, rel=1e-6)


def test_the_layerwise_preset_reaches_the_adapter(base: Path, tmp_path: Path) -> None:
    run, _ = run_in(base, tmp_path, adapter__layerwise="low", adapter__rank=8)
    assert len({update.method.rank for update in load(run.adapter_dir).updates}) > 1  # type: ignore[attr-defined]


# ---- what is refused ----


def test_an_output_that_holds_a_run_is_refused(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path)
    train(recipe)
    with pytest.raises(RecipeError, match="holds a finished run; resume it, name another output, or delete"):
        train(recipe)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(RecipeError, match="holds a run stopped at step 6"):
        train(recipe)


def test_an_attempt_that_failed_before_training_does_not_block_the_next(base: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    with pytest.raises(TargetError, match="q_prj"):
        train(recipe_of(base, tmp_path, adapter__targets=["q_prj", "v_proj"]), listen=heard.append)
    assert (heard[-1]["event"], heard[-1]["kind"]) == ("error", "TargetError")
    train(recipe_of(base, tmp_path))
    assert not told(tmp_path, "error")


def test_a_recipe_without_data_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"set data\.train to a file"):
        train(recipe_of(base, tmp_path, data__train=None))


def test_rows_without_a_trained_token_are_refused_with_a_sample(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a cab " * 20, "completion": "b"}])
    with pytest.raises(DataError, match="no token to train on"):
        train(recipe_of(base, tmp_path, data__train=data, data__overlong="cut", data__max_length=16))


def test_an_empty_dataset_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        train(recipe_of(base, tmp_path, data__train=str(tmp_path / "rows.jsonl")))


def test_a_device_that_is_absent_is_refused_before_anything_is_loaded(base: Path, tmp_path: Path) -> None:
    absent = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(DeviceError, match=f"'{absent}' was asked for and is not there; there is: "):
        train(recipe_of(base, tmp_path, train__device=absent))


def test_a_rate_that_explodes_stops_the_run_and_says_so(base: Path, tmp_path: Path) -> None:
    changes = {"train__lr": 1e30, "train__epochs": 4, "train__clip": 1e30, "train__warmup": 0.0}
    with pytest.raises(LorakitError, match=r"step \d+: .* is (nan|inf).*Lower train\.lr"):
        train(recipe_of(base, tmp_path, **changes))


def test_a_last_step_that_explodes_is_no_success(base: Path, tmp_path: Path) -> None:
    changes = {"train__lr": 1e30, "train__steps": 2, "train__warmup": 0.5}  # the first step's rate is 0
    with pytest.raises(LorakitError, match=r"^step 2: \S+\.(down|up) is as large as 1e\+30; .* Lower train\.lr"):
        train(recipe_of(base, tmp_path, train__save_every=1, **changes))
    assert not (tmp_path / "run" / "adapter").exists()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def test_weights_that_are_not_finite_are_never_saved(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from lorakit.training import trainer

    real = trainer.state

    def spoilt(model: Any, **how: Any) -> Any:
        made = real(model, **how)
        if (tmp_path / "run" / "checkpoint-1").exists():
            made.updates[3].tensors["up"][0, 0] = math.nan
        return made

    monkeypatch.setattr(trainer, "state", spoilt)
    with pytest.raises(LorakitError) as refused:
        train(recipe_of(base, tmp_path, train__steps=2, train__save_every=1))
    path = load_native(tmp_path / "run" / "checkpoint-1").updates[3].site.path
    assert str(refused.value) == (
        f"step 2: {path}.up is no longer finite; the last whole checkpoint is from before. Lower train.lr "
        "(it was 0.005), lengthen train.warmup, or use dtype: fp32"
    )


def test_class_names_for_rows_without_a_label_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.labels names classes, and the rows have no label \(format prompt"):
        train(recipe_of(base, tmp_path, data__labels=["good", "bad"]))


def test_an_adapter_that_no_gradient_reaches_stops_the_first_step(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def past_the_layer(self: Any, x: torch.Tensor) -> torch.Tensor:
        up = torch.nn.functional.linear(x, self.up_proj.weight)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)  # type: ignore[no-any-return]

    monkeypatch.setattr(LlamaMLP, "forward", past_the_layer)
    with pytest.raises(AliveError, match=r"2 of 14 active adapters were never called(.|\n)*up_proj"):
        train(recipe_of(base, tmp_path))
    with pytest.raises(AliveError, match="the loss depends on nothing that is trained"):
        train(recipe_of(base, tmp_path, adapter__targets=["up_proj"], output=str(tmp_path / "alone")))


def test_a_gradient_of_zero_stops_the_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.methods.lora import LoRA

    monkeypatch.setattr(LoRA, "scale", property(lambda self: 0.0))
    with pytest.raises(AliveError, match="the gradient of every trained parameter is zero"):
        train(recipe_of(base, tmp_path))


def test_packing_that_leaks_is_refused_or_left(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.training import stage

    monkeypatch.setattr(stage, "packing_is_isolated", lambda model: False)
    run_in(base, tmp_path, train__batch_size=None, train__batch_tokens=256)
    plan = told(tmp_path, "plan")[0]
    assert plan["packed"] is False
    assert "see each other in this model with attention 'sdpa'" in plan["why"]


@pytest.mark.parametrize(
    ("choice", "layers", "again"), [(True, "top:1", 1), (0.5, "top:1", 0), (0.1, None, 0), (0.5, None, 1)]
)
def test_a_run_tells_how_many_blocks_its_backward_computes_again(
    base: Path, tmp_path: Path, choice: bool | float, layers: str | None, again: int
) -> None:
    run_in(base, tmp_path, train__checkpointing=choice, adapter__layers=layers, train__steps=1)
    (event,) = told(tmp_path, "recomputed")
    assert (event["blocks"], event["of"]) == (again, 2)


def test_a_tracker_writes_into_the_output(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run_in(base, tmp_path, train__report_to=["tensorboard"])
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_a_tracker_that_is_absent_is_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="names wandb, not installed here; run: pip install wandb"):
        run_in(base, tmp_path, train__report_to=["wandb"], data__train=str(tmp_path / "none.jsonl"))  # before it reads


def test_a_full_device_is_told_with_what_to_change(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("lorakit.training.trainer.loss_of_batch", full)
    with pytest.raises(LorakitError, match=r"step 1: out of memory on cpu\. Halve train\.batch_tokens"):
        run_in(base, tmp_path)


def test_other_processes_that_cannot_be_met_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LorakitError, match="RANK, MASTER_ADDR, MASTER_PORT not set.*lorakit train --nproc"):
        train(recipe_of(base, tmp_path))


def test_the_state_of_the_model_is_what_was_saved(base: Path, tmp_path: Path) -> None:
    run, _ = run_in(base, tmp_path)
    model, _ = load_base(str(base))
    attach(model, load(run.adapter_dir))
    kept = load_native(tmp_path / "run" / f"checkpoint-{run.steps}")
    for ours, theirs in zip(state(model).updates, kept.updates, strict=True):
        assert torch.equal(ours.tensors["up"], theirs.tensors["up"])


def test_a_run_of_one_step_learns(base: Path, tmp_path: Path) -> None:
    run, _ = run_in(base, tmp_path, train__steps=1, train__warmup=0.1)
    assert all(t.abs().max() > 0 for t in adapter_tensors(run).values())
