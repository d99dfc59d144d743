"""The target language: what each pattern means, and what is said when it means nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, Phi3Config

from lorakit.core.site import Site, Skeleton
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.targets import modules_named, parse_layers, resolve, select
from lorakit.errors import SpecError, TargetError
from lorakit.inject.sites import sites
from lorakit.methods.lora import LoRA


def skeleton(config: Any, auto: Any = AutoModelForCausalLM) -> Skeleton:
    """Return the skeleton of a model built on the meta device."""
    with torch.device("meta"):
        return sites(auto.from_config(config))


@pytest.fixture(scope="module")
def gpt2() -> Skeleton:
    return skeleton(GPT2Config(n_layer=3, n_embd=48, n_head=4))


@pytest.fixture(scope="module")
def llama() -> Skeleton:
    config = LlamaConfig(num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=4)
    return skeleton(config)


def keys(skeleton: Skeleton, *include: str, **kwargs: Any) -> list[str]:
    """Return the keys of the sites that targets mean."""
    return [site.key for site, _ in select(Targets(include, **kwargs), skeleton)]


def test_a_name_means_its_dotted_ends_and_never_a_part_of_a_word(gpt2: Skeleton) -> None:
    assert keys(gpt2, "c_attn") == [f"transformer.h.{i}.attn.c_attn" for i in range(3)]
    assert len(keys(gpt2, "c_proj")) == 6
    assert keys(gpt2, "attn.c_proj") == [f"transformer.h.{i}.attn.c_proj" for i in range(3)]
    with pytest.raises(TargetError, match=r"'proj' matched nothing; did you mean 'c_proj'"):
        keys(gpt2, "proj")


def test_a_glob_star_stays_within_one_name(gpt2: Skeleton) -> None:
    assert keys(gpt2, "transformer.h.*.attn.c_attn") == keys(gpt2, "c_attn")
    assert keys(gpt2, "transformer.h.?.mlp.c_fc") == keys(gpt2, "c_fc")
    assert keys(gpt2, "**.c_fc") == keys(gpt2, "c_fc")
    with pytest.raises(TargetError, match="matched nothing"):
        keys(gpt2, "transformer.*.c_attn")


def test_a_regular_expression_matches_the_whole_path(llama: Skeleton) -> None:
    assert keys(llama, r"re:.*\.(q|v)_proj") == [f"model.layers.{i}.self_attn.{p}_proj" for i in range(4) for p in "qv"]
    with pytest.raises(TargetError, match=r"'re:q_proj' matched nothing; did you mean 'q_proj'"):
        keys(llama, "re:q_proj")
    with pytest.raises(TargetError, match="is not a regular expression"):
        keys(llama, "re:(")


def test_all_linear_leaves_the_head_out_and_is_attention_and_mlp_here(llama: Skeleton) -> None:
    everything = keys(llama, "all-linear")
    assert len(everything) == 28
    assert "lm_head" not in everything
    assert sorted(keys(llama, "attention") + keys(llama, "mlp")) == sorted(everything)
    assert {key.rpartition(".")[2] for key in keys(llama, "mlp")} == {"gate_proj", "up_proj", "down_proj"}


def test_attention_and_mlp_of_an_encoder() -> None:
    bert = skeleton(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4), AutoModel)
    assert {k.partition("layer.0.")[2] for k in keys(bert, "attention", layers="0")} == {
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    }
    assert {k.partition("layer.0.")[2] for k in keys(bert, "mlp", layers="0")} == {"intermediate.dense", "output.dense"}


def test_exclude_and_layers_narrow(llama: Skeleton) -> None:
    assert keys(llama, "attention", exclude=("k_proj", "o_proj"), layers="top:1") == [
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.self_attn.v_proj",
    ]
    with pytest.raises(TargetError, match="nothing is left to adapt"):
        keys(llama, "q_proj", exclude=("q_proj",))


@pytest.mark.parametrize(
    ("text", "layers"),
    [("1", {1}), ("0-2", {0, 1, 2}), ("top:2", {6, 7}), ("bottom:1", {0}), ("0, 3,5-6", {0, 3, 5, 6})],
)
def test_layers_are_counted_from_0(text: str, layers: set[int]) -> None:
    assert parse_layers(text, 8) == layers


@pytest.mark.parametrize("text", ["8", "6-8", "top:9"])
def test_a_layer_the_model_does_not_have_is_refused(text: str) -> None:
    with pytest.raises(TargetError, match=r"lies outside this model: it has 8 layers, 0 to 7"):
        parse_layers(text, 8)


def test_layers_in_other_words_are_refused() -> None:
    with pytest.raises(TargetError, match="layers '3-1' runs backwards; write 1-3"):
        parse_layers("3-1", 8)
    with pytest.raises(TargetError, match=r"layers 'last' is not understood; write 20-24, top:5"):
        parse_layers("last", 8)


def test_slices_of_fused_layers_go_by_name_or_number(gpt2: Skeleton) -> None:
    assert keys(gpt2, "h.0.attn.c_attn[q,v]") == [
        "transformer.h.0.attn.c_attn[0:48]",
        "transformer.h.0.attn.c_attn[96:144]",
    ]
    assert keys(gpt2, "h.1.attn.c_attn[10:20]") == ["transformer.h.1.attn.c_attn[10:20]"]
    with pytest.raises(TargetError, match=r"has no part 'o'; its parts: q = 0:48, k = 48:96, v = 96:144"):
        keys(gpt2, "c_attn[o]")
    with pytest.raises(TargetError, match="lies outside its 144 output rows"):
        keys(gpt2, "c_attn[100:200]")
    with pytest.raises(TargetError, match="targets overlap on rows"):
        keys(gpt2, "c_attn[q]", "c_attn")


def test_rows_of_a_grouped_convolution_are_not_sliced() -> None:
    grouped = Skeleton((Site("conv", 8, 3, (3,), kind="conv1d", groups=2),))
    with pytest.raises(
        TargetError, match="a convolution of 2 groups, whose rows see different channels; adapt it whole"
    ):
        resolve(AdapterSpec(LoRA(2), Targets("conv[0:4]")), grouped)


def test_grouped_query_slices_follow_the_configuration() -> None:
    phi = skeleton(
        Phi3Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            pad_token_id=0,
        )
    )
    attention = "model.layers.0.self_attn.qkv_proj"
    assert keys(phi, "qkv_proj[q,k,v]") == [f"{attention}[0:32]", f"{attention}[32:48]", f"{attention}[48:64]"]
    assert keys(phi, "gate_up_proj[up]") == ["model.layers.0.mlp.gate_up_proj[48:96]"]


def test_every_bad_pattern_is_told_at_once_with_near_misses(llama: Skeleton) -> None:
    with pytest.raises(TargetError) as told:
        keys(llama, "q_proj", "v_porj", "input_layernorm", exclude=("upp_proj",))
    text = str(told.value)
    assert text.startswith("3 target pattern(s) cannot be used:")
    assert "'v_porj' matched nothing; did you mean 'v_proj'" in text
    assert "model.layers.0.input_layernorm is LlamaRMSNorm whose output is not linear in its weight" in text
    assert "exclude 'upp_proj' matched nothing; did you mean 'up_proj'" in text


def test_layers_that_leave_nothing_of_one_pattern_are_refused(llama: Skeleton) -> None:
    with pytest.raises(
        TargetError, match=r"layers='top:2' leaves nothing of 'lm_head'; give other layers, or leave it"
    ):
        keys(llama, "q_proj", "lm_head", layers="top:2")
    assert len(keys(llama, "q_proj", "lm_head")) == 5


def test_a_pattern_of_an_override_that_means_nothing_says_whose_it_is(llama: Skeleton) -> None:
    with pytest.raises(TargetError, match=r"override of zzz: 1 target pattern\(s\) cannot be used:\n .*'zzz' matched"):
        resolve(AdapterSpec(LoRA(4), overrides=[Override.of("zzz", rank=2)]), llama)


def test_what_says_nothing_without_a_method_is_refused() -> None:
    for targets in (Targets("q_proj"), Targets(exclude="lm_head")):
        with pytest.raises(SpecError, match="without a method targets and exclude mean nothing; name in `train` what"):
            AdapterSpec(None, targets, train="*")
    assert AdapterSpec(None, Targets(layers="1"), train="norms").targets.layers == "1"


@pytest.mark.parametrize("wrong", [{"layers": 3}, {"include": None}, {"exclude": 5}])
def test_targets_of_another_type_are_refused_where_no_type_checker_runs(wrong: dict[str, Any]) -> None:
    script = f"from lorakit import LorakitError, Targets\ntry: Targets(**{wrong!r})\nexcept LorakitError as e: print(e)"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert f"not {next(iter(wrong.values()))!r}" in told


def test_a_container_is_not_a_layer(llama: Skeleton) -> None:
    with pytest.raises(TargetError, match="self_attn is LlamaAttention which holds other layers; name those"):
        keys(llama, "self_attn")


def test_a_layer_norm_among_right_ones_is_refused(gpt2: Skeleton) -> None:
    with pytest.raises(TargetError, match=r"ln_1 is LayerNorm whose output is not linear in its weight"):
        keys(gpt2, r"re:transformer\.h\.\d\.(ln_1|attn\.c_attn)")


def test_multihead_attention_s_projection_is_refused() -> None:
    layer = sites(nn.Sequential(nn.MultiheadAttention(8, 2)))
    with pytest.raises(TargetError, match="whose weight MultiheadAttention reads directly, past the layer's forward"):
        keys(layer, "out_proj")


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
READ = {
    "wavlm": ({"k_proj", "q_proj", "v_proj", "out_proj"}, "WavLMAttention"),
    "mamba": ({"conv1d", "dt_proj", "out_proj", "x_proj"}, "MambaMixer"),
    "falcon_mamba": ({"conv1d", "dt_proj", "out_proj", "x_proj"}, "FalconMambaMixer"),
    "deberta": ({"in_proj", "rel_embeddings"}, "DisentangledSelfAttention"),
    "bloom": (set[str](), ""),  # reads two of them where it was told to repeat how it was pretrained
    "t5": (set[str](), ""),  # asks for the dtype of one
}


@pytest.mark.parametrize("family", READ)
def test_layers_whose_weight_a_module_around_them_reads_are_told_by_its_code(family: str) -> None:
    skeleton = sites(AutoConfig.for_model(family, **SMALL))
    names, reader = READ[family]
    read = {path.rpartition(".")[2]: why for path, (_, why) in skeleton.others.items() if "reads directly" in why}
    assert read.keys() <= names
    assert not reader or any(f"whose weight {reader} reads directly" in why for why in read.values())
    assert names <= read.keys() | {"rel_embeddings"}


def test_a_weight_read_from_further_up_is_told_and_one_that_is_made_another_s_is_not() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
            self.own, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.own.weight = self.other.weight

        def tie(self) -> None:
            self.own.weight = self.other.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if isinstance(self.own.weight, nn.Parameter) and self.own.weight.dtype == x.dtype:
                x = self.own(x)
            return x @ self.inner.a.weight

    found = sites(nn.Sequential(Reads()))
    assert [path for path, (_, why) in found.others.items() if "Reads reads directly" in why] == ["0.inner.a"]


@pytest.mark.parametrize(
    ("family", "layer"),
    [("codegen", "qkv_proj"), ("gpt_bigcode", "c_attn"), ("lfm2", "in_proj"), ("gpt_neox", "query_key_value")],
)
def test_a_fused_layer_that_is_not_three_thirds_has_no_named_parts(family: str, layer: str) -> None:
    more: dict[str, Any] = {"gpt_bigcode": {"multi_query": False}, "lfm2": {"layer_types": ["conv"] * 2}}.get(
        family, {}
    )
    skeleton = sites(AutoConfig.for_model(family, **SMALL, **more))
    path = next(site.path for site in skeleton.sites if site.path.endswith(layer))
    assert path not in skeleton.parts
    with pytest.raises(TargetError, match="has no part"):
        keys(skeleton, f"{layer}[q]")


def test_a_subclass_with_its_own_forward_is_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    with pytest.raises(TargetError, match="0 is Doubled whose forward is its own, so its weight may mean anything"):
        keys(sites(nn.Sequential(Doubled(4, 4))), "0")


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (parametrizations.weight_norm(nn.Linear(4, 4)), "whose weight is made of others at each reading"),
        (parametrizations.spectral_norm(nn.Conv1d(4, 4, 3)), "whose weight is made of others at each reading"),
        (nn.Embedding(8, 4, max_norm=1.0), "shrinks the rows that it reads"),
    ],
)
def test_a_weight_that_a_merge_could_not_write_is_refused(layer: nn.Module, why: str) -> None:
    with pytest.raises(TargetError, match=why):
        keys(sites(nn.Sequential(layer)), "0")


def test_a_block_of_fused_experts_says_that_it_holds_no_layers() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.act_fn = nn.Parameter(torch.zeros(2, 4, 4)), nn.SiLU()

    with pytest.raises(TargetError, match="Experts which keeps its weights in tensors of its own, not in layers"):
        keys(sites(nn.Sequential(Experts())), "0")


def test_what_matched_nothing_is_not_proposed_again() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.ReLU(), "attn": nn.Linear(4, 4)})])})
    with pytest.raises(TargetError, match="'mlp' matched nothing") as refused:
        keys(sites(model), "mlp")
    assert "did you mean 'mlp'," not in str(refused.value)


def test_overrides_change_rank_and_alpha_where_they_say(llama: Skeleton) -> None:
    spec = AdapterSpec(
        LoRA(8, 16.0),
        Targets(("attention", "mlp")),
        overrides=(Override.of("mlp", rank=4), Override.of(layers="3", alpha=2.0), Override.of("k_proj", rank=2)),
    )
    by_key = {m.site.key: m.method for m in resolve(spec, llama)}
    assert by_key["model.layers.0.self_attn.q_proj"] == LoRA(8, 16.0)
    assert by_key["model.layers.0.mlp.up_proj"] == LoRA(4, 16.0)
    assert by_key["model.layers.3.mlp.up_proj"] == LoRA(8, 2.0), "the last override that matches wins"
    assert by_key["model.layers.3.self_attn.k_proj"] == LoRA(2, 16.0)


def test_an_override_that_applies_to_nothing_is_refused(llama: Skeleton) -> None:
    spec = AdapterSpec(LoRA(8), Targets("q_proj"), overrides=(Override.of("mlp", rank=4),))
    with pytest.raises(TargetError, match="the override of mlp applies to no adapted layer"):
        resolve(spec, llama)
    with pytest.raises(SpecError, match=r"override of mlp: method lora has no field 'rnak'; did you mean 'rank'"):
        AdapterSpec(LoRA(8), overrides=(Override.of("mlp", rnak=4),))


def test_modules_to_train_whole_go_by_dotted_ends(llama: Skeleton) -> None:
    paths = ("model.norm", "model.layers.0.input_layernorm", "lm_head")
    assert modules_named(["norm", "lm_head"], paths) == {"norm": ["model.norm"], "lm_head": ["lm_head"]}
    with pytest.raises(TargetError, match=r"'lm_haed' matched no module; did you mean 'lm_head'"):
        modules_named(["lm_haed"], paths)


def test_a_spec_is_json_both_ways() -> None:
    spec = AdapterSpec(
        LoRA(8, 4.0, stabilised=True),
        Targets(("attention", "c_attn[q]"), ("k_proj",), "top:5"),
        train=("classifier",),
        dropout=0.1,
        overrides=(Override.of("mlp", rank=4),),
        seed=7,
    )
    assert AdapterSpec.from_json(spec.to_json()) == spec
    assert hash(AdapterSpec.from_json(spec.to_json())) == hash(spec)
    with pytest.raises(SpecError, match="adapter spec has version 99, this lorakit reads 1; upgrade it"):
        AdapterSpec.from_json({**spec.to_json(), "version": 99})
    with pytest.raises(SpecError, match="unknown method 'loar'; did you mean 'lora'"):
        AdapterSpec.from_json({**spec.to_json(), "method": {"name": "loar"}})


@pytest.mark.parametrize("dropout", [-0.5, 1.0])
def test_a_dropout_that_cannot_be_is_refused(dropout: float) -> None:
    with pytest.raises(SpecError, match="dropout must be at least 0 and below 1"):
        AdapterSpec(LoRA(8), dropout=dropout)


def test_an_override_everywhere_heeds_its_own_exclude(llama: Skeleton) -> None:
    spec = AdapterSpec(LoRA(8), Targets("attention"), overrides=(Override(Targets("*", ("k_proj",)), (("rank", 4),)),))
    ranks = {m.site.path.rpartition(".")[2]: m.method.rank for m in resolve(spec, llama)}  # type: ignore[attr-defined]
    assert ranks == {"q_proj": 4, "k_proj": 8, "v_proj": 4, "o_proj": 4}
