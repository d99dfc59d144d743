"""Let a model compute faster what it computes anyway: adapted layers together, norms and activations that keep less.

`fuse(model)` looks at every module once and says which run fused and which not and why. What a norm or a gated MLP does
is read from the code of its forward, so a model that computes something else is left alone; layers that may share an
input are found by their names, and whether they do is seen at each call. Whatever the conditions of a call exclude (a
weight per row, several adapters at once, something for autocast to cast) takes the plain way, call by call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.adapters import Adapted
from lorakit.core.fronts import Front, base_class, put_in_front, take_from_front
from lorakit.inject.statements import statements
from lorakit.inject.together import Together, resting, takes, why_not
from lorakit.kernels.attention import DropsInAttention
from lorakit.kernels.dropout import dropout
from lorakit.kernels.gated import activated, gated
from lorakit.kernels.norms import layer_norm, rms_norm
from lorakit.kernels.remade import forget

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"),
            ("gate_proj", "up_proj"))  # fmt: skip
"""Names of layers beside each other that a block calls one after the other with one input."""


@dataclass(frozen=True)
class Fusion:
    """What of a model runs fused: for each path what it is part of, and for the others why not."""

    fused: dict[str, str]
    plain: dict[str, str]

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many modules run as what, and for which reason others do not, the most frequent first."""
        parts = {"runs": Counter(self.fused.values()), "plain": Counter(self.plain.values())}
        return {part: dict(counter.most_common()) for part, counter in parts.items()}


