"""LoRA-GA: a case by hand, and the identity it was made for: the first step is the gradient's best rank-2r part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inits.lora_ga import LoRAGA
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.evidence import gather
from lorakit.methods.lora import LoRA
from tests.law.cases import KINDS, Net
from tests.tolerances import assert_close


def layer(height: int, width: int) -> Net:
    """Return a linear layer without bias, in fp64."""
    return Net(torch.nn.Linear(width, height, bias=False)).double()


def test_one_case_by_hand() -> None:
    # G = diag(3, 2) in 16 x 2, m = 16, gamma = 16: c = 2 / 4; A0 = c e1, B0 = c e2, whatever the scale and the spectrum
    gradient = torch.zeros(16, 2)
    gradient[0, 0], gradient[1, 1] = 3.0, 2.0
    model = layer(16, 2)
    attach(model, AdapterSpec(LoRA(1, 7.0, init_=LoRAGA()), Targets("layer")), evidence={"layer": gradient})
    t = adapters_named(model, "default")[0].tensors()
    assert_close(t["down"].abs().float(), torch.tensor([[0.5, 0.0]]))
    assert_close(t["up"].abs().float(), 0.5 * torch.eye(16)[:, 1:2])


@pytest.mark.parametrize("iterations", [None, 16])
@pytest.mark.parametrize("stabilised", [False, True])
def test_the_first_step_is_the_best_rank_2r_part_of_the_gradient(stabilised: bool, iterations: int | None) -> None:
    model, x, target = layer(20, 30), torch.randn(50, 30).double(), torch.randn(50, 20).double()

    def loss(model: Net, x: Tensor) -> Tensor:
        return (model(x) - target).square().mean()

    method = LoRA(4, 6.0, stabilised, LoRAGA(iterations=iterations))
    spec = AdapterSpec(method, Targets("layer"))
    gradient = torch.autograd.grad(loss(model, x), model.layer.weight)[0]  # type: ignore[arg-type]
    measured = gather(model, spec, [x], loss=loss)
    assert_close(measured["layer"], gradient.float())
    attach(model, spec, evidence={"layer": gradient})
    adapter, eta = adapters_named(model, "default")[0], 1e-5
    loss(model, x).backward()
    with torch.no_grad():
        for parameter in adapter.parameters():
            assert parameter.grad is not None
            parameter -= eta * parameter.grad
    u, s, vh = torch.linalg.svd(gradient)
    best = u[:, :8] @ torch.diag(s[:8]) @ vh[:8]
    c2 = 20**0.5 / 16
    step = adapter.delta(torch.zeros(20, 30).double()) / (-eta * method.scale**2 * c2)
    # to first order: the rest, eta s G A0^T B0^T G, is 1e-5 of it
    torch.testing.assert_close(step, best, rtol=0, atol=1e-5 * float(best.abs().max()) * method.scale)


@pytest.mark.parametrize("kind", ["linear", "transposed-linear", "embedding", "conv1d", "conv2d, grouped, reflected"])
def test_the_measured_gradient_is_autograd_s_whatever_the_layout(kind: str) -> None:
    model, spec = Net(KINDS[kind].layer()), AdapterSpec(LoRA(4, init_=LoRAGA()), Targets("layer"))
    batches = [KINDS[kind].inputs(), KINDS[kind].inputs()]
    measured = gather(model, spec, batches, loss=lambda model, x: model(x).pow(3).sum())["layer"]
    for x in batches:
        model(x).pow(3).sum().backward()
    wanted: Tensor = model.layer.weight.grad / 2  # type: ignore[operator, union-attr, assignment]
    assert_close(measured, wanted.T if kind in ("transposed-linear", "embedding") else wanted)
