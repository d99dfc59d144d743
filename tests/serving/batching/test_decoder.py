"""One forward of many sequences gives each what it gets alone: every family, every kind of adapter, any mixture."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.state import AdapterState
from lorakit.errors import AdapterFileError, AttachError, SpecError
from lorakit.inject.attach import attach
from lorakit.inject.bases import base_of
from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.block import BlockDiagonal
from lorakit.methods.dora import DoRA
from lorakit.methods.houlsby import Houlsby
from lorakit.methods.ia3 import IA3
from lorakit.methods.loha import LoHa
from lorakit.methods.lora import LoRA
from lorakit.methods.vera import VeRA
from lorakit.serving.batching.decoder import Decoder, Piece
from lorakit.serving.batching.place import Choice
from tests.serving.models import FAMILIES, VOCABULARY, adapter, logits_alone, made
from tests.tolerances import assert_close

EVERYWHERE = AdapterSpec(LoRA(4), targets=Targets(("all-linear", "lm_head")))
SPECS = {
    "lora": AdapterSpec(LoRA(2)),
    "wider": AdapterSpec(LoRA(8, alpha=4.0)),
    "dora": AdapterSpec(DoRA(LoRA(3))),
    "vera": AdapterSpec(VeRA(8)),
    "adalora": AdapterSpec(AdaLoRA(target_rank=2, init_rank=4)),
    "loha": AdapterSpec(LoHa(2)),
}


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=length)


def served(decoder: Decoder, prompts: list[list[int]], choices: list[Choice | None], cut: int) -> list[Tensor]:
    """Return the logits at every position from `cut - 1` on, all sequences in one batch: prompts in one piece each."""
    pieces = [Piece(i, 0, p[:cut], c, True) for i, (p, c) in enumerate(zip(prompts, choices, strict=True))]
    found = [decoder.step([], pieces)]
    for at in range(cut, len(prompts[0])):
        found.append(decoder.step([(p[at], at, c) for p, c in zip(prompts, choices, strict=True)]))
    return list(torch.stack(found, 1))


def check(model: Any, states: list[AdapterState | None], scales: list[float]) -> None:
    """Assert that sequences of one batch, each with its own adapter, get the logits they get alone."""
    prompts = [prompt(20, seed) for seed in range(len(states))]
    wanted = [logits_alone(model, s, p, x)[11:] for s, p, x in zip(states, prompts, scales, strict=True)]
    decoder = Decoder(model, slots=len(states))
    prepared = {id(s): decoder.prepare(str(i), s) for i, s in enumerate(states) if s is not None}
    for one in prepared.values():
        decoder.bank.hold(one)
    choices = [None if s is None else Choice(prepared[id(s)], x) for s, x in zip(states, scales, strict=True)]
    for found, expected in zip(served(decoder, prompts, choices, 12), wanted, strict=True):
        gemma = type(model).__name__.startswith("Gemma")  # whose norms are fp32 in any dtype
        assert_close(found, expected, dtype=torch.float32 if gemma else None)
    decoder.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sequence_of_a_mixed_batch_gets_its_own_adapters_logits(family: str) -> None:
    model = made(family)
    one, two, three, four = (
        adapter(model, spec) for spec in (SPECS["lora"], SPECS["wider"], SPECS["dora"], EVERYWHERE)
    )
    check(model, [one, None, two, three, one, four, four], [1.0, 1.0, 0.5, 1.0, 2.0, 1.0, -0.5])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_low_rank_method_is_served_among_others(family: str, name: str) -> None:
    model = made(family)
    others = [adapter(model, SPECS["lora"]) for _ in range(3)]
    check(model, [adapter(model, SPECS[name]), None, *others], [1.0, 1.0, 1.0, 0.7, 1.0])


@pytest.mark.parametrize("choices", [[0, 0, 0], [0, 1, 0], [0, None, 0], [None, None, None]])
@pytest.mark.parametrize("room", [0, 1 << 30])
def test_whether_factors_stand_by_row_or_are_gathered_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, choices: list[int | None], room: int
) -> None:
    monkeypatch.setattr("lorakit.serving.batching.bank.RESIDENT", room)
    model = made("llama")
    states = [adapter(model, EVERYWHERE), adapter(model, SPECS["dora"])]
    check(model, [None if c is None else states[c] for c in choices], [1.0] * 3)


def test_an_embeddings_adapter_is_served() -> None:
    model = made("gemma2")
    spec = AdapterSpec(LoRA(4), targets=Targets(("embed_tokens", "q_proj")))
    one, two, three = (adapter(model, spec) for _ in range(3))
    check(model, [one, None, two, three], [1.0, 1.0, 0.5, 1.0])


def test_slices_of_a_fused_layer_are_served() -> None:
    model = made("phi3")
    spec = AdapterSpec(LoRA(4), targets=Targets("qkv_proj[q,v]"))
    one, two, three = (adapter(model, spec) for _ in range(3))
    assert any(update.site.rows for update in one.updates)
    check(model, [one, two, three, None], [1.0] * 4)


def test_a_base_in_16_bits_keeps_its_adapters_in_fp32() -> None:
    model = made("llama", torch.float32)
    state = adapter(model, SPECS["wider"])
    prompts = [prompt(16, 1)]
    wanted = logits_alone(model, state, prompts[0])[11:]
    decoder = Decoder(model.to(torch.bfloat16), slots=1)
    prepared = decoder.prepare("a", state)
    assert all(pair.down.dtype == pair.up.dtype == torch.float32 for pair in prepared.pairs.values())
    decoder.bank.hold(prepared)
    assert_close(served(decoder, prompts, [Choice(prepared)], 12)[0], wanted, dtype=torch.bfloat16)


def test_sequences_in_pieces_and_decoded_ones_share_a_step() -> None:
    model = made("mistral")
    states = [adapter(model, SPECS["lora"]), None, adapter(model, SPECS["dora"])]
    long, short = prompt(30, 1), prompt(9, 2)
    wanted = [logits_alone(model, states[0], short), logits_alone(model, states[2], long)]
    decoder = Decoder(model, slots=3)
    first, last = (decoder.prepare(str(i), s) for i, s in ((0, states[0]), (2, states[2])))
    decoder.bank.hold(first)
    decoder.bank.hold(last)
    mine, other = Choice(first), Choice(last)
    assert_close(decoder.step([], [Piece(0, 0, short[:7], mine, True)]), wanted[0][6:7])
    both = decoder.step([(short[7], 7, mine)], [Piece(2, 0, long[:11], other, False)])
    assert_close(both, wanted[0][7:8])
    both = decoder.step([(short[8], 8, mine)], [Piece(2, 11, long[11:], other, True)])
    assert_close(both, torch.stack([wanted[0][8], wanted[1][-1]]))


@pytest.mark.parametrize("everywhere", ["decoded", "read", "both"])
def test_an_adapter_of_the_head_acts_on_its_own_sequence_while_a_prompt_is_half_read(everywhere: str) -> None:
    model = made("llama")
    specs = {name: EVERYWHERE if everywhere in (name, "both") else SPECS["lora"] for name in ("decoded", "read")}
    states = [adapter(model, spec) for spec in specs.values()]
    short, long = prompt(8, 1), prompt(20, 2)
    wanted = [logits_alone(model, states[0], short), logits_alone(model, states[1], long)]
    decoder = Decoder(model, slots=2)
    mine, other = (Choice(decoder.prepare(str(i), s)) for i, s in enumerate(states))
    decoder.bank.hold(mine.adapter)
    decoder.bank.hold(other.adapter)
    found = decoder.step([], [Piece(0, 0, short[:7], mine, True), Piece(1, 0, long[:9], other, False)])
    assert_close(found, wanted[0][6:7])
    found = decoder.step([(short[7], 7, mine)], [Piece(1, 9, long[9:15], other, False)])
    assert_close(found, wanted[0][7:8])
    assert decoder.step([], [Piece(1, 15, long[15:18], other, False)]).shape == (0, VOCABULARY)
    assert_close(decoder.step([], [Piece(1, 18, long[18:], other, True)]), wanted[1][-1:])
    decoder.close()


def test_a_moved_sequence_goes_on_where_it_was() -> None:
    model = made("llama")
    ids = prompt(14, 3)
    wanted = logits_alone(model, None, ids)
    decoder = Decoder(model, slots=4)
    decoder.step([], [Piece(3, 0, ids[:10], None, True)])
    decoder.slots.move(3, 0, 10)
    found = torch.cat([decoder.step([(ids[at], at, None)]) for at in range(10, 14)])
    assert_close(found, wanted[10:])


def test_a_wider_adapter_may_come_later_and_go_again() -> None:
    model = made("llama")
    states = [adapter(model, SPECS[name]) for name in ("lora", "wider", "dora")]
    prompts = [prompt(14, seed) for seed in range(3)]
    wanted = [logits_alone(model, s, p)[11:] for s, p in zip(states, prompts, strict=True)]
    decoder = Decoder(model, slots=3)
    ready = [decoder.prepare(str(i), s) for i, s in enumerate(states)]
    decoder.bank.hold(ready[0])
    assert_close(served(decoder, prompts[:1], [Choice(ready[0])], 12)[0], wanted[0])
    for one in ready[1:]:
        decoder.bank.hold(one)
    for found, expected in zip(served(decoder, prompts, [Choice(r) for r in ready], 12), wanted, strict=True):
        assert_close(found, expected)
    decoder.bank.drop(ready[1])
    choices = [Choice(ready[0]), None, Choice(ready[2])]
    wanted[1] = logits_alone(made("llama"), None, prompts[1])[11:]
    for found, expected in zip(served(decoder, prompts, choices, 12), wanted, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_close_gives_the_model_back_bit_for_bit(family: str) -> None:
    model = made(family)
    before, ids = {k: v.clone() for k, v in model.state_dict().items()}, prompt(9, 1)
    wanted, classes = logits_alone(model, None, ids), [type(m) for m in model.modules()]
    Decoder(model).close()
    assert [type(m) for m in model.modules()] == classes
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits_alone(model, None, ids), wanted)


def test_large_weights_are_packed_once_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.kernels.prepacked.FEWEST", 1)
    model = made("gpt2", torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    states = [adapter(model, SPECS["dora"]), adapter(model, SPECS["lora"]), adapter(model, EVERYWHERE), None]
    check(model, states, [1.0] * 4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    decoder = Decoder(model)
    packed = [place for place in decoder.bank.places.values() if place.packed is not None]
    assert len(packed) == 9, "four layers a block, and the head"
    assert sum(place.module.weight.numel() == 0 for place in packed) == 8, "the head's is the embeddings', which stays"


def test_a_base_with_another_state_than_keys_and_values_is_refused() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    for model in (MambaForCausalLM(MambaConfig(**sizes)), BloomForCausalLM(BloomConfig(**sizes, n_layer=2, n_head=4))):
        before = [type(m) for m in model.modules()]
        with pytest.raises(AttachError, match="engine"):
            Decoder(model.eval())
        assert [type(m) for m in model.modules()] == before, "and left as it was"


def test_adapters_that_cannot_differ_by_token_are_refused_with_the_way_out() -> None:
    model = made("llama")
    decoder = Decoder(made("llama"))
    for spec, why in (
        (AdapterSpec(IA3()), "ia3 is no low-rank change of a weight.*convert --as-lora.*merge"),
        (
            AdapterSpec(Houlsby(reduction=2), targets=Targets(("attention-out", "mlp-out"))),
            "houlsby is no change of a weight.*lorakit generate",
        ),
    ):
        with pytest.raises(SpecError, match=why):
            decoder.prepare("a", adapter(model, spec))


def test_the_base_s_own_weight_beside_an_adapted_head_is_no_hindrance() -> None:
    model = made("llama")
    state = adapter(model, EVERYWHERE)
    same = replace(state, trained={"lm_head.weight": model.lm_head.weight.detach().clone()})
    decoder = Decoder(model)
    assert decoder.prepare("a", same).pairs.keys() == decoder.prepare("b", state).pairs.keys()
    other = replace(state, trained={"lm_head.weight": same.trained["lm_head.weight"] + 1e-3})
    with pytest.raises(SpecError, match="trained 1 of the base's own(.|\n)*lm_head.weight(.|\n)*merge"):
        decoder.prepare("c", other)
    decoder.close()


def test_an_adapter_of_another_base_is_refused_with_both_values() -> None:
    torch.manual_seed(1)
    given = adapter(FAMILIES["llama"](), SPECS["lora"])
    with pytest.raises(AdapterFileError, match="another base.*\n.*q_proj: expected .* found"):
        Decoder(made("llama")).prepare("a", given)
    small = adapter(made("gpt2"), SPECS["lora"])
    with pytest.raises(AdapterFileError, match="made for another model, and this model has none of its 8 layers"):
        Decoder(made("llama")).prepare("a", replace(small, base=base_of(made("llama"))))


def test_block_diagonal_factors_are_served_as_they_are() -> None:
    model = made("llama")
    given = adapter(model, AdapterSpec(BlockDiagonal(4, blocks=2, alpha=8.0)))
    check(model, [given, None, adapter(model, SPECS["lora"]), adapter(model, SPECS["wider"])], [1.0] * 4)
    attach(model, given, "again")
