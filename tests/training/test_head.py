"""The loss without logits: where it is taken, that it is the loss with them, and why not elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    OPTConfig,
    PhiConfig,
)

from lorakit import AdapterSpec, attach
from lorakit.core.spec import Targets
from lorakit.kernels.linear_cross_entropy import Temper
from lorakit.methods.lora import LoRA
from lorakit.training.head import Head, head_of
from lorakit.training.loss import how_lost, logits_of, loss_of_batch, mean_of_batch, summed_loss
from tests.context.samples import DECODERS, GROUPED, SIZES, classifier, decoder, loud, read_by, tokens
from tests.law.cases import CONTEXTS
from tests.tolerances import assert_close

FAMILIES: dict[str, Any] = {
    **{family: (make, Temper()) for family, make in DECODERS.items()},
    "phi": (lambda: PhiConfig(**GROUPED), Temper()),
    "gptj": (lambda: GPTJConfig(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=48, rotary_dim=4), Temper()),
    "opt": (
        lambda: OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=8),
        Temper(),
    ),
    "gpt_neox": (lambda: GPTNeoXConfig(**SIZES, intermediate_size=24), Temper()),
    "gemma2": (lambda: Gemma2Config(**GROUPED, head_dim=4, final_logit_softcapping=2.0), Temper(cap=2.0)),
    "cohere": (lambda: CohereConfig(**GROUPED, logit_scale=0.0625), Temper(0.0625)),
    "granite": (lambda: GraniteConfig(**GROUPED, logits_scaling=8.0), Temper(1 / 8)),
}
families = pytest.mark.parametrize("family", FAMILIES)


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return loud(AutoModelForCausalLM.from_config(FAMILIES[family][0]())).eval()  # no dropout


def batch() -> dict[str, Tensor]:
    """Return two rows, one padded, whose first tokens are not trained."""
    ids = tokens(2, 9)
    labels = ids.masked_fill(torch.arange(9) < torch.tensor([[4], [2]]), -100)
    mask = torch.ones_like(ids)
    mask[1, 7:], labels[1, 7:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plainly(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss of whole logits, whatever the head."""
    inputs = {name: tensor for name, tensor in given.items() if name != "labels"}
    return summed_loss(logits_of(model, inputs, given["labels"]), given["labels"])


