"""A LoRA out of a tuned model: what a low-rank change is, comes back exactly; what is lost and left out is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    GemmaConfig,
    GPT2Config,
    MambaConfig,
    MixtralConfig,
)

from lorakit import AdapterSpec, LoRA, attach, load, save
from lorakit.core.init import leading
from lorakit.core.site import Site
from lorakit.core.spec import Targets
from lorakit.core.state import AdapterState, Base, Purpose, delta_of
from lorakit.errors import AdapterFileError, CombineError, RecipeError, SpecError
from lorakit.inject.attach import state
from lorakit.inject.merge import merge
from lorakit.training import extraction
from lorakit.training.base import load_base
from lorakit.training.extraction import EXACT, ITERATIONS, extract
from lorakit.training.tuned import Twin
from tests.training import samples

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 67,
}

IDS = torch.arange(3, 15)[None]
GATE = "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama."""
    return samples.save_base(tmp_path_factory.mktemp("bases") / "llama")


def changed(base: Path, folder: Path, **changes: Tensor) -> str:
    """Copy a base with these tensors added to its own; a name has `__` for `.`."""
    shutil.copytree(base, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, change in changes.items():
        own = tensors[name.replace("__", ".")]
        tensors[name.replace("__", ".")] = (own + change).to(own.dtype)
    save_file(tensors, file, {"format": "pt"})
    return str(folder)


def on_gate(change: Tensor) -> dict[str, Tensor]:
    return {f"{GATE}.weight".replace(".", "__"): change}


def test_a_merged_adapter_comes_back_out_of_its_model(base: Path, tmp_path: Path) -> None:
    model = load_base(str(base))[0]
    handle = attach(model, AdapterSpec(LoRA(4, 8.0)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    was = {update.site.key: delta_of(update) for update in state(model).updates}
    merge(model)
    shutil.copytree(base, tmp_path / "tuned")
    model.save_pretrained(tmp_path / "tuned")

    found = extract(str(tmp_path / "tuned"), str(base), rank=4)
    assert found.error < 1e-5
    assert not found.left
    for update in found.state.updates:
        torch.testing.assert_close(delta_of(update), was[update.site.key], rtol=0, atol=2e-6)
    assert was.keys() == {update.site.key for update in found.state.updates}

    other = load_base(str(base))[0]
    attach(other, found.state)
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_what_a_rank_leaves_out_is_known_by_hand(base: Path, tmp_path: Path) -> None:
    change = torch.zeros(48, 32)
    change[0, 3], change[7, 1], change[40, 30] = 0.3, 0.2, 0.1  # singular values, each its own direction
    tuned = changed(base, tmp_path / "tuned", **on_gate(change))
    found = extract(tuned, str(base), rank=1)
    assert found.losses[GATE].size == pytest.approx(0.14**0.5, rel=1e-4)
    assert found.losses[GATE].error == pytest.approx(0.05**0.5, rel=1e-4)
    assert found.error == found.missing == pytest.approx((5 / 14) ** 0.5, rel=1e-4)
    (update,) = found.state.updates
    assert float(delta_of(update)[0, 3]) == pytest.approx(0.3, rel=1e-4)  # type: ignore[index]
    kept = [extract(tuned, str(base), energy=share).state.updates[0].tensors["down"] for share in (0.6, 0.9, 1)]
    assert [len(down) for down in kept] == [1, 2, 3]


def test_other_changes_are_left_out_or_kept_whole(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm, table = "model.norm.weight", "model.embed_tokens.weight"
    moves = {norm: 0.1 * torch.ones(32), table: 0.01 * torch.ones(samples.VOCABULARY, 32)}
    tuned = changed(base, tmp_path / "tuned", **on_gate(0.1 * torch.randn(48, 32)),
                    **{name.replace(".", "__"): move for name, move in moves.items()})  # fmt: skip
    left = extract(tuned, str(base), rank=32)
    assert left.error < 1e-5
    assert left.left == pytest.approx({name: float(move.norm()) for name, move in moves.items()}, rel=1e-3)
    whole = float(torch.cat([left_.flatten() for left_ in moves.values()]).norm())
    assert left.missing == pytest.approx(whole / (whole**2 + left.losses[GATE].size ** 2) ** 0.5, rel=1e-3)
    kept = extract(tuned, str(base), rank=32, whole=True)
    assert not kept.left
    assert kept.missing < 1e-5
    assert sorted(kept.state.spec.train) == [r"re:model\.embed_tokens", r"re:model\.norm"]
    save(kept.state, tmp_path / "kept")
    model, other = load_base(str(base))[0], load_base(tuned)[0]
    attach(model, load(tmp_path / "kept"))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=1e-4, atol=1e-5)


def test_peft_reads_what_was_extracted(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    tuned = changed(base, tmp_path / "tuned", **on_gate(0.1 * torch.randn(48, 32)), model__norm__weight=torch.ones(32))
    save(extract(tuned, str(base), rank=32, whole=True).state, tmp_path / "adapter")
    model = PeftModel.from_pretrained(load_base(str(base))[0], tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, load_base(tuned)[0](IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_run_that_trained_everything_is_read_as_it_is(base: Path, tmp_path: Path) -> None:
    model = load_base(str(base))[0]
    change = 0.1 * torch.randn(48, 32)
    name = f"{GATE}.weight"
    full = AdapterState(
        AdapterSpec(None, train=("*",)), (), {name: model.get_parameter(name).detach() + change}, Base(str(base))
    )
    found = extract(full, str(base), rank=32)
    assert found.losses[GATE].size == pytest.approx(float(change.norm()), rel=1e-4)
    assert found.error < 1e-5


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    base = samples.save_encoder(tmp_path / "bert")
    model, tokenizer = load_base(str(base), task="classification", labels=("no", "yes"))
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.add_(0.1)
        model.bert.encoder.layer[1].output.dense.bias.add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    purpose = Purpose("classification", "classification", None, ("no", "yes"))
    found = extract(str(tmp_path / "tuned"), str(base), rank=2, purpose=purpose, whole=True)
    assert set(found.state.trained) >= {"classifier.weight", "classifier.bias"}
    assert set(found.left) == {"bert.encoder.layer.1.output.dense.bias"}, "its layer is adapted"
    assert [len(update.tensors["down"]) for update in found.state.updates] == [1]


def test_a_wide_weight_is_decomposed_at_random_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def watched(matrix: Tensor, rank: int, iterations: int | None, rng: torch.Generator) -> tuple[Tensor, ...]:
        asked.append(iterations)
        return leading(matrix, rank, iterations, rng)

    monkeypatch.setattr(extraction, "leading", watched)
    torch.manual_seed(0)
    for size in (EXACT, EXACT + 8):
        change = torch.randn(size, 4) @ torch.randn(4, size) + 1e-3 * torch.randn(size, size)
        changes = extraction._Changes(4, None, torch.float32, whole=False)
        changes.add(Twin("w.weight", torch.zeros(size, size), change, parameter=True), [Site("w", size, size)])
        exact = torch.linalg.svdvals(change)[4:].norm()
        assert changes.losses["w"].error == pytest.approx(float(exact), rel=1e-3)
    assert asked == [None, ITERATIONS]


def test_the_dtype_that_is_stored_is_the_one_that_is_measured(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned = changed(base, tmp_path / "tuned", **on_gate(0.1 * torch.randn(48, 32)))
    found = extract(tuned, str(base), rank=32, dtype=torch.bfloat16)
    (update,) = found.state.updates
    assert {tensor.dtype for tensor in update.tensors.values()} == {torch.bfloat16}
    assert 1e-3 < found.error < 1e-2


def test_rounding_to_another_dtype_is_no_change(base: Path, tmp_path: Path) -> None:
    tuned = changed(base, tmp_path / "tuned", **on_gate(torch.ones(48, 32)))
    file = Path(tuned) / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    found = extract(tuned, str(base), rank=1)
    assert [update.site.key for update in found.state.updates] == [GATE]
    assert not found.left


def test_targets_say_which_layers(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    up = {"model__layers__1__mlp__up_proj__weight": 0.1 * torch.randn(48, 32)}
    tuned = changed(base, tmp_path / "tuned", **on_gate(0.1 * torch.randn(48, 32)), **up)
    found = extract(tuned, str(base), rank=2, targets=Targets(("up_proj",)))
    assert [update.site.path for update in found.state.updates] == ["model.layers.1.mlp.up_proj"]
    assert set(found.left) == {f"{GATE}.weight"}
    model = load_base(str(base))[0]
    attach(model, AdapterSpec(found.state.spec.method, found.state.spec.targets))
    assert [u.site.path for u in state(model).updates] == ["model.layers.1.mlp.up_proj"], "a new run means the same"


def test_what_cannot_be_extracted_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="extract how much"):
        extract(str(base), str(base))
    with pytest.raises(SpecError, match="rank and energy both"):
        extract(str(base), str(base), rank=1, energy=0.5)
    with pytest.raises(CombineError, match="the models are the same"):
        extract(str(base), str(base), rank=1)
    moved = changed(base, tmp_path / "moved", model__norm__weight=torch.ones(32))
    with pytest.raises(CombineError, match="what changed lies elsewhere"):
        extract(moved, str(base), rank=1)
    broken = changed(base, tmp_path / "broken", **on_gate(torch.full((48, 32), torch.nan)))
    with pytest.raises(CombineError, match=rf"{GATE}.weight: holds NaN or infinity"):
        extract(broken, str(base), rank=1)


def test_another_architecture_is_refused_by_its_tensors(base: Path, tmp_path: Path) -> None:
    longer = samples.save_base(tmp_path / "longer", vocabulary=samples.VOCABULARY + 5)
    with pytest.raises(RecipeError, match=r"model.embed_tokens.weight: \(272, 32\), and \(267, 32\)"):
        extract(str(longer), str(base), rank=1)
    biased = samples.save_base(tmp_path / "qwen2", "qwen2")
    with pytest.raises(RecipeError, match=r"q_proj.bias: not in"):
        extract(str(biased), str(base), rank=1)
    with pytest.raises(RecipeError, match=r"q_proj.bias: missing"):
        extract(str(base), str(biased), rank=1)


def test_packed_models_are_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "packed")
    config = tmp_path / "packed" / "config.json"
    plain = json.loads(config.read_text())
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for packed in (nf4, {"quant_method": "fp8"}):
        config.write_text(json.dumps({**plain, "quantization_config": packed}))
        with pytest.raises(RecipeError, match="holds packed ones; name the one in 16 bits"):
            extract(str(tmp_path / "packed"), str(base), rank=1)


FAMILIES = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=67, n_positions=32),
    "mixtral": MixtralConfig(num_local_experts=2, num_experts_per_tok=2, num_key_value_heads=2, **SIZES),
    "gemma": GemmaConfig(head_dim=8, num_key_value_heads=2, **SIZES),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=67, state_size=4, intermediate_size=64),
}
"""Transposed layers in one tensor for q, k and v; stacked experts; a tied head; parameters of a module with layers."""


def family(name: str, folder: Path) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[name]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_with_every_direction_it_is_the_tuned_model_or_says_what_is_missing(name: str, tmp_path: Path) -> None:
    base = family(name, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    found = extract(str(tmp_path / "tuned"), base, energy=1.0, whole=True)
    assert found.error < 1e-5
    other = AutoModelForCausalLM.from_pretrained(base)
    attach(other, found.state)
    with torch.no_grad():
        apart = float((other(IDS).logits - model(IDS).logits).abs().max())
    assert (apart < 1e-4) == (found.missing < 1e-4), f"{apart} apart, and {found.missing} is said to be missing"
    assert bool(found.left) == (name in ("gpt2", "mixtral", "mamba")), "biases, experts, what a layer's parent holds"


def test_rows_outside_the_targets_are_left_out_by_their_size(tmp_path: Path) -> None:
    base = family("gpt2", tmp_path / "base")
    name = "transformer.h.0.attn.c_attn.weight"
    change = torch.zeros(32, 96)
    change[:, :32], change[:, 32:64] = 0.01, 1.0  # q a little, k much
    tuned = changed(Path(base), tmp_path / "tuned", **{name.replace(".", "__"): change})
    found = extract(tuned, base, rank=1, targets=Targets(("c_attn[q,v]",)))
    assert [update.site.rows for update in found.state.updates] == [(0, 32)]
    assert found.left == {name: pytest.approx(32.0, rel=1e-4)}
    assert found.missing == pytest.approx(1.0, abs=1e-3)


def test_a_tied_head_is_one_tensor_with_the_embedding(tmp_path: Path) -> None:
    base = family("gemma", tmp_path / "base")
    with pytest.raises(RecipeError, match="is lm_head.weight too, and an update would act on one of them"):
        extract(base, base, rank=2, targets=Targets(("embed_tokens",)))
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1.0)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "parted")
    with pytest.raises(CombineError, match="are one tensor in .* and differ in .*parted"):
        extract(str(tmp_path / "parted"), base, rank=2)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())
    model.save_pretrained(tmp_path / "copied")
    for tuned, start in ((str(tmp_path / "copied"), base), (base, str(tmp_path / "copied"))):
        found = extract(tuned, start, rank=2)
        assert not found.left
        assert not found.state.trained


def test_16_bits_of_another_kind_are_compared_to_their_rounding(tmp_path: Path) -> None:
    base = family("gpt2", tmp_path / "base")
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight.add_(0.1 * (name == "bf16"))
        model.to(dtype).save_pretrained(tmp_path / name)
    found = extract(str(tmp_path / "bf16"), str(tmp_path / "fp16"), rank=1)
    assert [update.site.path for update in found.state.updates] == ["transformer.h.0.mlp.c_fc"]
    assert not found.left


def test_a_model_for_another_task_is_refused_by_what_has_no_place(tmp_path: Path) -> None:
    base = samples.save_encoder(tmp_path / "bert")
    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=3)
    model.save_pretrained(tmp_path / "tokens")
    with pytest.raises(RecipeError, match=r"classifier.weight: .* has no place for it"):
        extract(str(tmp_path / "tokens"), str(base), rank=2)


