"""The updates of one layer at work: an adapter is tensors plus the method that gives them meaning.

`attach` puts `Adapted` in front of a layer's class. The layer keeps its identity, its keys and its weight; its forward
adds, to the base output, each active update times its weight. A weight is a number or one number per batch row, so
switching off, scaling, stacking and choosing per row are one notion, and every update is measured from the frozen base,
so their order cannot matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.fronts import Front, put_in_front, take_from_front
from lorakit.core.hollow import is_hollow
from lorakit.core.host import Host
from lorakit.core.method import Call, Method, Start, Static
from lorakit.core.site import Site
from lorakit.errors import AttachError, MergeError

Weight = float | Tensor
Fast = Callable[[nn.Module, Tensor], Tensor | None]
"""`(layer, x) -> y`, the adapted output all at once, or None where the plain way must be taken (inject/fuse.py)."""


class Adapter(nn.Module):
    """One named update at one site."""

    def __init__(
        self,
        method: Method,
        site: Site,
        host: Host,
        like: Tensor,
        dropout: float = 0.0,
        held: dict[str, nn.Parameter] | None = None,
    ) -> None:
        """Allocate the tensors `method` declares, on `like`'s device, in at least fp32.

        `held` are the tensors shared with the sites before this one, by their word; new ones are added to it. A shared
        tensor is a parameter even when it is frozen: moving a module replaces its buffers, which would part them.
        """
        super().__init__()
        self.method, self.site, self.host, self.dropout = method, site, host, dropout
        self.borrowed: frozenset[str] = frozenset()
        self.notes: dict[str, Tensor] = {}
        held = {} if held is None else held
        dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
        for name, decl in method.tensors(site).items():
            if decl.shared in held:
                self.register_parameter(name, held[decl.shared])
                self.borrowed |= {name}
                continue
            values = torch.empty(decl.shape, dtype=dtype, device=like.device)
            if decl.trainable or decl.shared is not None:
                self.register_parameter(name, nn.Parameter(values, requires_grad=decl.trainable))
            else:
                self.register_buffer(name, values)
            if decl.shared is not None:
                held[decl.shared] = self.get_parameter(name)

    def tensors(self) -> dict[str, Tensor]:
        """Return the declared tensors by name."""
        return {name: getattr(self, name) for name in (*self._parameters, *self._buffers)}

    @torch.no_grad()
    def init(self, read: Callable[[], Tensor], rng: torch.Generator, evidence: Tensor | None = None) -> None:
        """Fill the tensors; drawn on the CPU so that a seed means the same values on every device."""
        own = {name: t for name, t in self.tensors().items() if name not in self.borrowed}
        if any(map(is_hollow, own.values())):
            return
        drawn = {name: torch.empty_like(t, device="cpu") for name, t in own.items()}
        self.method.init(drawn, Start(self.site, read, rng, evidence))
        for name, values in drawn.items():
            own[name].copy_(values)

    def forward(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the term this update adds to `y = op(x; W) + b`, zero outside its rows."""
        whole = x
        if self.dropout and self.training:
            if self.method.reads == "output":
                y = F.dropout(y, self.dropout)
            elif x.is_floating_point():
                x = F.dropout(x, self.dropout)
        kept = {name: t.to(y.device) for name, t in self.tensors().items()}
        p = {name: t.to(y.dtype) for name, t in kept.items()}
        call = Call(self.host, module, x, y, whole, self.site.rows, kept=kept)
        branch = self.method.branch(p, call)
        if call.notes and not torch.compiler.is_exporting():  # an exported program's values are no numbers to keep
            self.notes = call.notes
        return branch if self.site.rows is None else _place(branch, self.host.op.axis, self.site.rows, y)

    def delta(self, weight: Tensor) -> Tensor:
        """Return dW for the canonical base `weight`, in fp32 or better, zero outside its rows."""
        if not isinstance(self.method, Static):
            raise MergeError(
                f"{self.site.path}: {self.method.name} depends on the input, so no single weight equals it; "
                "keep it attached"
            )
        rows = self.site.rows
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        delta = self.method.delta(self.tensors(), wide if rows is None else wide[rows[0] : rows[1]])
        return delta if rows is None else _place(delta, -wide.dim(), rows, wide)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the notes of the last forward, which belong to its graph."""
        return {**self.__dict__, "notes": {}}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take a checkpoint of the bare base as it is: it has none of our keys, and misses none."""
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)


