"""LoHa: one case by hand, the entrywise product behind its low-rank branch, its start and rank, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.spec import AdapterSpec, Targets, method_from_json, method_to_json
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach
from lorakit.methods.loha import LoHa
from tests.law.cases import KINDS, Net, net, weight_of
from tests.tolerances import assert_close

PARTS = ("up1", "down1", "up2", "down2")


def adapted(method: LoHa, weight: Tensor, **tensors: Tensor) -> Net:
    """Return a bias-free linear layer with the given weight and factors."""
    model = Net(nn.Linear(weight.shape[1], weight.shape[0], bias=False)).to(weight.dtype)
    attach(model, AdapterSpec(method, Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    with torch.no_grad():
        model.layer.get_parameter("weight").copy_(weight)
        for name, values in tensors.items():
            adapter.get_parameter(name).copy_(values)
    return model


def test_one_case_by_hand() -> None:
    # B1 A1 = [[1], [2]] [[3, 4]] = [[3, 4], [6, 8]], B2 A2 = [[5], [1]] [[1, -1]] = [[5, -5], [1, -1]], s = 2 / 1:
    # dW = 2 [[15, -20], [6, -8]] = [[30, -40], [12, -16]]
    model = adapted(
        LoHa(1, 2.0),
        torch.eye(2),
        up1=torch.tensor([[1.0], [2.0]]),
        down1=torch.tensor([[3.0, 4.0]]),
        up2=torch.tensor([[5.0], [1.0]]),
        down2=torch.tensor([[1.0, -1.0]]),
    )
    assert model(torch.tensor([1.0, 1.0])).tolist() == [-9.0, -3.0]
    assert LoHa(16, 8.0).scale == 0.5


@pytest.mark.parametrize("kind", ["linear", "transposed-linear", "embedding", "conv1d", "conv2d"])
def test_the_low_rank_pair_is_the_entrywise_product(kind: str) -> None:
    model = net(kind, "loha")
    p = adapters_named(model, "n0")[0].tensors()
    wanted = 2.0 * (p["up1"] @ p["down1"].flatten(1)) * (p["up2"] @ p["down2"].flatten(1))
    assert_close(adapters_named(model, "n0")[0].delta(weight_of(model)).flatten(1), wanted)


def test_each_group_of_a_convolution_has_its_own_product() -> None:
    model = net("conv2d, grouped, reflected", "loha")  # 8 outputs in 2 groups, 6 inputs each, rank 4: two of rank 2
    p = adapters_named(model, "n0")[0].tensors()
    delta = adapters_named(model, "n0")[0].delta(weight_of(model)).flatten(1)
    for out, rank in ((slice(0, 4), slice(0, 2)), (slice(4, 8), slice(2, 4))):
        one, two = (p[f"up{i}"][out] @ p[f"down{i}"][rank].flatten(1) for i in (1, 2))
        assert_close(delta[out], 2.0 * one * two)


def test_gradients_are_those_of_the_entrywise_product() -> None:
    # with P1 = B1 A1, P2 = B2 A2 and G = dL/dh^T x: dB1 = s (G * P2) A1^T, dA1 = s B1^T (G * P2), and so for the other
    shapes = {"up1": (4, 3), "down1": (3, 5), "up2": (4, 3), "down2": (3, 5)}
    p = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    x, g = torch.randn(6, 5).double(), torch.randn(6, 4).double()
    model = adapted(LoHa(3, 7.0), torch.randn(4, 5).double(), **p)
    model(x).backward(g)
    adapter, s, big_g = adapters_named(model, "default")[0], 7 / 3, g.T @ x
    for mine, other in ((1, 2), (2, 1)):
        seen = s * big_g * (p[f"up{other}"] @ p[f"down{other}"])
        up, down = adapter.get_parameter(f"up{mine}"), adapter.get_parameter(f"down{mine}")
        torch.testing.assert_close(up.grad, seen @ p[f"down{mine}"].T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(down.grad, p[f"up{mine}"].T @ seen, rtol=1e-12, atol=1e-12)


def test_two_pairs_of_rank_r_make_a_product_of_rank_r_squared() -> None:
    model = Net(nn.Linear(40, 30).double())
    attach(model, AdapterSpec(LoHa(4, 4.0), Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 2 * 4 * (40 + 30)
    assert int(torch.linalg.matrix_rank(adapter.delta(torch.zeros(30, 40).double()))) == 16


@pytest.mark.parametrize(
    ("kind", "bounds"),
    [
        ("linear", {"up1": 1 / 2, "up2": 1 / 2, "down1": 1 / math.sqrt(12), "down2": 0}),
        ("conv2d", {"up1": 1 / 2, "up2": 1 / 2, "down1": 1 / math.sqrt(12 * 9), "down2": 0}),
        ("embedding", {"up1": 1 / 2, "up2": 1 / 2, "down1": 1, "down2": 0}),
    ],
)
def test_it_starts_at_zero_with_three_random_factors(kind: str, bounds: dict[str, float]) -> None:
    model = Net(KINDS[kind].layer())
    attach(model, AdapterSpec(LoHa(4, 4.0), Targets("layer")))
    for name, bound in bounds.items():
        largest = adapters_named(model, "default")[0].get_parameter(name).abs().max().item()
        assert 0.8 * bound <= largest <= bound, name


def test_the_start_depends_on_the_seed() -> None:
    def start(seed: int) -> Tensor:
        model = Net(nn.Linear(6, 6))
        attach(model, AdapterSpec(LoHa(2), Targets("layer"), seed=seed))
        return torch.cat([adapters_named(model, "default")[0].get_parameter(n).detach().flatten() for n in PARTS])

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_values_that_cannot_be_are_refused_where_no_type_checker_runs() -> None:
    script = (
        "import math\n"
        "from lorakit import LorakitError\n"
        "from lorakit.methods.loha import LoHa\n"
        "ranks, alphas = (0, 1.5, True), (0.0, math.nan, '8')\n"
        "for given in ([r, 8.0] for r in ranks), ([4, a] for a in alphas):\n"
        "  for one in given:\n"
        "    try: LoHa(*one); print('taken')\n"
        "    except LorakitError as e: print(e)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    rank = "rank must be a whole number of at least 1, not {}; exclude a layer to skip it"
    alpha = "alpha must be a positive number, not {}; the usual choice is the rank"
    assert told.splitlines() == [
        *(rank.format(value) for value in ("0", "1.5", "True")),
        *(alpha.format(value) for value in ("0.0", "nan", "'8'")),
    ]


def test_a_rank_above_the_weight_s_is_refused_with_its_path() -> None:
    with pytest.raises(SpecError, match=r"layer: rank 64 exceeds min\(out, in\) = 48"):
        attach(Net(nn.Linear(48, 64)), AdapterSpec(LoHa(64), Targets("layer")))


def test_it_is_the_same_through_json() -> None:
    method = LoHa(3, 1.5)
    assert method_from_json(json.loads(json.dumps(method_to_json(method)))) == method
