"""Per-head LoRA: LoRA of rank H r with a block-diagonal factor, its count, and heads that do not touch each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach
from lorakit.methods.lora import LoRA
from lorakit.methods.per_head import PerHead
from tests.law.cases import Net, jitter
from tests.tolerances import assert_close


def factors(method: PerHead, out: int = 12, in_: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random stored factors at a layer and their dW."""
    model = Net(nn.Linear(in_, out))
    attach(model, AdapterSpec(method, Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    jitter(adapter)
    down, up = (adapter.get_parameter(name).detach() for name in ("down", "up"))
    return down, up, adapter.delta(torch.zeros(out, in_)).detach()


def test_one_case_by_hand() -> None:
    # two heads of one output each, r = 1, s = 2 / 1: head 0 adds 2 * 3 (1, 2), head 1 adds 2 * 5 (0, 1)
    method = PerHead(rank=1, alpha=2.0, heads=2)
    down, up = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0], [5.0]])
    right, left = method.factors({"down": down, "up": up})
    assert (left @ right).tolist() == [[6.0, 12.0], [0.0, 10.0]]


def test_stacked_heads_are_a_lora_of_rank_h_r() -> None:
    down, up, delta = factors(PerHead(rank=2, alpha=3.0, heads=3))
    heads = [1.5 * up[4 * h : 4 * h + 4] @ down[2 * h : 2 * h + 2] for h in range(3)]
    assert_close(delta, torch.cat(heads))
    assert_close(delta, 1.5 * torch.block_diag(*up.chunk(3)) @ down)  # type: ignore[no-untyped-call]


def test_the_output_projection_is_the_mirror_image() -> None:
    down, up, delta = factors(PerHead(rank=2, alpha=3.0, heads=3, side="down"))
    heads = [1.5 * up[:, 2 * h : 2 * h + 2] @ down[2 * h : 2 * h + 2] for h in range(3)]
    assert_close(delta, torch.cat(heads, 1))
    assert_close(delta, 1.5 * up @ torch.block_diag(*down.chunk(3)))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("side", ["up", "down"])
def test_one_head_is_lora(side: Any) -> None:
    down, up, delta = factors(PerHead(rank=4, alpha=6.0, heads=1, side=side))
    lora_down, lora_up = LoRA(4, 6.0).factors({"down": down, "up": up})
    assert_close(delta, lora_up @ lora_down)


def test_a_head_s_output_does_not_see_another_head_s_factors() -> None:
    method = PerHead(rank=2, alpha=4.0, heads=3)
    down, up, delta = factors(method)
    down[2:4], up[4:8] = 7.0, 7.0  # head 1
    right, left = method.factors({"down": down, "up": up})
    changed = left @ right
    assert torch.equal(changed[:4], delta[:4])
    assert torch.equal(changed[8:], delta[8:])
    assert (changed[4:8] != delta[4:8]).all()


@pytest.mark.parametrize("side", ["up", "down"])
def test_it_trains_six_and_a_half_times_lora_at_768_with_12_heads(side: Any) -> None:
    model = Net(nn.Linear(768, 768, device="meta"))
    handle = attach(model, AdapterSpec(PerHead(rank=1, alpha=1.0, heads=12, side=side), Targets("layer")))
    assert sum(p.numel() for p in handle.parameters()) == 9_984  # LoRA: 1,536


def test_grouped_queries_take_overrides() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=11,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    overrides = (Override.of(("k_proj", "v_proj"), heads=2), Override.of("o_proj", side="down"))
    attach(model, AdapterSpec(PerHead(rank=2, heads=4), Targets("attention"), overrides=overrides))
    shapes = {
        a.site.path.rpartition(".")[2]: tuple(tuple(t.shape) for t in a.tensors().values())
        for a in adapters_named(model, "default")
    }
    assert shapes == {
        "q_proj": ((8, 32), (32, 2)),
        "k_proj": ((4, 32), (16, 2)),
        "v_proj": ((4, 32), (16, 2)),
        "o_proj": ((8, 8), (32, 8)),
    }


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"heads": 2, "rank": 0}, "rank must be a whole number of at least 1"),
        ({}, "heads must be a whole number of at least 1, not 0; give the model's num_attention_heads"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        PerHead(**fields)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (PerHead(heads=10), "layer: its 24 outputs do not divide into 10 heads; the nearest that do are 8 and 12"),
        (PerHead(heads=5, side="down"), "its 18 inputs do not divide into 5 heads; the nearest that do are 3 and 6"),
        (PerHead(heads=99), "layer: its 24 outputs do not divide into 99 heads; the nearest that do are 24 and 24"),
        (PerHead(rank=4, heads=8), "layer: rank 4 exceeds the 3 outputs of a head; lower the rank"),
    ],
)  # fmt: skip
def test_a_layer_that_is_not_made_of_such_heads_is_refused(method: PerHead, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        attach(Net(nn.Linear(18, 24)), AdapterSpec(method, Targets("layer")))