def test_a_head_for_other_classes_is_a_new_one(tmp_path: Path) -> None:
    base = samples.save_encoder(tmp_path / "bert")
    for name, labels in (("three", ("a", "b", "c")), ("two", ("no", "yes"))):
        model, tokenizer = load_base(str(base), task="classification", labels=labels)
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight.add_(0.1 * (name == "two"))
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / name)
    purpose = Purpose("classification", "classification", None, ("no", "yes"))
    found = extract(str(tmp_path / "two"), str(tmp_path / "three"), rank=2, purpose=purpose)
    assert set(found.state.trained) == {"classifier.weight", "classifier.bias"}


def test_a_run_on_another_base_and_an_adapter_are_refused(base: Path, tmp_path: Path) -> None:
    other = samples.save_base(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    model = load_base(str(base))[0]
    attach(model, AdapterSpec(None, train=(GATE,)))
    with pytest.raises(AdapterFileError, match="trained on another base"):
        extract(state(model), str(other), rank=1)
    adapted = load_base(str(base))[0]
    attach(adapted, AdapterSpec(LoRA(2)))
    with pytest.raises(CombineError, match="has updates already"):
        extract(state(adapted), str(base), rank=1)


def test_experts_of_another_width_and_whole_numbers_that_differ_are_refused(tmp_path: Path) -> None:
    base = family("mixtral", tmp_path / "base")
    shutil.copytree(base, tmp_path / "wide")
    file = tmp_path / "wide" / "model.safetensors"
    tensors = load_file(file)
    expert = next(name for name in tensors if "experts" in name)
    save_file({**tensors, expert: torch.zeros(3, 3)}, file, {"format": "pt"})
    with pytest.raises(RecipeError, match=rf"{expert}: \(3, 3\), and"):
        extract(str(tmp_path / "wide"), base, rank=1)
    for name, count in (("one", 1), ("two", 2)):
        shutil.copytree(base, tmp_path / name)
        save_file({**tensors, "counts": torch.tensor([count])}, tmp_path / name / "model.safetensors", {"format": "pt"})
    with pytest.raises(CombineError, match="counts: whole numbers, which differ"):
        extract(str(tmp_path / "two"), str(tmp_path / "one"), rank=1)
