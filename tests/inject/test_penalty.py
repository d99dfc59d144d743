"""What methods add to the loss: the mean over an adapter's sites, of the active ones, in full precision."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lorakit import AdapterSpec, LoRA, Targets, attach, penalty, use
from lorakit.core.method import Call, Method, Start, Tensors
from lorakit.core.site import Decl, Role, Site
from lorakit.inject.attach import adapters_named
from lorakit.methods.adalora import AdaLoRA


@dataclass(frozen=True)
class Noted(Method):
    """Scales the output by a gain, and wants the mean output small."""

    name = "noted"  # type: ignore[misc]
    paper = formula = count = ""  # type: ignore[misc]

    def tensors(self, site: Site) -> dict[str, Decl]:
        return {"gain": Decl((site.out,), Role.GAIN)}

    def init(self, p: Tensors, start: Start) -> None:
        p["gain"].fill_(2.0)

    def branch(self, p: Tensors, call: Call) -> Tensor:
        y = call.scale(p["gain"], call.y0)
        call.notes["mean"] = y.mean()
        return y

    def penalty(self, p: Tensors, notes: Tensors) -> Tensor:
        return 3.0 * notes["mean"]


def model(*methods: Method) -> nn.Module:
    net = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12))
    for i, method in enumerate(methods):
        attach(net, AdapterSpec(method, Targets(["0", "1"])), f"n{i}")
    return net


def test_it_is_the_mean_over_the_sites_and_the_sum_over_adapters() -> None:
    net = model(AdaLoRA(2, 6, orthogonal_weight=1.0), AdaLoRA(2, 4, orthogonal_weight=1.0))
    with torch.no_grad():
        for name in ("n0", "n1"):
            for p in adapters_named(net, name)[0].parameters():
                p.zero_()  # a norm of sqrt(r) at the first site
            for p in adapters_named(net, name)[1].parameters():
                p.copy_(torch.eye(*p.shape) if p.dim() == 2 else p)  # and of 0 at the second
    term = penalty(net)
    assert term is not None
    assert term.item() == pytest.approx((6**0.5 + 4**0.5) / 2)
    use(net, {"n1": 1.0})
    only_one = penalty(net)
    assert only_one is not None
    assert only_one.item() == pytest.approx(4**0.5 / 2), "an adapter that is off costs nothing"


def test_without_a_penalised_method_there_is_none() -> None:
    assert penalty(model(LoRA(4))) is None
    assert penalty(nn.Linear(3, 3)) is None
    net = model(AdaLoRA(2, 6))
    use(net, {})
    assert penalty(net) is None


def test_it_sees_what_the_last_forward_noted_and_gradients_flow_back() -> None:
    net, x = model(Noted()), torch.randn(4, 12)
    y = net(x)
    term = penalty(net)
    assert term is not None
    (y.square().mean() + term).backward()
    assert all(p.grad is not None and p.grad.any() for a in adapters_named(net, "n0") for p in a.parameters())


def test_autocast_does_not_reach_it() -> None:
    net = model(AdaLoRA(2, 6))
    exact = torch.stack([AdaLoRA(2, 6).penalty(a.tensors(), {}) for a in adapters_named(net, "n0")]).mean()
    with torch.autocast("cpu", torch.bfloat16):
        term = penalty(net)
    assert term is not None
    assert torch.equal(term, exact)
