"""LoRA-FA: a frozen A, what a forward keeps for backward, and what the corrected step does to W."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.core.adapters import Adapter
from lorakit.core.method import Preconditioned
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach
from lorakit.methods.lora import LoRA
from lorakit.methods.lora_fa import LoRAFA
from tests.law.cases import Net
from tests.tolerances import assert_close


def adapted(method: Any, layer: nn.Module) -> tuple[Net, Adapter]:
    """Return a one-layer model and its adapter."""
    model = Net(layer)
    attach(model, AdapterSpec(method, Targets("layer")))
    return model, adapters_named(model, "default")[0]


def test_one_case_by_hand() -> None:
    # A = [[3, 4]], so A A^T = 25; s = 2 / 1; dL/dB = (50, 100) becomes (50, 100) / (25 * 4) = (0.5, 1)
    _, adapter = adapted(LoRAFA(1, 2.0), nn.Linear(2, 2))
    adapter.get_buffer("down").copy_(torch.tensor([[3.0, 4.0]]))
    up = adapter.get_parameter("up")
    up.grad = torch.tensor([[50.0], [100.0]])
    LoRAFA(1, 2.0).precondition(adapter.tensors())
    assert_close(up.grad, torch.tensor([[0.5], [1.0]]))


def test_only_b_learns() -> None:
    model, adapter = adapted(LoRAFA(4, 8.0), nn.Linear(12, 8))
    down = adapter.get_buffer("down").clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.randn(5, 12)).square().sum().backward()
    optimizer.step()
    assert [name for name, _ in adapter.named_parameters()] == ["up"]
    assert torch.equal(adapter.get_buffer("down"), down)
    assert adapter.get_parameter("up").all()


@pytest.mark.parametrize("stabilised", [False, True])
def test_it_starts_and_acts_as_lora(stabilised: bool) -> None:
    layer, x = nn.Linear(12, 8), torch.randn(3, 12)
    _, lora = adapted(LoRA(4, 6.0, stabilised), layer)
    model, ours = adapted(LoRAFA(4, 6.0, stabilised), nn.Linear(12, 8))
    assert torch.equal(ours.get_buffer("down"), lora.get_parameter("down"))
    p = {"down": lora.get_parameter("down").detach(), "up": torch.randn(8, 4)}
    assert all(torch.equal(a, b) for a, b in zip(ours.method.factors(p), lora.method.factors(p), strict=True))  # type: ignore[attr-defined]
    assert model(x).shape == (3, 8)


def test_a_forward_keeps_r_values_of_a_token_where_lora_keeps_its_input() -> None:
    kept: dict[str, int] = {}
    for method in (LoRA(2, 4.0), LoRAFA(2, 4.0)):
        model, _ = adapted(method, nn.Linear(64, 8))
        x, sizes = torch.randn(10, 64, requires_grad=True), []
        base = {t.data_ptr() for t in (model.layer.weight, *model.parameters())}

        def pack(t: torch.Tensor, sizes: list[int] = sizes, base: set[int] = base) -> torch.Tensor:
            sizes.append(0 if t.data_ptr() in base or 10 not in t.shape else t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x)
        kept[method.name] = sum(sizes)
    assert kept == {"lora": 10 * 64 + 10 * 2, "lora-fa": 10 * 2}


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(12, 8, bias=False),
        lambda: nn.Conv2d(12, 8, 3, bias=False),
        lambda: nn.Conv2d(12, 8, 3, groups=2, bias=False),
    ],
)
@pytest.mark.parametrize("alpha", [4.0, 32.0])
def test_a_corrected_step_moves_w_along_its_gradient_on_the_rows_of_a(layer: Any, alpha: float) -> None:
    # dW = s (-g A) = -G A^T (A A^T)^-1 A: G projected, whatever s is
    torch.manual_seed(1)
    method = LoRAFA(4, alpha)
    model, adapter = adapted(method, layer().double())
    weight = model.layer.weight.requires_grad_()
    x = torch.randn(2, 12, *([7, 7] if isinstance(model.layer, nn.Conv2d) else [])).double()
    model(x).square().sum().backward()
    method.precondition(adapter.tensors())
    up = adapter.get_parameter("up")
    with torch.no_grad():
        up.sub_(up.grad)  # type: ignore[arg-type]
    groups = adapter.site.groups
    down = adapter.get_buffer("down").reshape(groups, 4 // groups, -1)
    full = weight.grad.reshape(groups, 8 // groups, -1)  # type: ignore[union-attr]
    onto = torch.linalg.pinv(down) @ down
    wanted = -(full @ onto).reshape(weight.shape)
    torch.testing.assert_close(adapter.delta(torch.zeros_like(weight)), wanted, rtol=1e-5, atol=1e-5)


def test_a_tensor_without_a_gradient_is_left_alone() -> None:
    _, adapter = adapted(LoRAFA(4, 8.0), nn.Linear(12, 8))
    assert isinstance(adapter.method, Preconditioned)
    adapter.method.precondition(adapter.tensors())
    assert adapter.get_parameter("up").grad is None
    assert not isinstance(LoRA(4), Preconditioned)


def test_what_lora_refuses_is_refused() -> None:
    with pytest.raises(SpecError, match="rank must be a whole number of at least 1, not 0"):
        LoRAFA(0)
    with pytest.raises(SpecError, match="alpha must be a positive number, not -2.0"):
        LoRAFA(4, -2.0)
