"""The laws of everything that acts on what a model reads, on every family of decoders."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.core.reading import blocks_of
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.state import AdapterState
from lorakit.data import IGNORE
from lorakit.errors import AttachError, DataError, MergeError
from lorakit.inject.activate import use
from lorakit.inject.alive import alive
from lorakit.inject.attach import adapters_named, attach, detach, state
from lorakit.inject.merge import merge
from lorakit.methods.lora import LoRA
from lorakit.persist.native import load_native, save_native
from lorakit.training.loss import loss_of_batch
from tests.context.samples import DECODERS, ODD, decoder, padded, read_by, tokens
from tests.law.cases import CONTEXTS, jitter
from tests.tolerances import assert_close

families = pytest.mark.parametrize("family", DECODERS)
methods = pytest.mark.parametrize("method", CONTEXTS)


def ends_of(method: str, *ends: int) -> dict[str, Tensor]:
    """Return the argument that says where each row's prompt ends, for methods that ask."""
    return {"prompt_ends": torch.tensor(ends)} if CONTEXTS[method].lengths()[1] else {}


@families
@methods
def test_inside_the_row_is_longer_and_outside_as_it_was(family: str, method: str) -> None:
    model, ids, widths = read_by(decoder(family), method), tokens(2, 7), []
    blocks_of(model.base_model)[1].register_forward_hook(lambda _, args, out: widths.append(out.shape[1]))
    out = model(ids, output_hidden_states=True)
    grown = 0 if CONTEXTS[method].where == "cache" else sum(CONTEXTS[method].lengths())
    assert widths == [7 + grown]
    assert out.logits.shape == (2, 7, 40)
    assert {h.shape for h in out.hidden_states} == {(2, 7, 16)}
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)


@families
@methods
def test_off_and_taken_away_the_model_is_the_bare_base(family: str, method: str) -> None:
    model, ids = decoder(family), tokens(2, 7)
    before, keys, cls = model(ids).logits, set(model.state_dict()), type(model.base_model)
    flags, blocks = [p.requires_grad for p in model.parameters()], {type(b) for b in blocks_of(model.base_model)}
    read_by(model, method)
    assert not torch.allclose(model(ids).logits, before, atol=1e-2)
    assert isinstance(model.base_model, cls)
    with use(model, {}):
        assert torch.equal(model(ids).logits, before)
    assert not torch.allclose(model(ids).logits, before, atol=1e-2)
    detach(model)
    assert torch.equal(model(ids).logits, before)
    assert set(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    assert type(model.base_model) is cls
    assert {type(b) for b in blocks_of(model.base_model)} == blocks


@families
@methods
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_row(family: str, method: str, side: str) -> None:
    model, rows = read_by(decoder(family), method), [tokens(9, seed=1), tokens(4, seed=2), tokens(6, seed=3)]
    batch = padded(rows, side)
    if (family, side) == ("mistral", "left") and "prefix-tuning" in method:  # its window would count the padding
        with pytest.raises(DataError, match="give rows of one length, or use prompt-tuning"):
            model(**batch)
        return
    out = model(**batch).logits
    for i, row in enumerate(rows):
        assert_close(out[i][batch["attention_mask"][i] == 1], model(row[None]).logits[0])


@pytest.mark.parametrize("family", sorted(ODD))
@methods
def test_families_with_habits_of_their_own_read_and_learn(family: str, method: str) -> None:
    model, row = read_by(decoder(family), method), tokens(6)
    batch = {**padded([row, tokens(3, seed=2)], "right"), "labels": torch.stack([row, row]).where(row > 9, IGNORE)}
    given = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if method == "prefix-layer" and family in ("bloom", "falcon"):
        with pytest.raises(AttachError, match="passes nothing on to 3 of its 3 blocks, .*; use prefix-embedding"):
            loss_of_batch(model.train(), given, batch["labels"])
        return
    loss, trained = loss_of_batch(model.train(), given, batch["labels"])
    (loss / trained).backward()
    for adapter in adapters_named(model, "default"):
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in adapter.parameters())
    model.eval()
    if (family, method.partition(",")[0]) != ("gemma3", "prefix-tuning"):  # which is refused beside a window
        out = model(**padded([row, tokens(3, seed=2)], "left")).logits
        assert_close(out[1, 3:], model(tokens(3, seed=2)[None]).logits[0])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(row[None], attention_mask=torch.ones(1, 6), **settings).shape == (1, 10)


@families
@methods
def test_a_cache_changes_no_token(family: str, method: str) -> None:
    model, ids = read_by(decoder(family), method), tokens(2, 7)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    row = ids
    for _ in range(8):
        logits = model(row, use_cache=False, **ends_of(method, 7, 7)).logits
        row = torch.cat([row, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, row)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@methods
@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_is_answered_alike_alone_and_in_a_padded_batch(family: str, method: str, beams: int) -> None:
    model, rows = read_by(decoder(family), method), [tokens(9, seed=1), tokens(4, seed=2), tokens(6, seed=3)]
    settings: dict[str, Any] = {
        "do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, "num_beams": beams,
    }  # fmt: skip
    together = model.generate(**padded(rows, "left"), **settings)[:, 9:]
    for row, answer in zip(rows, together, strict=True):
        assert torch.equal(model.generate(**padded([row], "left"), **settings)[0, len(row) :], answer)


@families
@methods
def test_steps_on_a_cache_give_the_logits_of_one_pass(family: str, method: str) -> None:
    model, ids = read_by(decoder(family), method), tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 5:7] = 0  # a prompt padded on its right, and an answer after it
    whole = model(ids, attention_mask=mask, **ends_of(method, 7, 5)).logits
    out, steps = model(ids[:, :7], attention_mask=mask[:, :7]), []
    for i in range(7, 10):
        out = model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=out.past_key_values)
        steps.append(out.logits)
    assert_close(torch.cat(steps, 1), whole[:, 7:])


