"""What vLLM would refuse of an adapter's folder is told before, with what to do instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.serving.remote.servable import rank_to_serve, refusals
from tests.serving.adapters import folder_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain LoRA in PEFT's format."""
    return folder_of(tmp_path / "adapter", 0.5)


def change(folder: Path, **fields: Any) -> None:
    """Set keys of an adapter's configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def retensor(folder: Path, drop: str = "", **more: torch.Tensor) -> None:
    """Write the adapter's tensors without those whose names end in `drop`, and with more."""
    file = folder / "adapter_model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if not (drop and name.endswith(drop))}
    save_file({**kept, **{name.replace("__", "."): t for name, t in more.items()}}, file)


def test_a_plain_lora_is_served(folder: Path) -> None:
    assert refusals(folder) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 2.0}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "EVA"},
        {"init_lora_weights": False},
        {"modules_to_save": ["score"]},
        {"bias": None},
    ],
)
def test_what_vllm_reads_is_no_refusal(folder: Path, fields: dict[str, Any]) -> None:
    change(folder, **fields)
    assert refusals(folder) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', and vLLM reads LORA alone; write it as a plain LoRA: lorakit"),
        ({"use_dora": True}, "use_dora: DoRA, which vLLM does not serve; write the nearest LoRA: lorakit export"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights: 'pissa_niter_16' moved a part of the base"),
        ({"init_lora_weights": "olora"}, "'olora' moved a part of the base"),
        ({"modules_to_save": ["score", "embed_tokens"]}, "modules_to_save: it trains embed_tokens whole"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: it trains rows of the embedding; merge"),
        ({"bias": "all"}, "bias: 'all': it trains biases of the base; merge"),
        ({"lora_bias": True}, "lora_bias: the pairs have biases"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: an activated LoRA"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: it repeats layers"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: block-diagonal factors"),
        ({"use_qalora": True}, "use_qalora: QALoRA"),
        ({"r": 513}, "rank 513: vLLM ends at 512; write the nearest of a lower one: lorakit export"),
        ({"rank_pattern": {"q_proj": 600}}, "rank 600: vLLM ends at 512"),
        ({"r": "8"}, "rank '8': expected whole numbers"),
        ({"r": 0}, "rank 0: expected whole numbers above 0"),
        ({"r": None, "lora_alpha": None}, "r, lora_alpha: missing in adapter_config.json"),
    ],
)
def test_each_setting_vllm_refuses_is_named_with_its_remedy(folder: Path, fields: dict[str, Any], words: str) -> None:
    change(folder, **fields)
    found = refusals(folder)
    assert len(found) == 1
    assert words in found[0]


def test_all_refusals_are_listed_at_once(folder: Path) -> None:
    change(folder, bias="all", lora_bias=True, use_qalora=True)
    assert [line.split(":")[0] for line in refusals(folder)] == ["bias", "lora_bias", "use_qalora"]


def test_a_tensor_that_is_no_pair_is_named(folder: Path) -> None:
    retensor(folder, base_model__model__model__norm__weight=torch.ones(4))
    assert refusals(folder) == [
        "base_model.model.model.norm.weight: no tensor of a pair of LoRA, which vLLM does not read; merge the adapter "
        "and serve the result (lorakit merge)"
    ]


def test_half_a_pair_is_named(folder: Path) -> None:
    retensor(folder, drop="lora_B.weight")
    (found,) = refusals(folder)
    assert "q_proj: half of a pair of LoRA" in found


def test_a_head_of_a_classifier_and_an_embedding_s_pair_are_read(folder: Path) -> None:
    change(folder, modules_to_save=["score"])
    table = "base_model__model__model__embed_tokens"
    retensor(folder, base_model__model__score__weight=torch.ones(2, 4),
             **{f"{table}__lora_embedding_A": torch.ones(2, 9), f"{table}__lora_embedding_B": torch.ones(4, 2),
                f"{table}__base_layer__weight": torch.ones(9, 4)})  # fmt: skip
    assert refusals(folder) == []


def test_folders_without_peft_s_files_are_told_apart(tmp_path: Path) -> None:
    native = folder_of(tmp_path / "native", format="native")
    assert f"which vLLM does not read; write it as a plain LoRA: lorakit export {native} " in refusals(native)[0]
    assert "no adapter_config.json in it" in refusals(tmp_path)[0]
    pickle = folder_of(tmp_path / "pickle")
    (pickle / "adapter_model.safetensors").rename(pickle / "adapter_model.bin")
    assert "a pickle, which can hold code; write it as safetensors: lorakit export" in refusals(pickle)[0]
    (pickle / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors: missing" in refusals(pickle)[0]


def test_damaged_files_are_told_and_raise_nothing(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"12345678901")
    assert "adapter_model.safetensors: cannot be read" in refusals(folder)[0]
    (folder / "adapter_config.json").write_text("{")
    assert "not JSON" in refusals(folder)[0]


def test_the_rank_to_start_vllm_with_is_the_next_it_takes(folder: Path) -> None:
    assert rank_to_serve(folder) == 8
    change(folder, rank_pattern={"q_proj": 33})
    assert rank_to_serve(folder) == 64
