"""Tiny random transformers, and every method that acts on what they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    RobertaConfig,
)

from lorakit.core.method import Context
from lorakit.core.spec import AdapterSpec
from lorakit.inject.attach import adapters_named, attach
from tests.law.cases import CONTEXTS, jitter

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 24}
DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "gpt2": lambda: GPT2Config(**SIZES),
}
ODD: dict[str, Callable[[], Any]] = {
    "bloom": lambda: BloomConfig(**{**SIZES, "n_layer": 3, "n_head": 4}),
    "falcon": lambda: FalconConfig(**SIZES, multi_query=True, new_decoder_architecture=False, bias=False),
    "opt": lambda: OPTConfig(**{**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, head_dim=4, sliding_window=8),
}
"""ALiBi and a head that passes nothing on; one key for all heads; a head that goes past the module around the blocks;
embeddings that are multiplied, and a window."""
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**SIZES, intermediate_size=24),
    "roberta": lambda: RobertaConfig(**{**SIZES, "pad_token_id": 1, "bos_token_id": 0}, intermediate_size=24),
}


def decoder(family: str, **changes: Any) -> Any:
    """Return a random language model, in evaluation mode."""
    torch.manual_seed(0)
    config = {**DECODERS, **ODD}[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    return loud(AutoModelForCausalLM.from_config(config)).eval()


def classifier(family: str) -> Any:
    """Return a random classifier of three classes, in evaluation mode."""
    torch.manual_seed(0)
    config = {**DECODERS, **ENCODERS}[family]()
    config.num_labels = 3
    return loud(AutoModelForSequenceClassification.from_config(config)).eval()


@torch.no_grad()
def loud(model: nn.Module) -> nn.Module:
    """Widen the weights: at the usual 0.02 every token looks the same, and no test would see a wrong position."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3 if "embed" in name or "wte" in name or "wpe" in name else 0.2)
    return model


def read_by(model: Any, method: str | Context, name: str = "default") -> Any:
    """Return the model with a method attached, its tensors moved off the start."""
    attach(model, AdapterSpec(CONTEXTS[method] if isinstance(method, str) else method), name)
    for adapter in adapters_named(model, name):
        jitter(adapter)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Return token ids without special ones."""
    return torch.randint(3, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str, pad: int = 0) -> dict[str, Tensor]:
    """Return rows of uneven length as one batch with its attention mask."""
    longest = max(map(len, rows))

    def fill(row: Tensor, value: int) -> Tensor:
        extra = row.new_full((longest - len(row),), value)
        return torch.cat([extra, row] if side == "left" else [row, extra])

    ids = torch.stack([fill(row, pad) for row in rows])
    mask = torch.stack([fill(torch.ones_like(row), 0) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