class Adapters(nn.Module):
    """Every update of one layer, and how strongly each acts."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host
        self.by_name = nn.ModuleDict()
        self.weights: dict[str, Weight] = {}
        self.fast: Fast | None = None
        self.witness: Callable[[Adapter], None] | None = None

    def named(self) -> list[tuple[str, Adapter]]:
        """Return the updates: a name owns one, or several on different rows of a fused layer."""
        return [(key.split("@")[0], cast(Adapter, adapter)) for key, adapter in self.by_name.items()]

    def forward(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return `y + sum_i w_i branch_i(x)`."""
        total = y
        for name, adapter in self.named():
            if name in self.weights:
                total = total + _per_row(self.weights[name], y, adapter.site.path) * adapter(module, x, y)
                if self.witness is not None:
                    self.witness(adapter)
        return total


class Adapted(Front):
    """Mixin in front of a host's class: the base forward, then the updates."""

    adapters: Adapters

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted output; the input is the first argument, by place or by name."""
        adapters: Adapters = self._modules["adapters"]  # type: ignore[attr-defined]
        if adapters.fast is not None and len(args) == 1 and not kwargs:
            fast = adapters.fast(cast(nn.Module, self), args[0])
            if fast is not None:
                if adapters.witness is not None:
                    for adapter in adapters.by_name.values():
                        adapters.witness(cast(Adapter, adapter))
                return fast
        y: Any = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(y, Tensor):
            path = self.adapters.named()[0][1].site.path
            raise AttachError(
                f"{path} gives back a {type(y).__name__}, not a tensor, so nothing can be added to it; "
                "name the layers inside it"
            )
        x = args[0] if args else next(iter(kwargs.values()))
        return adapters(self, x, y)  # type: ignore[no-any-return]

    def base_forward(self, x: Tensor) -> Tensor:
        """Return the output without the updates."""
        y: Tensor = super().forward(x)  # type: ignore[misc]
        return y


def attached(model: nn.Module, *, acting: bool = False) -> Iterator[tuple[str, Adapter]]:
    """Yield every update in a model with its adapter's name, in the model's order; if `acting`, those that act now."""
    for module in model.modules():
        if isinstance(module, Adapted):
            for name, adapter in module.adapters.named():
                if not acting or name in module.adapters.weights:
                    yield name, adapter


def swap_in(module: nn.Module, host: Host) -> Adapters:
    """Make `module` an adapted one (once) and return its updates."""
    if not isinstance(module, Adapted):
        module.adapters = Adapters(host).train(module.training)
        for part, mixin in _fronts(host, module):
            put_in_front(part, mixin)
    return cast(Adapters, module.adapters)


def swap_out(module: nn.Module) -> None:
    """Give `module` its own class back, without updates: the inverse of `swap_in`."""
    if isinstance(module, Adapted):
        host = module.adapters.host
        del module.adapters
        for part, mixin in _fronts(host, cast(nn.Module, module)):
            take_from_front(part, mixin)


def _fronts(host: Host, module: nn.Module) -> list[tuple[nn.Module, type[Front]]]:
    return [(module, Adapted)] if host.fronts is None else host.fronts(module)


def _place(part: Tensor, axis: int, rows: tuple[int, int], like: Tensor) -> Tensor:
    """Return `part` at `rows` of `axis` (negative), zero elsewhere, shaped like `like`."""
    return F.pad(part, [0, 0] * (-axis - 1) + [rows[0], like.shape[axis] - rows[1]])


def _per_row(weight: Weight, y: Tensor, path: str) -> Weight:
    """Return a weight that broadcasts over `y (batch, ...)`."""
    if not isinstance(weight, Tensor) or weight.dim() == 0:
        return weight
    if weight.shape[0] != y.shape[0]:
        raise AttachError(
            f"{path}: weights for {weight.shape[0]} rows meet a batch of {y.shape[0]}; "
            "give one weight per row of the batch (times the beams, when generating with beams)"
        )
    return weight.to(y.dtype).view(-1, *[1] * (y.dim() - 1))


__all__ = ["Adapted", "Adapter", "Adapters", "Weight", "attached", "swap_in", "swap_out"]
