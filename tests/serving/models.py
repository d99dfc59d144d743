"""Tiny decoders of different families with adapters of different kinds, and what each writes alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lorakit.core.spec import AdapterSpec
from lorakit.core.state import AdapterState
from lorakit.inject.activate import use
from lorakit.inject.attach import adapters_named, attach, detach, state

VOCABULARY = 97
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ROOM = {"max_position_embeddings": 96, "vocab_size": VOCABULARY, "pad_token_id": 0}


def llama() -> LlamaForCausalLM:
    """Return a Llama whose heads share keys and whose head stands apart from the embeddings."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, **ROOM, num_key_value_heads=2))


def mistral() -> MistralForCausalLM:
    """Return a model whose tokens see the eight before them."""
    return MistralForCausalLM(MistralConfig(**SIZES, **ROOM, num_key_value_heads=2, sliding_window=8))


def gemma2() -> Gemma2ForCausalLM:
    """Return a model with windows in every other layer, capped logits and a head tied to scaled embeddings."""
    config = Gemma2Config(**SIZES, **ROOM, num_key_value_heads=2, head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
    return Gemma2ForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    """Return a model of transposed layers, learned positions and queries, keys and values in one."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes))


def phi3() -> Phi3ForCausalLM:
    """Return a model whose projections are fused."""
    return Phi3ForCausalLM(Phi3Config(**SIZES, **ROOM, num_key_value_heads=2))


def qwen3() -> Qwen3ForCausalLM:
    """Return a model that norms queries and keys."""
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **ROOM, num_key_value_heads=2, head_dim=8))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama, "mistral": mistral, "gemma2": gemma2, "gpt2": gpt2, "phi3": phi3, "qwen3": qwen3,
}  # fmt: skip


@cache
def _made(family: str) -> Any:
    torch.manual_seed(7)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.mul_(3.0)  # so that tokens differ by more than rounding
            elif name.endswith("bias"):
                p.normal_(0, 0.3)
    return model


def made(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return a fresh model of a family, with weights far enough apart that the likeliest token is not a tie.

    In fp64 what two ways compute agrees to twelve digits, or they are two different things.
    """
    return copy.deepcopy(_made(family)).to(dtype)


def adapter(model: Any, spec: AdapterSpec) -> AdapterState:
    """Return an adapter of `spec` that changes what the model writes."""
    attach(model, spec, "made")
    with torch.no_grad():
        for one in adapters_named(model, "made"):
            for values in one.parameters():
                values.add_(0.15 * torch.randn_like(values))
    given = state(model, "made")
    detach(model, "made")
    return given


def logits_alone(model: Any, given: AdapterState | None, ids: list[int], scale: float = 1.0) -> Tensor:
    """Return the logits `(n, vocabulary)` of the model with one adapter attached, by its own plain forward."""
    if given is not None:
        attach(model, given, "alone")
        use(model, {"alone": scale})
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    if given is not None:
        detach(model, "alone")
    return logits
