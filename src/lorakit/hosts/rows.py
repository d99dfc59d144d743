"""The table of layer kinds: adding a kind is adding a row.

A row matches the class that computes `op(x; W) + b` and its subclasses only while they keep its forward: a subclass
with a forward of its own may do anything with the weight, and an update that guesses would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lorakit.core.adapters import Adapted
from lorakit.core.hollow import whole_shape
from lorakit.core.host import Host
from lorakit.core.reading import fronts_of
from lorakit.core.site import Site
from lorakit.hosts.bnb import is_layer
from lorakit.hosts.linear4bit import Linear4bit
from lorakit.hosts.lossy import Bnb4bit, Bnb8bit, Packed, TorchAO
from lorakit.hosts.ops import Convolution, Lookup, MatrixProduct
from lorakit.hosts.stores import Nothing, Plain, Transposed, Vocabulary


def _keeps_forward_of(base: type[nn.Module]) -> Callable[[nn.Module], bool]:
    def matches(module: nn.Module) -> bool:
        return isinstance(module, base) and _plain_forward(type(module)) is base.forward and owns_weight(module)

    return matches


def owns_weight(module: nn.Module) -> bool:
    """Return whether `weight` is a parameter, and no layer's forward changes it.

    Under a parametrization (`weight_norm`) it is a value made anew at each reading, so what a merge writes is lost; an
    embedding with `max_norm` shrinks the rows it reads.
    """
    return "weight" in module._parameters and getattr(module, "max_norm", None) is None


def _plain_forward(cls: type) -> Any:
    """Return the forward a module would have without lorakit's mixin in front."""
    return next(c.__dict__["forward"] for c in cls.__mro__ if "forward" in c.__dict__ and c is not Adapted)


def _is_gpt2_conv1d(module: nn.Module) -> bool:
    """Return whether this is transformers' Conv1D, without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def _is_embedding(module: nn.Module) -> bool:
    """Return whether this is a table lookup: torch's, or a model's own that also multiplies by `embed_scale`."""
    if not (isinstance(module, nn.Embedding) and owns_weight(module)):
        return False
    return _plain_forward(type(module)) is nn.Embedding.forward or hasattr(module, "embed_scale")


def _conv_site(kind: str) -> Callable[[str, Any], Site]:
    def site(path: str, m: Any) -> Site:
        habits = {"dilation": set(m.dilation) != {1}, "padding_mode": m.padding_mode != "zeros"}
        return Site(path, m.out_channels, m.in_channels // m.groups, tuple(m.kernel_size), kind=kind, groups=m.groups,
                    habits=frozenset(name for name, has in habits.items() if has))  # fmt: skip

    return site


def _transposed_site(path: str, module: Any) -> Site:
    in_, out = whole_shape(module.weight)
    return Site(path, out, in_, kind="transposed-linear")


def _no_site(path: str, module: nn.Module) -> Site:
    """Say that the width of a module of several layers is read off its layers (inject/sites.py)."""
    raise AssertionError(path)


def _linear_site(path: str, module: Any) -> Site:
    return Site(path, module.out_features, module.in_features)


def _is_packed(transposed: bool) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, Linear4bit) and module.transposed == transposed


def _is_bnb(name: str) -> Callable[[nn.Module], bool]:
    return lambda module: is_layer(module, name)


def _is_torchao(module: nn.Module) -> bool:
    """Return whether this is a linear layer whose weight torchao quantised, without importing the package."""
    made_by = type(getattr(module, "weight", None)).__module__
    return isinstance(module, nn.Linear) and made_by.partition(".")[0] == "torchao"


def _packed_site(path: str, module: Any) -> Site:
    return Site(path, module.out_features, module.in_features, kind="transposed-linear")


ROWS: tuple[Host, ...] = (
    Host("linear", _is_packed(False), MatrixProduct(), Packed(), _linear_site, store_name="4-bit"),
    Host("transposed-linear", _is_packed(True), MatrixProduct(), Packed(), _packed_site, store_name="4-bit"),
    Host("linear", _is_bnb("Linear4bit"), MatrixProduct(), Bnb4bit(), _linear_site, store_name="bnb 4-bit"),
    Host(
        "linear",
        _is_bnb("Linear8bitLt"),
        MatrixProduct(),
        Bnb8bit(),
        _linear_site,
        store_name="bnb 8-bit",
    ),
    Host("linear", _is_torchao, MatrixProduct(), TorchAO(), _linear_site, store_name="torchao"),
    Host(
        "linear",
        _keeps_forward_of(nn.Linear),
        MatrixProduct(),
        Plain(),
        _linear_site,
    ),
    Host(
        "transposed-linear",
        _is_gpt2_conv1d,
        MatrixProduct(),
        Transposed(),
        _transposed_site,
    ),
    Host(
        "embedding",
        _is_embedding,
        Lookup(),
        Transposed(),
        lambda path, m: Site(path, m.embedding_dim, m.num_embeddings, kind="embedding"),  # type: ignore[arg-type]
    ),
    Host("conv1d", _keeps_forward_of(nn.Conv1d), Convolution(1), Plain(), _conv_site("conv1d")),
    Host("conv2d", _keeps_forward_of(nn.Conv2d), Convolution(2), Plain(), _conv_site("conv2d")),
    Host("conv3d", _keeps_forward_of(nn.Conv3d), Convolution(3), Plain(), _conv_site("conv3d")),
    Host("module", lambda m: False, MatrixProduct(), Nothing(), _no_site),  # named by a target, never found by itself
    Host("model", lambda m: False, MatrixProduct(), Vocabulary(), _no_site, fronts_of),  # the reader of a transformer
)
