"""The files of a merged base are those a merge in memory writes, bit for bit, or there are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
)

from lorakit.context.prompt_tuning import PromptTuning
from lorakit.core.adapters import Adapter
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.state import AdapterState
from lorakit.errors import LorakitError, MergeError
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.inject.merge import merge
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture
from lorakit.training.base import load_base
from lorakit.training.merge_files import FilesReport, merging_files
from lorakit.training.quantised import pack, write_packed
from lorakit.training.quantizer import Packing
from lorakit.training.recipe import QuantSection
from tests.data.samples import tokenizer
from tests.law.cases import jitter
from tests.training.samples import VOCABULARY

SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **SIZES}
LABELS = ("low", "high", "middle")
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **changes: LlamaConfig(**{**LLAMA, **changes}),
    "gpt2": lambda **changes: GPT2Config(n_embd=32, n_layer=2, n_head=4, **{**SIZES, **changes}),
    "mixtral": lambda **changes: MixtralConfig(num_local_experts=3, **{**LLAMA, **changes}),
}


def save_base(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, shards: str = "20KB", **sizes: Any
) -> Path:
    """Save a random base in several files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # norms and biases start at 1 and at 0
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    tokenizer().save_pretrained(folder)
    return folder


def trained(base: Path, spec: AdapterSpec, labels: tuple[str, ...] = ()) -> AdapterState:
    """Return an adapter on a base, every tensor moved off its start."""
    torch.manual_seed(1)
    model = loaded(base, "fp32", labels)
    handle = attach(model, spec)
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    with torch.no_grad():
        inside = {id(p) for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()}
        for parameter in handle.parameters():
            if id(parameter) not in inside:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return state(model)


def loaded(base: Path, dtype: str, labels: tuple[str, ...] = ()) -> nn.Module:
    """Return a base as `lorakit merge` loads it."""
    task: Any = "classification" if labels else "causal-lm"
    return load_base(str(base), task=task, labels=labels, dtype=dtype, device="cpu")[0]


def in_memory(base: Path, adapter: AdapterState, folder: Path, dtype: str, labels: tuple[str, ...] = ()) -> Path:
    """Write a base that was merged in memory."""
    model: Any = loaded(base, dtype, labels)
    attach(model, adapter)
    merge(model)
    model.save_pretrained(folder)
    return folder


def streamed(base: Path, adapter: AdapterState, folder: Path, **options: Any) -> FilesReport:
    """Write a base that was merged file by file."""
    folder.mkdir()
    with merging_files(str(base), adapter, **options) as job:
        return job.write(folder)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return everything in the safetensors files of a folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Assert that tensors are equal bit for bit."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def layout(folder: Path) -> dict[str, set[str]]:
    """Return the names in each safetensors file of a folder."""
    return {file.name: set(load_file(file)) for file in sorted(folder.glob("*.safetensors"))}


SPECS: dict[str, tuple[str, AdapterSpec]] = {
    "llama": ("llama", AdapterSpec(LoRA(4))),
    "gpt2, transposed": ("gpt2", AdapterSpec(LoRA(4))),
    "overrides": (
        "llama",
        AdapterSpec(
            LoRA(4), overrides=(Override.of("mlp", rank=2, alpha=7.0), Override.of("q_proj", layers="1", rank=8))
        ),
    ),
    "dora": ("llama", AdapterSpec(DoRA(LoRA(4)))),
    "dora, transposed": ("gpt2", AdapterSpec(DoRA(LoRA(4)), Targets("attention"))),
    "two slices of a fused layer": (
        "gpt2",
        AdapterSpec(LoRA(4), Targets(("c_attn[q,v]",)), overrides=(Override.of("c_attn[v]", rank=2),)),
    ),
    "embedding and head": ("llama", AdapterSpec(LoRA(4), Targets(("embed_tokens", "lm_head")))),
    "trained whole beside it": ("llama", AdapterSpec(LoRA(4), Targets("q_proj"), train=("lm_head", "norms"))),
    "a mixture of experts, around the experts": ("mixtral", AdapterSpec(LoRA(4), Targets("attention"))),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", SPECS)
def test_every_tensor_is_the_one_a_merge_in_memory_writes(case: str, dtype: str, tmp_path: Path) -> None:
    family, spec = SPECS[case]
    kept = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    base = save_base(tmp_path / "base", family, kept)
    adapter = trained(base, spec)
    report = streamed(base, adapter, tmp_path / "merged")
    assert_same(tensors(tmp_path / "merged"), tensors(in_memory(base, adapter, tmp_path / "memory", dtype)))
    assert layout(tmp_path / "merged") == layout(base)
    assert report.files == len(layout(base)) > 3
    assert report.dtypes == (str(kept).removeprefix("torch."),)
    assert report.layers == len({update.site.path for update in adapter.updates})
    assert 0 < report.difference < (1e-6 if dtype == "fp32" else 0.0078)
    assert (report.update_lost > 0) == (dtype == "bf16")


@pytest.mark.parametrize(("kept", "asked"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "fp16")])
def test_another_dtype_is_the_one_a_merge_in_memory_writes(kept: str, asked: str, tmp_path: Path) -> None:
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    base = save_base(tmp_path / "base", "llama", names[kept])
    adapter = trained(base, AdapterSpec(LoRA(4), train=("norms",)))
    report = streamed(base, adapter, tmp_path / "merged", dtype=names[asked])
    if asked == "fp16":  # as the verb does: no CPU need compute in it
        model: Any = loaded(base, "fp32").half()
        attach(model, adapter)
        merge(model)
        model.save_pretrained(tmp_path / "memory")
    else:
        in_memory(base, adapter, tmp_path / "memory", asked)
    assert_same(tensors(tmp_path / "merged"), tensors(tmp_path / "memory"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == report.dtypes[0]
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "merged").values())
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")


