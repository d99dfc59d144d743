"""Any configuration becomes a model without weights, and one that does not say its sizes is refused by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lorakit.core.spec import AdapterSpec
from lorakit.errors import LorakitError, SpecError
from lorakit.inject.attach import attach
from lorakit.inject.sites import sites
from lorakit.inject.skeleton import config_of, on_meta, shapes_of, ties_of
from lorakit.methods.lora import LoRA
from tests.inject.families import FAMILIES

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt-neox": "GPTNeoXForCausalLM",
    "opt": "OPTForCausalLM",
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "deberta-v2": "DebertaV2ForMaskedLM",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "whisper": "WhisperForConditionalGeneration",
    "mixtral": "MixtralForCausalLM",
}

BERT_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 512,
}


def decoder(
    kind: str, d: int, i: int, layers: int, heads: int, kv: int, vocabulary: int, **others: Any
) -> dict[str, Any]:
    """Return the sizes that decoders of the LLaMA line share; a family ties its embeddings unless it says otherwise."""
    return {
        "model_type": kind,
        "hidden_size": d,
        "intermediate_size": i,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        **others,
    }


REAL: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-2-7B": (6_738_415_616, decoder("llama", 4096, 11008, 32, 32, 32, 32000)),
    "Mistral-7B": (7_241_732_096, decoder("mistral", 4096, 14336, 32, 32, 8, 32000)),
    "Qwen2-7B": (7_615_616_512, decoder("qwen2", 3584, 18944, 28, 28, 4, 152064)),
    "Qwen3-8B": (8_190_735_360, decoder("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128)),
    "Gemma-2-2B": (2_614_341_888, decoder("gemma2", 2304, 9216, 26, 8, 4, 256000, head_dim=256)),
    "Gemma-3-1B": (999_885_952, decoder("gemma3_text", 1152, 6912, 26, 4, 1, 262144, head_dim=256)),
    "Phi-3-mini": (3_821_079_552, decoder("phi3", 3072, 8192, 32, 32, 32, 32064)),
    "GPT-2": (
        124_439_808,
        {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
    ),
    "GPT-NeoX-20B": (
        20_554_567_680,
        {
            "model_type": "gpt_neox",
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "vocab_size": 50432,
        },
    ),
    "OPT-125M": (
        125_239_296,
        {
            "model_type": "opt",
            "hidden_size": 768,
            "ffn_dim": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
            "vocab_size": 50272,
            "word_embed_proj_dim": 768,
        },
    ),
    "BERT-base": (
        109_482_240,
        {"model_type": "bert", "architectures": ["BertModel"], **BERT_BASE, "type_vocab_size": 2, "vocab_size": 30522},
    ),
    "RoBERTa-base": (
        124_697_433,
        {
            "model_type": "roberta",
            "architectures": ["RobertaForMaskedLM"],
            **BERT_BASE,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "vocab_size": 50265,
        },
    ),
    "DeBERTa-v3-base": (
        183_831_552,
        {
            "model_type": "deberta-v2",
            "architectures": ["DebertaV2Model"],
            **BERT_BASE,
            "type_vocab_size": 0,
            "vocab_size": 128100,
            "relative_attention": True,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": "p2c|c2p",
            "max_relative_positions": -1,
            "position_biased_input": False,
        },
    ),
    "T5-base": (
        222_903_552,
        {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "d_model": 768,
            "d_ff": 3072,
            "d_kv": 64,
            "num_layers": 12,
            "num_heads": 12,
            "vocab_size": 32128,
        },
    ),
    "ViT-B/16": (
        86_567_656,
        {
            "model_type": "vit",
            "architectures": ["ViTForImageClassification"],
            **{key: value for key, value in BERT_BASE.items() if key != "max_position_embeddings"},
            "image_size": 224,
            "patch_size": 16,
            "num_channels": 3,
            "num_labels": 1000,
        },
    ),
    "Whisper-tiny": (
        37_760_640,
        {
            "model_type": "whisper",
            "architectures": ["WhisperForConditionalGeneration"],
            "d_model": 384,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 6,
            "decoder_attention_heads": 6,
            "encoder_ffn_dim": 1536,
            "decoder_ffn_dim": 1536,
            "vocab_size": 51865,
            "num_mel_bins": 80,
            "max_source_positions": 1500,
            "max_target_positions": 448,
        },
    ),
    "Mixtral-8x7B": (46_702_792_704, decoder("mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8)),
}
"""The number of values in the published checkpoint, and the sizes its config.json gives."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_model_of_every_family_is_the_same_with_and_without_weights(family: str) -> None:
    config = config_of(FAMILIES[family])
    model = on_meta(config)
    assert type(model).__name__ == CLASSES[family]
    assert all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())
    assert not model.training
    real = getattr(transformers, CLASSES[family])(config)
    assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert sites(real) == sites(model) == sites(config)
    assert shapes_of(real) == shapes_of(model)
    assert ties_of(real) == ties_of(model)
    assert attach(model, AdapterSpec(LoRA(4, 8.0))).paths == attach(real, AdapterSpec(LoRA(4, 8.0))).paths


