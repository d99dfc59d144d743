"""A base small enough to train in a second: a random two-layer model with a byte tokenizer, saved as a directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, MixtralConfig, Qwen2Config

from lorakit.training.recipe import Recipe, make_recipe
from tests.data.samples import tokenizer

VOCABULARY = 267
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(num_key_value_heads=2, intermediate_size=48, **_SIZES),
    "mixtral": lambda: MixtralConfig(
        num_key_value_heads=2, intermediate_size=48, num_local_experts=2, sliding_window=None, **_SIZES
    ),
    "qwen2": lambda: Qwen2Config(num_key_value_heads=2, intermediate_size=48, **_SIZES),
}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

WORDS = "a cab a bad cab a bead a dab ace bed fade deaf cafe face".split()


def save_base(folder: Path, family: str = "llama", *, vocabulary: int = VOCABULARY) -> Path:
    """Save a random base with its tokenizer."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.vocab_size = vocabulary
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    """Save a random BERT without a classification head."""
    torch.manual_seed(0)
    config = BertConfig(intermediate_size=48, **_SIZES)
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def pairs(count: int, offset: int = 0) -> list[dict[str, str]]:
    """Return prompts of uneven length whose completion is the prompt's last word."""
    rows = []
    for i in range(offset, offset + count):
        words = [WORDS[(i * 5 + j * 3) % len(WORDS)] for j in range(1 + i % 5)]
        rows.append({"prompt": " ".join(words) + " =", "completion": " " + words[-1]})
    return rows


def labelled(count: int, offset: int = 0) -> list[dict[str, str]]:
    """Return texts that are `high` when they hold an f, else `low`."""
    rows = []
    for i in range(offset, offset + count):
        words = [WORDS[(i * 5 + j * 3) % len(WORDS)] for j in range(1 + i % 4)]
        text = " ".join(words)
        rows.append({"text": text, "label": "high" if "f" in text else "low"})
    return rows


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as JSONL and return the path."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def recipe_of(base: Path, folder: Path, **changes: Any) -> Recipe:
    """Return a recipe for 48 pairs, 8 a step, LoRA of rank 4; `changes` are dotted keys with `__` for the dot."""
    values: dict[str, Any] = {
        "model": str(base),
        "data": {"train": write_rows(folder / "train.jsonl", pairs(48)), "max_length": 64},
        "adapter": {"rank": 4, "alpha": 8},
        "train": {"lr": 5e-3, "batch_size": 8, "warmup": 0.1, "device": "cpu"},
        "output": str(folder / "run"),
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return make_recipe(values)
