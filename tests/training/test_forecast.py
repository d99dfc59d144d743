"""The forecast of a step: equal to the real step's allocations, and the straight line over blocks exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA
from lorakit.training import forecast as module
from lorakit.training.forecast import Load, forecast, scene
from lorakit.training.groups import param_groups
from lorakit.training.head import Head, head_of
from lorakit.training.optimizers import make_optimizer
from lorakit.training.quantised import pack_layers
from lorakit.training.recipe import QuantSection
from lorakit.training.rehearsal import rehearse
from tests.slow import slow

FULL = AdapterSpec(None, train=("*",))
LOAD = Load(2, 24)


def llama(blocks: int = 3, **fields: Any) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                **{
                    "vocab_size": 96,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": blocks,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    **fields,
                }
            )
        )


def kept(model: nn.Module, spec: AdapterSpec, load: Load) -> int:
    """Return what autograd saves in a real forward, each storage once, parameters left out, and the loss itself."""
    made = scene(model, spec, load, pack=pack_layers)  # type: ignore[arg-type]
    real = made.build()
    made.prepare(real)
    rows = made.batch()
    real.train()
    there = [*real.parameters(), *real.buffers(), *made.extra(real)]
    own, found = {t.untyped_storage().data_ptr() for t in there}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), made.forward():
        made.loss(real, rows)
    return sum(found.values())


@pytest.mark.parametrize(
    ("spec", "load"),
    [
        (AdapterSpec(LoRA(4)), LOAD),
        (AdapterSpec(LoRA(4), dropout=0.1), LOAD),
        (AdapterSpec(DoRA(LoRA(4))), LOAD),
        (AdapterSpec(LoRA(4)), replace(LOAD, dtype=torch.bfloat16)),
        (AdapterSpec(LoRA(4)), replace(LOAD, packed=True, shared=True)),
        (AdapterSpec(LoRA(4)), replace(LOAD, quant=QuantSection())),
        (AdapterSpec(LoRA(4)), replace(LOAD, quant=QuantSection(principal=2))),
        (FULL, LOAD),
        (FULL, replace(LOAD, dtype=torch.bfloat16)),
    ],
)
def test_what_is_saved_is_what_autograd_saves(spec: AdapterSpec, load: Load) -> None:
    found = forecast(llama(), spec, load).between
    own, real = found.activations + found.logits, kept(llama(), spec, load)
    assert own == pytest.approx(real, rel=0.02), "few bytes live that nobody saved: the loss, positions"
    assert own >= real


def test_an_encoder_with_a_head_is_forecast_too() -> None:
    config = BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    spec, load = AdapterSpec(LoRA(4), train=("heads",)), Load(3, 12, classes=True)
    found = forecast(model, spec, load).between
    assert found.activations + found.logits == pytest.approx(kept(model, spec, load), rel=0.02)


@pytest.mark.parametrize(
    ("spec", "load"),
    [
        (AdapterSpec(LoRA(4)), LOAD),
        (AdapterSpec(LoRA(4)), replace(LOAD, checkpointing=True)),
        slow(AdapterSpec(DoRA(LoRA(4))), replace(LOAD, quant=QuantSection())),
        (FULL, LOAD),
        slow(FULL, replace(LOAD, rows=1, length=4)),
        slow(FULL, replace(LOAD, dtype=torch.bfloat16)),
        slow(FULL, replace(LOAD, checkpointing=True)),
    ],
)
def test_the_line_over_blocks_is_exact(spec: AdapterSpec, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_line = forecast(llama(6), spec, load)
    monkeypatch.setattr(module, "FEW", 6)
    assert on_the_line == forecast(llama(6), spec, load)


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(LoRA(4), Targets(layers="top:2")),
        AdapterSpec(LoRA(4), overrides=[Override.of("*", layers="5", rank=2)]),
    ],
)
def test_a_spec_that_numbers_blocks_is_rehearsed_on_all_of_them(spec: AdapterSpec) -> None:
    found = forecast(llama(6), spec, LOAD)
    everywhere = forecast(llama(6), AdapterSpec(LoRA(4)), LOAD)
    assert found.step.adapters < everywhere.step.adapters


def test_unequal_blocks_are_rehearsed_one_and_all() -> None:
    model = llama(6)
    assert module._depth(model) == 6
    with torch.device("meta"):
        model.model.layers[3].mlp.up_proj = nn.Linear(32, 48, bias=True)
    assert module._depth(model) == 0


def test_what_is_saved_falls_with_fusing_and_checkpointing_and_dropout_raises_it_where_nothing_is_fused() -> None:
    def saved(dropout: float = 0.0, **how: Any) -> int:
        return forecast(llama(), AdapterSpec(LoRA(4), dropout=dropout), replace(LOAD, **how)).between.activations

    assert saved(fused=False) > 1.3 * saved()
    assert saved(0.1, fused=False) > 1.2 * saved(fused=False)
    assert saved(0.1) == saved(), "its mask is made again from its seed"
    assert saved(checkpointing=True) < 0.5 * saved()


def test_flops_are_torch_s_and_those_of_the_formula() -> None:
    model, spec, load = llama(), AdapterSpec(LoRA(4)), LOAD
    made = scene(model, spec, load)
    real = made.build()
    made.prepare(real)
    real.train()
    assert isinstance(head_of(real), Head), "measured before, for it is measured once"
    with FlopCounterMode(display=False) as counter:
        made.loss(real, made.batch()).backward()  # type: ignore[no-untyped-call]
    found = rehearse(scene(model, spec, load)).flops
    assert found == counter.get_total_flops()
    tokens, adapters = 48, 4 * 3 * (64 + 48 + 48 + 64 + 3 * 80)
    blocks = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    assert adapters == sum(p.numel() for p in real.parameters() if p.requires_grad)
    head = 4 * (tokens - 2) * 32 * 96  # a row's last position predicts nothing
    below = 2 * tokens * (32 * 32 + 2 * 32 * 16 + 3 * 4 * 32)  # the first block's inputs need no gradient
    attention = 3 * (4 + 10) * 32 * 24 * tokens  # two products of a row's 24 places forward, five backward
    assert found == (4 * blocks + 6 * adapters) * tokens + head - below + attention


def test_a_packed_base_holds_4_bits_a_weight_and_computes_the_same() -> None:
    dense, packed = (
        forecast(llama(hidden_size=64), AdapterSpec(LoRA(4)), replace(LOAD, quant=q)) for q in (None, QuantSection())
    )
    assert packed.flops == dense.flops
    assert packed.step.activations <= dense.step.activations
    weights = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 48)
    saved = dense.step.weights - packed.step.weights
    assert saved == pytest.approx(weights * (4 - 4.127 / 8), rel=0.02)


@pytest.mark.parametrize("blocks", [3, 6])
def test_moments_in_8_bits_are_those_the_optimizer_keeps(blocks: int) -> None:
    # a third of the tensors, 32 x 96 and smaller, stay in 32 bits
    load = replace(LOAD, optimizer="adamw-8bit")
    wide = {"hidden_size": 64, "intermediate_size": 96}
    made = scene(llama(blocks, **wide), FULL, load)
    real = made.build()
    made.prepare(real)
    optimizer = make_optimizer("adamw-8bit", param_groups(real, 1e-3))
    made.loss(real, made.batch()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
    own = sum({t.data_ptr(): t.nbytes for t in kept}.values())
    assert any(t.dtype == torch.float32 and t.numel() in (64, 2048) for t in kept)
    steps = 4 * len(list(real.parameters()))
    assert forecast(llama(blocks, **wide), FULL, load).step.optimizer == own + steps
