"""LoRA+ groups: who learns fast, who decays, and that a ratio of one changes nothing."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import AdapterSpec, LoRA, Targets, attach, param_groups
from lorakit.errors import SpecError
from lorakit.methods.ia3 import IA3
from lorakit.training.base import load_base


@pytest.fixture
def model(base: Path) -> Any:
    return load_base(str(base))[0]


def sizes(groups: list[dict[str, Any]]) -> dict[str, int]:
    return {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}


def test_up_learns_faster_and_down_does_not(model: Any) -> None:
    attach(model, AdapterSpec(LoRA(4, 8)))
    slow, fast = param_groups(model, 1e-3, up_ratio=16)
    assert (slow["name"], slow["lr"], fast["name"], fast["lr"]) == ("slow", 1e-3, "fast", 16e-3)
    assert all(name.endswith(".down") for name, p in model.named_parameters() if any(p is q for q in slow["params"]))
    assert all(name.endswith(".up") for name, p in model.named_parameters() if any(p is q for q in fast["params"]))


def test_every_trainable_parameter_is_in_one_group(model: Any) -> None:
    attach(model, AdapterSpec(LoRA(4, 8), Targets(("all-linear", "embed_tokens")), train=("model.norm", "lm_head")))
    grouped = [id(p) for group in param_groups(model, 1e-3, 4) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_adapters_of_embeddings_have_a_rate_of_their_own_with_lora_plus_only(model: Any) -> None:
    attach(model, AdapterSpec(LoRA(4, 8), Targets(("q_proj", "embed_tokens"))))
    with_plus = {group["name"]: group["lr"] for group in param_groups(model, 1e-3, 4)}
    assert with_plus == {"slow": 1e-3, "embedding": 1e-6, "fast": 4e-3}
    assert {group["lr"] for group in param_groups(model, 1e-3)} == {1e-3}


def test_modules_trained_whole_learn_at_the_plain_rate_and_vectors_never_decay(model: Any) -> None:
    attach(model, AdapterSpec(LoRA(4, 8), Targets(("q_proj",)), train=("model.norm", "lm_head")))
    groups = {group["name"]: group for group in param_groups(model, 1e-3, 4, weight_decay=0.1)}
    assert any(p is model.lm_head.weight for p in groups["slow"]["params"])
    assert (groups["slow"]["lr"], groups["slow"]["weight_decay"]) == (1e-3, 0.1)
    assert [p.shape for p in groups["fast, no decay"]["params"]] == [model.model.norm.weight.shape]
    assert groups["fast, no decay"]["weight_decay"] == 0.0


def test_biases_never_decay_either() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    attach(layers, AdapterSpec(LoRA(2), Targets(("0",)), train=("1",)))
    groups = {group["name"]: group for group in param_groups(layers, 1e-3, 4, weight_decay=0.1)}
    assert sizes(list(groups.values())) == {"slow": 8 + 16, "fast": 8, "fast, no decay": 4}
    assert [groups[name]["weight_decay"] for name in ("slow", "fast", "fast, no decay")] == [0.1, 0.1, 0.0]


def test_a_ratio_without_an_up_to_act_on_is_refused(model: Any) -> None:
    attach(model, AdapterSpec(IA3(), Targets(("k_proj",)), train=("model.norm",)))
    assert len(param_groups(model, 1e-3)) == 1
    with pytest.raises(SpecError, match="lets `up` learn faster, and nothing here has one; change lr instead"):
        param_groups(model, 1e-3, up_ratio=16)


def test_groups_are_as_large_as_those_of_peft(base: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs, _ = load_base(str(base))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"])
    optimizer = importlib.import_module("peft.optimizers").create_loraplus_optimizer(
        peft.get_peft_model(theirs, config), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    names = ("slow", "embedding", "fast", "fast, no decay")
    reference = {
        name: (sum(p.numel() for p in group["params"]), group["lr"], group["weight_decay"])
        for name, group in zip(names, optimizer.param_groups, strict=True)
        if group["params"]
    }
    ours, _ = load_base(str(base))
    attach(ours, AdapterSpec(LoRA(4, 8), Targets(("q_proj", "down_proj", "embed_tokens"))))
    groups = param_groups(ours, 1e-3, 16, weight_decay=0.1)
    found = {g["name"]: (sum(p.numel() for p in g["params"]), g["lr"], g["weight_decay"]) for g in groups}
    assert found == reference


def test_a_ratio_of_one_steps_bit_for_bit_like_one_plain_group(model: Any) -> None:
    attach(model, AdapterSpec(LoRA(4, 8)))
    twin = copy.deepcopy(model)
    grouped = torch.optim.AdamW(param_groups(model, 1e-2))
    plain = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    ids = torch.randint(10, 200, (2, 12))
    for _ in range(3):
        for each, optimizer in ((model, grouped), (twin, plain)):
            each(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_one_sgd_step_moves_up_by_the_ratio_and_down_as_before(base: Path) -> None:
    moved = []
    for ratio in (1.0, 16.0):
        model, _ = load_base(str(base))
        attach(model, AdapterSpec(LoRA(4, 8), Targets(("q_proj",))))
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        for name, p in model.named_parameters():
            if name.endswith(".up"):
                nn.init.ones_(p)
                start[name] = p.detach().clone()
        ids = torch.arange(20, 32)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.optim.SGD(param_groups(model, 1e-2, ratio)).step()
        moved.append({name: (p - start[name]).norm().item() for name, p in model.named_parameters() if name in start})
    for name, distance in moved[0].items():
        assert distance > 0
        assert moved[1][name] == pytest.approx(distance * (16 if name.endswith(".up") else 1), rel=1e-3)
