"""Configurations of well-known models by name, for plans of what one cannot or need not download.

Each is what the model's `config.json` says of its sizes, and so its totals are exact. GPT-3's weights were never
published: its configuration is GPT-2's architecture at the sizes of arXiv 2005.14165, table 2.1 (96 layers, width
12288, 96 heads, 2048 positions) with GPT-2's vocabulary, the same base that LoRA's paper counts its adapters on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lorakit.errors import SpecError, did_you_mean


def shape(name: str) -> dict[str, Any]:
    """Return the configuration of a preset as `config.json` would hold it; the caller's own copy.

    Raises:
        SpecError: no preset of that name; the near ones and all of them are in the message.
    """
    if name not in SHAPES:
        raise SpecError(f"unknown shape {name!r}{did_you_mean(name, SHAPES)}; known: {', '.join(SHAPES)}")
    return copy.deepcopy(dict(SHAPES[name]))


def _llama(width: int, inner: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    } | others


def _gpt2(width: int, layers: int, heads: int, positions: int = 1024) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_positions": positions,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "tie_word_embeddings": True,
    }


_SECOND: dict[str, Any] = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_THIRD: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-65b": _llama(8192, 22016, 80, 64, rms_norm_eps=1e-5),
    "llama-2-7b": _llama(4096, 11008, 32, 32, **_SECOND),
    "llama-2-70b": _llama(8192, 28672, 80, 64, num_key_value_heads=8, **_SECOND),
    "llama-3-8b": _llama(4096, 14336, 32, 32, **_THIRD),
    "llama-3-70b": _llama(8192, 28672, 80, 64, **_THIRD),
    "mistral-7b": _llama(4096, 14336, 32, 32, **_MISTRAL),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "gpt3-175b": _gpt2(12288, 96, 96, positions=2048),
}
"""The presets: LLaMA (arXiv 2302.13971, table 2), Llama 2 (2307.09288), Llama 3 (2407.21783, table 3), Mistral 7B v0.1
(2310.06825, table 1), GPT-2 and GPT-3 (2005.14165, table 2.1)."""