@pytest.mark.parametrize("name", REAL)
def test_a_model_of_real_size_has_the_published_number_of_parameters(name: str) -> None:
    published, fields = REAL[name]
    assert sites(on_meta(config_of(fields))).total_parameters == published


def test_every_family_is_tested_at_its_real_size() -> None:
    assert {fields["model_type"] for _, fields in REAL.values()} == {f["model_type"] for f in FAMILIES.values()}
    assert set(CLASSES) == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "architectures", "task", "expected"),
    [
        ("llama", ["LlamaForSequenceClassification"], None, "LlamaForSequenceClassification"),
        ("llama", ["LlamaForSequenceClassification"], "causal-lm", "LlamaForCausalLM"),
        ("llama", ["LLaMAForCausalLM"], None, "LlamaForCausalLM"),  # what the first conversions wrote
        ("llama", ["MistralForCausalLM"], None, "LlamaForCausalLM"),  # model_type decides, as in transformers
        ("llama", ["LlamaForCausalLM"], "classification", "LlamaForSequenceClassification"),
        ("bert", ["BertModel"], None, "BertModel"),
        ("bert", None, "causal-lm", "BertLMHeadModel"),
        ("bert", None, "classification", "BertForSequenceClassification"),
        ("t5", ["T5WithLMHeadModel"], "causal-lm", "T5ForConditionalGeneration"),
        ("whisper", None, "causal-lm", "WhisperForConditionalGeneration"),
        ("vit", ["ViTModel"], None, "ViTModel"),
        ("vit", ["ViTModel"], "classification", "ViTForImageClassification"),
        ("whisper", None, "classification", "WhisperForAudioClassification"),
    ],
)
def test_the_class_is_that_of_the_task_or_the_architecture(
    family: str, architectures: list[str] | None, task: str | None, expected: str
) -> None:
    config = config_of({**FAMILIES[family], "architectures": architectures})
    assert type(on_meta(config, task)).__name__ == expected


def test_an_encoder_that_is_made_a_decoder_continues_text() -> None:
    assert type(on_meta(config_of({**FAMILIES["bert"], "is_decoder": True}))).__name__ == "BertLMHeadModel"


def test_building_leaves_the_configuration_as_it_was() -> None:
    config = config_of(FAMILIES["llama"])
    before = config.to_dict()
    on_meta(config, "classification")
    assert config.to_dict() == before


def test_a_tied_parameter_has_two_names_and_one_is_the_first() -> None:
    model = on_meta(config_of(FAMILIES["gpt2"]))
    assert ties_of(model) == {"lm_head.weight": "transformer.wte.weight"}
    assert shapes_of(model)["lm_head.weight"] == shapes_of(model)["transformer.wte.weight"] == (96, 48)
    assert ties_of(nn.Linear(2, 2)) == {}


def test_a_task_without_a_model_is_refused() -> None:
    with pytest.raises(SpecError, match="unknown task 'clasification'; did you mean 'classification'"):
        on_meta(config_of(FAMILIES["llama"]), "clasification")
    config = transformers.VitsConfig()
    with pytest.raises(SpecError, match="transformers has no classifier of model type 'vits'"):
        on_meta(config, "classification")


def test_sizes_that_do_not_fit_each_other_are_an_error_that_says_so(tmp_path: Path) -> None:
    file = write(tmp_path, {**FAMILIES["gpt2"], "n_head": 5})
    with pytest.raises(SpecError) as raised:
        on_meta(config_of(file))
    assert str(raised.value).startswith(f"{file}: no gpt2 can be built of these sizes (")
    assert "`num_heads`: 5)" in str(raised.value)


# Where a configuration comes from


