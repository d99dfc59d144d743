"""The files of a streamed merge hold what PEFT's `merge_and_unload` makes of the same adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lorakit.persist import load
from tests.tolerances import assert_close
from tests.training.test_merge_files import save_base, streamed, tensors


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("family", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "mlp.c_proj"])]
)
def test_an_adapter_of_peft_is_merged_as_peft_merges_it(
    family: str, targets: list[str], dora: bool, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_dora=dora, fan_in_fan_out=family == "gpt2")
    config.init_lora_weights = False
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    wanted = theirs.merge_and_unload().state_dict()
    report = streamed(base, load(tmp_path / "adapter"), tmp_path / "merged")
    assert report.layers == 4
    before = tensors(base)
    for name, tensor in tensors(tmp_path / "merged").items():
        assert_close(tensor, wanted[name])
        changed = not tensor.equal(before[name])
        assert changed == any(f"{target}.weight" in name for target in targets), name
