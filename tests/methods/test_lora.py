"""LoRA and rsLoRA: the paper's numbers, gradients and identities, and one case by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.sites import sites
from lorakit.methods.lora import LoRA
from tests.law.cases import Net


def adapted(method: LoRA, down: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> Net:
    """Return a bias-free linear layer with the given weight and factors."""
    model = Net(nn.Linear(weight.shape[1], weight.shape[0], bias=False)).to(weight.dtype)
    attach(model, AdapterSpec(method, Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    with torch.no_grad():
        model.layer.weight.copy_(weight)  # type: ignore[operator]
        adapter.get_parameter("down").copy_(down)
        adapter.get_parameter("up").copy_(up)
    return model


def test_one_case_by_hand() -> None:
    # W = [[1, 0], [0, 2]], A = [[1, 2]], B = [[3], [4]], s = 6 / 1: dW = 6 [[3, 6], [4, 8]] = [[18, 36], [24, 48]]
    model = adapted(
        LoRA(1, 6.0), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    )
    # x = (1, -1): W x = (1, -2), dW x = (-18, -24)
    assert model(torch.tensor([1.0, -1.0])).tolist() == [-17.0, -26.0]


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 0.5), (True, 2.0)])
def test_the_scale_is_alpha_over_r_or_over_its_root(stabilised: bool, scale: float) -> None:
    # alpha 8, r 16: 8/16 = 0.5; 8/sqrt(16) = 2; swapping them passes every law and fails here
    assert LoRA(16, 8.0, stabilised).scale == scale
    eye = torch.eye(16)
    model = adapted(LoRA(16, 8.0, stabilised), eye, eye, torch.zeros(16, 16))
    assert torch.equal(model(eye), scale * eye)


def test_gradients_are_the_paper_s() -> None:
    # dL/dA = s B^T G and dL/dB = s G A^T with G = dL/dh^T x summed over tokens
    down, up, weight = torch.randn(3, 5).double(), torch.randn(4, 3).double(), torch.randn(4, 5).double()
    model, x, g = adapted(LoRA(3, 7.0), down, up, weight), torch.randn(6, 5).double(), torch.randn(6, 4).double()
    model(x).backward(g)
    adapter, big_g, s = adapters_named(model, "default")[0], g.T @ x, 7.0 / 3.0
    torch.testing.assert_close(adapter.get_parameter("down").grad, s * up.T @ big_g, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.get_parameter("up").grad, s * big_g @ down.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("optimizer", "power"), [("adam", 1), ("sgd", 2)])
def test_the_scale_acts_as_a_learning_rate_of_b_alone(optimizer: str, power: int) -> None:
    # (s, lr, lr) is (1, lr, s lr) under Adam with eps 0 and (1, lr, s^2 lr) under SGD, to the bit where s is 2^k
    s, lr, weight, x = 4.0, 0.01, torch.randn(4, 5).double(), torch.randn(6, 5).double()
    down, start, outputs = torch.randn(3, 5).double(), torch.zeros(4, 3).double(), []
    for scale, rate in ((s, lr), (1.0, lr * s**power)):
        model = adapted(LoRA(3, 3.0 * scale), down, start, weight)
        adapter = adapters_named(model, "default")[0]
        a, b = adapter.get_parameter("down"), adapter.get_parameter("up")
        groups = [{"params": [a], "lr": lr}, {"params": [b], "lr": rate}]
        chosen = torch.optim.Adam(groups, eps=0.0) if optimizer == "adam" else torch.optim.SGD(groups, lr)
        for step in range(5):
            chosen.zero_grad()
            model(x).square().sum().backward()
            if step == 0:
                a.grad = None  # it is 0, of which Adam without eps makes 0 / 0
            chosen.step()
        assert not torch.equal(a, down)
        outputs.append(model(x).detach())
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("targets", "parameters", "modules"),
    [
        (["c_attn"], 294_912, 12),
        (["c_attn", "c_proj"], 811_008, 36),
        (["c_attn", "attn.c_proj"], 442_368, 24),
        (["c_attn", "c_proj", "c_fc"], 1_179_648, 48),
    ],
)
def test_gpt2_counts(targets: list[str], parameters: int, modules: int) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert sites(model).total_parameters == 124_439_808
    handle = attach(model, AdapterSpec(LoRA(8), Targets(targets)))
    assert (sum(p.numel() for p in handle.parameters()), len(handle.paths)) == (parameters, modules)


def test_a_rank_bounds_the_rank_of_the_update() -> None:
    model = adapted(LoRA(3, 6.0), torch.randn(3, 20), torch.randn(12, 3), torch.randn(12, 20))
    delta = adapters_named(model, "default")[0].delta(torch.zeros(12, 20))
    assert int(torch.linalg.matrix_rank(delta)) == 3


def test_an_embedding_starts_the_other_way_round() -> None:
    model = Net(nn.Embedding(11, 6))
    attach(model, AdapterSpec(LoRA(4), Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    assert not adapter.get_parameter("down").any()
    assert adapter.get_parameter("up").all()


def test_the_start_depends_on_seed_and_path_alone() -> None:
    def start(seed: int, targets: list[str]) -> torch.Tensor:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        attach(model, AdapterSpec(LoRA(2), Targets(targets), seed=seed))
        return adapters_named(model, "default")[-1].get_parameter("down").detach()

    assert torch.equal(start(1, ["1"]), start(1, ["0", "1"]))
    assert not torch.equal(start(1, ["1"]), start(2, ["1"]))


@pytest.mark.parametrize("rank", [0, -4])
def test_a_rank_that_cannot_be_is_refused(rank: int) -> None:
    with pytest.raises(SpecError, match=r"rank must be a whole number of at least 1, not .*exclude a layer to skip it"):
        LoRA(rank)


def test_a_rank_of_another_type_is_refused_where_no_type_checker_runs() -> None:
    script = (
        "from lorakit import LoRA, LorakitError\n"
        "for rank in (1.5, '8', True):\n"
        "    try: LoRA(rank); print('taken')\n"
        "    except LorakitError as e: print(e)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert [line.split(";")[0] for line in told.splitlines()] == [
        f"rank must be a whole number of at least 1, not {rank}" for rank in ("1.5", "'8'", "True")
    ]


@pytest.mark.parametrize("alpha", [0.0, -16.0, math.nan, math.inf])
def test_an_alpha_that_cannot_be_is_refused(alpha: float) -> None:
    with pytest.raises(SpecError, match=r"alpha must be a positive number, not .*2 \* rank"):
        LoRA(8, alpha)


def test_a_rank_above_the_weight_s_is_refused_with_its_path() -> None:
    model = Net(nn.Linear(48, 64))
    with pytest.raises(SpecError, match=r"layer: rank 64 exceeds min\(out, in\) = 48; lower the rank or exclude"):
        attach(model, AdapterSpec(LoRA(64), Targets("layer")))


def test_a_rank_its_groups_do_not_divide_is_refused() -> None:
    model = Net(nn.Conv2d(12, 8, 3, groups=4))
    with pytest.raises(SpecError, match="layer: rank 6 is not a multiple of the convolution's 4 groups; use rank 8"):
        attach(model, AdapterSpec(LoRA(6), Targets("layer")))
