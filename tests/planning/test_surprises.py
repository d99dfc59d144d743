"""What a plan says of a method that its user may not expect."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from lorakit.core.method import Method
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.targets import resolve
from lorakit.inject.sites import sites
from lorakit.methods.dora import DoRA
from lorakit.methods.ia3 import IA3
from lorakit.methods.lora import LoRA
from lorakit.methods.per_head import PerHead
from lorakit.planning.surprises import surprises

ATTENTION = sites(
    nn.ModuleDict({"q_proj": nn.Linear(32, 32), "k_proj": nn.Linear(32, 16), "up_proj": nn.Linear(32, 48)})
)


@pytest.mark.parametrize(
    ("method", "dtype", "said"),
    [
        (
            IA3(),
            torch.bfloat16,
            "ia3 multiplies by factors that begin at 1, and outputs in 16 bits are rounded to 0.0078",
        ),
        (IA3(), torch.float16, "rounded to 0.00098"),
        (IA3(), torch.float32, ""),
        (LoRA(4), torch.bfloat16, ""),
        (DoRA(LoRA(4)), torch.bfloat16, ""),  # its pair learns what its magnitude cannot
    ],
)
def test_factors_near_1_beside_16_bits(method: Method, dtype: torch.dtype, said: str) -> None:
    found = surprises(resolve(AdapterSpec(method, Targets(("q_proj",))), ATTENTION), ATTENTION, dtype, 8)
    assert bool(found) == bool(said)
    assert all(said in line for line in found)


def test_heads_that_are_none_of_the_model_s() -> None:
    # four query heads and two of keys, of 8 values each
    def told(*targets: str, **fields: int) -> list[str]:
        spec = AdapterSpec(
            PerHead(1, 2.0, heads=4), Targets(targets), overrides=[Override.of("k_proj", **fields)] * bool(fields)
        )
        return list(surprises(resolve(spec, ATTENTION), ATTENTION, torch.float32, 8))

    assert told("q_proj") == []
    assert told("q_proj", "k_proj", heads=2) == []
    assert told("k_proj")[0].startswith(
        "1 layers, such as k_proj, are divided into parts of 4 values, and a head of this"
    )
    assert "such as up_proj, are divided into parts of 12 values" in told("q_proj", "up_proj")[0]
    untold = resolve(AdapterSpec(PerHead(1, 2.0, heads=4), Targets(("k_proj",))), ATTENTION)
    assert surprises(untold, ATTENTION, torch.float32, None) == ()


def test_heads_where_there_are_none_or_at_the_other_side() -> None:
    model = sites(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4))

    def told(*targets: str, **fields: str) -> list[str]:
        overrides = [Override.of("o_proj", **fields)] * bool(fields)
        spec = AdapterSpec(PerHead(1, 2.0, heads=4), Targets(targets), overrides=overrides)
        return [line.split(" layers, such as ")[1] for line in surprises(resolve(spec, model), model, torch.float32, 8)]

    assert told("q_proj", "k_proj", "v_proj") == []
    assert told("attention")[0].startswith("model.layers.0.self_attn.o_proj, read the heads and write none: give them")
    assert told("attention", side="down") == []
    assert told("q_proj", "up_proj")[0].startswith("model.layers.0.mlp.up_proj, lie outside of attention, where there")
