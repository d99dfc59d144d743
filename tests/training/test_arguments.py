"""What the Trainer is told, and what is kept wide beneath it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lorakit.training.arguments import widen
from lorakit.training.run import train
from tests.training.samples import labelled, recipe_of, write_rows


def test_what_is_trained_whole_is_kept_in_fp32_with_the_vectors_beside_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)).bfloat16().requires_grad_(False)
    model[0].bias.requires_grad_()
    model[1].bias.requires_grad_()
    assert widen(model)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"0.bias", "1.weight", "1.bias"}
    assert not widen(model.bfloat16().requires_grad_(False))


def test_biases_of_a_bf16_base_are_trained(encoder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", labelled(48))
    adapter = {"method": "none", "train": "biases"}
    run = train(recipe_of(encoder, tmp_path, data__train=data, adapter=adapter, train__dtype="bf16"))
    assert run.steps == 6
