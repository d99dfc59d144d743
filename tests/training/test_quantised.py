"""Bases in 4 bits: loaded tensor by tensor, trained as their dequantised weights are, in bitsandbytes' format."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from lorakit.core.spec import AdapterSpec
from lorakit.errors import AttachError, LorakitError, RecipeError
from lorakit.hosts import nf4
from lorakit.hosts.linear4bit import Linear4bit
from lorakit.inject.attach import attach, state
from lorakit.inject.sites import sites
from lorakit.methods.lora import LoRA
from lorakit.persist import load
from lorakit.training import quantizer
from lorakit.training.base import load_base
from lorakit.training.dense_weights import LYING, DenseWeights
from lorakit.training.plan import plan
from lorakit.training.quantised import make_dense, pack, packing_in, write_packed
from lorakit.training.quantizer import Packing
from lorakit.training.recipe import QuantSection, make_recipe
from lorakit.training.run import train
from tests.data.samples import tokenizer
from tests.tolerances import assert_close
from tests.training.samples import VOCABULARY, labelled, recipe_of, save_base, write_rows

NF4 = QuantSection()
IDS = torch.tensor([[5, 42, 109, 108, 61, 7]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@torch.no_grad()
def save_dequantised(base: Path, folder: Path) -> Path:
    """Write a dense base whose linear layers hold what 4 bits left of another's, in fp32."""
    model, made = load_base(str(base), quant=NF4)
    dense = AutoModelForCausalLM.from_pretrained(base)
    for path, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            dense.get_submodule(path).weight.copy_(layer.dense(torch.float32))
    dense.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def test_every_linear_layer_but_the_head_is_packed_and_holds_the_bytes_of_its_weight(base: Path) -> None:
    model, _ = load_base(str(base), quant=NF4)
    dense, _ = load_base(str(base))
    packed = {path: m for path, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert len(packed) == 14
    assert isinstance(model.lm_head, nn.Linear)
    for path, layer in packed.items():
        value = nf4.quantize(dense.get_submodule(path).weight)
        assert torch.equal(layer.weight, value.packed)
        assert torch.equal(layer.quantized.absmax, value.absmax)
    assert model.generation_config.eos_token_id == dense.generation_config.eos_token_id


def test_a_packed_model_counts_the_weights_it_stands_for(base: Path) -> None:
    packed, dense = load_base(str(base), quant=NF4)[0], load_base(str(base))[0]
    assert sites(packed).total_parameters == sites(dense).total_parameters == sum(p.numel() for p in dense.parameters())


def test_only_one_dense_tensor_is_held_at_a_time(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tensors that are read, the one before is packed and gone."""
    order: list[str] = []
    original = quantizer._pack

    def watched(layer: Linear4bit, weight: torch.Tensor, name: str, packing: Packing) -> nn.Parameter:
        order.append(f"packed {name}")
        return original(layer, weight, name, packing)

    monkeypatch.setattr(quantizer, "_pack", watched)
    pack(str(base), Packing(NF4, done=lambda name: order.append(f"read {name}")), torch.device("cpu"))
    for before, after in pairwise(order):
        if after.startswith("packed "):
            assert before == after.replace("packed", "read")
    assert sum(line.startswith("packed ") for line in order) == 14


@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": 4, "alpha": 8},
        {"method": "dora", "rank": 4, "alpha": 8},
        {"method": "adalora", "target_rank": 2, "init_rank": 4, "tfinal": 2},
        {"method": "ia3"},
        {"rank": 4, "alpha": 8, "init": "pissa"},
    ],
    ids=["lora", "dora", "adalora", "ia3", "pissa"],
)
def test_training_on_4_bits_is_training_on_what_they_dequantise_to(
    base: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    other = save_dequantised(base, tmp_path / "dequantised")
    runs = []
    for name, model, quant in (("packed", base, "nf4"), ("dense", other, None)):
        (tmp_path / name).mkdir()
        recipe = recipe_of(model, tmp_path / name, quant=quant, adapter=adapter, train__steps=12)
        runs.append(load(train(recipe).adapter_dir))
    one, two = runs
    assert [u.method for u in one.updates] == [u.method for u in two.updates], "the same ranks were chosen"
    for mine, theirs in zip(one.updates, two.updates, strict=True):
        for key, tensor in mine.tensors.items():
            apart = float((tensor - theirs.tensors[key]).abs().max())
            assert apart <= 1e-5 * max(1.0, float(tensor.abs().max())), (key, apart)


def test_a_16_bit_compute_dtype_and_checkpointing_train(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path, quant="nf4", train__dtype="bf16", train__checkpointing=True, train__epochs=4)
    run = train(recipe)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    first = next(event for event in events if event["event"] == "step")
    assert run.train_loss < first["loss"]


def test_a_classifier_in_4_bits_trains_its_head(tmp_path: Path, encoder: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", labelled(48))
    run = train(recipe_of(encoder, tmp_path, quant="nf4", data__train=data))
    assert any("classifier" in key for key in load(run.adapter_dir).trained)


def test_gpt2_s_layers_are_packed_as_what_they_were(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    packed, _ = load_base(str(tmp_path / "gpt2"), quant=NF4)
    dense, _ = load_base(str(tmp_path / "gpt2"))
    kinds = {site.path: site.kind for site in sites(dense).sites}
    assert {site.path: site.kind for site in sites(packed).sites} == kinds
    attach(packed, AdapterSpec(LoRA(2)))
    attach(dense, state(packed))
    assert (logits(packed) - logits(dense)).abs().max() < 0.1


def test_what_is_packed_cannot_be_trained_whole(base: Path) -> None:
    model, _ = load_base(str(base), quant=NF4)
    with pytest.raises(AttachError, match=r"packed into 4 bits, and cannot be trained whole"):
        attach(model, AdapterSpec(None, train=("*",)))
    attach(model, AdapterSpec(LoRA(2), train=("lm_head", "norms")))


# ---- files ----


@pytest.fixture
def packed(base: Path, tmp_path: Path) -> Path:
    packing = Packing(NF4)
    write_packed(pack(str(base), packing, torch.device("cpu")), packing, tmp_path / "packed")
    tokenizer().save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def test_a_packed_checkpoint_reloads_as_it_is(base: Path, packed: Path) -> None:
    fresh, _ = load_base(str(base), quant=NF4)
    for quant in (None, NF4):
        again, _ = load_base(str(packed), quant=quant)
        assert torch.equal(logits(again), logits(fresh))
    found = packing_in(again)
    assert found is not None
    assert (found.settings, found.dense) == (NF4, ["lm_head"])


def test_what_is_dense_in_a_packed_checkpoint_comes_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, dtype="bfloat16")  # fmt: skip
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    packing, packed = Packing(NF4), tmp_path / "packed"
    write_packed(pack(str(tmp_path / "base"), packing, torch.device("cpu")), packing, packed)
    tokenizer().save_pretrained(packed)
    again, fresh = (
        load_base(str(packed), dtype="fp32")[0],
        load_base(str(tmp_path / "base"), dtype="fp32", quant=NF4)[0],
    )
    assert {p.dtype for p in again.parameters() if p.is_floating_point()} == {torch.float32}
    assert torch.equal(logits(again), logits(fresh))


def test_transformers_with_bitsandbytes_loads_it_with_the_same_bytes(tmp_path: Path) -> None:
    """Widths are whole blocks: bitsandbytes' kernel misplaces the scales of rows that are not."""
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    packing, packed = Packing(NF4), tmp_path / "packed"
    write_packed(pack(str(tmp_path / "base"), packing, torch.device("cpu")), packing, packed)
    tokenizer().save_pretrained(packed)
    theirs = AutoModelForCausalLM.from_pretrained(packed, device_map="cpu", dtype=torch.float32).train()
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    ours, _ = load_base(str(packed))
    assert_close(logits(theirs), logits(ours))
    attach(theirs, AdapterSpec(LoRA(2)))


def test_a_checkpoint_that_bitsandbytes_wrote_is_loaded(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer().save_pretrained(tmp_path / "theirs")
    ours, _ = load_base(str(tmp_path / "theirs"))
    assert torch.equal(logits(ours), logits(load_base(str(base), quant=NF4)[0]))


def test_other_settings_for_a_packed_checkpoint_are_refused(packed: Path) -> None:
    with pytest.raises(RecipeError, match="is packed already, as kind='nf4' .*; leave `quant` out, or give the base"):
        load_base(str(packed), quant=QuantSection(kind="fp4"))
    with pytest.raises(RecipeError, match="is packed into 4 bits already; give the base it was made of"):
        pack(str(packed), Packing(NF4), torch.device("cpu"))


def test_a_packed_checkpoint_without_a_state_is_refused(packed: Path) -> None:
    file = packed / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        {k: t for k, t in tensors.items() if k != f"{name}.quant_state.bitsandbytes__nf4"}, file, {"format": "pt"}
    )
    with pytest.raises(LorakitError, match=rf"{name}.*: packed weights without their quant_state"):
        load_base(str(packed))


def test_files_that_are_not_there_are_named(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(LorakitError, match="is read tensor by tensor from model.safetensors, and it holds no weights"):
        load_base(str(tmp_path), quant=NF4)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(LorakitError, match="it holds pytorch_model.bin; convert it to safetensors first"):
        load_base(str(tmp_path), quant=NF4)
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LorakitError, match="model-1.safetensors named in model.safetensors.index.json and not there"):
        load_base(str(tmp_path), quant=NF4)


def test_a_sharded_checkpoint_is_read(base: Path, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(base)
    dense.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    sharded, _ = load_base(str(tmp_path / "sharded"), quant=NF4)
    assert torch.equal(logits(sharded), logits(load_base(str(base), quant=NF4)[0]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quant": "nf3"}, "quant: expected nf4 or fp4, given 'nf3'; did you mean 'nf4'"),
        ({"quant": {"kind": "nf4", "block_size": 48}}, "quant.block_size: expected 32, 64, 128"),
        ({"quant": {"kind": "nf4", "double": True}}, "quant.double: unknown key"),
    ],
)
def test_a_recipe_s_quant_says_what_it_may_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(given)


def test_a_word_is_enough_for_quant() -> None:
    assert make_recipe({"quant": "fp4"}).quant == QuantSection(kind="fp4")


def test_nan_in_a_checkpoint_names_the_layer(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(LorakitError, match="model.layers.1.mlp.up_proj.weight: 1 of 1,536 weights are NaN or infinite"):
        load_base(str(base), quant=NF4)


# ---- loftq ----


def loftq_recipe(base: Path, folder: Path, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    adapter = {"rank": 8, "alpha": 16, "init": "loftq"}
    return recipe_of(base, folder, quant="nf4", adapter=adapter, train__steps=2, **changes)


def test_loftq_starts_nearer_to_the_dense_base_than_4_bits_alone(base: Path, tmp_path: Path) -> None:
    recipe = loftq_recipe(base, tmp_path, train__lr=1e-12)
    run = train(recipe)
    packed, dense = load_base(str(base), quant=NF4)[0], load_base(str(base))[0]
    without = (logits(packed) - logits(dense)).norm()
    attach(packed, load(run.adapter_dir))
    assert (logits(packed) - logits(dense)).norm() < 0.95 * without
    update = next(u for u in load(run.adapter_dir).updates if u.site.path.endswith("layers.0.mlp.up_proj"))
    residual = dense.model.layers[0].mlp.up_proj.weight - nf4.dequantize(
        nf4.quantize(dense.model.layers[0].mlp.up_proj.weight)
    )
    exact = torch.linalg.svdvals(residual)
    left = residual - 2 * update.tensors["up"] @ update.tensors["down"]  # alpha / rank = 2
    assert_close(left.norm(), exact[8:].norm(), dtype=torch.bfloat16)  # two steps of almost no length were taken


def test_loftq_reads_gpt2_s_layers_the_right_way_round(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    dense = load_base(str(tmp_path / "gpt2"))[0]
    own = [site for site in sites(dense).sites if site.path != "lm_head"]  # which is tied
    asked = {"task": "causal-lm", "labels": (), "reader": "init loftq", "remedy": "set model"}
    found = DenseWeights(str(tmp_path / "gpt2"), own, **asked)  # type: ignore[arg-type]
    for site in own:
        weight = dense.get_submodule(site.path).weight
        assert torch.equal(found[site.key], weight.T if site.kind in LYING else weight)
    assert len(found) == len(list(found)) == len(own)
    with pytest.raises(RecipeError, match=r"init loftq: .* has no tensor of its own for\n  - lm_head"):
        DenseWeights(str(tmp_path / "gpt2"), sites(dense).sites, **asked)  # type: ignore[arg-type]


def test_loftq_needs_the_dense_base(packed: Path, tmp_path: Path) -> None:
    recipe = loftq_recipe(packed, tmp_path / "run")
    with pytest.raises(RecipeError, match="init loftq reads dense weights, and .* holds packed ones"):
        train(recipe)


@pytest.mark.parametrize("adapter", [{"rank": 4, "alpha": 8, "init": "pissa"}, {"rank": 4, "alpha": 8}])
def test_with_a_principal_part_training_is_that_on_what_the_layer_computes(
    base: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    quant = {"kind": "nf4", "principal": 4}
    model, tokens = load_base(str(base), quant=QuantSection(**quant))
    make_dense(model)
    model.save_pretrained(tmp_path / "dequantised")
    tokens.save_pretrained(tmp_path / "dequantised")
    runs = []
    for name, place, packed in (("packed", base, quant), ("dense", tmp_path / "dequantised", None)):
        (tmp_path / name).mkdir()
        runs.append(load(train(recipe_of(place, tmp_path / name, quant=packed, adapter=adapter)).adapter_dir))
    for mine, theirs in zip(*(run.updates for run in runs), strict=True):
        for key, tensor in mine.tensors.items():
            assert_close(tensor, theirs.tensors[key], scale=10 * max(1.0, float(tensor.abs().max())))


def test_a_principal_part_is_saved_and_only_lorakit_loads_it(base: Path, tmp_path: Path) -> None:
    packing = Packing(QuantSection(principal=4), errors={})
    model = pack(str(base), packing, torch.device("cpu"))
    write_packed(model, packing, tmp_path / "packed")
    tokenizer().save_pretrained(tmp_path / "packed")
    again, _ = load_base(str(tmp_path / "packed"))
    assert torch.equal(logits(again), logits(model))
    assert (found := packing_in(again)) is not None
    assert found.settings == packing.settings
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "lorakit-4bit", "bitsandbytes would leave the principal part out"
    plain = Packing(QuantSection(), errors={})
    pack(str(base), plain, torch.device("cpu"))
    assert packing.errors is not None
    assert plain.errors is not None
    assert all(packing.errors[path].relative < plain.errors[path].relative for path in plain.errors)
    assert packing.packed_bytes > plain.packed_bytes


def test_a_principal_rank_no_layer_has_is_refused(base: Path) -> None:
    with pytest.raises(LorakitError, match=r"principal 33 exceeds min\(out, in\) = ") as told:
        load_base(str(base), quant=QuantSection(principal=33))
    assert "lower it (quant.principal)" in str(told.value)
    assert len(str(told.value).splitlines()) <= 3, "a line for each shape, not for each layer"
    planned = make_recipe({"model": str(base), "quant": {"kind": "nf4", "principal": 33}})
    with pytest.raises(LorakitError, match=r"principal 33 exceeds min\(out, in\) = "):
        plan(planned)


@pytest.mark.parametrize("said", [None, 2])
def test_a_principal_part_that_the_configuration_does_not_tell_of_is_refused(
    base: Path, tmp_path: Path, said: int | None
) -> None:
    packing = Packing(QuantSection(principal=4))
    write_packed(pack(str(base), packing, torch.device("cpu")), packing, tmp_path / "packed")
    tokenizer().save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].pop("principal")
    if said is not None:
        config["quantization_config"]["principal"] = said
    file.write_text(json.dumps(config))
    wrong = rf"principal_down .*\(4, \d+\).*config.json says principal {said or 0}"
    with pytest.raises(LorakitError, match=wrong):
        load_base(str(tmp_path / "packed"))
