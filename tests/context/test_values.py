"""What the methods compute, against the frozen model run by hand, and the counts the papers print."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lorakit.context.prefix_embedding import PrefixEmbedding
from lorakit.context.prefix_layer import PrefixLayer
from lorakit.context.prefix_tuning import PrefixTuning
from lorakit.context.prompt_tuning import PromptTuning
from lorakit.core.layout import Layout
from lorakit.core.method import Context
from lorakit.core.reading import blocks_of
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec
from lorakit.errors import DataError
from lorakit.inject.attach import adapters_named, attach, detach, state
from lorakit.inject.sites import sites
from tests.context.samples import DECODERS, classifier, decoder, padded, read_by, tokens
from tests.tolerances import assert_close

families = pytest.mark.parametrize("family", DECODERS)
GPT3 = Site("", 12_288, 96, (96, 128), kind="model")


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (PrefixEmbedding(256, 8), 3_244_032),  # 12,288 (256 + 8); the paper prints 3.2M
        (PrefixEmbedding(32, 8), 491_520),
        (PrefixLayer(8, 8), 18_874_368),  # 96 * 12,288 * 16; the paper prints 20.2M, its own formula gives this
        (PromptTuning(100), 1_228_800),
        (PrefixTuning(10), 23_592_960),  # 2 * 96 * 10 * 12,288
    ],
)
def test_counts_on_gpt3(method: Context, parameters: int) -> None:
    assert sum(d.numel for d in method.tensors(GPT3).values()) == parameters


def test_counts_on_gpt2() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert sites(model).reader == Site("transformer", 768, 12, (12, 64), kind="model")
    for method, parameters in ((PrefixLayer(8, 8), 147_456), (PrefixTuning(20), 368_640)):
        handle = attach(model, AdapterSpec(method), method.name)
        assert sum(p.numel() for p in handle.parameters()) == parameters
        detach(model, method.name)


@families
@pytest.mark.parametrize("ends", [(7, 7), (0, 4), (3, 6)])
def test_prefix_embedding_is_the_model_on_a_longer_row(family: str, ends: tuple[int, int]) -> None:
    model, ids = read_by(decoder(family), PrefixEmbedding(3, 2)), tokens(2, 7)
    vectors = state(model).updates[0].tensors["embeddings"]
    out = model(ids, prompt_ends=torch.tensor(ends)).logits
    detach(model)
    for row, end, logits in zip(ids, ends, out, strict=True):
        words = model.get_input_embeddings()(row)
        longer = torch.cat([vectors[:3], words[:end], vectors[3:], words[end:]])
        by_hand = model(inputs_embeds=longer[None]).logits[0]
        columns = [3 + i for i in range(end)] + [3 + 2 + i for i in range(end, 7)]
        if end:
            columns[end - 1] = 3 + end + 1  # the answer's first token is predicted from the last special token
        assert_close(logits, by_hand[columns])


@families
def test_prompt_tuning_is_prefix_embedding_without_any_behind(family: str) -> None:
    prompt, ids = read_by(decoder(family), PromptTuning(5)), tokens(2, 7)
    prefix = read_by(decoder(family), PrefixEmbedding(5, 0))
    with torch.no_grad():
        values = adapters_named(prompt, "default")[0].get_parameter("prompt")
        adapters_named(prefix, "default")[0].get_parameter("embeddings").copy_(values)
    assert torch.equal(prompt(ids).logits, prefix(ids).logits)


@families
def test_prefix_layer_replaces_what_every_block_reads(family: str) -> None:
    model, ids, read = read_by(decoder(family), PrefixLayer(3, 2)), tokens(1, 6), []
    vectors = state(model).updates[0].tensors["activations"]
    out = model(ids, prompt_ends=torch.tensor([4])).logits
    detach(model)
    special = torch.tensor([0, 1, 2, 7, 8])  # P P P x x x x I I y y

    def replaced(index: int) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0].clone()
            hidden[:, special] = vectors[index]
            read.append(index)
            return (hidden, *args[1:])

        return hook

    for index, block in enumerate(blocks_of(model.base_model)):
        block.register_forward_pre_hook(replaced(index))
    words = model.get_input_embeddings()(ids)
    anything = torch.randn(1, 5, 16)
    row = torch.cat([anything[:, :3], words[:, :4], anything[:, 3:], words[:, 4:]], 1)
    by_hand = model(inputs_embeds=row).logits
    assert read == [0, 1, 2]
    assert_close(out, by_hand[:, [3, 4, 5, 8, 9, 10]])


@families
def test_prefix_layer_gives_no_gradient_to_earlier_layers_there(family: str) -> None:
    model = read_by(decoder(family), PrefixLayer(2, 0))
    attach_points = []

    def keep(_: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        out.retain_grad()
        attach_points.append(out)

    blocks_of(model.base_model)[0].register_forward_hook(keep)
    model(tokens(1, 6)).logits.square().sum().backward()
    grad = attach_points[0].grad
    assert grad is not None
    assert not grad[:, :2].any()
    assert grad[:, 2:].any()


def test_the_loss_ignores_virtual_positions() -> None:
    model, ids = read_by(decoder("llama"), PrefixEmbedding(3, 2)), tokens(2, 7)
    labels = torch.where(torch.arange(7) < 4, -100, ids)
    given = {"prompt_ends": torch.tensor([4, 4])}
    logits = model(ids, **given).logits
    by_hand = F.cross_entropy(logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    assert_close(model(ids, labels=labels, **given).loss, by_hand)


def test_a_prefix_keeps_its_keys_and_values_without_the_perceptron() -> None:
    model, ids = read_by(decoder("llama"), PrefixTuning(4, hidden=5)), tokens(2, 7)
    update = state(model).updates[0]
    method, tensors = update.method.trimmed(update.site, update.tensors)  # type: ignore[attr-defined]
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"prefix": (4, 3 * 2 * 2 * 4)}
    plain = decoder("llama")
    attach(plain, AdapterSpec(method))
    with torch.no_grad():
        adapters_named(plain, "default")[0].get_parameter("prefix").copy_(tensors["prefix"])
    assert_close(plain(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("method", [PromptTuning(4), PrefixEmbedding(3, 2), PrefixLayer(3, 2), PrefixTuning(4)])
def test_an_encoder_pools_its_own_first_token_padded_or_not(family: str, method: Context) -> None:
    model, rows = classifier(family), [tokens(9, seed=1), tokens(4, seed=2)]
    before = model(rows[1][None]).logits
    read_by(model, method)
    batch = padded(rows, "right", pad=model.config.pad_token_id)
    out = model(**batch).logits
    for row, logits in zip(rows, out, strict=True):
        assert_close(logits, model(row[None]).logits[0])
    assert not torch.allclose(out[1], before[0], atol=1e-2)
    kept = model.base_model(**batch)
    assert kept.last_hidden_state.shape == (2, 9, 16)
    if kept.pooler_output is not None:
        assert_close(kept.pooler_output, model.base_model.pooler(kept.last_hidden_state))


def test_token_types_make_room_too() -> None:
    model, ids = read_by(classifier("bert"), PrefixEmbedding(3, 2)), tokens(2, 7)
    types = (torch.arange(7) >= 3).long().expand(2, -1)
    assert_close(model(ids, token_type_ids=types * 0).logits, model(ids).logits)
    assert not torch.allclose(model(ids, token_type_ids=types).logits, model(ids).logits, atol=1e-3)


@families
def test_a_decoder_s_classifier_reads_the_last_position_after_its_text(family: str) -> None:
    model, rows = read_by(classifier(family), PrefixEmbedding(3, 2)), [tokens(9, seed=1), tokens(4, seed=2)]
    out = model(**padded(rows, "right")).logits
    for row, logits in zip(rows, out, strict=True):
        assert_close(logits, model(row[None]).logits[0])
    words = model.get_input_embeddings()(rows[1])
    vectors = state(model).updates[0].tensors["embeddings"]
    detach(model)
    longer = torch.cat([vectors[:3], words, vectors[3:]])
    hidden = model.base_model(inputs_embeds=longer[None]).last_hidden_state
    assert_close(out[1], model.score(hidden)[0, -1])


def test_columns_of_a_row_by_hand() -> None:
    layout = Layout(2, 1, torch.tensor([3, 0]))
    row = layout.spread(torch.tensor([[-1, -2, -3]] * 2), torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]]))
    assert row.tolist() == [[-1, -2, 10, 11, 12, -3, 13], [-1, -2, -3, 20, 21, 22, 23]]
    positions = layout.positions(torch.arange(4).expand(2, -1))
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert layout.cut(row[..., None], answers=True)[..., 0].tolist() == [[10, 11, -3, 13], [20, 21, 22, 23]]
    assert layout.cut(row[..., None], answers=False)[..., 0].tolist() == [[10, 11, 12, 13], [20, 21, 22, 23]]
    assert layout.mask(torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])).tolist() == [
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 1, 1, 1],
    ]


def test_virtual_positions_stand_behind_padding_on_the_left() -> None:
    layout = Layout(2, 1, torch.tensor([3, 4]), torch.tensor([2, 0]))
    row = layout.spread(torch.tensor([[-1, -2, -3]] * 2), torch.tensor([[0, 0, 12, 13], [20, 21, 22, 23]]))
    assert row.tolist() == [[0, 0, -1, -2, 12, -3, 13], [-1, -2, 20, 21, 22, 23, -3]]
    assert layout.cut(row[..., None], answers=True)[..., 0].tolist() == [[0, 0, -3, 13], [20, 21, 22, -3]]
    assert layout.cut(row[..., None], answers=False)[..., 0].tolist() == [[0, 0, 12, 13], [20, 21, 22, 23]]
    assert layout.mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).tolist() == [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
    only = Layout(2, 0, starts=torch.tensor([1]))
    assert only.spread(torch.tensor([[-1, -2]]), torch.tensor([[0, 11, 12]])).tolist() == [[0, -1, -2, 11, 12]]
    assert only.positions(torch.tensor([[0, 0, 1]])).tolist() == [[2, 0, 1, 2, 3]]
    assert only.cut(torch.tensor([[[0], [-1], [-2], [11], [12]]]), answers=True)[..., 0].tolist() == [[0, 11, 12]]


def test_positions_skip_padding_on_the_left() -> None:
    positions = Layout(2, 1, torch.tensor([4])).positions(torch.tensor([[0, 0, 1, 2]]))
    assert positions.tolist() == [[0, 1, 2, 2, 3, 4, 5]]


def test_a_text_starts_the_prompt_repeated_or_cut() -> None:
    encode = {"three words here": [5, 6, 7]}.__getitem__
    table = decoder("llama").get_input_embeddings().weight
    for count, ids in ((5, [5, 6, 7, 5, 6]), (2, [5, 6])):
        model = decoder("llama")
        attach(model, AdapterSpec(PromptTuning(count, text="three words here").tokenized(encode)))
        assert torch.equal(state(model).updates[0].tensors["prompt"], table[ids])


@pytest.mark.parametrize("method", [PromptTuning(200), PrefixEmbedding(100, 100), PrefixLayer(40, 40)])
def test_it_starts_as_embeddings_of_tokens(method: Context) -> None:
    model = decoder("llama", max_position_embeddings=400)
    attach(model, AdapterSpec(method))
    (vectors,) = state(model).updates[0].tensors.values()
    table = {tuple(row.tolist()) for row in model.get_input_embeddings().weight}
    drawn = {tuple(row.tolist()) for row in vectors.flatten(0, -2)}
    assert drawn <= table
    assert len(drawn) > 30, "draws the whole vocabulary"


def test_a_prompt_starts_as_what_the_model_reads_of_tokens_where_embeddings_are_multiplied() -> None:
    model = decoder("gemma3")
    attach(model, AdapterSpec(PromptTuning(3)))
    (adapter,) = adapters_named(model, "default")
    read = model.get_input_embeddings()(torch.arange(40))
    for row in adapter.tensors()["prompt"]:
        assert (row == read).all(1).any()


def test_roberta_has_no_position_up_to_that_of_its_padding() -> None:
    model = read_by(classifier("roberta"), PromptTuning(4))
    room = 48 - 1 - 1 - 4  # the table has 48 rows, the padding is 1, and four positions are read beside the row
    model(tokens(1, room))
    with pytest.raises(DataError, match=f"shorten rows to {room} tokens"):
        model(tokens(1, room + 1))


def test_a_normal_start_has_the_vocabulary_s_own_scale() -> None:
    model = decoder("llama", max_position_embeddings=4000)
    attach(model, AdapterSpec(PromptTuning(2000, start="normal")))
    vectors, table = state(model).updates[0].tensors["prompt"], model.get_input_embeddings().weight
    assert abs(vectors.std() / table.std() - 1) < 0.03
