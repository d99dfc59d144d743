"""IA3: one case by hand for each side, gradients, biases, grouped convolutions, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Targets, method_from_json, method_to_json
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.merge import merge
from lorakit.methods.ia3 import IA3
from tests.law.cases import KINDS, Net, inputs, net, weight_of
from tests.tolerances import assert_close


def adapted(method: IA3, layer: nn.Module, gain: Tensor) -> Net:
    """Return a layer with the given factors."""
    model = Net(layer)
    attach(model, AdapterSpec(method, Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    assert torch.equal(adapter.get_parameter("gain"), torch.ones_like(gain)), "l starts at 1"
    with torch.no_grad():
        adapter.get_parameter("gain").copy_(gain)
    return model


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    """Return a linear layer with these values."""
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.load_state_dict({"weight": torch.tensor(weight)} | ({"bias": torch.tensor(bias)} if bias else {}))
    return layer


def test_the_output_side_by_hand() -> None:
    # W x = (1 - 2, 3 - 4) = (-1, -1), l = (2, 10): (-2, -10), and the bias as it was
    model = adapted(IA3(), linear([[1.0, 2.0], [3.0, 4.0]], [100.0, 200.0]), torch.tensor([2.0, 10.0]))
    assert model(torch.tensor([1.0, -1.0])).tolist() == [98.0, 190.0]


def test_the_input_side_by_hand() -> None:
    # l x = (2, -10): W l x = (2 - 20, 6 - 40) = (-18, -34)
    model = adapted(IA3("input"), linear([[1.0, 2.0], [3.0, 4.0]], [100.0, 200.0]), torch.tensor([2.0, 10.0]))
    assert model(torch.tensor([1.0, -1.0])).tolist() == [82.0, 166.0]


@pytest.mark.parametrize("side", ["output", "input"])
def test_gradients_are_those_of_the_scaled_activation(side: str) -> None:
    # output: dl = sum over tokens of g * (W x); input: dl = sum over tokens of x * (W^T g)
    layer = nn.Linear(5, 4).double()
    weight, x, g = layer.weight.detach(), torch.randn(6, 5).double(), torch.randn(6, 4).double()
    model = adapted(IA3(side), layer, torch.rand(4 if side == "output" else 5).double())  # type: ignore[arg-type]
    model(x).backward(g)
    grad = adapters_named(model, "default")[0].get_parameter("gain").grad
    wanted = (g * (x @ weight.T)).sum(0) if side == "output" else (x * (g @ weight)).sum(0)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


def test_the_input_side_of_a_grouped_convolution_has_a_factor_per_channel() -> None:
    layer = nn.Conv2d(12, 8, 3, groups=4, padding=1)
    gain, x = torch.rand(12) + 0.5, torch.randn(2, 12, 5, 5)
    wanted = layer(gain.view(-1, 1, 1) * x).detach()
    model = adapted(IA3("input"), layer, gain)
    assert_close(model(x), wanted)
    merge(model)
    assert_close(model(x), wanted)


@pytest.mark.parametrize("name", ["ia3", "ia3, input"])
@pytest.mark.parametrize("kind", ["linear", "transposed-linear", "conv2d", "conv2d, grouped, reflected"])
def test_no_weight_sized_tensor_is_formed(kind: str, name: str) -> None:
    model, x = net(kind, name), inputs(kind).requires_grad_()
    kept: list[tuple[int, ...]] = []

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() != model.layer.get_parameter("weight").data_ptr():
            kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    assert sorted(weight_of(model).shape) not in [sorted(shape) for shape in kept]
    assert kept


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_does_not_round_the_factor(dtype: torch.dtype, side: str) -> None:
    layer, x = nn.Linear(64, 64).to(dtype), torch.randn(4, 64).to(dtype)
    model = Net(layer)
    before = model(x)
    attach(model, AdapterSpec(IA3(side), Targets("layer")))  # type: ignore[arg-type]
    assert torch.equal(model(x), before)
    adapter = adapters_named(model, "default")[0]
    with torch.no_grad():
        adapter.get_parameter("gain").add_(2**-12)  # a small part of one step of either dtype above 1
    term = adapter(model.layer, x, before)
    assert term.dtype == dtype
    assert_close(term.float(), 2**-12 * (x.float() @ layer.weight.float().T), dtype=dtype)


@pytest.mark.parametrize("name", ["ia3", "ia3, input"])
def test_under_autocast_the_output_is_the_base_s_dtype(name: str) -> None:
    model, x = net("linear", name), inputs("linear")
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), exact, dtype=torch.bfloat16)


def test_an_embedding_s_input_side_is_one_factor_per_token() -> None:
    layer = KINDS["embedding"].layer()
    tokens, gain = torch.tensor([[3, 5]]), torch.arange(12.0)
    before = layer(tokens).detach()
    assert_close(adapted(IA3("input"), layer, gain)(tokens), torch.tensor([[[3.0], [5.0]]]) * before)


def test_a_slice_of_a_grouped_convolution_has_no_one_vector_of_inputs() -> None:
    site = Site("layer", 8, 3, (3, 3), kind="conv2d", groups=4).slice(0, 4)
    IA3().check(site)
    with pytest.raises(SpecError, match="part of a grouped convolution is not one vector; target the whole layer"):
        IA3("input").check(site)


def test_a_side_that_is_neither_is_refused_where_no_type_checker_runs() -> None:
    script = (
        "from lorakit import LorakitError\n"
        "from lorakit.methods.ia3 import IA3\n"
        "for side in ('inputs', None):\n"
        "    try: IA3(side); print('taken')\n"
        "    except LorakitError as e: print(e)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == [
        f"side must be output (keys, values) or input (a feed-forward's last layer), not {side}"
        for side in ("'inputs'", "None")
    ]


def test_it_is_the_same_through_json() -> None:
    for method in (IA3(), IA3("input")):
        assert method_from_json(json.loads(json.dumps(method_to_json(method)))) == method
