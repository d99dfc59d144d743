"""A tokenizer whose ids can be written by hand, chat templates of every temper, and tiny models.

Byte b has the id 10 + b: `a` is 107, `b` 108, a space 42, a newline 20; one merge makes `ab` 266.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

PAD, BOS, EOS, USER, ASSISTANT, SYSTEM = range(6)
SPECIALS = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>"]
A, B, C, SPACE, NEWLINE, AB = 107, 108, 109, 42, 20, 266

_HEAD = "{% for m in messages %}{{ '<' + m.role + '>' }}"
_TAIL = "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
PLAIN = _HEAD + "{{ m.content + '<eos>\n' }}" + _TAIL
MARKED = (
    _HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<eos>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<eos>\n' }}{% endif %}" + _TAIL
)
MARKED_WITHOUT_END = MARKED.replace(
    "{{ m.content + '<eos>' }}{% endgeneration %}{{ '\n' }}", "{{ m.content }}{% endgeneration %}{{ '<eos>\n' }}"
)
ENDLESS = _HEAD + "{{ m.content }}" + _TAIL
FORGETFUL = _HEAD + "{{ (m.content if loop.last else '...') + '<eos>' }}" + _TAIL


def tokenizer(template: str | None = None, *, adds: str = "") -> PreTrainedTokenizerFast:
    """Build the tokenizer; `adds` is what it puts around a text by itself, e.g. `<bos>` or `<bos>...<eos>`."""
    vocab = {name: i for i, name in enumerate(SPECIALS)} | {
        char: 10 + byte for byte, char in bytes_to_unicode().items()
    }
    raw = Tokenizer(models.BPE({**vocab, "ab": AB}, [("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(SPECIALS)
    if adds:
        around = adds.partition("...")
        raw.post_processor = processors.TemplateProcessing(
            single=f"{around[0]} $A {around[2]}".strip(), special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    built = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    built.chat_template = template
    return built


CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(num_key_value_heads=2, intermediate_size=64, **_SMALL),
    "qwen2": lambda: Qwen2Config(num_key_value_heads=2, intermediate_size=64, **_SMALL),
    "gpt2": lambda: GPT2Config(vocab_size=267, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "mistral": lambda: MistralConfig(num_key_value_heads=2, intermediate_size=64, **_SMALL),
    "qwen3": lambda: Qwen3Config(num_key_value_heads=2, intermediate_size=64, head_dim=8, **_SMALL),
    "gemma": lambda: GemmaConfig(num_key_value_heads=2, intermediate_size=64, head_dim=8, **_SMALL),
    "phi": lambda: PhiConfig(intermediate_size=64, **_SMALL),
    "gpt-neox": lambda: GPTNeoXConfig(intermediate_size=64, **_SMALL),
    "bloom": lambda: BloomConfig(vocab_size=267, hidden_size=32, n_layer=2, n_head=4),
    "opt": lambda: OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **_SMALL),
}
_SMALL = {
    "vocab_size": 267,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def model(family: str, attention: str, *, use_cache: bool = False, **fields: Any) -> PreTrainedModel:
    """Build a random two-layer model of a family with an attention backend."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    for name, value in {"use_cache": use_cache, **fields}.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
