"""What cannot be read is refused, with the reason and the remedy, and the model stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DynamicCache,
    T5Config,
    T5ForConditionalGeneration,
)

from lorakit.context.prefix_embedding import PrefixEmbedding
from lorakit.context.prefix_layer import PrefixLayer
from lorakit.context.prefix_tuning import PrefixTuning
from lorakit.context.prompt_tuning import PromptTuning
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.errors import AdapterFileError, AliveError, AttachError, DataError, SpecError, TargetError
from lorakit.inject.activate import use
from lorakit.inject.alive import alive
from lorakit.inject.attach import attach, detach, state
from tests.context.samples import classifier, decoder, read_by, tokens


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PromptTuning(0), r"tokens must be a whole number of at least 1, not 0"),
        (lambda: PromptTuning(4, start="zero"), r"start must be one of vocabulary, normal, not 'zero'"),
        (lambda: PromptTuning(4, start="normal", text="x"), "starts from its text or by start: normal; leave one out"),
        (lambda: PromptTuning(4, text=" ").tokenized(lambda text: []), "the text ' ' has no token to start from"),
        (lambda: PrefixEmbedding(-1, 2), "before must be a whole number of at least 0, not -1"),
        (lambda: PrefixLayer(0, 0), "before and after are both 0, so nothing would be read"),
        (lambda: PrefixTuning(4, hidden=0), "hidden must be a whole number of at least 1, not 0"),
    ],
)
def test_numbers_that_cannot_be(make: Any, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        make()


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"targets": Targets("q_proj")}, "targets"),
        ({"targets": Targets(exclude=["q_proj"], layers="0-1")}, "exclude, layers"),
        ({"dropout": 0.1}, "dropout"),
        ({"overrides": [Override.of("*", tokens=2)]}, "overrides"),
    ],
)
def test_what_names_layers_is_refused(spec: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=f"prompt-tuning acts on what the model reads, on no layer; remove {named}$"):
        attach(decoder("llama"), AdapterSpec(PromptTuning(4), **spec))


def test_a_model_that_reads_no_embeddings_is_refused() -> None:
    with pytest.raises(TargetError, match="prompt-tuning acts on what a transformer reads, and this model has no part"):
        attach(nn.Sequential(nn.Linear(3, 3)), AdapterSpec(PromptTuning(4)))
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 20}
    with pytest.raises(TargetError, match="it takes a transformers decoder or encoder"):
        attach(T5ForConditionalGeneration(T5Config(**sizes)), AdapterSpec(PromptTuning(4)))


def test_a_prefix_in_a_cache_that_the_model_has_not_is_refused() -> None:
    config = DistilBertConfig(vocab_size=40, dim=16, n_layers=3, n_heads=4, hidden_dim=24, max_position_embeddings=48)
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(SpecError, match="acts through the cache, and this model takes none; use prompt-tuning"):
        attach(model, AdapterSpec(PrefixTuning(4)))


def test_a_prefix_longer_than_the_context_is_refused_and_nothing_is_attached() -> None:
    model = decoder("llama")
    with pytest.raises(AttachError, match="the 48 virtual positions of prompt-tuning leave nothing of the model's 48"):
        attach(model, AdapterSpec(PromptTuning(48)))
    assert not hasattr(model.model, "adapters")
    assert all(p.requires_grad for p in model.parameters())


def test_a_row_longer_than_what_the_prefix_leaves_is_refused() -> None:
    model = read_by(decoder("gpt2"), PrefixEmbedding(3, 2))
    model(tokens(1, 43))
    with pytest.raises(DataError, match="a row of 44 tokens and the 5 virtual positions .* shorten rows to 43 tokens"):
        model(tokens(1, 44))


@pytest.mark.parametrize("weight", [0.5, torch.tensor([1.0, 0.0])])
def test_a_weight_other_than_one_is_refused(weight: Any) -> None:
    model = read_by(decoder("llama"), "prompt-tuning")
    with pytest.raises(
        AttachError, match="'default' stands at virtual positions, which are there or not for the whole"
    ):
        use(model, {"default": weight})
    use(model, {"default": torch.tensor(1.0)})


def test_two_at_once_are_refused_and_one_after_the_other_is_not() -> None:
    model, ids = read_by(decoder("llama"), "prompt-tuning", "a"), tokens(1, 5)
    with_a = model(ids).logits
    with pytest.raises(AttachError, match="'a' and 'the new one' both put virtual positions into the input"):
        attach(model, AdapterSpec(PrefixTuning(4)), "b")
    use(model, {})
    read_by(model, "prefix-tuning", "b")
    with_b = model(ids).logits
    with pytest.raises(AttachError, match="'a' and 'b' both put virtual positions into the input, and their order"):
        use(model, {"a": 1.0, "b": 1.0})
    assert torch.equal(model(ids).logits, with_b), "a refused choice changes nothing"
    with use(model, {"a": 1.0}):
        assert torch.equal(model(ids).logits, with_a)
    detach(model, "a")
    assert torch.equal(model(ids).logits, with_b)


def test_a_packed_row_is_refused() -> None:
    model = read_by(decoder("llama"), "prompt-tuning")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(
        DataError, match="this row packs several examples, and prompt-tuning puts .*; set data.packing: never"
    ):
        model(tokens(1, 7), position_ids=positions)
    model(tokens(1, 7), position_ids=torch.arange(7)[None])


def test_a_cache_of_another_reader_is_refused() -> None:
    model, ids = read_by(decoder("llama"), "prompt-tuning", "a"), tokens(1, 5)
    cache = model(ids).past_key_values
    with use(model, {}):
        bare = model(ids).past_key_values
        with pytest.raises(AttachError, match="filled with those of adapter 'a', and the model now reads without virt"):
            model(ids[:, :1], past_key_values=cache)
    with pytest.raises(AttachError, match="this cache was filled without virtual positions, .* start a new cache"):
        model(ids[:, :1], past_key_values=bare)
    model(ids[:, :1], past_key_values=cache)


def test_a_call_without_a_cache_gives_none_back() -> None:
    model = read_by(decoder("llama"), "prefix-tuning")
    assert model(tokens(1, 5), use_cache=False).past_key_values is None
    cache = DynamicCache(config=model.config)
    assert model(tokens(1, 5), past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == 5 + 4


def test_a_cache_of_fixed_size_is_refused() -> None:
    model = read_by(decoder("llama"), "prompt-tuning")
    with pytest.raises(AttachError, match="a cache that grows; generate without cache_implementation"):
        model.generate(tokens(1, 5), max_new_tokens=2, cache_implementation="static", pad_token_id=0)


def test_a_prefix_in_the_cache_and_checkpointing_do_not_go_together() -> None:
    model = read_by(decoder("llama"), "prefix-tuning").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(
        AttachError, match="prefix-tuning acts through the cache, which gradient checkpointing switches"
    ):
        model(tokens(1, 5))
    model.eval()
    model(tokens(1, 5))


def test_where_the_prompt_ends_is_asked_where_it_cannot_be_known() -> None:
    model, ids = read_by(decoder("llama"), PrefixEmbedding(3, 2)), tokens(2, 5)
    for training, caching in ((True, True), (False, False)):
        with pytest.raises(DataError, match="prefix-embedding has 2 virtual positions after the prompt; say where"):
            model.train(training)(ids, use_cache=caching)
    with pytest.raises(DataError, match=r"prompt_ends has shape \(3,\), expected one column a row: \(2,\)"):
        model(ids, prompt_ends=torch.tensor([1, 2, 3]))
    model.train()(ids, prompt_ends=torch.tensor([1, 5]))
    read_by(classifier("bert"), PrefixEmbedding(3, 2)).train()(ids)


def test_a_prompt_in_pieces_is_refused_behind_positions_that_end_it() -> None:
    model, ids = read_by(decoder("llama"), PrefixEmbedding(3, 2)), tokens(1, 8)
    cache = model(ids[:, :4]).past_key_values
    with pytest.raises(AttachError, match="4 tokens follow the virtual positions that end the prompt; give the whole"):
        model(ids[:, 4:], past_key_values=cache)
    whole = read_by(decoder("llama"), PrefixEmbedding(3, 0))
    pieces = whole(ids[:, 4:], past_key_values=whole(ids[:, :4]).past_key_values).logits
    torch.testing.assert_close(pieces, whole(ids).logits[:, 4:], rtol=0, atol=2e-5)


def test_a_state_of_another_shape_lists_its_tensors() -> None:
    kept = state(read_by(decoder("llama"), "prefix-tuning"))
    with pytest.raises(AdapterFileError, match=r"model.prefix: shape \(4, 48\), expected \(4, 96\)"):
        attach(decoder("llama", num_key_value_heads=4), kept)
    with pytest.raises(AdapterFileError, match="made for another model, and this model has none of its 1 layers"):
        attach(decoder("gpt2"), kept)


def test_a_text_without_its_ids_says_who_knows_them() -> None:
    model = decoder("llama")
    with pytest.raises(SpecError, match=r"starts from a text, and a model has no tokenizer: attach method.tokenized"):
        attach(model, AdapterSpec(PromptTuning(4, text="Once upon")))
    with pytest.raises(AttachError, match="token id 40 of prompt-tuning lies outside the model's 40 embeddings"):
        attach(model, AdapterSpec(PromptTuning(4, ids=(3, 40))))
    assert not hasattr(model.model, "adapters")


def test_a_prompt_nobody_reads_is_not_alive() -> None:
    model, ids = read_by(decoder("llama"), "prompt-tuning"), tokens(1, 5)
    with pytest.raises(AliveError, match="1 of 1 active adapters were never called"), alive(model):
        model.lm_head(model.get_input_embeddings()(ids))
    with alive(model, backward=False):
        model(ids)
