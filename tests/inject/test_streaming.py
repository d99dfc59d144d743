"""A weight that is merged by itself is the weight merged in the model, bit for bit, and is proved to act as one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorakit.core.adapters import Adapter
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.state import AdapterState
from lorakit.errors import AdapterFileError, MergeError
from lorakit.inject.attach import attach, detach, state
from lorakit.inject.bases import probe
from lorakit.inject.merge import Merged, merge
from lorakit.inject.proof import EXACT, prove
from lorakit.inject.streaming import StreamedMerge
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture
from lorakit.methods.vera import VeRA
from tests.inject.test_attach import gpt2, llama, moved
from tests.law.cases import DENSE, STATIC, net

PAIRS = [(kind, method) for kind, method in STATIC if kind in DENSE]


def streamed(bare: nn.Module, adapter: AdapterState) -> tuple[StreamedMerge, dict[str, torch.Tensor]]:
    """Return the merge of an adapter on an empty copy of `bare`, all of it done, and the merged weights."""
    job = StreamedMerge(copy.deepcopy(bare).to("meta"), adapter)
    assert job.problems == []
    return job, {name: job.merged(name, bare.get_parameter(name).detach().clone()) for name in job.layers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_every_method_merges_on_every_kind_of_layer_as_it_does_in_the_model(
    kind: str, method: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = net(kind, method)
    adapter = state(model, "n0")
    detach(model, "n0")
    model.to(dtype)
    job, found = streamed(model, adapter)
    attach(model, adapter)
    report = merge(model)
    assert torch.equal(found["layer.weight"], model.get_parameter("layer.weight"))
    assert job.report() == report
    assert report.largest_change > 0
    assert 0 <= job.proven.difference <= (EXACT if dtype is torch.float32 else torch.finfo(dtype).eps)
    assert job.proven.layer == "layer"


def test_two_updates_on_slices_of_one_fused_layer_are_merged_together() -> None:
    model = gpt2()
    bare = copy.deepcopy(model)
    moved(model, AdapterSpec(LoRA(4), Targets(("c_attn[q,v]", "mlp.c_proj"))))
    job, found = streamed(bare, state(model))
    report = merge(model)
    assert job.report() == report
    assert report.layers == len(found) == 4
    for name, weight in found.items():
        assert torch.equal(weight, model.get_parameter(name))
        if "c_attn" in name:
            assert torch.equal(weight[:, 32:64], bare.get_parameter(name)[:, 32:64]), "the keys stay as they were"


def test_a_tensor_that_layers_share_is_given_to_each() -> None:
    model = llama()
    bare = copy.deepcopy(model)
    moved(model, AdapterSpec(VeRA(8), Targets("q_proj")))
    _, found = streamed(bare, state(model))
    merge(model)
    for name, weight in found.items():
        assert torch.equal(weight, model.get_parameter(name))


def test_a_layer_is_as_empty_after_its_merge_as_before() -> None:
    model = llama(attention_bias=True)
    hollow = copy.deepcopy(model).to("meta")
    moved(model, AdapterSpec(LoRA(4)))
    job = StreamedMerge(hollow, state(model))
    before = dict(hollow.state_dict(keep_vars=True))
    name = "model.layers.0.self_attn.q_proj.weight"
    job.merged(name, llama().get_parameter(name).detach().clone())
    after = hollow.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[key] is value and value.is_meta for key, value in before.items())


def test_what_was_trained_whole_is_given_by_every_name_and_in_the_dtype_asked_for() -> None:
    model = llama(tie_word_embeddings=True)
    hollow = copy.deepcopy(model).to("meta")
    hollow.tie_weights()  # type: ignore[operator]
    attach(model, AdapterSpec(LoRA(4), Targets("q_proj"), train=("embed_tokens", "norm")))
    with torch.no_grad():
        model.get_submodule("model.embed_tokens").get_parameter("weight").add_(1)
    job = StreamedMerge(hollow, state(model))
    assert "model.norm.weight" in job.whole
    value = model.get_submodule("lm_head").get_parameter("weight")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(job.trained(name, torch.bfloat16), value.to(torch.bfloat16))


def test_problems_name_every_layer_and_what_to_do() -> None:
    model = llama(tie_word_embeddings=True)
    hollow = copy.deepcopy(model).to("meta")
    hollow.tie_weights()  # type: ignore[operator]
    attach(model, AdapterSpec(Mixture(2, 2), Targets("q_proj")))
    assert StreamedMerge(copy.deepcopy(hollow), state(model)).problems == [
        f"model.layers.{i}.self_attn.q_proj: mixture depends on the input, so no single weight equals it; "
        "keep it attached"
        for i in (0, 1)
    ]
    detach(model)
    attach(model, AdapterSpec(LoRA(2), Targets("embed_tokens")))
    assert StreamedMerge(hollow, state(model)).problems == [
        "model.embed_tokens: its weight is tied to lm_head.weight, which would change too; "
        "merge in memory with untie=True"
    ]


def test_an_adapter_of_another_model_or_another_base_is_refused() -> None:
    model = llama()
    bare = copy.deepcopy(model)
    moved(model, AdapterSpec(LoRA(4), Targets("q_proj")))
    adapter = state(model)
    with pytest.raises(AdapterFileError, match="made for another model, and this model has none of its 2 layers"):
        StreamedMerge(gpt2().to("meta"), adapter)
    job = StreamedMerge(copy.deepcopy(bare).to("meta"), adapter)
    weights = {path: probe(bare.get_parameter(f"{path}.weight")) for path in job.known_by}
    assert len(weights) == 8
    job.check_base("the base", weights)
    first = next(iter(weights))
    weights[first] = tuple(-value for value in weights[first])
    with pytest.raises(AdapterFileError, match=rf"another base(.|\n)*{first}: expected"):
        job.check_base("another", weights)


def test_nan_and_overflow_are_refused_with_the_layer_or_the_parameter_named() -> None:
    model = llama()
    bare = copy.deepcopy(model)
    moved(model, AdapterSpec(LoRA(4), Targets("q_proj"), train=("model.norm",)))
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(1e6)
        model.get_submodule("model.layers.1.self_attn.q_proj").adapters.by_name["default"].up.fill_(1e6)
    job = StreamedMerge(bare.to("meta"), state(model))
    half = torch.ones(32, 32, dtype=torch.float16)
    job.merged("model.layers.0.self_attn.q_proj.weight", half.clone())
    with pytest.raises(MergeError, match=r"layers.1.self_attn.q_proj: merging would write .* NaN or infinite values"):
        job.merged("model.layers.1.self_attn.q_proj.weight", half.clone())
    with pytest.raises(MergeError, match=r"model.norm.weight: it was trained whole, and 32 of its 32 values"):
        job.trained("model.norm.weight", torch.float16)
    assert job.trained("model.norm.weight", torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_that_does_not_act_as_its_branch_is_refused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof must see what a sum that is wrong by a hundredth of the update, or by the scale, would be."""
    model = llama()
    bare = copy.deepcopy(model)
    moved(model, AdapterSpec(LoRA(4), Targets("q_proj")))
    adapter, right = state(model), Adapter.delta
    for wrong in (lambda delta: 1.01 * delta, lambda delta: 0 * delta, lambda delta: delta.flip(0)):
        monkeypatch.setattr(Adapter, "delta", lambda self, weight, wrong=wrong: wrong(right(self, weight)))
        job = StreamedMerge(copy.deepcopy(bare).to("meta"), adapter)
        name = "model.layers.0.self_attn.q_proj.weight"
        with pytest.raises(MergeError, match=r"layers.0.self_attn.q_proj: on random inputs the merged and the adapted"):
            job.merged(name, bare.get_parameter(name).detach().to(dtype, copy=True))


