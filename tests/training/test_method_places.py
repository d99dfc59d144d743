"""A run whose recipe names a method and nothing else goes where the method's authors put it, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit import attach, load, state
from lorakit.training.base import load_base
from lorakit.training.events import read_events
from lorakit.training.run import train
from tests.training.samples import recipe_of

BOTH, NORMS = {"attention-out": 2, "mlp-out": 2}, 5 * 32
"""The base has two layers of 32 features with two norms each, and one norm at the end."""


@pytest.mark.parametrize(
    ("adapter", "patterns", "whole", "parameters"),
    [
        ({"method": "houlsby"}, BOTH, ["norms"], 4 * (2 * 32 * 2 + 2 + 32) + NORMS),
        ({"method": "houlsby", "layers": "1"}, dict.fromkeys(BOTH, 1), ["norms"], 2 * (2 * 32 * 2 + 2 + 32) + 2 * 32),
        ({"method": "pfeiffer", "reduction": 4}, {"mlp-out": 2}, [], 2 * (2 * 32 * 8 + 8 + 32)),
        ({"method": "parallel"}, {"mlp-module": 2}, [], 2 * (2 * 32 * 16 + 16 + 32)),
        ({"method": "compacter", "reduction": 8}, BOTH, ["norms"], 4 * 3 * (32 + 4) + 64 + NORMS),
        ({"method": "compacter++", "reduction": 8, "train": []}, {"mlp-out": 2}, [], 2 * 3 * (32 + 4) + 64),
    ],
)
def test_a_method_goes_to_its_own_place(
    base: Path, tmp_path: Path, adapter: dict[str, Any], patterns: dict[str, int], whole: list[str], parameters: int
) -> None:
    run = train(recipe_of(base, tmp_path, adapter=adapter))
    told = next(e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "targets")
    assert (told["patterns"], told["trained_whole"]) == (patterns, whole)
    assert run.trainable_parameters == parameters
    kept = load(run.adapter_dir)
    model, _ = load_base(str(base))
    attach(model, kept)
    assert all(
        (mine.tensors[name] == update.tensors[name]).all()
        for mine, update in zip(state(model).updates, kept.updates, strict=True)
        for name in update.tensors
    )
    assert any(
        update.tensors[name].any() for update in kept.updates for name in update.tensors if name.startswith("up")
    )
