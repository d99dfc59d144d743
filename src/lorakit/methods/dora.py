"""DoRA: train the length and the direction of each row of a weight apart.

`W' = g V`, `V = W + dW` of the inner method, `g = m / ||V||` (arXiv 2402.09353, eq. 5): the paper's W is (in, out), so
its "column" is an output feature here, a row of the canonical weight with all of its kernel; LyCORIS norms the other
axis. `||V||` is a constant in backward (section 4.3). The branch is `(g - 1) y0 + g inner(x)`, where y0 is the base
output without bias. Dropout reaches the inner branch alone: the base path sees the whole input, as in LoRA. PEFT also
drops the input of the first term, which has the same mean and costs a second base forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.core.method import (
    Call,
    LowRank,
    Method,
    Penalised,
    Preconditioned,
    Scheduled,
    Settled,
    Start,
    Static,
    Tensors,
    Trimmed,
    per_group,
)
from lorakit.core.peft_form import LORA_NO_BEARING, PATTERNS, PeftForm, pair_from_peft, pair_to_peft
from lorakit.core.site import Decl, Role, Site
from lorakit.core.state import Update
from lorakit.errors import SpecError
from lorakit.methods.ia3 import IA3
from lorakit.methods.lora import LoRA


@dataclass(frozen=True)
class DoRA(Static):
    """Give each row of `W + dW` of the inner method a trained length m, started at the row norms it begins with."""

    inner: Static = field(default=LoRA())

    name: ClassVar[str] = "dora"
    paper: ClassVar[str] = "arXiv 2402.09353"
    formula: ClassVar[str] = "dW = g V - W, V = W + dW of inner, g = m / ||V|| per output"
    count: ClassVar[str] = "inner + m"
    peft: ClassVar[PeftForm | None] = PeftForm(
        "LORA",
        {"r": "inner.rank", "lora_alpha": "inner.alpha", "use_rslora": "inner.stabilised"},
        {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
        read=lambda method, q, embedding: _from_peft(method, q, embedding),
        write=lambda update: _to_peft(update),
        patterns=PATTERNS,
        flag="use_dora",
        settings={"init_lora_weights": True, "bias": "none"},
        no_bearing=LORA_NO_BEARING,
        dropout="lora_dropout",
        forgets=frozenset({"dilation", "padding_mode"}),
        embedding={"down": "lora_embedding_A", "up": "lora_embedding_B", "magnitude": "lora_magnitude_vector"},
        refusal=lambda site, method: _refusal(method),
    )

    def __post_init__(self) -> None:
        inner: object = self.inner
        if not isinstance(inner, Static):
            called = inner.name if isinstance(inner, Method) else repr(inner)
            raise SpecError(f"dora gives lengths to a changed weight, and {called} is no change of a weight; use lora")
        if isinstance(inner, DoRA):
            raise SpecError("dora of dora would norm the inner lengths away; give it the method inside, such as lora")
        if isinstance(inner, IA3) and inner.side == "output":
            raise SpecError("dora would norm away the scales of ia3 at the outputs; give it lora, or ia3 of side input")
        if isinstance(inner, Penalised | Scheduled | Trimmed | Preconditioned):
            raise SpecError(
                f"dora does not run the schedule, penalty or corrected gradient that {inner.name} needs; use "
                f"{inner.name} alone"
            )

    def check(self, site: Site) -> None:
        """Raise `SpecError` where the inner method does not fit."""
        super().check(site)
        self.inner.check(site)

    def settled(self, sites: Sequence[Site]) -> DoRA:
        """Return this method with its inner one settled."""
        inner = self.inner
        return replace(self, inner=cast(Static, inner.settled(sites))) if isinstance(inner, Settled) else self

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare the inner method's tensors as they are, and one length per output."""
        return {**self.inner.tensors(site), "magnitude": Decl((site.out,), Role.GAIN)}

    def init(self, p: Tensors, start: Start) -> None:
        """Start at m = ||W + dW||, so that g is 1, also where the inner method starts at another dW than 0."""
        self.inner.init({name: t for name, t in p.items() if name != "magnitude"}, start)
        p["magnitude"].copy_(self._lengths(p, start.weight))

    def delta(self, p: Tensors, weight: Tensor) -> Tensor:
        """Return `g (W + dW) - W`."""
        gain = self.gain(p, weight).view(-1, *[1] * (weight.dim() - 1))
        return gain * (weight + self.inner.delta(p, weight)) - weight

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return `(g - 1) y0 + g inner(x)`; a low-rank inner never forms its dW."""
        gain = self.gain(call.kept, call.weight)
        inner = self.inner.branch(p, call)
        return call.scale((gain - 1).to(call.y.dtype), call.y0) + call.scale(gain.to(inner.dtype), inner)

    def gain(self, p: Tensors, weight: Tensor) -> Tensor:
        """Return g, with the norm detached; a row of V that is 0 has no direction to stretch and stays 0."""
        with torch.no_grad():
            norms = self._lengths(p, weight)
        return p["magnitude"] / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def _lengths(self, p: Tensors, weight: Tensor) -> Float[Tensor, " out"]:
        """Return ||W + dW|| of each row; a low-rank dW is not formed."""
        if isinstance(self.inner, LowRank):
            return row_norms_of_sum(weight, *self.inner.factors(p))
        return row_norms(weight + self.inner.delta(p, weight))


def row_norms(weight: Float[Tensor, " out *rest"]) -> Float[Tensor, " out"]:
    """Return the Euclidean norm of each row, `(out, ...) -> (out,)`, summed in fp32 or better."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=wide)
    return norms


def row_norms_of_sum(
    weight: Float[Tensor, " out *rest"], down: Float[Tensor, " r *rest"], up: Float[Tensor, "out rg"]
) -> Float[Tensor, " out"]:
    """Return `row_norms(W + U D)` without forming `U D`, each of g groups with its own block of `D`.

    `||W + U D||^2 = ||W||^2 + 2 <U, W D^T> + <U, U (D D^T)>` per row, `W (out, n)`, `D (r, n)`, `U (out, r / g)`: two
    thin products and an r x r Gram matrix. The error is some roundings of ||W||, also where `U D` all but cancels W.
    """
    d, u = per_group(down, up)
    w = weight.reshape(*u.shape[:2], -1)
    crossed = u * (w @ d.mT.to(w.dtype)).to(u.dtype)  # a wider product would need a wide copy of a 16-bit W
    squared = u * (u @ (d @ d.mT))
    return (row_norms(weight).square() + (2 * crossed + squared).sum(-1).flatten()).clamp_min(0).sqrt()


def _to_peft(update: Update) -> Tensors:
    """Return LoRA's pair and the lengths, `(1, out, 1, ...)` at a convolution."""
    magnitude, kernel = update.tensors["magnitude"], update.site.kernel
    return {**pair_to_peft(update), "magnitude": magnitude.view(1, -1, *[1] * len(kernel)) if kernel else magnitude}


def _from_peft(method: DoRA, q: dict[str, Tensor], embedding: bool) -> Update:
    read = pair_from_peft(method, q, embedding, method.inner.rank)  # type: ignore[attr-defined]
    return Update(read.site, method, {**read.tensors, "magnitude": q["magnitude"].flatten()})


def _refusal(method: DoRA) -> str | None:
    return None if type(method.inner) is LoRA else f"PEFT has DoRA of lora alone, not of {method.inner.name}"
