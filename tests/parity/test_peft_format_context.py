"""Parity of PEFT's files for trained vectors at virtual positions, both ways, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.context.prefix_tuning import PrefixTuning
from lorakit.context.prompt_tuning import PromptTuning
from lorakit.core.method import Context
from lorakit.core.state import Purpose, trim
from lorakit.inject.attach import attach, state
from lorakit.persist import files, load, peft_refusal, save
from tests.context.samples import decoder, read_by, tokens
from tests.parity.test_peft_format import peft_loads, peft_saves, same
from tests.tolerances import assert_close

METHODS: dict[str, Context] = {
    "prefix": PrefixTuning(tokens=5),
    "prefix, perceptron": PrefixTuning(tokens=5, hidden=7),
    "prompt": PromptTuning(tokens=5),
}
FAMILIES = ["gpt2", "llama", "qwen2"]
families = pytest.mark.parametrize("family", FAMILIES)
methods = pytest.mark.parametrize("method", METHODS)


def answers(model: Any, ids: Tensor, *, virtual: bool = False) -> Tensor:
    """Return the logits of the real positions; PEFT wants a mask and gives those of the virtual ones as well."""
    with torch.no_grad():
        y: Tensor = model(ids, **({"attention_mask": torch.ones_like(ids)} if virtual else {})).logits
    return y[:, -ids.shape[1] :]


@families
@methods
def test_peft_loads_ours_with_equal_logits_and_its_own_key(family: str, method: str, tmp_path: Path) -> None:
    ours = read_by(decoder(family), METHODS[method])
    save(trim(state(ours)), tmp_path)
    ids = tokens(2, 7)
    assert_close(answers(peft_loads(tmp_path, decoder(family)), ids, virtual=True), answers(ours, ids))
    tensors, _ = files.read_safetensors(tmp_path / "adapter_model.safetensors")
    assert list(tensors) == ["prompt_embeddings"]
    same(trim(state(ours)), load(tmp_path))
    assert load(tmp_path).spec == state(ours).spec


@families
@methods
def test_we_load_peft_s_with_equal_logits(family: str, method: str, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    hidden = getattr(METHODS[method], "hidden", None)
    config: Any = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    if method != "prompt":
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=hidden is not None,
                                    encoder_hidden_size=hidden)  # fmt: skip
    theirs = get_peft_model(decoder(family), config).eval()
    peft_saves(theirs, tmp_path)
    ids, ours = tokens(2, 7), decoder(family)
    attach(ours, load(tmp_path))
    assert_close(answers(ours, ids), answers(theirs, ids, virtual=True))
    save(state(ours), tmp_path / "again")
    assert_close(answers(peft_loads(tmp_path / "again", decoder(family)), ids, virtual=True), answers(ours, ids))


def test_what_peft_would_read_otherwise_is_refused() -> None:
    whole = state(read_by(decoder("llama"), METHODS["prefix, perceptron"]))
    assert "PEFT's PREFIX_TUNING has no place for b1, b2, seeds, w1, w2" in (peft_refusal(whole) or "")
    prompt = state(read_by(decoder("llama"), METHODS["prompt"]))
    classifier = replace(prompt, purpose=Purpose("classification", "text", None, ("no", "yes")))
    assert "virtual positions of a classifier" in (peft_refusal(classifier) or "")
