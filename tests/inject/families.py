"""A small configuration of every family that plans are held to: two layers, widths that every method divides."""

from __future__ import annotations

from typing import Any

_DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
_ENCODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_DECODER},
    "mistral": {"model_type": "mistral", **_DECODER},
    "qwen2": {"model_type": "qwen2", **_DECODER},
    "qwen3": {"model_type": "qwen3", **_DECODER, "head_dim": 12},
    "gemma2": {"model_type": "gemma2", **_DECODER, "head_dim": 12, "tie_word_embeddings": True},
    "gemma3": {"model_type": "gemma3_text", **_DECODER, "head_dim": 12, "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", **_DECODER, **_TOKENS},
    "gpt2": {"model_type": "gpt2", "vocab_size": 96, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4},
    "gpt-neox": {"model_type": "gpt_neox", **_ENCODER, "tie_word_embeddings": False},
    "opt": {
        "model_type": "opt",
        "vocab_size": 96,
        "hidden_size": 48,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "word_embed_proj_dim": 48,
    },
    "bert": {"model_type": "bert", **_ENCODER, "type_vocab_size": 2},
    "roberta": {"model_type": "roberta", **_ENCODER, "type_vocab_size": 1},
    "deberta-v2": {
        "model_type": "deberta-v2",
        **_ENCODER,
        "type_vocab_size": 0,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    },
    "t5": {
        "model_type": "t5",
        "vocab_size": 96,
        "d_model": 48,
        "d_ff": 96,
        "d_kv": 12,
        "num_layers": 2,
        "num_heads": 4,
    },
    "vit": {
        "model_type": "vit",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 16,
        "num_channels": 3,
    },
    "whisper": {
        "model_type": "whisper",
        "vocab_size": 96,
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "num_mel_bins": 12,
        "max_source_positions": 32,
        "max_target_positions": 32,
        **_TOKENS,
    },
    "mixtral": {"model_type": "mixtral", **_DECODER, "num_local_experts": 2},
}
"""By family, what its `config.json` would say."""
