"""The two axes of the law matrix: every layer kind, and every method in a few configurations.

A new method or a new kind is one entry here; the laws then run over it by themselves, and a registered one without an
entry fails `test_the_matrix_covers_the_registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.context.prefix_embedding import PrefixEmbedding
from lorakit.context.prefix_layer import PrefixLayer
from lorakit.context.prefix_tuning import PrefixTuning
from lorakit.context.prompt_tuning import PromptTuning
from lorakit.core.adapters import Adapter
from lorakit.core.method import Context, Method, Static
from lorakit.core.registry import host_of
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.hosts.linear4bit import Linear4bit
from lorakit.inits.gaussian import Gaussian
from lorakit.inits.olora import OLoRA
from lorakit.inits.pissa import Pissa
from lorakit.inject.attach import adapters_named, attach
from lorakit.methods import dora
from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.adaptive import Adaptive
from lorakit.methods.block import BlockDiagonal
from lorakit.methods.compacter import Compacter
from lorakit.methods.compacter_plus_plus import CompacterPlusPlus
from lorakit.methods.dora import DoRA
from lorakit.methods.hierarchical import Hierarchical
from lorakit.methods.houlsby import Houlsby
from lorakit.methods.ia3 import IA3
from lorakit.methods.krona import KronA
from lorakit.methods.lin import Lin
from lorakit.methods.loha import LoHa
from lorakit.methods.lokr import LoKr
from lorakit.methods.lora import LoRA
from lorakit.methods.lora_fa import LoRAFA
from lorakit.methods.mixture import Mixture
from lorakit.methods.parallel import Parallel
from lorakit.methods.per_head import PerHead
from lorakit.methods.pfeiffer import Pfeiffer
from lorakit.methods.vera import VeRA


class Net(nn.Module):
    """A model of one layer, so that it has a path."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        y: Tensor = self.layer(x)
        return y


class MLP(nn.Module):
    """A module that holds layers and gives back the width it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        """Return `down gelu(up x)`."""
        y: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return y


@dataclass(frozen=True)
class Kind:
    """One layer kind: how to build a layer, and a batch of three rows for it."""

    layer: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    lossy: bool = False
    """Whether a merged weight is rounded again, so that merging is refused unless it is asked for."""


def _conv1d() -> nn.Module:
    layer = Conv1D(8, 12)
    nn.init.normal_(layer.weight, std=0.2)  # its own 0.02 would leave an update that scales it too small to see
    nn.init.normal_(layer.bias)
    return layer


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(12, 8), lambda: torch.randn(3, 5, 12)),
    "linear, no bias": Kind(lambda: nn.Linear(12, 8, bias=False), lambda: torch.randn(3, 12)),
    "transposed-linear": Kind(_conv1d, lambda: torch.randn(3, 5, 12)),
    "linear, 4-bit": Kind(lambda: Linear4bit.of(nn.Linear(12, 8)), lambda: torch.randn(3, 5, 12), lossy=True),
    "transposed-linear, 4-bit": Kind(
        lambda: Linear4bit.of(_conv1d(), block_size=32, double_quant=False), lambda: torch.randn(3, 12), lossy=True
    ),
    "embedding": Kind(lambda: nn.Embedding(12, 8, padding_idx=0), lambda: torch.randint(0, 12, (3, 5))),
    "conv1d": Kind(lambda: nn.Conv1d(12, 8, 3, padding=2, dilation=2), lambda: torch.randn(3, 12, 9)),
    "conv2d": Kind(lambda: nn.Conv2d(12, 8, 3, stride=2, padding=1), lambda: torch.randn(3, 12, 9, 9)),
    "conv2d, grouped, reflected": Kind(
        lambda: nn.Conv2d(12, 8, 3, groups=2, padding=1, padding_mode="reflect"), lambda: torch.randn(3, 12, 7, 7)
    ),
    "conv2d, circular, no bias": Kind(
        lambda: nn.Conv2d(12, 8, (3, 1), padding="same", padding_mode="circular", bias=False),
        lambda: torch.randn(3, 12, 5, 5),
    ),
    "conv3d": Kind(lambda: nn.Conv3d(12, 8, (1, 2, 2), groups=4), lambda: torch.randn(3, 12, 3, 4, 4)),
    "module": Kind(MLP, lambda: torch.randn(3, 5, 12)),
}

DENSE = [kind for kind in KINDS if not KINDS[kind].lossy]
"""The kinds that others know as well, and whose merged weights are kept."""

METHODS: dict[str, Method] = {
    "lora": LoRA(rank=4, alpha=8.0),
    "lora, rank-stabilised": LoRA(rank=4, alpha=8.0, stabilised=True),
    "lora, gaussian": LoRA(rank=4, alpha=8.0, init_=Gaussian()),
    "lora, olora": LoRA(rank=4, alpha=8.0, init_=OLoRA()),
    "lora, pissa": LoRA(rank=4, alpha=8.0, init_=Pissa()),
    "lora, pissa, randomised": LoRA(rank=4, alpha=8.0, init_=Pissa(iterations=4)),
    "adalora": AdaLoRA(target_rank=2, init_rank=4, alpha=16.0),
    "adalora, trimmed": AdaLoRA(target_rank=4, init_rank=6, alpha=16.0, kept=4),
    "adaptive": Adaptive(target_rank=3, high=4, alpha=6.0),
    "block-diagonal": BlockDiagonal(rank=4, alpha=8.0, blocks=2),
    "block-diagonal, down": BlockDiagonal(rank=4, alpha=8.0, blocks=2, side="down"),
    "block-diagonal, up": BlockDiagonal(rank=4, alpha=8.0, blocks=2, side="up"),
    "compacter": Compacter(reduction=2, terms=2),
    "compacter++": CompacterPlusPlus(reduction=2, terms=2),
    "compacter, rank 2": Compacter(reduction=1, terms=4, rank=2, activation="tanh"),
    "dora": DoRA(LoRA(rank=4, alpha=8.0)),
    "dora of ia3": DoRA(IA3("input")),
    "hierarchical": Hierarchical(rank=4, alpha=8.0, group_rank=4, global_rank=4),
    "houlsby": Houlsby(reduction=2),
    "ia3": IA3(),
    "ia3, input": IA3("input"),
    "krona": KronA(a1=2, a2=3),
    "lin": Lin(reduction=2),
    "loha": LoHa(rank=4, alpha=8.0),
    "lokr": LoKr(rank=1, alpha=2.0),
    "lokr, both factored": LoKr(rank=1, alpha=2.0, factor=4, decompose_both=True),
    "lokr, whole": LoKr(rank=4, alpha=8.0, zero="w2"),
    "lora-fa": LoRAFA(rank=4, alpha=8.0),
    "mixture": Mixture(experts=3, rank=2, alpha=4.0, balance=0.1),
    "mixture, top 2": Mixture(experts=3, rank=2, alpha=4.0, top=2),
    "parallel": Parallel(reduction=2, scale=0.5),
    "per-head": PerHead(rank=2, alpha=4.0, heads=2),
    "per-head, down": PerHead(rank=2, alpha=4.0, heads=2, side="down"),
    "pfeiffer": Pfeiffer(reduction=2),
    "vera": VeRA(rank=10),
}

CONTEXTS: dict[str, Context] = {
    "prefix-embedding": PrefixEmbedding(before=3, after=2),
    "prefix-layer": PrefixLayer(before=3, after=2),
    "prefix-tuning": PrefixTuning(tokens=4),
    "prefix-tuning, perceptron": PrefixTuning(tokens=4, hidden=5),
    "prompt-tuning": PromptTuning(tokens=4),
}
"""What acts on what a model reads, on no layer: it has no dW and cannot start as the base does, so none of the laws of
a layer holds; it has laws of its own, in tests/context/test_laws.py."""

PAIRS = [(kind, name) for kind in KINDS for name, method in METHODS.items() if kind.split(",")[0] in method.kinds]
FIRST = {*{kind: (kind, name) for kind, name in reversed(PAIRS)}.values(),
         *{type(METHODS[name]): (kind, name) for kind, name in reversed(PAIRS)}.values()}  # fmt: skip
"""One pair of each kind and of each method's class, for laws that take a second a pair; the slow tests take all."""
STATIC = [(kind, name) for kind, name in PAIRS if isinstance(METHODS[name], Static)]
"""The pairs with a dW, which can be merged and compared with a dense weight."""
MISFITS = [(kind, name) for kind in KINDS for name in METHODS if (kind, name) not in PAIRS]

