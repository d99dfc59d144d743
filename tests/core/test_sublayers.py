"""The keywords for one layer, or the module, of each sublayer: what they mean in each family, and when they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AfmoeConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    T5Config,
)

from lorakit.core.site import Skeleton
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.targets import parameters_named, resolve, select
from lorakit.errors import TargetError
from lorakit.inject.sites import sites
from lorakit.methods.lora import LoRA
from lorakit.methods.parallel import Parallel

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA_LIKE = ("model.layers.#.self_attn.o_proj", "model.layers.#.mlp.down_proj", "model.layers.#.mlp")
FAMILIES: dict[str, tuple[Any, Any, tuple[str, str, str | None]]] = {
    "llama": (AutoModelForCausalLM, LlamaConfig(**WIDE, num_key_value_heads=2), LLAMA_LIKE),
    "mistral": (AutoModelForCausalLM, MistralConfig(**WIDE, num_key_value_heads=2, head_dim=16), LLAMA_LIKE),
    "qwen2": (AutoModelForCausalLM, Qwen2Config(**WIDE, num_key_value_heads=2), LLAMA_LIKE),
    # declares qkv_proj after o_proj, and gate and up as one layer
    "phi3": (AutoModelForCausalLM, Phi3Config(**WIDE, num_key_value_heads=2, pad_token_id=0), LLAMA_LIKE),
    "gpt2": (
        AutoModelForCausalLM,
        GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64),
        ("transformer.h.#.attn.c_proj", "transformer.h.#.mlp.c_proj", "transformer.h.#.mlp"),
    ),
    "bert": (
        AutoModel,
        BertConfig(**WIDE),
        ("encoder.layer.#.attention.output.dense", "encoder.layer.#.output.dense", None),
    ),
    "t5": (
        AutoModel,
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64),
        (
            "decoder.block.#.layer.0.SelfAttention.o decoder.block.#.layer.1.EncDecAttention.o "
            "encoder.block.#.layer.0.SelfAttention.o",
            "decoder.block.#.layer.2.DenseReluDense.wo encoder.block.#.layer.1.DenseReluDense.wo",
            "decoder.block.#.layer.2.DenseReluDense encoder.block.#.layer.1.DenseReluDense",
        ),
    ),
    "opt": (
        AutoModelForCausalLM,
        OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
                  word_embed_proj_dim=32),
        ("model.decoder.layers.#.self_attn.out_proj", "model.decoder.layers.#.fc2", None),
    ),
}  # fmt: skip


def skeleton(auto: Any, config: Any) -> Skeleton:
    """Return the skeleton of a model built on the meta device."""
    with torch.device("meta"):
        return sites(auto.from_config(config))


def paths(skeleton: Skeleton, *include: str, **kwargs: Any) -> list[str]:
    """Return the paths that targets mean, layers or modules."""
    return [site.path for site, _ in select(Targets(include, **kwargs), skeleton, blocks=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_s_outputs_and_mlp(family: str) -> None:
    auto, config, meant = FAMILIES[family]
    model = skeleton(auto, config)
    for keyword, expected in zip(("attention-out", "mlp-out", "mlp-module"), meant, strict=True):
        if expected is None:
            with pytest.raises(
                TargetError, match=r"which module is its MLP; name it:\n.*in no module of the MLP alone"
            ):
                paths(model, keyword)
        else:
            found = paths(model, keyword)
            assert sorted({re.sub(r"\.\d+\.", ".#.", path, count=1) for path in found}) == expected.split()
            assert len(found) == 2 * len(expected.split()), "each of the two layers has its own"


def test_the_module_is_the_innermost_one() -> None:
    # T5's layer.1 adds the residual and the norm around DenseReluDense and takes and gives the same width
    auto, config, _ = FAMILIES["t5"]
    model = skeleton(auto, config)
    assert {"encoder.block.0.layer.1", "encoder.block.0.layer.1.DenseReluDense"} <= set(model.blocks)


def test_a_gate_declared_after_the_output_is_not_taken_for_it() -> None:
    config = AfmoeConfig(
        **{**WIDE, "num_hidden_layers": 1}, num_dense_layers=1, head_dim=8, layer_types=["full_attention"]
    )
    model = skeleton(AutoModelForCausalLM, config)
    assert [s.path for s in model.sites if "self_attn" in s.path][-1] == "model.layers.0.self_attn.gate_proj"
    assert paths(model, "attention-out") == ["model.layers.0.self_attn.o_proj"]


def test_a_mixture_of_experts_has_no_one_output() -> None:
    model = skeleton(AutoModelForCausalLM, MixtralConfig(**WIDE, num_key_value_heads=2, num_local_experts=4))
    for keyword in ("mlp-out", "mlp-module"):
        with pytest.raises(
            TargetError, match=f"'{keyword}': this model does not tell(.|\n)*layers.0 is a mixture of exp"
        ):
            paths(model, keyword)


class Block(nn.Module):
    """A layer with two ways back to the stream, and an attention without an output by a known name."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8), "result": nn.Linear(8, 8)})
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.squeeze, self.expand = nn.Linear(8, 3), nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return x: only the shapes matter."""
        return x


def test_what_cannot_be_told_is_refused_with_what_was_found() -> None:
    model = sites(nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])}))
    with pytest.raises(TargetError, match=r"which of its layers is the MLP's output; name it:\n.*0 holds down, expand"):
        paths(model, "mlp-out")
    with pytest.raises(TargetError, match=r"is attention's output projection; name it:\n.*0\.attn holds q, k, result"):
        paths(model, "attention-out")
    with pytest.raises(TargetError, match=r"exclude 'mlp-out': this model does not tell"):
        paths(model, "all-linear", exclude=("mlp-out",))


def test_a_model_without_layers_has_none() -> None:
    with pytest.raises(TargetError, match="'mlp-out' matched nothing"):
        paths(sites(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))), "mlp-out")


def test_outputs_are_excluded_and_overridden_by_keyword() -> None:
    auto, config, _ = FAMILIES["llama"]
    model = skeleton(auto, config)
    left = paths(model, "attention", exclude=("attention-out",), layers="0")
    assert [path.rpartition(".")[2] for path in left] == ["q_proj", "k_proj", "v_proj"]
    spec = AdapterSpec(LoRA(8), Targets("mlp"), overrides=(Override.of("mlp-out", rank=4),))
    ranks = {m.site.path.rpartition(".")[2]: m.method.rank for m in resolve(spec, model)}  # type: ignore[attr-defined]
    assert ranks == {"gate_proj": 8, "up_proj": 8, "down_proj": 4}


def test_modules_are_overridden_by_keyword_and_refused_to_methods_of_layers() -> None:
    auto, config, _ = FAMILIES["llama"]
    model = skeleton(auto, config)
    spec = AdapterSpec(Parallel(), Targets("mlp-module"), overrides=(Override.of("mlp-module", layers="1", scale=1.0),))
    assert [m.method.scale for m in resolve(spec, model)] == [4.0, 1.0]  # type: ignore[attr-defined]
    with pytest.raises(TargetError, match="'mlp-module' matched only modules that cannot be adapted"):
        resolve(AdapterSpec(LoRA(8), Targets("mlp-module")), model)


def test_a_sequential_is_no_module_to_work_beside() -> None:
    # it runs its children one by one, and an adapter inside it would be one of them
    inner = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    assert not sites(nn.ModuleDict({"mlp": inner})).blocks


def test_layers_keep_the_norms_and_biases_of_the_other_layers_out() -> None:
    auto, config, _ = FAMILIES["gpt2"]
    with torch.device("meta"):
        model = auto.from_config(config)
    names, read = [name for name, _ in model.named_parameters()], sites(model)
    upper = parameters_named(["norms", "biases", "*"], names, read, "1")
    assert upper["norms"] == [f"transformer.h.1.ln_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert {name.split(".")[2] for found in upper.values() for name in found} == {"1"}
    assert "transformer.ln_f.weight" in parameters_named(["norms"], names, read)["norms"]
    assert parameters_named(["ln_f", "heads"], [*names, "lm_head.weight"], read, "1") == {
        "ln_f": ["transformer.ln_f.weight", "transformer.ln_f.bias"],
        "heads": ["lm_head.weight"],
    }, "what is named stays named"