def fused(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss, and assert that no logits came to be."""
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, args, out: seen.append(out.logits))
    try:
        found = loss_of_batch(model, {k: v for k, v in given.items() if k != "labels"}, given["labels"])
    finally:
        hook.remove()
    assert seen[-1].numel() == 0
    return found


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@families
def test_the_loss_and_the_gradients_of_every_family_are_those_of_its_logits(family: str) -> None:
    model, given = model_of(family), batch()
    attach(model, AdapterSpec(LoRA(4)))
    head = head_of(model)
    assert isinstance(head, Head), head
    assert head.temper == FAMILIES[family][1]
    (loss, count), (wanted, many) = fused(model, given), plainly(model, given)
    assert_close(loss, wanted)
    assert count == many
    found, expected = gradients(model, loss), gradients(model, plainly(model, given)[0])
    assert found.keys() == expected.keys() != set()
    for name, own in found.items():
        assert_close(own, expected[name], scale=max(g.abs().max().item() for g in expected.values()))


@pytest.mark.parametrize("train", ["*", "heads"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])  # apart, tied, with a bias
def test_a_head_that_is_trained_whole_gets_its_gradient(family: str, train: str) -> None:
    model, given = model_of(family), batch()
    attach(model, AdapterSpec(None, train=(train,)))
    found = gradients(model, fused(model, given)[0])
    expected = gradients(model, plainly(model, given)[0])
    assert found.keys() == expected.keys()
    assert any(p is model.get_output_embeddings().weight for p in map(model.get_parameter, found))
    for name, own in found.items():
        assert_close(own, expected[name], scale=max(g.abs().max().item() for g in expected.values()))


@pytest.mark.parametrize("method", CONTEXTS)
@pytest.mark.parametrize("family", DECODERS)
def test_virtual_positions_are_read_as_with_logits(family: str, method: str) -> None:
    model, given = read_by(decoder(family), method), batch()
    found = gradients(model, fused(model, given)[0])
    expected = gradients(model, plainly(model, given)[0])
    for name, own in found.items():
        assert_close(own, expected[name])


def test_packed_rows_are_summed_as_with_logits() -> None:
    model, ids = model_of("llama"), tokens(1, 9)
    given = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), "labels": ids.clone()}
    given["labels"][0, 4] = -100
    assert_close(fused(model, given)[0], plainly(model, given)[0])


def test_under_autocast_the_products_are_narrow_and_the_sum_is_wide() -> None:
    model, given = model_of("llama"), batch()
    with torch.autocast("cpu", torch.bfloat16):
        (loss, _), (wanted, _) = fused(model, given), plainly(model, given)
    found, expected = gradients(model, loss), gradients(model, wanted)
    assert loss.dtype == torch.float32
    assert_close(loss, wanted, dtype=torch.bfloat16)
    for name, own in found.items():
        assert own.dtype == torch.float32
        scale = max(g.abs().max().item() for g in expected.values())
        assert_close(own, expected[name], scale=scale, dtype=torch.bfloat16)


def test_a_model_in_16_bits_is_measured_in_16_bits() -> None:
    for family, (_, temper) in FAMILIES.items():
        head = head_of(model_of(family).bfloat16())
        assert isinstance(head, Head), family
        assert head.temper == temper


def adapted() -> Any:
    model = model_of("llama")
    attach(model, AdapterSpec(LoRA(4), Targets(include=("lm_head",))))
    return model


def strange() -> Any:
    """Return a model that does something to its logits that nobody told of."""
    model = model_of("llama")
    model.register_forward_hook(lambda _, args, out: setattr(out, "logits", out.logits + 1.0) or out)
    return model


def twice() -> Any:
    """Return a model whose head is called by others too."""
    model = model_of("llama")

    def aside(*_: Any) -> None:
        model.lm_head(torch.ones(1, 2, 16))

    model.model.register_forward_hook(aside)
    return model


def replaced() -> Any:
    model = model_of("llama")
    model.lm_head.forward = lambda x: x @ model.lm_head.weight.T
    return model


def watched() -> Any:
    model = model_of("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


class Sharded(Tensor):
    """Stands for a weight that is split among devices, or kept in fewer bits."""


def sharded() -> Any:
    model = model_of("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Sharded))
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (watched, "something watches its head"),
        (sharded, "its head's weight is a Sharded"),
        (adapted, "its head is adapted"),
        (replaced, "its head is no plain linear layer"),
        (strange, "its logits are not what its head makes"),
        (twice, "its logits are not what its head makes"),
    ],
)
def test_elsewhere_the_logits_are_made_and_the_reason_is_told(make: Any, why: str) -> None:
    model, given = make(), batch()
    assert how_lost(model).startswith(f"plain, because {why}")
    assert torch.equal(mean_of_batch(model, given), plainly(model, given)[0] / plainly(model, given)[1])


def test_a_classifier_has_no_head_over_a_vocabulary() -> None:
    model, given = classifier("bert"), {"input_ids": tokens(3, 5), "labels": torch.tensor([0, 2, 1])}
    assert how_lost(model) == "plain, because the model has no head over a vocabulary"
    assert_close(mean_of_batch(model, given), model(**given).loss)


def test_a_model_is_measured_once_and_nothing_is_left_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, calls = model_of("llama").train(), batch(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    assert how_lost(model) == "fused, the logits never exist whole"
    assert (len(calls), model.training) == (1, True)
    assert torch.equal(torch.get_rng_state(), state)
    fused(model, given)
    assert len(calls) == 2
    assert not model.lm_head._forward_pre_hooks
    assert head_of(copy.deepcopy(model)) != head_of(model), "a copy has a head of its own"
    assert len(calls) == 2
    assert model(**given).logits.shape == (2, 9, 40), "whoever asks for logits gets them"