@methods
def test_gradients_are_those_of_finite_differences(method: str) -> None:
    model = read_by(decoder("gpt2").double(), method)  # Llama's norms compute in fp32, whatever the model is
    ids, direction = tokens(2, 6), torch.randn(2, 6, 40, dtype=torch.float64)
    adapter = adapters_named(model, "default")[0]

    def value() -> Tensor:
        out: Tensor = (model(ids, **ends_of(method, 3, 5)).logits * direction).sum()
        return out

    value().backward()
    for parameter in adapter.parameters():
        along = torch.randn_like(parameter)
        slope = (parameter.grad * along).sum()
        steps = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(along, alpha=sign * 1e-5)
                steps.append(value())
                parameter.sub_(along, alpha=sign * 1e-5)
        torch.testing.assert_close(slope, (steps[0] - steps[1]) / 2e-5, rtol=1e-6, atol=1e-6)


@families
@methods
def test_every_position_learns(family: str, method: str) -> None:
    model = read_by(decoder(family), method).train()
    with alive(model):
        model(tokens(2, 6), labels=tokens(2, 6), **ends_of(method, 3, 5)).loss.backward()
    for adapter in adapters_named(model, "default"):
        for parameter in adapter.parameters():
            assert parameter.grad.flatten(0, -2).abs().sum(-1).gt(0).all() if parameter.dim() > 1 else True


@families
@methods
def test_a_state_attached_elsewhere_reads_the_same(family: str, method: str, tmp_path: Path) -> None:
    model, ids = read_by(decoder(family), method), tokens(2, 7)
    save_native(state(model), tmp_path / "kept")
    for given in (state(model), load_native(tmp_path / "kept")):
        twin = decoder(family)
        attach(twin, given, "other")
        assert torch.equal(twin(ids).logits, model(ids).logits)


def test_the_bare_reader_keeps_its_adapter_and_its_head_s_parameters_apart(tmp_path: Path) -> None:
    model = decoder("llama").model
    attach(model, AdapterSpec(CONTEXTS["prompt-tuning"], train="norm"))
    assert state(model).updates[0].site.path == ""
    save_native(state(model), tmp_path / "kept")
    found: AdapterState = load_native(tmp_path / "kept")
    assert list(found.trained) == ["norm.weight"]
    assert found.updates[0].tensors["prompt"].equal(state(model).updates[0].tensors["prompt"])


@methods
def test_copies_and_pickles_still_read(method: str) -> None:
    model, ids = read_by(decoder("llama"), method), tokens(2, 7)
    out, buffer = model(ids).logits, io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(ids).logits, out)
        detach(twin)
        assert not torch.equal(twin(ids).logits, out)
        assert type(twin.model) is type(decoder("llama").model)
    assert torch.equal(model(ids).logits, out), "a copy shares nothing with its original"


@methods
def test_it_stands_beside_an_update_of_the_layers(method: str) -> None:
    model, ids = decoder("llama"), tokens(2, 7)
    attach(model, AdapterSpec(LoRA(2), Targets("q_proj")), "lora")
    for adapter in adapters_named(model, "lora"):
        jitter(adapter)
    alone = model(ids).logits
    read_by(model, method, "read")
    both = model(ids).logits
    use(model, {"lora": 1.0})
    assert torch.equal(model(ids).logits, alone)
    use(model, {"read": 1.0, "lora": torch.tensor([0.0, 1.0])})
    assert_close(model(ids).logits[1], both[1])
    use(model, {"read": 1.0, "lora": 1.0})
    merge(model, ["lora"])
    assert_close(model(ids).logits, both)
    with pytest.raises(MergeError, match="model: .* acts on what the model reads, so no single weight equals it"):
        merge(model)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", [m for m in CONTEXTS if CONTEXTS[m].where != "cache"])
@families
def test_checkpointing_gives_the_same_gradients(family: str, method: str, reentrant: bool) -> None:
    model, grads = read_by(decoder(family), method).train(), []
    for dropout in [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]:
        dropout.p = 0.0
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(tokens(2, 6), labels=tokens(2, 6), use_cache=False, **ends_of(method, 3, 5)).loss
        grads.append(torch.autograd.grad(loss, list(adapters_named(model, "default")[0].parameters()))
                     if not checkpointed else backward(model, loss))  # fmt: skip
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain)


def backward(model: Any, loss: Tensor) -> list[Tensor | None]:
    """Return the gradients of a backward pass as an optimizer finds them."""
    loss.backward()
    return [p.grad for p in adapters_named(model, "default")[0].parameters()]


def test_compiled_equals_eager() -> None:
    model, ids = read_by(decoder("llama", num_hidden_layers=1), "prefix-layer"), tokens(2, 7)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(ids).logits, model(ids).logits)
