"""What bottleneck adapters share: a small network with a skip connection, behind a layer or beside a module.

    serial    h <- h + W_up f(W_down h + b1) + b2        h is the layer's output (houlsby.py, pfeiffer.py, lin.py)
    parallel  h <- h + s (W_up f(W_down x + b1) + b2)    x is what the module reads (parallel.py)

`down (r, d)` = W_down and `up (d, r)` = W_up with r = d / reduction: 2 d r + r + d values an adapter, as arXiv
2106.09685, section 5.1, counts them. On the layer that leads back to the stream an adapter lies inside the residual,
before the sublayer's dropout. Activations and reductions are those of the package `adapters` 1.3, and W_up starts at 0
(its `mam_adapter` start), not at N(0, 0.02) (`bert`) or a truncated N(0, 0.01) (`houlsby`): the first forward is the
base's to the bit. None of them is a change of W, for an activation stands between, so none can be merged.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.core.checks import is_number
from lorakit.core.method import Call, Method, Start, Tensors
from lorakit.core.site import Decl, Role, Site
from lorakit.core.sublayers import LINEAR_KINDS
from lorakit.errors import SpecError, did_you_mean

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "swish": F.silu,
    "tanh": lambda x: x.tanh(),
}
_WIDEST = 64  # times the layer's own features; more is a slip of the pen


@dataclass(frozen=True)
class Bottleneck(Method):
    """What all of them share: r features between the layer's own, and an activation."""

    reduction: float = 16
    activation: str = "relu"

    kinds: ClassVar[frozenset[str]] = frozenset({*LINEAR_KINDS, "module"})
    reads: ClassVar[Literal["input", "output"]] = "output"

    def __post_init__(self) -> None:
        if not (is_number(self.reduction) and self.reduction > 0):
            raise SpecError(f"reduction must be a positive number, not {self.reduction!r}; for r features give out / r")
        if self.activation not in ACTIVATIONS:
            raise SpecError(
                f"unknown activation {self.activation!r}{did_you_mean(str(self.activation), ACTIVATIONS)}; "
                f"known: {', '.join(ACTIVATIONS)}"
            )

    def width(self, site: Site) -> int:
        """Return r."""
        return round(site.out / self.reduction)

    def check(self, site: Site) -> None:
        """Raise `SpecError` where the reduction leaves no feature."""
        super().check(site)
        if not self.width(site):
            raise SpecError(f"reduction {self.reduction:g} leaves none of {site.out} features; lower it")
        if self.reduction < 1 / _WIDEST:
            raise SpecError(
                f"reduction {self.reduction:g} widens {site.out} features to {self.width(site):,}; for r features give "
                "out / r"
            )

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return the bottleneck of the output."""
        return self.through(p, output(call))

    @abstractmethod
    def through(self, p: Tensors, h: Float[Tensor, "... d"]) -> Float[Tensor, "... out"]:
        """Return what the small network makes of h."""


@dataclass(frozen=True)
class TwoProjections(Bottleneck):
    """A bottleneck of two dense projections with biases."""

    formula: ClassVar[str] = "h <- h + W_up f(W_down h + b1) + b2"
    count: ClassVar[str] = "(2 * m + 1) * round(m / reduction) + m"
    normed: ClassVar[bool] = False
    """Whether a LayerNorm of its own comes first."""

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare 2 d r + r + d values, and 2 d for a norm; what reads the input takes the input's width."""
        r, into = self.width(site), site.in_ if self.reads == "input" else site.out
        norm = {"gain": Decl((into,), Role.GAIN), "shift": Decl((into,), Role.GAIN)} if self.normed else {}
        return {
            **norm,
            "down": Decl((r, into), Role.DOWN),
            "down_bias": Decl((r,), Role.DOWN),
            "up": Decl((site.out, r), Role.UP),
            "up_bias": Decl((site.out,), Role.UP),
        }

    def init(self, p: Tensors, start: Start) -> None:
        """Start at 0: W_down ~ U(-1/sqrt(d), 1/sqrt(d)), W_up, both biases 0, the norm the plain one."""
        for name, values in p.items():
            nn.init.ones_(values) if name == "gain" else nn.init.zeros_(values)
        nn.init.kaiming_uniform_(p["down"], a=math.sqrt(5), generator=start.rng)

    def through(self, p: Tensors, h: Float[Tensor, "... d"]) -> Float[Tensor, "... out"]:
        """Return `W_up f(W_down h + b1) + b2`."""
        narrow = ACTIVATIONS[self.activation](F.linear(h, p["down"], p["down_bias"]))
        return F.linear(narrow, p["up"], p["up_bias"])


def output(call: Call) -> Tensor:
    """Return the layer's output with its bias, at this update's rows."""
    return call.y if call.rows is None else call.y[..., call.rows[0] : call.rows[1]]
