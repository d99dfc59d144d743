"""Generation: a batch says what each prompt alone would, and nothing is left changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import AdapterSpec, LoRA, attach
from lorakit.context.prefix_tuning import PrefixTuning
from lorakit.context.prompt_tuning import PromptTuning
from lorakit.core.method import Context
from lorakit.errors import DataError, LorakitError
from lorakit.training.base import load_base
from lorakit.training.generate import generate
from tests.context.samples import decoder, read_by

PROMPTS = ["a", "a cab a bad cab", "bead dab", "ace bed fade deaf cafe face", "cab", "a dab ace"]


@pytest.fixture
def both(base: Path) -> tuple[Any, Any, list[list[int]]]:
    model, tokenizer = load_base(str(base))
    model.float()
    with torch.no_grad():
        for parameter in model.parameters():  # sharper logits, as a trained model has them: no near ties
            parameter.mul_(6.0 if parameter.dim() == 2 else 1.0)
    return model, tokenizer, [tokenizer(text)["input_ids"] for text in PROMPTS]


def plain(model: Any, ids: list[int], steps: int, eos: int) -> list[int]:
    """The oracle: no cache, no padding, one prompt."""
    made = list(ids)
    for _ in range(steps):
        made.append(int(model(input_ids=torch.tensor([made]), use_cache=False).logits[0, -1].argmax()))
        if made[-1] == eos:
            break
    return made[len(ids) :]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_batch_answers_as_each_prompt_alone(both: tuple[Any, Any, list[list[int]]], batch_size: int) -> None:
    model, tokenizer, prompts = both
    expected = [
        tokenizer.decode(plain(model, ids, 12, tokenizer.eos_token_id), skip_special_tokens=True) for ids in prompts
    ]
    assert len(set(expected)) > 1
    assert generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size) == expected


@pytest.mark.parametrize("method", [PromptTuning(3), PrefixTuning(3)])
def test_a_window_sees_no_padding_beside_virtual_positions(base: Path, method: Context) -> None:
    _, tokenizer = load_base(str(base))
    model = read_by(
        decoder("mistral", vocab_size=max(tokenizer.get_vocab().values()) + 1, pad_token_id=tokenizer.pad_token_id),
        method,
    )
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    alone = [generate(model, tokenizer, [ids], max_new_tokens=6)[0] for ids in prompts]
    assert len(set(alone)) > 1
    assert generate(model, tokenizer, prompts, max_new_tokens=6) == alone


def test_logits_that_are_nan_are_told_of(both: tuple[Any, Any, list[list[int]]]) -> None:
    """transformers reads them as the end of the answer, and says nothing."""
    model, tokenizer, prompts = both
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 0] = float("nan")
    with pytest.raises(LorakitError, match="logits are NaN: its weights or its adapter's"):
        generate(model, tokenizer, prompts, max_new_tokens=4)


def test_an_answer_ends_at_the_end_token(both: tuple[Any, Any, list[list[int]]], monkeypatch: Any) -> None:
    model, tokenizer, prompts = both
    third = plain(model, prompts[1], 5, -1)[2]
    monkeypatch.setattr(type(tokenizer), "eos_token_id", third, raising=False)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(third)
    (answer,) = generate(model, tokenizer, [prompts[1]], max_new_tokens=5)
    assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) <= 2


def test_drawing_depends_on_the_seed_alone_and_leaves_the_random_state(both: tuple[Any, Any, list[list[int]]]) -> None:
    model, tokenizer, prompts = both
    before = torch.get_rng_state()
    first = generate(model, tokenizer, prompts, max_new_tokens=12, temperature=2.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert generate(model, tokenizer, prompts, max_new_tokens=12, temperature=2.0, seed=1) == first
    assert generate(model, tokenizer, prompts, max_new_tokens=12, temperature=2.0, seed=2) != first


def test_model_and_tokenizer_come_back_as_they_were(both: tuple[Any, Any, list[list[int]]]) -> None:
    model, tokenizer, prompts = both
    model.train()
    model.config.use_cache = False
    before = (model.generation_config.to_dict(), model.config.to_dict(), tokenizer.padding_side, tokenizer.pad_token)
    generate(model, tokenizer, prompts[:2], max_new_tokens=2)
    assert model.training
    assert before == (
        model.generation_config.to_dict(),
        model.config.to_dict(),
        tokenizer.padding_side,
        tokenizer.pad_token,
    )


def test_the_adapters_that_are_active_speak(both: tuple[Any, Any, list[list[int]]]) -> None:
    model, tokenizer, prompts = both
    bare = generate(model, tokenizer, prompts, max_new_tokens=8)
    attach(model, AdapterSpec(LoRA(4, 64)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                parameter.normal_()
    assert generate(model, tokenizer, prompts, max_new_tokens=8) != bare


def test_prompts_that_cannot_be_answered_are_refused(both: tuple[Any, Any, list[list[int]]]) -> None:
    model, tokenizer, prompts = both
    with pytest.raises(DataError, match="^prompt 2 is empty, and a model needs something to go on from"):
        generate(model, tokenizer, [prompts[0], []])
    with pytest.raises(DataError, match=r"exceed the model's 128 positions"):
        generate(model, tokenizer, [prompts[3]], max_new_tokens=120)
    assert generate(model, tokenizer, []) == []