def test_what_transformers_keeps_wide_stays_wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the correction of a router in DeepSeek-V3, here the norms of a block."""
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["layers.*.input_layernorm"])
    base = save_base(tmp_path / "base", "llama")
    adapter = trained(base, AdapterSpec(LoRA(4)))
    report = streamed(base, adapter, tmp_path / "merged", dtype=torch.bfloat16)
    assert report.dtypes == ("bfloat16", "float32")
    assert_same(tensors(tmp_path / "merged"), tensors(in_memory(base, adapter, tmp_path / "memory", "bf16")))


def test_what_transformers_does_not_ask_for_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", "llama", shards="1GB")
    adapter = trained(base, AdapterSpec(LoRA(4)))
    file = base / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "model.norm.weight"}, file, {"format": "pt"})
    assert "model.norm.weight: the files of the base have no tensor for it" in refused(base, adapter, tmp_path / "one")
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"model\.norm"])
    streamed(base, adapter, tmp_path / "two")
    assert layout(tmp_path / "two") == layout(base)


def test_a_classifier_with_its_head_is_written_as_in_memory(tmp_path: Path) -> None:
    """The files of a base that continues text have no such head: it goes into the last of them."""
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = trained(base, AdapterSpec(LoRA(4), train=("score",)), LABELS)
    assert list(adapter.trained) == ["score.weight"]
    report = streamed(base, adapter, tmp_path / "merged", task="classification", labels=LABELS)
    found, wanted = tensors(tmp_path / "merged"), tensors(in_memory(base, adapter, tmp_path / "memory", "bf16", LABELS))
    assert torch.equal(found.pop("lm_head.weight"), tensors(base)["lm_head.weight"]), "what is not asked for stays"
    assert_same(found, wanted)
    assert report.tensors == len(tensors(base)) + 1
    last = sorted(layout(tmp_path / "merged"))[-1]
    assert "score.weight" in layout(tmp_path / "merged")[last]
    index, before = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (tmp_path / "merged", base)
    )
    assert index["weight_map"] == {**before["weight_map"], "score.weight": last}
    assert index["metadata"]["total_parameters"] == before["metadata"]["total_parameters"] + 3 * 32
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.pad_token_id == 0
    assert model.config.architectures == ["LlamaForSequenceClassification"]


def test_an_encoder_whose_names_lack_the_prefix_keeps_its_names(encoder: Path, tmp_path: Path) -> None:
    adapter = trained(encoder, AdapterSpec(LoRA(4), train=("classifier",)), LABELS)
    streamed(encoder, adapter, tmp_path / "merged", task="classification", labels=LABELS)
    in_memory(encoder, adapter, tmp_path / "memory", "fp32", LABELS)
    assert layout(tmp_path / "merged")["model.safetensors"] == {
        *layout(encoder)["model.safetensors"],
        "classifier.weight",
        "classifier.bias",
    }
    one, other = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict()
        for name in ("merged", "memory")
    )
    assert_same(one, other)


def test_a_gpt2_of_the_hub_has_names_without_a_prefix_and_buffers_of_its_own(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2", shards="1GB")
    file = base / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    save_file(bare, file, {"format": "pt"})
    adapter = trained(base, AdapterSpec(LoRA(4)))
    streamed(base, adapter, tmp_path / "merged")
    found = tensors(tmp_path / "merged")
    assert torch.equal(found.pop("h.0.attn.bias"), bare["h.0.attn.bias"])
    wanted = tensors(in_memory(base, adapter, tmp_path / "memory", "fp32"))
    assert_same({f"transformer.{name}": tensor for name, tensor in found.items()}, wanted)


def test_a_tied_weight_trained_whole_is_written_under_the_name_it_has_in_the_files(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors(base)
    adapter = trained(base, AdapterSpec(LoRA(4), Targets("q_proj"), train=("embed_tokens",)))
    (value,) = adapter.trained.values()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        folder = tmp_path / name
        streamed(base, replace(adapter, trained={name: value}), folder)
        assert torch.equal(tensors(folder)["model.embed_tokens.weight"], value)
        assert layout(folder) == layout(base)


@pytest.mark.parametrize("equal", [True, False])
def test_weights_that_are_tied_in_name_only_are_as_transformers_takes_them(equal: bool, tmp_path: Path) -> None:
    """With both in the files, equal ones are tied on loading, and different ones are not."""
    base = save_base(tmp_path / "base", "llama", shards="1GB", tie_word_embeddings=True)
    file = base / "model.safetensors"
    both = load_file(file)
    both["lm_head.weight"] = both["model.embed_tokens.weight"] * (1.0 if equal else -1.0)
    save_file(both, file, {"format": "pt"})
    adapter = trained(base, AdapterSpec(LoRA(4), Targets("q_proj")))
    tables = trained(base, AdapterSpec(LoRA(4), Targets("embed_tokens")))
    streamed(base, adapter, tmp_path / "merged")
    assert_same({**tensors(tmp_path / "merged"), **_attention(both)}, both)
    if equal:
        with pytest.raises(MergeError, match="embed_tokens: its weight is tied to lm_head.weight"):
            streamed(base, tables, tmp_path / "refused")
    else:
        streamed(base, tables, tmp_path / "parted")
        wanted = tensors(in_memory(base, tables, tmp_path / "memory", "fp32"))
        assert_same(tensors(tmp_path / "parted"), wanted)


def _attention(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in values.items() if "q_proj" in name}


def test_everything_beside_the_weights_is_copied(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (base / "pytorch_model.bin").write_text("the same weights, pickled")
    (base / "lorakit-merge.json").write_text("of another merge")
    streamed(base, trained(base, AdapterSpec(LoRA(4))), tmp_path / "merged")
    there = {str(file.relative_to(base)): file.read_bytes() for file in base.rglob("*") if file.is_file()}
    found = {
        str(f.relative_to(tmp_path / "merged")): f.read_bytes() for f in (tmp_path / "merged").rglob("*") if f.is_file()
    }
    assert found.keys() == there.keys() - {"pytorch_model.bin", "lorakit-merge.json"}
    for name in found:
        if name.endswith(".json"):
            assert json.loads(found[name]) == json.loads(there[name])
        elif not name.endswith(".safetensors"):
            assert found[name] == there[name]


def refused(base: Path, adapter: AdapterState, folder: Path, **options: Any) -> str:
    """Return what a refused merge says."""
    with pytest.raises(LorakitError) as error:
        streamed(base, adapter, folder, **options)
    return str(error.value)


def test_what_is_no_change_of_a_weight_is_refused_with_every_layer_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    said = refused(base, trained(base, AdapterSpec(Mixture(2, 2), Targets("q_proj"))), tmp_path / "merged")
    why = "mixture depends on the input, so no single weight equals it; keep it attached"
    assert said == (
        "nothing was written; 2 layer(s) cannot be merged from files:\n"
        f"  - model.layers.0.self_attn.q_proj: {why}\n"
        f"  - model.layers.1.self_attn.q_proj: {why}"
    )
    prompt = trained(base, AdapterSpec(PromptTuning(tokens=4)))
    assert "model: prompt-tuning acts on what the model reads" in refused(base, prompt, tmp_path / "prompt")
    assert not any((tmp_path / "merged").iterdir())


def test_an_adapter_of_another_base_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    base, other = save_base(tmp_path / "base", "llama"), save_base(tmp_path / "other", "llama")
    for file in other.glob("*.safetensors"):
        save_file({name: -tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    said = refused(other, trained(base, AdapterSpec(LoRA(4))), tmp_path / "merged")
    assert "the adapter was trained on another base" in said
    assert "model.layers.0.self_attn.q_proj: expected (" in said
    assert not any((tmp_path / "merged").iterdir())
    deeper = trained(save_base(tmp_path / "deep", "llama", num_hidden_layers=3), AdapterSpec(LoRA(4)))
    assert "7 of its 21 layers are not here" in refused(base, deeper, tmp_path / "deeper")


def test_files_that_lack_a_tensor_or_hold_another_shape_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", shards="1GB")
    adapter = trained(base, AdapterSpec(LoRA(4), Targets("mlp")))
    file = base / "model.safetensors"
    whole = load_file(file)
    del whole["model.layers.1.mlp.up_proj.weight"], whole["model.norm.weight"]
    whole["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 31)
    save_file(whole, file, {"format": "pt"})
    assert refused(base, adapter, tmp_path / "merged") == (
        "nothing was written; 3 layer(s) cannot be merged from files:\n"
        "  - model.layers.0.mlp.up_proj: the files have shape (48, 31), the model (48, 32)\n"
        "  - model.layers.1.mlp.up_proj.weight: the files of the base have no tensor for it\n"
        "  - model.norm.weight: the files of the base have no tensor for it"
    )


def test_a_packed_base_is_refused_layer_by_layer(base: Path, tmp_path: Path) -> None:
    packing = Packing(QuantSection())
    write_packed(pack(str(base), packing, "cpu"), packing, tmp_path / "packed")
    tokenizer().save_pretrained(tmp_path / "packed")
    said = refused(tmp_path / "packed", trained(base, AdapterSpec(LoRA(4), Targets("q_proj"))), tmp_path / "merged")
    why = "its weight is quantised (bitsandbytes); merge into the 16-bit base, or in memory with lossy=True"
    assert said == "nothing was written; 2 layer(s) cannot be merged from files:\n" + "\n".join(
        f"  - model.layers.{i}.self_attn.q_proj: {why}" for i in (0, 1)
    )
    streamed(tmp_path / "packed", trained(base, AdapterSpec(LoRA(4), Targets("lm_head"))), tmp_path / "head")
    changed, before = tensors(tmp_path / "head"), tensors(tmp_path / "packed")
    assert [name for name in before if not torch.equal(before[name], changed[name])] == ["lm_head.weight"]


def test_a_weight_that_loading_makes_of_others_is_refused(tmp_path: Path) -> None:
    """The experts of a mixture are stacked on loading: values move, which no renaming tells."""
    base = save_base(tmp_path / "base", "mixtral", shards="1GB")
    names = list(tensors(base))
    assert any("experts.0" in name for name in names), "the files hold the experts one by one"
    adapter = trained(base, AdapterSpec(LoRA(4), Targets("attention"), train=("experts",)))
    said = refused(base, adapter, tmp_path / "merged")
    assert "mlp.experts.down_proj: its weight is made of other tensors on loading (model.layers.0." in said
    assert "merge in memory" in said


def test_nan_and_overflow_leave_no_trace_of_success(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = trained(base, AdapterSpec(LoRA(4)))
    adapter.updates[9].tensors["up"].fill_(3e38)
    said = refused(base, adapter, tmp_path / "merged")
    assert said.startswith(f"{adapter.updates[9].site.path}: merging would write 1,024 NaN or infinite values of 1,")
    with torch.no_grad():
        file = sorted(base.glob("*.safetensors"))[0]
        save_file({name: 1e6 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    plain = trained(base, AdapterSpec(LoRA(4)))
    assert "are too large for torch.float16; use a wider dtype" in refused(
        base, plain, tmp_path / "half", dtype=torch.float16
    )


def test_an_update_that_rounding_would_swallow_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = trained(base, AdapterSpec(LoRA(4)))
    for update in adapter.updates:
        update.tensors["up"].mul_(1e-5)
    said = refused(base, adapter, tmp_path / "merged")
    assert said == (
        "nothing was written: rounding the merged weights would take 67% of the update (Frobenius), so most of it "
        "would be lost; write fp32 instead"
    )
    assert streamed(base, adapter, tmp_path / "wide", dtype=torch.float32).update_lost < 0.01


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = trained(base, AdapterSpec(LoRA(4)))
    file = sorted(base.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    said = refused(base, adapter, tmp_path / "merged")
    assert said.startswith(f"{file} is truncated or corrupt: ")
    assert said.endswith("; get the file again")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", shards="1GB")
    adapter = trained(base, AdapterSpec(LoRA(4)))
    shutil.move(base / "model.safetensors", base / "pytorch_model.bin")
    assert "it holds pytorch_model.bin; convert it to safetensors first" in refused(base, adapter, tmp_path / "merged")
