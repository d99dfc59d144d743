"""One autograd function for linear layers of one input against the same layers written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernels.dropout import keep_mask
from lorakit.kernels.low_rank import Layer, low_rank_linear
from lorakit.kernels.remade import remade, remember

KINDS = {
    "alone": (("",), 0.0),
    "biased": (("bias",), 0.0),
    "three": (("", "bias", ""), 0.0),
    "transposed": (("transposed", "transposed bias"), 0.0),
    "stretched": (("gain", "gain bias"), 0.0),
    "packed": (("base", "base"), 0.0),
    "thinned": (("", "bias"), 0.3),
    "all": (("gain transposed", "base", "bias", ""), 0.25),
}


def made(kind: str, dtype: torch.dtype, kept: torch.dtype) -> tuple[Tensor, list[Layer], float]:
    """Return an input and layers of a kind, their updates in `kept`."""
    torch.manual_seed(0)
    words, dropout = KINDS[kind]
    x = torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
    layers = []
    for i, word in enumerate(words):
        out, rank = 4 + i, 2 + i
        weight = torch.randn(out, 6, dtype=dtype)
        layers.append(
            Layer(
                torch.randn(rank, 6, dtype=kept, requires_grad=True),
                torch.randn(out, rank, dtype=kept, requires_grad=True),
                0.5 + i,
                weight.t().contiguous() if "transposed" in word else weight,
                torch.randn(out, dtype=dtype) if "bias" in word else None,
                "transposed" in word,
                torch.rand(out, dtype=kept).add(0.5).requires_grad_() if "gain" in word else None,
            )
        )
    return x, layers, dropout


def packed(x: Tensor, layers: list[Layer], kind: str) -> list[Layer]:
    """Return the layers with those called packed given their own output instead of their weight."""
    words, _ = KINDS[kind]
    return [
        layer._replace(weight=None, base=F.linear(x, layer.weight)) if "base" in word and layer.weight is not None
        else layer
        for layer, word in zip(layers, words, strict=True)
    ]  # fmt: skip


def plain(x: Tensor, layers: list[Layer], dropout: float, seed: int) -> list[Tensor]:
    """Return `g (x W^T + s drop(x) A^T B^T) + b` of each layer."""
    outs = []
    for layer in layers:
        assert layer.weight is not None
        mask, factor = keep_mask(x.reshape(-1, x.shape[-1]), x.shape[-1], dropout, seed) if dropout else (x, 1.0)
        thin = x * mask.view(x.shape) * factor if dropout else x
        weight = layer.weight.t() if layer.transposed else layer.weight
        y = F.linear(x, weight) + layer.scale * F.linear(F.linear(thin, layer.down.to(x.dtype)), layer.up.to(x.dtype))
        y = y if layer.gain is None else y * layer.gain.to(y.dtype)
        outs.append(y if layer.bias is None else y + layer.bias)
    return outs


def leaves(x: Tensor, layers: list[Layer]) -> list[Tensor]:
    """Return everything that gets a gradient."""
    return [x, *(t for layer in layers for t in (layer.down, layer.up, layer.gain) if t is not None)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_values_and_gradients_are_those_of_the_layers_written_out(
    kind: str, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.kernels.low_rank.draw_seed", lambda like: 7)
    x, layers, dropout = made(kind, dtype, torch.float32)
    ours = low_rank_linear(x, packed(x, layers, kind), dropout)
    theirs = plain(x, layers, dropout, 7)
    pulls = [torch.randn_like(y) for y in theirs]
    mine = torch.autograd.grad(ours, leaves(x, layers), pulls)
    wanted = torch.autograd.grad(theirs, leaves(x, layers), pulls)
    for one, other in zip((*ours, *mine), (*theirs, *wanted), strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).detach().float().norm() / other.detach().float().norm()) < bound


def test_a_gain_near_1_is_not_rounded_to_1_by_16_bits() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(512, 64, dtype=torch.bfloat16), torch.randn(256, 64, dtype=torch.bfloat16)
    gain = torch.full((256,), 1.003)  # bf16 has no number between 1 and 1.0078
    layer = Layer(torch.zeros(2, 64), torch.zeros(256, 2), 1.0, weight, gain=gain)
    base = F.linear(x, weight).double()
    for grad in (False, True):  # two ways through the kernel
        y = low_rank_linear(x, [layer._replace(gain=gain.clone().requires_grad_(grad))])[0].detach().double()
        assert float((y * base).sum() / base.square().sum()) == pytest.approx(1.003, abs=2e-4)
    seen = x.clone().requires_grad_()
    y = low_rank_linear(seen, [layer])[0]
    (y.float() * base.float()).sum().backward()
    wanted = base @ weight.double()
    assert seen.grad is not None
    assert float((seen.grad.double() * wanted).sum() / wanted.square().sum()) == pytest.approx(1.003, abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.kernels.low_rank.draw_seed", lambda like: 7)
    x, layers, dropout = made(kind, torch.float64, torch.float64)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        it = iter(values[1:])
        own = [
            layer._replace(down=next(it), up=next(it), gain=None if layer.gain is None else next(it))
            for layer in layers
        ]
        return low_rank_linear(values[0], packed(values[0], own, kind), dropout)

    assert torch.autograd.gradcheck(function, leaves(x, layers))


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_outputs_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.kernels.low_rank.draw_seed", lambda like: 7)
    x, layers, dropout = made(kind, torch.float32, torch.float32)
    with torch.no_grad():
        ours = low_rank_linear(x, packed(x, layers, kind), dropout)
        theirs = plain(x, layers, dropout, 7)
    torch.testing.assert_close(list(ours), theirs, rtol=1e-5, atol=1e-5)


def test_numbers_by_hand() -> None:
    """x = (1, 2), W = (3, 4), A = (5, 6), B = 7, s = 2, b = 8: y = 11 + 2 * 17 * 7 + 8 = 257."""
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    down, up = torch.tensor([[5.0, 6.0]], requires_grad=True), torch.tensor([[7.0]], requires_grad=True)
    (y,) = low_rank_linear(x, [Layer(down, up, 2.0, torch.tensor([[3.0, 4.0]]), torch.tensor([8.0]))])
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert y.tolist() == [[257.0]]
    assert [t.grad.tolist() for t in (x, down, up) if t.grad is not None] == [[[73.0, 88.0]], [[14.0, 28.0]], [[34.0]]]


def kept_bytes(*layers: Layer, x: Tensor) -> int:
    """Return what autograd keeps of a call, weights and updates left out."""
    own = {t.data_ptr() for layer in layers for t in (layer.down, layer.up, layer.weight) if t is not None}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        low_rank_linear(x, layers)
    return sum(kept.values())


def test_one_input_and_the_thin_products_are_all_that_is_kept() -> None:
    x, layers, _ = made("three", torch.float32, torch.float32)
    rows, ranks = 10, 2 + 3 + 4
    assert kept_bytes(*layers, x=x) == 4 * rows * (6 + ranks)
    frozen = [layer._replace(down=layer.down.detach()) for layer in layers]
    assert kept_bytes(*frozen, x=x) == 4 * rows * ranks, "nobody asks for a gradient of A, so nobody reads x"


def test_an_input_that_is_made_again_is_not_kept() -> None:
    _, layers, _ = made("three", torch.float32, torch.float32)
    z = torch.randn(2, 5, 6, requires_grad=True)

    def grads(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum(y.square().sum() for y in low_rank_linear(x, layers)), leaves(z, layers))  # type: ignore[arg-type,return-value]

    doubled = remember(z * 2, lambda t: t * 2, z)
    assert kept_bytes(*layers, x=doubled) == 4 * 10 * (6 + 9)
    for one, other in zip(grads(remember(z * 2, lambda t: t * 2, z)), grads(z * 2), strict=True):
        assert torch.equal(one, other)
    written = remember(z * 2, lambda t: t * 2, z)
    with torch.no_grad():
        written.add_(1.0)
    assert remade(written) is None, "it is no longer what was remembered"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("grad", [True, False])
def test_an_input_may_lie_in_memory_as_it_likes(grad: bool, dropout: float) -> None:
    """As Mamba's, which come out of a convolution: channels before positions."""
    lying = torch.randn(2, 6, 5).transpose(1, 2)
    layer = Layer(torch.randn(2, 6), torch.randn(4, 2), 1.5, torch.randn(4, 6), torch.randn(4))
    made = []
    for x in (lying, lying.contiguous()):
        torch.manual_seed(0)
        (y,) = low_rank_linear(x.clone().requires_grad_(grad) if grad else x, [layer], dropout)
        made.append(y)
    torch.testing.assert_close(*made)
