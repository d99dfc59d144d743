"""Gathering evidence: it measures what the initialisations ask for, and leaves the model as it found it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import AdapterSpec, LoRA, Override, Targets, attach, gather
from lorakit.errors import SpecError
from lorakit.inits.eva import Eva
from lorakit.inits.loftq import LoftQ
from lorakit.inits.lora_ga import LoRAGA
from lorakit.inits.pissa import Pissa
from lorakit.inject.attach import adapters_named
from lorakit.inject.evidence import needs
from tests.inject.test_attach import IDS, llama
from tests.tolerances import assert_close


def ga(**targets: Any) -> AdapterSpec:
    return AdapterSpec(LoRA(2, init_=LoRAGA()), Targets(**targets))


def test_gradients_of_a_whole_model_are_autograd_s() -> None:
    model = llama()
    batches = [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS.flip(1), "labels": IDS}]
    measured = gather(model, ga(), batches)
    for batch in batches:
        model(**batch).loss.backward()
    assert len(measured) == 14
    for path, gradient in measured.items():
        assert_close(gradient, model.get_submodule(path).weight.grad / 2)  # type: ignore[operator]


def test_nothing_of_the_model_is_changed() -> None:
    model = llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    rng = torch.get_rng_state()
    spec = AdapterSpec(LoRA(2, init_=Eva()), overrides=[Override.of("*", layers="1", init="lora-ga")])
    gather(model, spec, [{"input_ids": IDS, "labels": IDS}])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng), "dropout was off, so nothing was drawn"


def test_each_site_gets_what_its_own_start_needs() -> None:
    model = llama()
    spec = AdapterSpec(
        LoRA(2),
        overrides=[
            Override.of("q_proj", init="eva"),
            Override.of("v_proj", init="lora-ga"),
            Override.of("o_proj", init="loftq"),
        ],
    )
    assert needs(spec)
    measured = gather(model, spec, [{"input_ids": IDS, "labels": IDS}])
    shapes = {path.rpartition(".")[2]: tuple(t.shape) for path, t in measured.items()}
    assert shapes == {"q_proj": (32, 32), "v_proj": (32, 32), "o_proj": (32, 32)}
    assert len(measured) == 6
    assert_close(measured["model.layers.0.self_attn.o_proj"], model.model.layers[0].self_attn.o_proj.weight)


def test_a_start_that_measures_nothing_reads_no_batch() -> None:
    def never() -> Any:
        raise AssertionError("read")
        yield

    assert not needs(AdapterSpec(LoRA(2, init_=Pissa())))
    assert gather(llama(), AdapterSpec(LoRA(2, init_=Pissa())), never()) == {}
    assert len(gather(llama(), AdapterSpec(LoRA(2, init_=LoftQ())), never())) == 14


@pytest.mark.parametrize("init", [Eva(), LoRAGA()])
def test_slices_of_a_fused_layer_are_measured_apart(init: Any) -> None:
    model, x = nn.Sequential(nn.Linear(12, 8)), torch.randn(20, 12)
    spec = AdapterSpec(LoRA(1, init_=init), Targets("0[0:3,5:8]"))
    measured = gather(model, spec, [x], loss=lambda model, x: model(x).pow(3).sum())
    assert list(measured) == ["0[0:3]", "0[5:8]"]
    if isinstance(init, LoRAGA):
        model(x).pow(3).sum().backward()
        gradient = model[0].weight.grad
        assert isinstance(gradient, Tensor)
        assert_close(measured["0[5:8]"], gradient[5:8])
    else:
        assert_close(measured["0[5:8]"], x.T @ x)
    attach(model, spec, evidence=measured)
    assert len(adapters_named(model, "default")) == 2


def test_a_layer_before_an_operation_in_place_is_measured_too() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)), torch.randn(5, 6)
    measured = gather(model, ga(include=["0", "2"]), [x], loss=lambda model, x: model(x).square().sum())
    model(x).square().sum().backward()
    assert_close(measured["0"], model[0].weight.grad)  # type: ignore[arg-type]


def test_a_16_bit_base_is_summed_in_fp32() -> None:
    model, x = nn.Sequential(nn.Linear(12, 8)).bfloat16(), torch.randn(4000, 12).bfloat16()
    moment = gather(model, AdapterSpec(LoRA(1, init_=Eva()), Targets("0")), [x])["0"]
    assert moment.dtype == torch.float32
    assert_close(moment, x.float().T @ x.float())
    gradient = gather(model, ga(include=["0"]), [x, x], loss=lambda model, x: model(x).square().mean())["0"]
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("batches", [[], [{"input_ids": IDS}]])
def test_batches_that_reach_nothing_are_refused(batches: list[Any]) -> None:
    model = llama()
    if batches:
        with pytest.raises(SpecError, match="the model gave no loss to take gradients of; put labels into the batches"):
            gather(model, ga(), batches)
    else:
        told = r"0 batch\(es\) measured, and none reached these layers; give more batches, .*\n  - model.layers.0"
        with pytest.raises(SpecError, match=told):
            gather(model, ga(), batches)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_the_loss_does_not_use_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    with pytest.raises(SpecError, match=r"1 batch\(es\) measured, and none reached these layers.*\n  - idle$"):
        gather(Idle(), ga(include=["used", "idle"]), [torch.randn(3, 4)], loss=lambda m, x: m(x).square().sum())
