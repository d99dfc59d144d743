"""Gradients corrected in front of any optimizer's step, and only where a method asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.attach import adapters_named, attach
from lorakit.methods.lora import LoRA
from lorakit.methods.lora_fa import LoRAFA
from lorakit.training.groups import param_groups
from lorakit.training.precondition import precondition
from lorakit.training.run import train
from tests.tolerances import assert_close
from tests.training import samples


def model() -> nn.Sequential:
    """Return a model whose first layer has LoRA-FA and whose second has LoRA."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    attach(made, AdapterSpec(LoRAFA(2, 3.0), Targets("0")), "fa")
    attach(made, AdapterSpec(LoRA(2, 3.0), Targets("1")), "plain")
    return made


def gradients(made: nn.Module) -> list[torch.Tensor]:
    """Return the gradients of LoRA-FA's B and of LoRA's."""
    ups = [adapters_named(made, name)[0].get_parameter("up").grad for name in ("fa", "plain")]
    return [grad.clone() for grad in ups if grad is not None]


def test_a_step_corrects_the_gradients_of_the_methods_that_ask() -> None:
    made, x = model(), torch.randn(7, 6)
    optimizer = torch.optim.AdamW(param_groups(made, 0.01))
    precondition(made, optimizer)
    made(x).square().sum().backward()
    fa, plain = gradients(made)
    down = adapters_named(made, "fa")[0].get_buffer("down")
    optimizer.step()
    corrected, untouched = gradients(made)
    assert_close(corrected, fa @ torch.linalg.inv(down @ down.T) / 1.5**2)
    assert torch.equal(untouched, plain)


def test_without_the_hook_a_step_is_the_optimizer_s_own() -> None:
    made = model()
    optimizer = torch.optim.AdamW(param_groups(made, 0.01))
    precondition(made, optimizer).remove()
    made(torch.randn(7, 6)).square().sum().backward()
    before = gradients(made)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(gradients(made), before, strict=True))


def test_with_a_step_of_plain_descent_the_scale_no_longer_matters() -> None:
    outputs, x = [], torch.randn(7, 6)
    for alpha in (1.0, 50.0):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(6, 5))
        attach(made, AdapterSpec(LoRAFA(2, alpha), Targets("0")))
        optimizer = torch.optim.SGD(param_groups(made, 0.01))
        precondition(made, optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            made(x).square().sum().backward()
            optimizer.step()
        outputs.append(made(x).detach())
    assert_close(*outputs)


def test_a_run_corrects_every_pair_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corrected: list[object] = []
    plain = LoRAFA.precondition
    monkeypatch.setattr(LoRAFA, "precondition", lambda self, p: (corrected.append(self), plain(self, p))[1])
    base = samples.save_base(tmp_path / "base")
    recipe = samples.recipe_of(base, tmp_path, train__steps=3, adapter__method="lora-fa")
    assert train(recipe).steps == 3
    assert len(corrected) == 3 * 14
