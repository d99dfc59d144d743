"""Parity of the bottleneck adapters with plain torch modules, wired into whole models as the papers draw them.

PEFT has none of these methods, so the other side is written here from `nn.Linear`, `nn.LayerNorm` and `torch.kron`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, T5Config, T5EncoderModel
from transformers.activations import ACT2FN

from lorakit.core.adapters import Adapter
from lorakit.core.method import Method
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.attach import adapters_named, attach
from lorakit.methods.compacter import Compacter
from lorakit.methods.houlsby import Houlsby
from lorakit.methods.lin import Lin
from lorakit.methods.parallel import Parallel
from lorakit.methods.pfeiffer import Pfeiffer
from tests.law.cases import jitter
from tests.tolerances import assert_close

IDS = torch.arange(14).reshape(2, 7)


class Plain(nn.Module):
    """`h + s (up f(down LN(r)) + b)` with r the output h, or the input where `beside`, of any module."""

    def __init__(self, inner: nn.Module, d: int, r: int, activation: str, normed: bool, beside: bool, scale: float):
        super().__init__()
        self.inner, self.beside, self.scale = inner, beside, scale
        self.norm = nn.LayerNorm(d) if normed else nn.Identity()
        self.down, self.f, self.up = nn.Linear(d, r), ACT2FN[activation], nn.Linear(r, d)

    @property
    def weight(self) -> Tensor:
        """Return the inner weight, whose dtype T5 asks for."""
        return self.inner.get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        """Return the module's output with the adapter's term."""
        h = self.inner(x)
        branch: Tensor = self.up(self.f(self.down(self.norm(x if self.beside else h))))
        return h + self.scale * branch

    def take(self, p: dict[str, Tensor]) -> None:
        """Take our values."""
        self.down.weight.copy_(p["down"])
        self.down.bias.copy_(p["down_bias"])
        self.up.weight.copy_(p["up"])
        self.up.bias.copy_(p["up_bias"])
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.weight.copy_(p["gain"])
            self.norm.bias.copy_(p["shift"])

    def grads(self) -> dict[str, Tensor | None]:
        """Return the gradients under our names."""
        found = {"down": self.down.weight.grad, "down_bias": self.down.bias.grad,
                 "up": self.up.weight.grad, "up_bias": self.up.bias.grad}  # fmt: skip
        if isinstance(self.norm, nn.LayerNorm):
            found |= {"gain": self.norm.weight.grad, "shift": self.norm.bias.grad}
        return found


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return GPT2Model(config)


def bert() -> nn.Module:
    config = BertConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        hidden_dropout_prob=0, attention_probs_dropout_prob=0)  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def t5() -> nn.Module:
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0)
    return T5EncoderModel(config)


PLACES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "gpt2": (gpt2, ("h.{}.attn.c_proj",), ("h.{}.mlp.c_proj",), ("h.{}.mlp",)),
    "bert": (bert, ("encoder.layer.{}.attention.output.dense",), ("encoder.layer.{}.output.dense",), ()),
    "t5": (
        t5,
        ("encoder.block.{}.layer.0.SelfAttention.o",),
        ("encoder.block.{}.layer.1.DenseReluDense.wo",),
        ("encoder.block.{}.layer.1.DenseReluDense",),
    ),
}
CASES = [(family, method) for family in PLACES for method in (Houlsby(4), Pfeiffer(4), Lin(4), Parallel(4))
         if not (isinstance(method, Parallel) and not PLACES[family][3])]  # fmt: skip


def pair(family: str, method: Method) -> tuple[nn.Module, nn.Module, list[Adapter], list[Plain]]:
    """Return a model adapted by us, its twin with plain modules in the places the papers name, and both adapters."""
    build, attention, mlp, whole = PLACES[family]
    ours = build()
    theirs = copy.deepcopy(ours).requires_grad_(False)
    attach(ours, AdapterSpec(method, Targets(method.targets)))
    adapters = adapters_named(ours, "default")
    places = whole if isinstance(method, Parallel) else (*attention, *mlp) if isinstance(method, Houlsby) else mlp
    plains = []
    by_path = {adapter.site.path: adapter for adapter in adapters}
    for path in (place.format(i) for i in range(2) for place in places):
        jitter(by_path[path])
        plain = Plain(theirs.get_submodule(path), 32, 8, "silu" if isinstance(method, Houlsby) else "relu",
                      isinstance(method, Lin), isinstance(method, Parallel), getattr(method, "scale", 1.0))  # fmt: skip
        with torch.no_grad():
            plain.take(by_path[path].tensors())
        theirs.set_submodule(path, plain)
        plains.append(plain)
    assert len(adapters) == len(plains)
    return ours, theirs, [by_path[path.format(i)] for i in range(2) for path in places], plains


@pytest.mark.parametrize(("family", "method"), CASES)
def test_outputs_and_gradients_equal_plain_modules(family: str, method: Method) -> None:
    ours, theirs, adapters, plains = pair(family, method)
    y, z = ours(IDS).last_hidden_state, theirs(IDS).last_hidden_state
    assert_close(y, z)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (z * direction).sum().backward()
    for adapter, plain in zip(adapters, plains, strict=True):
        for name, grad in plain.grads().items():
            assert grad is not None
            assert grad.any()
            assert_close(adapter.get_parameter(name).grad, grad)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_compacter_equals_plain_kronecker_layers(n: int) -> None:
    ours, x = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16)), torch.randn(3, 5, 12)
    theirs = copy.deepcopy(ours)
    attach(ours, AdapterSpec(Compacter(2, terms=n, rank=2), Targets(["0", "1"])))
    first, second = adapters_named(ours, "default")
    jitter(first)
    jitter(second)
    leaves: list[dict[str, Any]] = [{k: v.detach().clone().requires_grad_() for k, v in a.tensors().items()}
                                    for a in (first, second)]  # fmt: skip
    leaves[1]["rules"] = leaves[0]["rules"]
    h = x
    for layer, p in zip(theirs, leaves, strict=True):
        h = layer(h)
        down, up = (
            sum(torch.kron(p["rules"][i], p[f"{side}_left"][i] @ p[f"{side}_right"][i]) for i in range(n))
            for side in ("down", "up")
        )
        h = h + ACT2FN["gelu_new"](h @ down + p["down_bias"]) @ up + p["up_bias"]
    y = ours(x)
    assert_close(y, h)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (h * direction).sum().backward()
    for adapter, p in zip((first, second), leaves, strict=True):
        for name, leaf in p.items():
            assert_close(adapter.get_parameter(name).grad, leaf.grad)