def write(folder: Path, fields: Any, name: str = "config.json") -> Path:
    """Write a configuration and return its file."""
    file = folder / name
    file.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return file


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mapping_a_file_and_a_directory_mean_the_same(family: str, tmp_path: Path) -> None:
    file = write(tmp_path, FAMILIES[family])
    read = [config_of(place) for place in (FAMILIES[family], file, str(file), tmp_path)]
    assert len({type(config) for config in read}) == 1
    assert len({repr(sites(config).by_path) for config in read}) == 1
    assert config_of(tmp_path)._name_or_path == str(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read_back(family: str, tmp_path: Path) -> None:
    config_of(FAMILIES[family]).save_pretrained(tmp_path)
    assert sites(config_of(tmp_path)) == sites(config_of(FAMILIES[family]))


def test_a_mapping_is_left_as_it_was() -> None:
    given = {**FAMILIES["llama"], "rope_theta": 1e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    before = json.dumps(given)
    config_of(given)
    assert json.dumps(given) == before  # transformers writes into the inner one


LLAMA = FAMILIES["llama"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({**LLAMA, "model_type": "lama"}, "model_type 'lama' is none that transformers"),
        ({**LLAMA, "model_type": "lama"}, "did you mean 'llama'"),
        ({**LLAMA, "model_type": 7}, "model_type 7 is none"),
        ({**LLAMA, "model_type": "x", "auto_map": {"AutoModel": "x.X"}}, "auto_map names is not run here"),
        ({k: v for k, v in LLAMA.items() if k != "model_type"}, 'has no model_type.*"model_type": "llama"'),
        ({"architectures": ["GPT2LMHeadModel"]}, 'its architectures say "model_type": "gpt2"'),
        ({"peft_type": "LORA", "r": 8}, "it is an adapter's: give the config.json of the model"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, '- hidden_size: missing; write "hidden_size": 4096'),
        ({"model_type": "llama"}, "(?s)- vocab_size: missing.*- hidden_size: missing.*- intermediate_size: missing"),
        (
            {"hiden_size" if k == "hidden_size" else k: v for k, v in LLAMA.items()},
            "- hidden_size: missing; did you mean 'hiden_size'",
        ),
        ({"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 9}, "- n_positions: missing"),
        ({**LLAMA, "hidden_size": "48"}, "- hidden_size: '48' is no whole number"),
        ({**LLAMA, "hidden_size": 48.5}, "- hidden_size: 48.5 is no whole number"),
        ({**LLAMA, "hidden_size": None}, "- hidden_size: None is no whole number"),
        ({**LLAMA, "num_hidden_layers": True}, "- num_hidden_layers: True is no whole number"),
        ({**LLAMA, "num_key_value_heads": "2"}, "- num_key_value_heads: '2' is no whole number"),
        ({**LLAMA, "num_hidden_layers": 0}, "- num_hidden_layers: 0 is less than 1"),
        ({**LLAMA, "vocab_size": -96}, "- vocab_size: -96 is less than 1"),
        ({**LLAMA, "attention_bias": "no"}, "no configuration of a llama .*attention_bias"),
        ("[1, 2]", "holds a JSON list, expected an object"),
        ('{"model_type": "llama", ', "is truncated or not JSON: .* at line 1 column"),
        ("", "is empty"),
        ('{"model_type": "llama", "vocab_size": 1' + "0" * 5000 + "}", "integer of more than"),
    ],
)
def test_a_configuration_that_cannot_be_read_names_the_file_and_the_key(fields: Any, said: str, tmp_path: Path) -> None:
    file = write(tmp_path, fields)
    with pytest.raises(SpecError, match=said) as raised:
        config_of(tmp_path)
    assert str(raised.value).startswith(str(file))
    if isinstance(fields, dict):
        with pytest.raises(SpecError, match=said) as raised:
            config_of(fields)
        assert str(raised.value).startswith("the configuration")


@pytest.mark.parametrize("field", ["num_key_value_heads", "max_position_embeddings", "head_dim"])
def test_what_follows_from_other_fields_or_shapes_nothing_may_be_left_out(field: str) -> None:
    assert config_of({k: v for k, v in LLAMA.items() if k != field}).hidden_size == 48


def test_a_canonical_name_is_read_where_the_family_has_its_own() -> None:
    fields = {
        "model_type": "gpt2",
        **{k: v for k, v in FAMILIES["bert"].items() if k.startswith(("hid", "num", "max", "voc"))},
    }
    assert config_of(fields).n_embd == 48


def test_a_place_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match=f"there is no {tmp_path / 'nowhere'}"):
        config_of(tmp_path / "nowhere")
    with pytest.raises(LorakitError, match="has no config.json, it is empty"):
        config_of(tmp_path)
    write(tmp_path, {}, "adapter_config.json")
    with pytest.raises(LorakitError, match="holds adapter_config.json; it is an adapter: give the model"):
        config_of(tmp_path)