HELD: dict[str, list[tuple[Any, str]]] = {"dora": [(dora, "row_norms"), (dora, "row_norms_of_sum")]}
"""Functions, by method, whose value is a constant in backward on purpose; the gradient law holds them at it."""


def net(kind: str, *methods: str, rows: str = "", dtype: torch.dtype = torch.float32) -> Net:
    """Return a one-layer model with each named method attached as `n0`, `n1`, ..., its tensors moved off the start."""
    model = Net(KINDS[kind].layer()).to(dtype)
    for i, method in enumerate(methods):
        attach(model, AdapterSpec(METHODS[method], Targets(f"layer{rows}")), f"n{i}")
        for adapter in adapters_named(model, f"n{i}"):
            jitter(adapter)
    return model


@torch.no_grad()
def jitter(adapter: Adapter) -> None:
    """Move every tensor off its starting value, so that no law holds trivially."""
    for values in adapter.parameters():
        values.add_(0.5 * torch.randn_like(values))


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a batch of three rows."""
    x = KINDS[kind].inputs()
    return x.to(dtype) if x.is_floating_point() else x


def dense(model: Net, x: Tensor, weight: Tensor) -> Tensor:
    """Return `op(x; weight) + b`, with torch's own layer and another weight."""
    host = host_of(model.layer)
    assert host is not None
    y = host.op.apply(model.layer, x, weight)
    bias: Any = getattr(model.layer, "bias", None)
    return y if bias is None else y + host.op.channel(bias, y)


def weight_of(model: Net) -> Tensor:
    """Return the base weight in canonical layout."""
    host = host_of(model.layer)
    assert host is not None
    return host.store.read(model.layer).detach()


def deltas(model: Net, name: str) -> Iterator[Tensor]:
    """Yield dW of each update of one name."""
    for adapter in adapters_named(model, name):
        yield adapter.delta(weight_of(model))
