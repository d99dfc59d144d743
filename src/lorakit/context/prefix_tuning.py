"""Prefix tuning: trained keys and values that every block finds in its cache, before those of the input.

`prefix (tokens, L * 2 * heads * width)` holds for each position the key and the value of each block, in PEFT's order
(arXiv 2101.00190, section 4.2). With `hidden`, section 4.3's reparametrisation: the same values come from a two-layer
perceptron, `W2 tanh(W1 e + b1) + b2` for each of the `seeds` e, while training; `trimmed` keeps what it gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.checks import check_whole
from lorakit.core.method import Call, Context, Start, Tensors
from lorakit.core.peft_form import PeftForm, prompt_embeddings
from lorakit.core.site import Decl, Role, Site


@dataclass(frozen=True)
class PrefixTuning(Context):
    """Let every block find `tokens` trained keys and values in its cache; `hidden` is the width of their perceptron."""

    tokens: int = 16
    hidden: int | None = None

    name: ClassVar[str] = "prefix-tuning"
    paper: ClassVar[str] = "arXiv 2101.00190"
    formula: ClassVar[str] = "block i attends to [K_i; K(x)], [V_i; V(x)], K_i, V_i (tokens, keys)"
    count: ClassVar[str] = (
        "2 * n * tokens * k if hidden is None else (tokens + hidden) * k + hidden + 2 * n * k * (hidden + 1)"
    )
    where: ClassVar[Literal["input", "blocks", "cache"]] = "cache"
    peft: ClassVar[PeftForm | None] = prompt_embeddings(
        "PREFIX_TUNING", "prefix", "encoder_hidden_size", "prefix_projection"
    )

    def __post_init__(self) -> None:
        check_whole("tokens", self.tokens)
        if self.hidden is not None:
            check_whole("hidden", self.hidden)

    def lengths(self) -> tuple[int, int]:
        """Return `(tokens, 0)`."""
        return self.tokens, 0

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare 2 L parameters a key and position, or those of the perceptron that makes them."""
        keys = math.prod(site.kernel)
        width = site.in_ * 2 * keys
        if self.hidden is None:
            return {"prefix": Decl((self.tokens, width), Role.TOKEN)}
        return {
            "seeds": Decl((self.tokens, keys), Role.TOKEN),
            "w1": Decl((self.hidden, keys), Role.DOWN),
            "b1": Decl((self.hidden,), Role.GAIN),
            "w2": Decl((width, self.hidden), Role.UP),
            "b2": Decl((width,), Role.GAIN),
        }

    def init(self, p: Tensors, start: Start) -> None:
        """Start as PEFT does: N(0, 1), and torch's linear layers; the first forward is not the base's."""
        nn.init.normal_(p["prefix"] if self.hidden is None else p["seeds"], generator=start.rng)
        if self.hidden is not None:
            for weight, bias in (("w1", "b1"), ("w2", "b2")):
                bound = 1 / math.sqrt(p[weight].shape[1])
                nn.init.uniform_(p[weight], -bound, bound, generator=start.rng)
                nn.init.uniform_(p[bias], -bound, bound, generator=start.rng)

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return keys and values, `(tokens, L * 2 * heads * width)`."""
        return self.prefix(p)

    def letters(self, site: Site) -> dict[str, int]:
        """Return k of the count: the width of a block's keys."""
        return {"k": math.prod(site.kernel)}

    def trimmed(self, site: Site, p: Tensors) -> tuple[PrefixTuning, Tensors]:
        """Return the prefix without its perceptron; keys and values are the same."""
        return replace(self, hidden=None), {"prefix": self.prefix(p)}

    def prefix(self, p: Tensors) -> Tensor:
        """Return the trained prefix, or what the perceptron makes of its seeds."""
        if self.hidden is None:
            return p["prefix"]
        return F.linear(F.linear(p["seeds"], p["w1"], p["b1"]).tanh(), p["w2"], p["b2"])
