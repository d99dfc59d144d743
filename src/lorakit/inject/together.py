"""Adapted layers that compute in one function, those that read one input together.

Whether a call can go this way is asked at every call: a weight per row, several adapters at once, a weight that is
trained itself and an input that autocast would cast take the plain way.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.fronts import is_watched
from lorakit.core.method import LowRank, Stretched
from lorakit.kernels.low_rank import Layer, low_rank_linear

MISSES = 2
"""How often layers may turn out to read different inputs before they compute alone; an interrupted forward is one."""


class Together:
    """Layers that read one input: the first that is called computes all of them, and the others find their outputs."""

    def __init__(self, modules: list[nn.Module], trains: bool = True) -> None:
        self._modules, self._trains = modules, trains
        self._misses = 0
        self._held: tuple[Tensor, int, dict[nn.Module, Tensor]] | None = None

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Return the adapted output of `module`, or None where the plain way must be taken."""
        if self._held is not None:
            read, version, waiting = self._held
            if read is x and x._version == version and module in waiting:
                y = waiting.pop(module)
                self._held = self._held if waiting else None
                return y
            self._held = None
            self._misses += 1  # somebody was computed whom nobody asked for
        if not takes(x) or (torch.is_grad_enabled() and not self._trains):
            return None
        if not (torch.is_grad_enabled() and self._joint):
            found = _layer(module, x)
            return None if found is None else low_rank_linear(x, (found[0],), found[1])[0]
        every = [_layer(each, x) for each in self._modules]
        rates = {found[1] for found in every if found is not None}
        if None in every or len(rates) > 1:
            return None
        layers = [found[0] for found in every if found is not None]
        waiting = dict(zip(self._modules, low_rank_linear(x, layers, rates.pop()), strict=True))
        y = waiting.pop(module)
        self._held = (x, x._version, waiting)
        return y

    @property
    def _joint(self) -> bool:
        """Whether the layers compute together: several, all still here, that did read one input so far."""
        layers: list[Any] = [module._modules.get("adapters") for module in self._modules]
        return (
            len(self._modules) > 1
            and self._misses < MISSES
            and all(layer is not None and layer.fast is self for layer in layers)
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what an interrupted forward left."""
        return {**self.__dict__, "_held": None}


def why_not(module: nn.Module) -> str | None:
    """Return why an adapted layer can never run fused, or None."""
    for _, adapter in module.adapters.named():  # type: ignore[union-attr,operator]
        method: Any = adapter.method
        site = adapter.site
        if site.kind not in ("linear", "transposed-linear"):
            return f"a layer of kind {site.kind}"
        if not isinstance(method.inner if isinstance(method, Stretched) else method, LowRank):
            return f"{method.name} is no product of two factors"
        if site.rows is not None:
            return "an update of some rows of a fused layer"
        if isinstance(method, Stretched) and not adapter.host.store.lossless:
            return f"{adapter.method.name} on a packed weight"
    return None


def resting(module: nn.Module) -> Together | None:
    """Return the way of a layer that nobody fused: fast without gradients, where nothing of autograd can be missed."""
    return Together([module], trains=False) if why_not(module) is None else None


def takes(x: Tensor) -> bool:
    """Return whether an input of this kind, in the context it comes in, can go the fused way.

    Autocast has nothing to cast where its dtype is the input's.
    """
    device = x.device.type
    return (
        x.dtype.is_floating_point
        and (not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == x.dtype)
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_exporting()
    )


def _layer(module: nn.Module, x: Tensor) -> tuple[Layer, float] | None:
    """Return an adapted layer as the kernel takes it, and the dropout of its update, or None where it cannot."""
    adapters: Any = module._modules["adapters"]
    weights, own = adapters.weights, adapters._modules["by_name"]._modules
    if len(own) != 1 or len(weights) != 1:
        return None
    ((name, adapter),) = own.items()
    by = weights.get(name)
    if not isinstance(by, float) or is_watched(adapter):
        return None
    method: Any = adapter.method
    p = adapter._parameters
    if adapter._buffers:
        p = {**p, **adapter._buffers}
    stretched = _has(type(method), "gain")  # type: ignore[arg-type]
    inner = method.inner if stretched else method
    if _has(type(inner), "pair"):  # type: ignore[arg-type]
        down, up, scale = inner.pair(p)
    else:
        (down, up), scale = inner.factors(p), 1.0
    if down.device != x.device:
        return None
    dropout = adapter.dropout if adapter.training else 0.0
    if not adapter.host.store.lossless:
        return Layer(down, up, by * scale, base=module.base_forward(x)), dropout  # type: ignore[operator]
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    if weight.dtype != x.dtype or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    gain = None
    if stretched:
        if by != 1.0:
            return None
        gain = method.gain(p, adapter.host.store.read(module))
    return Layer(down, up, by * scale, weight, bias, adapter.site.kind == "transposed-linear", gain), dropout


@cache
def _has(method: Hashable, word: str) -> bool:
    """Return whether a class of methods is `Stretched` ("gain") or `Paired` ("pair"): a protocol is slow to ask."""
    return hasattr(method, word)
