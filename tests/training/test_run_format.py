"""What a run writes at its end: PEFT's format where the adapter has one, and no failure where it has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit import load
from lorakit.training.events import read_events
from lorakit.training.run import train
from tests.training.samples import recipe_of, save_base


@pytest.mark.parametrize("side", ["input", "output"])
def test_an_adapter_peft_would_read_otherwise_is_saved_in_the_other_format(tmp_path: Path, side: str) -> None:
    adapter = {"method": "ia3", "side": side, "targets": ["k_proj"]}  # which has a bias in this family
    told: list[str] = []
    recipe = recipe_of(save_base(tmp_path / "base", "qwen2"), tmp_path, adapter=adapter, train__steps=2)
    run = train(recipe, listen=lambda event: told.append(event["event"]))
    files = {file.name for file in Path(run.adapter_dir).iterdir()}
    assert ("adapter_config.json" in files) == (side == "input")
    assert ("adapter.lorakit.safetensors" in files) == (side == "output")
    assert len(load(run.adapter_dir).updates) == 2
    whys = [event["why"] for event in read_events(Path(run.output) / "events.jsonl") if event["event"] == "format"]
    assert ("format" in told) == (side == "output")
    assert all("PEFT's output side multiplies its bias too" in why for why in whys)