def test_a_weight_that_was_cast_to_too_few_bits_is_refused() -> None:
    """W' is held to the rounding of the dtype it says it is in, not of a coarser one on the way."""
    model = net("linear, no bias", "lora")
    weight = model.layer.weight.detach()
    total = weight + model.layer.adapters.named()[0][1].delta(weight)
    rng = torch.Generator().manual_seed(0)
    once = prove("layer", model.layer, Merged(total, total.half()), rng)
    assert 0 < once <= torch.finfo(torch.float16).eps
    with pytest.raises(MergeError, match=r"layer: on random inputs .* where rounding explains 0.00196"):
        prove("layer", model.layer, Merged(total, total.to(torch.float8_e4m3fn).half()), rng)
    assert prove("layer", model.layer, Merged(total, total), rng) <= EXACT


def test_a_lookup_that_multiplies_is_proved_without_its_constant() -> None:
    """Gemma keeps the factor of its embedding in a buffer, which an empty model does not have."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3TextConfig(vocab_size=50, tie_word_embeddings=False, head_dim=8, num_key_value_heads=2, **sizes)
    model = Gemma3ForCausalLM(config).eval()
    bare = copy.deepcopy(model)
    moved(model, AdapterSpec(LoRA(4), Targets("embed_tokens")))
    job, found = streamed(bare, state(model))
    merge(model)
    assert torch.equal(found["model.embed_tokens.weight"], model.get_parameter("model.embed_tokens.weight"))
    assert job.proven.difference <= EXACT
