"""Merging equals the adapted forward, and refuses whatever would make it lie."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorakit.core.method import Method
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import MergeError
from lorakit.inject.activate import active, use
from lorakit.inject.attach import adapters_named, attach, detach
from lorakit.inject.merge import Tally, merge
from lorakit.methods.dora import DoRA
from lorakit.methods.houlsby import Houlsby
from lorakit.methods.ia3 import IA3
from lorakit.methods.lora import LoRA
from tests.inject.test_attach import IDS, gpt2, llama, moved
from tests.law.cases import Net
from tests.tolerances import assert_close


@pytest.mark.parametrize("build", [llama, gpt2])
def test_merged_logits_equal_adapted_ones(build: object) -> None:
    model = moved(build(), AdapterSpec(LoRA(4), Targets(("attention", "mlp"))))  # type: ignore[operator]
    adapted = model(IDS).logits
    report = merge(model)
    assert_close(model(IDS).logits, adapted)
    assert report.layers > 0
    assert report.largest_change > 0.01
    assert not [name for name, _ in model.named_parameters() if "adapters" in name]
    with pytest.raises(MergeError, match="no adapter is active on this model, so there is nothing to merge"):
        merge(model)


def test_merging_one_of_two_keeps_the_other_active() -> None:
    model = moved(llama(), AdapterSpec(LoRA(4)), "a")
    moved(model, AdapterSpec(LoRA(2), Targets("mlp")), "b")
    both = model(IDS).logits
    merge(model, ["a"])
    assert_close(model(IDS).logits, both)
    merge(model)
    assert_close(model(IDS).logits, both)


def test_a_16_bit_merge_rounds_once() -> None:
    model = moved(llama().to(torch.bfloat16), AdapterSpec(LoRA(4), Targets("q_proj")))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    delta = adapters_named(model, "default")[0].delta(layer.get_parameter("weight"))
    wanted = (layer.get_parameter("weight").float() + delta).to(torch.bfloat16)
    report = merge(model)
    assert torch.equal(layer.get_parameter("weight"), wanted)
    assert 0 < report.largest_rounding < report.largest_change


def test_nan_and_overflow_are_refused_and_nothing_changes() -> None:
    model = moved(llama().to(torch.float16), AdapterSpec(LoRA(4)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    last = adapters_named(model, "default")[-1]
    with torch.no_grad():
        last.get_parameter("up").fill_(60000.0)
    with pytest.raises(
        MergeError, match=r"down_proj: merging would write [\d,]+ NaN or infinite values of [\d,]+ in torch.float16"
    ):
        merge(model)
    changed = [k for k, v in model.state_dict().items() if "adapters" not in k and not torch.equal(v, before[k])]
    assert changed == []


def test_merging_refuses_tied_weights_and_unties_on_request() -> None:
    model = moved(llama(tie_word_embeddings=True), AdapterSpec(LoRA(4), Targets("embed_tokens")))
    adapted = model(IDS).logits
    with pytest.raises(MergeError, match=r"embed_tokens: its weight is tied to lm_head.weight(.|\n)*untie=True"):
        merge(model)
    merge(model, untie=True)
    assert model.config.tie_word_embeddings is False  # type: ignore[union-attr]
    assert_close(model(IDS).logits, adapted)


def test_untying_leaves_untied_layers_their_parameters() -> None:
    model = moved(llama(tie_word_embeddings=True), AdapterSpec(LoRA(4), Targets("q_proj")))
    weight = model.get_submodule("model.layers.0.self_attn.q_proj").get_parameter("weight")
    merge(model, untie=True)
    assert model.get_submodule("model.layers.0.self_attn.q_proj").get_parameter("weight") is weight
    assert model.config.tie_word_embeddings is True  # type: ignore[union-attr]


def test_a_choice_per_row_is_not_mergeable() -> None:
    model = moved(Net(nn.Linear(6, 6)), AdapterSpec(LoRA(2), Targets("layer")))
    use(model, {"default": torch.tensor([1.0, 0.0])})
    with pytest.raises(
        MergeError, match=r"layer: 'default' has one weight per row; choose a number with use\(\) first"
    ):
        merge(model)


def test_merging_keeps_modules_trained_whole() -> None:
    model = moved(llama(), AdapterSpec(LoRA(4), Targets("q_proj"), train=("lm_head",)))
    with torch.no_grad():
        model.get_submodule("lm_head").get_parameter("weight").mul_(3)
    adapted = model(IDS).logits
    merge(model)
    assert_close(model(IDS).logits, adapted)


def test_merging_an_adapter_that_is_switched_off_is_refused_and_keeps_it() -> None:
    model = moved(llama(), AdapterSpec(LoRA(4), Targets("q_proj"), train=("lm_head",)), "one")
    adapted = model(IDS).logits
    with use(model, {}), pytest.raises(MergeError, match="'one' is switched off, so there is nothing to merge"):
        merge(model, ["one"])
    assert torch.equal(model(IDS).logits, adapted)


def test_leaving_a_choice_after_merging_inside_it_is_quiet() -> None:
    model = moved(llama(), AdapterSpec(LoRA(4), Targets("q_proj")), "a")
    moved(model, AdapterSpec(LoRA(4), Targets("mlp")), "b")
    with use(model, {"a": 0.5}):
        merge(model)
    assert active(model) == {"b": 1.0}
    assert not [name for name, _ in model.named_parameters() if ".q_proj.adapters" in name]


def test_what_rounding_took_is_counted_over_all_layers_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates of 3 and 4 (norm 5) of which 0.3 and 0.4 are lost: a tenth, whatever the blocks."""
    monkeypatch.setattr("lorakit.inject.merge._BLOCK", 4)
    tally = Tally()
    for update in (3.0, 4.0):
        before, total = torch.zeros(5, 2), torch.zeros(5, 2)
        total[4, 1] = update
        tally.add(before, total, 0.9 * total)
    report = tally.report()
    assert report.layers == 2
    assert [report.update_lost, report.largest_change, report.largest_rounding] == pytest.approx([0.1, 4.0, 0.4])


@pytest.mark.parametrize("method", [DoRA(LoRA(2)), IA3(), Houlsby(2)])
def test_an_adapter_that_stays_and_leans_on_the_weight_is_refused(method: Method) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    attach(model, AdapterSpec(LoRA(2), Targets(["0"])), "a")
    attach(model, AdapterSpec(method, Targets(["0", "1"])), "b")
    with pytest.raises(MergeError, match=r"1 layer.*\n.*0: 'b' .* would stay, and is measured from the weight"):
        merge(model, ["a"])
    attach(model, AdapterSpec(LoRA(2), Targets(["0"])), "c")
    detach(model, "b")
    merge(model, ["a"])  # a low-rank update beside it is the same wherever it stands
    assert active(model) == {"c": 1.0}


def test_a_kept_base_comes_back_bit_for_bit_and_a_second_merge_changes_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(3, 6)
    kept, before = copy.deepcopy(model.state_dict()), model(x)
    handle = attach(model, AdapterSpec(LoRA(2), Targets(["0", "1"])))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_()
    adapted = model(x)
    merge(model)
    merged = {name: value.clone() for name, value in model.state_dict().items()}
    assert_close(model(x), adapted)
    with pytest.raises(MergeError):
        merge(model)
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())
    model.load_state_dict(kept)
    assert torch.equal(model(x), before)