def fuse(model: nn.Module) -> Fusion:
    """Make the adapted layers of a model, and the norms and activations between them, run fused where they can."""
    did: dict[str, str] = {}
    refused: dict[str, str] = {}
    modules = dict(model.named_modules())
    alone: dict[str, int] = {}
    inside: set[str] = set()
    for path, module in modules.items():
        if isinstance(module, Adapted):
            if (why := why_not(cast(nn.Module, module))) is None:
                alone[path] = module.adapters.named()[0][1].site.in_
            else:
                refused[path] = why
        elif (front := _front_of(module)) is not None and path not in inside:
            put_in_front(module, front)
            if front.what:
                did[path] = front.what
            if front is FusedGatedMLP:
                inside.add(f"{path}.act_fn")
    for paths in _neighbours(alone):
        together = Together([modules[path] for path in paths])
        for path in paths:
            modules[path].adapters.fast = together
            did[path] = "adapted layers sharing an input" if len(paths) > 1 else "adapted layers"
    return Fusion(did, refused)


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`."""
    for module in model.modules():
        if isinstance(module, Adapted):
            module.adapters.fast = resting(cast(nn.Module, module))
        for front in _FRONTS:
            take_from_front(module, front)


def _neighbours(sites: Mapping[str, int]) -> list[list[str]]:
    """Return the paths, each with the width its layer reads, in groups that may read one input, the others alone."""
    groups: dict[tuple[str, Any, int], list[str]] = {}
    for path, width in sites.items():
        parent, _, name = path.rpartition(".")
        which = next((i for i, names in enumerate(TOGETHER) if name in names), name)
        groups.setdefault((parent, which, width), []).append(path)
    return list(groups.values())


# ---- norms and activations ----


class _Fused(Front):
    """What stands in front of a module that computes a known formula; it acts where a gradient is wanted."""

    renames = False
    what = ""

    def _acts(self, x: Tensor) -> bool:
        """Return whether a gradient of `x` is wanted, and none of what the module itself has, which is of its dtype."""
        own = [p for p in cast(nn.Module, self)._parameters.values() if p is not None]
        still = not any(p.requires_grad or p.dtype != x.dtype for p in own)
        return torch.is_grad_enabled() and still and takes(x) and x.requires_grad


class FusedRMSNorm(_Fused):
    """Llama's RMSNorm and its kin."""

    what = "norms"

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of `x`."""
        if not self._acts(x):
            return super().forward(x)  # type: ignore[misc,no-any-return]
        eps = getattr(self, "variance_epsilon", None) or self.eps  # type: ignore[attr-defined]
        return rms_norm(x, self.weight, eps, from_one=statements(base_class(self).forward, "x") == _GEMMA)  # type: ignore[attr-defined,arg-type]


class FusedLayerNorm(_Fused):
    """torch's LayerNorm."""

    what = "norms"

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of `x`."""
        if not self._acts(x):
            return super().forward(x)  # type: ignore[misc,no-any-return]
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)  # type: ignore[attr-defined]


class FusedActivation(_Fused):
    """An activation that stands between two layers."""

    what = "activations"

    def forward(self, x: Tensor) -> Tensor:
        """Return `f(x)`."""
        if not self._acts(x):
            return super().forward(x)  # type: ignore[misc,no-any-return]
        return activated(x, cast(str, _activation(self)))


class FusedDropout(_Fused):
    """The base's own dropout on a CPU, where torch makes its mask one value after the other."""

    what = "dropout"

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with values dropped."""
        if not (self.training and x.device.type == "cpu" and takes(x)) or torch.compiler.is_compiling():  # type: ignore[attr-defined]
            return super().forward(x)  # type: ignore[misc,no-any-return]
        return dropout(x, self.p)  # type: ignore[attr-defined]


class FusedAttention(_Fused):
    """A block of attention that drops probabilities on a CPU, where torch writes the formula out for that."""

    what = "attention with dropout"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output."""
        trains = self.training and torch.is_grad_enabled()  # type: ignore[attr-defined]
        if not trains or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with DropsInAttention():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class Recomputed(_Fused):
    """A block that checkpointing may compute again, from its input alone: how that was made is lost by then."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output."""
        if getattr(self, "gradient_checkpointing", False):
            for given in (*args, *kwargs.values()):
                forget(given)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class FusedGatedMLP(_Fused):
    """`down(f(gate(x)) * up(x))`."""

    what = "gated MLPs"

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        if not (torch.is_grad_enabled() and takes(x)) or isinstance(self, Adapted):
            return super().forward(x)  # type: ignore[misc,no-any-return]
        gate, up = self.gate_proj(x), self.up_proj(x)  # type: ignore[attr-defined]
        return self.down_proj(gated(gate, up, cast(str, _activation(self.act_fn))))  # type: ignore[attr-defined,no-any-return]


_FRONTS = (Recomputed, FusedRMSNorm, FusedLayerNorm, FusedActivation, FusedDropout, FusedAttention, FusedGatedMLP)

_LLAMA = """input_dtype = x.dtype
x = x.to(torch.float32)
variance = x.pow(2).mean(-1, keepdim=True)
x = x * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * x.to(input_dtype)"""
_GEMMA = """output = self._norm(x.float())
output = output * (1.0 + self.weight.float())
return output.type_as(x)"""
_GEMMA_NORM = "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"
_MLP = """down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
return down_proj"""

_DROPPING = ("dropout", "attn_dropout", "attention_dropout")
"""What blocks of attention call the dropout of their probabilities."""
_NAMED = {
    "SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu", "NewGELUActivation": "gelu-tanh",
    "GELUTanh": "gelu-tanh", "PytorchGELUTanh": "gelu-tanh", "FastGELUActivation": "gelu-tanh",
    "QuickGELUActivation": "gelu-quick", "ReLU": "relu",
}  # fmt: skip
"""torch's and transformers' activations, whose names are their formulas."""


def _front_of(module: nn.Module) -> type[_Fused] | None:
    """Return what may stand in front of a module that is not adapted itself."""
    cls = base_class(module)
    if any(c.__name__ == "GradientCheckpointingLayer" for c in cls.__mro__):
        return Recomputed
    if cls is nn.LayerNorm:
        return FusedLayerNorm
    if isinstance(module, nn.Dropout) and cls is nn.Dropout:
        return FusedDropout if 0 < module.p < 1 and not module.inplace else None
    if cls.__name__.endswith("Attention") and any(_drops(getattr(module, name, None)) for name in _DROPPING):
        return FusedAttention
    if cls is nn.GELU or cls.__name__ in _NAMED:
        return FusedActivation if _activation(module) is not None else None
    if cls.__name__.endswith("Norm"):
        code = statements(cls.forward, "x")
        gemma = code == _GEMMA and statements(getattr(cls, "_norm", None), "x") == _GEMMA_NORM
        return FusedRMSNorm if code == _LLAMA or gemma else None
    if hasattr(module, "gate_proj") and statements(cls.forward, "x") == _MLP and _activation(module.act_fn) is not None:
        return FusedGatedMLP
    return None


def _drops(given: Any) -> bool:
    """Return whether a module or a number is a dropout above 0."""
    rate = given.p if isinstance(given, nn.Dropout) else given
    return isinstance(rate, float) and 0 < rate < 1


def _activation(module: Any) -> str | None:
    """Return the kernel's name of an activation module, or None for one it does not know."""
    cls = base_class(module) if isinstance(module, nn.Module) else type(module)
    if cls is nn.GELU:
        return "gelu-tanh" if module.approximate == "tanh" else "gelu"
    ours = cls.__module__ in ("torch.nn.modules.activation", "transformers.activations")
    return _NAMED.get(cls.__name__) if ours else None
