"""The frozen lower part, computed once a row: the same losses, gradients and files of a run, and every refusal."""

from __future__ import annotations

import json
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from lorakit.core.reading import blocks_of
from lorakit.errors import LorakitError, RecipeError
from lorakit.inject.lower import GIVEN, answering, lower_of, run_lower, why_not_frozen
from lorakit.training import calibration, frozen, trainer
from lorakit.training.loss import batches, mean_of_batch
from lorakit.training.plan import calibrated, plan
from lorakit.training.planned import HERE, Where
from lorakit.training.run import attached, train
from lorakit.training.stage import build_stage
from tests.inject.families import FAMILIES
from tests.tolerances import assert_close
from tests.training.samples import VOCABULARY, labelled, pairs, recipe_of, write_rows
from tests.training.test_run import adapter_tensors, run_in, told

TOP = {"adapter__layers": "1", "train__epochs": 2}
CACHED = {**TOP, "train__cache_frozen": True}


def family_model(family: str, dtype: torch.dtype) -> Any:
    """Return a small random model of a family, without dropout."""
    torch.manual_seed(0)
    values = dict(FAMILIES[family])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    for name, value in config.to_dict().items():
        if ("drop" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    config.use_cache = False
    kind = AutoModelForSequenceClassification if "bert" in family else AutoModelForCausalLM
    return kind.from_config(config, dtype=dtype).train()


@pytest.fixture(scope="module")
def still(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder without dropout."""
    folder = tmp_path_factory.mktemp("bases") / "still"
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter__dropout": 0.2},
        {"train__batch_size": None, "train__batch_tokens": 128},  # packed, with shared prompts where that pays
        {"train__checkpointing": True, "train__accumulation": 2},
        {"adapter__train": "lm_head", "train__fused": False},
    ],
    ids=["padded", "packed", "checkpointing", "head-too"],
)
def test_a_run_from_the_cache_learns_what_a_run_without_it_learns(
    base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    validation = write_rows(tmp_path / "v.jsonl", pairs(12, 200))
    plain, losses = run_in(base, tmp_path / "a", data__validation=validation, **TOP, **changes)
    kept, same = run_in(base, tmp_path / "b", data__validation=validation, **CACHED, **changes)
    assert same == pytest.approx(losses, rel=1e-6, abs=1e-6)
    assert kept.validation_loss == pytest.approx(plain.validation_loss, rel=1e-6)
    theirs = adapter_tensors(plain)
    for name, tensor in adapter_tensors(kept).items():
        assert_close(tensor, theirs[name])
    (event,) = told(tmp_path / "b", "frozen")
    report = [part["tokens"] for part in told(tmp_path / "b", "data")]
    assert (event["blocks"], event["of"], event["computed"]) == (1, 2, ["train", "validation"])
    if not changes.get("train__batch_tokens"):
        assert event["bytes"] == sum(report) * 32 * 4  # width 32, fp32
    assert not (tmp_path / "b" / "run" / frozen.FOLDER).exists()


def test_a_classifier_reads_the_cache_in_every_epoch_and_in_evaluation(still: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", labelled(40))
    validation = write_rows(tmp_path / "v.jsonl", labelled(12, 100))
    changes = {"data__train": rows, "data__validation": validation, "adapter__targets": "all-linear"}
    plain, losses = run_in(still, tmp_path / "a", **TOP, **changes)
    kept, same = run_in(still, tmp_path / "b", **CACHED, **changes)
    assert same == pytest.approx(losses, rel=1e-6)
    assert kept.validation_loss == pytest.approx(plain.validation_loss, rel=1e-6)


def test_the_frozen_blocks_run_once_a_row_and_in_no_step(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.Size] = []

    def go(own: Any, saved: Any, recipe: Any) -> None:
        layers = own.adapted.model.layers
        layers[0].mlp.register_forward_hook(lambda module, args, output: calls.append(output.shape))
        went: list[int] = []
        layers[1].mlp.register_forward_hook(lambda *_: went.append(1))
        own.train()
        assert len(went) == 12

    monkeypatch.setattr("lorakit.training.run._go", go)
    train(recipe_of(base, tmp_path, **CACHED))
    assert calls == []


FAMILY_CONFIGS = [name for name in FAMILIES if name not in ("t5", "vit", "whisper")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_gradients_from_the_hidden_states_equal_those_of_the_whole_model(family: str, dtype: torch.dtype) -> None:
    model = family_model(family, dtype)
    blocks = blocks_of(model)
    if len(blocks) < 2:
        pytest.skip("no stack of two blocks")
    for parameter in model.parameters():
        parameter.requires_grad = any(p is parameter for p in blocks[-1].parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lower = lower_of(model, list(trained))
    assert not isinstance(lower, str), lower
    assert (lower.count, lower.of) == (len(blocks) - 1, len(blocks))
    inputs = {"input_ids": torch.randint(3, 96, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    with torch.no_grad():
        passed = run_lower(model, lower, inputs)
    assert why_not_frozen(model, lower, passed) == ""

    def gradients(**given: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, **given).logits.float().square().mean().backward()
        return {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}

    plain = gradients()
    with answering(model, lower):
        given = gradients(**{GIVEN: passed.hidden})
        torch.testing.assert_close(gradients(), plain, rtol=0, atol=0)  # a call that gives nothing runs as ever
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    torch.testing.assert_close(given, plain, rtol=0, atol=0)
    torch.testing.assert_close(gradients(), plain, rtol=0, atol=0)


def test_what_lies_below_the_lowest_adapted_layer_has_no_backward(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path, adapter__layers="1")
    stage = build_stage(recipe)
    attached(recipe, stage, None)
    reached: dict[str, bool] = {}
    for path in ("embed_tokens", "layers.0", "layers.0.self_attn", "layers.1", "layers.1.self_attn"):

        def note(module: Any, args: Any, output: Any, path: str = path) -> None:
            reached[path] = (output[0] if isinstance(output, tuple) else output).requires_grad

        stage.model.model.get_submodule(path).register_forward_hook(note)
    (batch,) = batches(stage.train.dataset.select(range(4)), 4, 0, "cpu")
    mean_of_batch(stage.model.train(), batch).backward()
    assert reached == {
        "embed_tokens": False,
        "layers.0": False,
        "layers.0.self_attn": False,
        "layers.1": True,
        "layers.1.self_attn": True,
    }
    assert all(p.grad is None for p in stage.model.model.layers[0].parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter__layers": "0-1"}, r"model\.layers\.0\..* is trained, and it lies in the lowest block"),
        ({"adapter__layers": "1", "adapter__train": "model.embed_tokens"}, r"the model's embedding, is trained"),
        ({"adapter__method": "prefix-layer", "adapter__layers": None}, "prefix-layer trains what the model reads"),
    ],
)
def test_an_adapter_that_reaches_down_is_refused_by_name(
    base: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    if changes.get("adapter__method"):
        changes |= {"adapter__before": 2, "adapter": {"method": "prefix-layer"}}
        del changes["adapter__method"], changes["adapter__layers"], changes["adapter__before"]
    with pytest.raises(RecipeError, match=words) as refused:
        train(recipe_of(base, tmp_path, train__cache_frozen=True, **changes))
    assert str(refused.value).startswith("train.cache_frozen: ")
    assert not (tmp_path / "run").exists()


def test_dropout_below_the_adapter_is_refused_by_name(encoder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", labelled(24))
    with pytest.raises(RecipeError, match=r"bert\.embeddings\.dropout drops 10% of what it reads; set its rate to 0"):
        train(recipe_of(encoder, tmp_path, data__train=rows, **CACHED))


def test_blocks_that_are_shared_are_refused() -> None:
    albert = AlbertForSequenceClassification(
        AlbertConfig(
            vocab_size=96,
            embedding_size=16,
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=96,
        )
    )
    assert "no stack with a block of its own" in str(lower_of(albert, []))
    llama = family_model("llama", torch.float32)
    llama.model.layers[1] = llama.model.layers[0]
    assert lower_of(llama, ["lm_head"]) == "its blocks share parameters"


def test_upper_blocks_that_read_more_than_hidden_states_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LlamaDecoderLayer.forward

    def peeking(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = real(self, hidden_states, *args, **kwargs)
        aside.append(out)
        return out + aside[0].mean()

    aside: list[torch.Tensor] = []
    monkeypatch.setattr(LlamaDecoderLayer, "forward", peeking)
    monkeypatch.setattr(LlamaModel, "forward", _forgetting(LlamaModel.forward, aside))
    with pytest.raises(RecipeError, match="read more of the lower ones than hidden states"):
        train(recipe_of(base, tmp_path, **CACHED))


def _forgetting(forward: Any, aside: list[torch.Tensor]) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        aside.clear()
        return forward(self, *args, **kwargs)

    return wrapped


def test_randomness_without_a_name_is_measured(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LlamaDecoderLayer.forward

    def jittery(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        noise = torch.rand_like(hidden_states) * 1e-2 if self.training else 0.0
        return real(self, hidden_states + noise, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", jittery)
    with pytest.raises(RecipeError, match="compute something else in training than in evaluation"):
        train(recipe_of(base, tmp_path, **CACHED))


def test_a_disk_without_the_room_is_refused_with_the_bytes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(frozen.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    tokens = build_stage(recipe_of(base, tmp_path)).train.report.tokens
    with pytest.raises(LorakitError, match=rf"needs {tokens * 32 * 4:,} bytes on the disk of .*, which has 1 free"):
        train(recipe_of(base, tmp_path, **CACHED))
    assert not (tmp_path / "run").exists()


def test_a_run_that_stopped_reads_what_was_written_and_ends_the_same(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, losses = run_in(base, tmp_path / "whole", train__save_every=4, **CACHED)
    (tmp_path / "cut").mkdir()
    recipe = recipe_of(base, tmp_path / "cut", train__save_every=4, **CACHED)
    with monkeypatch.context() as patched:

        def stop(own: Any, *args: Any, **kwargs: Any) -> Any:
            if own.state.global_step == 5:
                raise RuntimeError("the power went")
            return real(own, *args, **kwargs)

        real = trainer.AdapterTrainer.training_step
        patched.setattr(trainer.AdapterTrainer, "training_step", stop)
        with pytest.raises(RuntimeError):
            train(recipe)
    folder = tmp_path / "cut" / "run" / frozen.FOLDER
    assert len(list(folder.iterdir())) == 1
    (folder / "train-of-other-rows.bin").write_bytes(b"old")
    (folder / "train.part").write_bytes(b"half")
    train(recipe, resume=True)
    first, second = told(tmp_path / "cut", "frozen")
    assert (first["computed"], second["computed"]) == (["train"], [])
    resumed = {event["step"]: event["loss"] for event in told(tmp_path / "cut", "step")}
    assert list(resumed.values()) == losses
    assert not folder.exists()


def test_ctrl_c_while_it_is_written_ends_the_run_at_once_and_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step has been made, so there is nothing to save: it must not wait for rows that may take an hour."""
    real = frozen.run_lower
    calls: list[int] = []

    def stop(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # two are the proof's
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(frozen, "run_lower", stop)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(recipe_of(base, tmp_path, train__batch_size=4, **CACHED))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) == 4
    assert not (tmp_path / "run" / frozen.FOLDER).exists()


def test_other_weights_make_another_cache(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path, **CACHED)
    digests = set()
    for changed in (None, "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        stage = build_stage(recipe)
        stage.model.requires_grad_(False)
        if changed is not None:
            with torch.no_grad():
                stage.model.get_parameter(changed)[VOCABULARY - 1 if "embed" in changed else 0, 0] += 1.0
        lower = lower_of(stage.model, ["model.layers.1"])
        assert not isinstance(lower, str)
        with answering(stage.model, lower), torch.no_grad():
            digests.add(frozen._checked(stage.model, lower, stage.train.dataset, 0)[0])
    assert len(digests) == 3  # the head is above


def test_the_plan_says_the_bytes_that_the_run_writes(base: Path, tmp_path: Path) -> None:
    validation = write_rows(tmp_path / "v.jsonl", pairs(12, 200))
    recipe = recipe_of(base, tmp_path, data__validation=validation, **CACHED)
    planned = plan(recipe)
    train(recipe)
    (event,) = told(tmp_path, "frozen")
    assert planned.pace.cache_bytes == planned.to_json()["pace"]["cache_bytes"] == event["bytes"] > 0
    assert plan(recipe_of(base, tmp_path, **TOP)).pace.cache_bytes == 0


def test_the_plan_counts_the_lower_part_once_and_not_in_every_step(base: Path, tmp_path: Path) -> None:
    """By hand: 2 FLOP a token and number of a matrix, 4 a token, place of its row and channel of attention."""
    validation = write_rows(tmp_path / "v.jsonl", pairs(12, 200))
    recipes = [recipe_of(base, tmp_path, data__validation=validation, **changes) for changes in (TOP, CACHED)]
    whole, kept = (plan(recipe, Where(("A10",))) for recipe in recipes)
    model, load = build_stage(recipes[0]).model, kept.load
    numbers = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    lower = (2 * numbers + 4 * load.length * model.config.hidden_size) * load.rows * load.length
    assert whole.pace.flops_per_step - kept.pace.flops_per_step == lower
    cached = kept.pace.cache_bytes / model.config.hidden_size / 4
    assert kept.pace.cache_flops == pytest.approx(lower * cached / (load.rows * load.length), abs=1)
    assert whole.pace.cache_flops == 0
    ratio = kept.pace.times["A10"].duration.seconds / whole.pace.times["A10"].duration.seconds
    step, padded = whole.pace.flops_per_step, load.rows * load.length
    tokens = kept.pace.tokens
    assert tokens is not None
    assert ratio == pytest.approx(((step - lower) / padded * tokens + kept.pace.cache_flops) / (step / padded * tokens))


def test_calibration_computes_the_lower_part_once_a_batch(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning: list[bool] = []
    real = calibration.build_stage

    def watched(recipe: Any) -> Any:
        stage = real(recipe)
        stage.model.model.layers[0].mlp.register_forward_hook(lambda m, *_: learning.append(m.training))
        return stage

    monkeypatch.setattr(calibration, "build_stage", watched)
    recipe = recipe_of(base, tmp_path, train__batch_size=4, **CACHED)
    found = calibrated(plan(recipe), recipe)
    assert learning == [False] * (calibration.STEPS + 1), "once more to find the head, and never in a step"
    assert found.pace.times[HERE].duration.seconds > 0


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"method": "prefix-layer"},
        {"layers": "1", "train": "model.embed_tokens"},
        {"targets": ["embed_tokens", "mlp"]},
    ],
)
def test_the_plan_refuses_what_the_run_refuses(base: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    recipe = recipe_of(base, tmp_path, train__cache_frozen=True, adapter=adapter)
    with pytest.raises(RecipeError, match="train.cache_frozen: "):
        plan(recipe)
    with pytest.raises(RecipeError, match="train.cache_frozen: "):
        train(recipe)
