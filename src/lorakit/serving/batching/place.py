"""One layer that serves many adapters: its own output, then what each token's adapter adds to it.

`Banked` stands in front of the layer's class. What a step asks of the layer is decided once, when the step's route is
taken, and not at every call: on a processor a call of a thin product costs no more than the questions before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.fronts import Front
from lorakit.core.registry import host_at
from lorakit.core.site import Site
from lorakit.errors import ServingError
from lorakit.kernels import grouped, prepacked


class Pair(NamedTuple):
    """What an adapter adds at one layer: `y + x down^T up`, `down (r, in)`, `up (r, out)`, every scale folded in.

    With `stretch (out,)`, g - 1 of DoRA, `y + stretch y0 + x down^T up` and `up` has g folded in; y0 is y without bias.
    """

    down: Tensor
    up: Tensor
    stretch: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Prepared:
    """An adapter as the bank serves it: a pair for each layer, by path."""

    digest: str
    pairs: Mapping[str, Pair]

    @cached_property
    def rank(self) -> int:
        """Return the highest rank."""
        return max((len(pair.down) for pair in self.pairs.values()), default=0)

    @cached_property
    def stretched(self) -> bool:
        """Return whether a layer's output is stretched."""
        return any(pair.stretch is not None for pair in self.pairs.values())

    @cached_property
    def bytes(self) -> int:
        """Return what its tensors take."""
        return sum(t.numel() * t.element_size() for pair in self.pairs.values() for t in pair if t is not None)


class Choice(NamedTuple):
    """Which adapter acts on a sequence, and how strongly."""

    adapter: Prepared
    scale: float = 1.0


class Span(NamedTuple):
    """Neighbouring tokens of one choice."""

    start: int
    stop: int
    choice: Choice


@dataclass(frozen=True)
class Route:
    """Which tokens of a step are whose: the first `rows` by row, up to `rank`, some gathered, the rest in spans."""

    tokens: int
    rows: int = 0
    rank: int = 0
    gathered: tuple[tuple[Tensor, Choice], ...] = ()
    spans: tuple[Span, ...] = ()
    choices: frozenset[Choice] = frozenset()
    """Everybody who acts on any token."""


class Banked(Front):
    """Mixin in front of a layer's class: its own output, then what the adapters of the step add."""

    renames = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the output with each token's own adapter."""
        place: Place = self.__dict__["banked"]
        y: Tensor = super().forward(x) if place.packed is None else prepacked.product(x, place.packed, place.bias)  # type: ignore[misc]
        if place.work is not None:
            place.work(x, y)
        return y


@dataclass(eq=False)
class Place:
    """One layer of the bank."""

    site: Site
    module: nn.Module
    head: bool
    packed: Tensor | None = None
    bias: Tensor | None = None
    work: Callable[[Tensor, Tensor], None] | None = None
    """Adds to `y` what the adapters of the step add, given `x`; None where nothing acts."""
    whole: bool = True
    """Whether the layer sees every token of a step, in order; a layer of a routed expert does not."""
    down: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))
    up: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))
    stretch: Tensor | None = None
    filled: list[int] = field(default_factory=list)
    """The rank of the factors in each row, beyond which it is zeros."""

    @cached_property
    def like(self) -> Tensor:
        """Return an empty tensor where the layer is, in the dtype adapters multiply in: fp32, or a wider base's."""
        own = next(iter(self.module.parameters()))
        wide = torch.promote_types(own.dtype, torch.float32) if own.is_floating_point() else torch.float32
        return own.new_empty(0, dtype=wide)

    @torch.no_grad()
    def weight(self) -> Tensor:
        """Return the layer's weight in canonical layout, also where only the packed one is left."""
        if self.packed is not None:
            return prepacked.unpacked(self.packed)
        return host_at(self.site, self.module).store.read(self.module).detach()

    def take(self, route: Route | None) -> None:
        """Decide what the coming step's calls of this layer do."""
        self.work = None
        if route is None:
            return
        acting = [pair for choice in route.choices if (pair := choice.adapter.pairs.get(self.site.path)) is not None]
        if not acting:
            return
        self.work = partial(self._add, route)
        if self.site.kind == "embedding" or any(pair.stretch is not None for pair in acting):
            return
        if route.rows == route.tokens:
            down, up = self.down[: route.rows, : route.rank], self.up[: route.rows, : route.rank]
            self.work = lambda x, y: grouped.rows(y, x, down, up)
        elif len(route.spans) == 1 and route.spans[0][:2] == (0, route.tokens):
            choice = route.spans[0].choice
            pair, scale = choice.adapter.pairs[self.site.path], choice.scale
            self.work = lambda x, y: grouped.span(y, x, pair.down, pair.up, scale)

    def seat(self, row: int, choice: Choice | None) -> None:
        """Write a row's own factors into the rows; zeros where nothing acts."""
        pair = None if choice is None else choice.adapter.pairs.get(self.site.path)
        rank, before = 0 if pair is None else len(pair.down), self.filled[row]
        self.filled[row] = rank
        if before > rank:
            self.down[row, rank:before] = 0
            self.up[row, rank:before] = 0
        if pair is not None and choice is not None:
            self.down[row, :rank] = pair.down
            torch.mul(pair.up, choice.scale, out=self.up[row, :rank])
        if self.stretch is not None:
            self.stretch[row] = 0.0
            if pair is not None and choice is not None and pair.stretch is not None:
                torch.mul(pair.stretch, choice.scale, out=self.stretch[row])

    def make_rows(self, count: int, rank: int, stretched: bool) -> None:
        """Make room for `count` rows of up to `rank`."""
        like, self.filled = self.like, [0] * count
        self.down = like.new_zeros(count, rank, self.site.in_)
        self.up = like.new_zeros(count, rank, self.site.height)
        self.stretch = like.new_zeros(count, self.site.height) if stretched else None

    def _add(self, route: Route, x: Tensor, y: Tensor) -> None:
        """Add what each token's adapter adds, in place, whatever the mixture."""
        flat = y.view(-1, y.shape[-1])
        if flat.shape[0] != route.tokens:
            raise ServingError(
                f"{self.site.path} saw {flat.shape[0]} of {route.tokens} tokens, so none knows its adapter"
            )
        given = x.reshape(-1) if self.site.kind == "embedding" else x.reshape(-1, x.shape[-1])
        if route.rows:
            self._rows(given[: route.rows], flat[: route.rows], route.rank)
        for at, choice in route.gathered:
            if (pair := choice.adapter.pairs.get(self.site.path)) is not None:
                self._gathered(given, flat, at, pair, choice.scale)
        for start, stop, choice in route.spans:
            if (pair := choice.adapter.pairs.get(self.site.path)) is not None:
                self._span(given[start:stop], flat[start:stop], pair, choice.scale)

    def _rows(self, x: Tensor, y: Tensor, rank: int) -> None:
        n = y.shape[0]
        if self.stretch is not None:
            self._stretch(y, self.stretch[:n])
        grouped.rows(y, x, self.down[:n, :rank], self.up[:n, :rank])

    def _span(self, x: Tensor, y: Tensor, pair: Pair, scale: float) -> None:
        if pair.stretch is not None:
            self._stretch(y, scale * pair.stretch)
        if self.site.kind == "embedding":
            y += (self._looked_up(x, pair) @ pair.up).mul_(scale).to(y.dtype)
        else:
            grouped.span(y, x, pair.down, pair.up, scale)

    def _gathered(self, x: Tensor, y: Tensor, at: Tensor, pair: Pair, scale: float) -> None:
        if pair.stretch is not None:
            y[at] += (scale * pair.stretch * self._unbiased(y[at])).to(y.dtype)
        if self.site.kind == "embedding":
            y[at] += (self._looked_up(x[at], pair) @ pair.up).mul_(scale).to(y.dtype)
        else:
            grouped.scattered(y, x, at, pair.down, pair.up, scale)

    def _stretch(self, y: Tensor, by: Tensor) -> None:
        y += (by * self._unbiased(y)).to(y.dtype)

    def _unbiased(self, y: Tensor) -> Tensor:
        bias = self.module._parameters.get("bias")
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        return wide if bias is None else wide - bias

    def _looked_up(self, ids: Tensor, pair: Pair) -> Tensor:
        found = F.embedding(ids, pair.down.mT)
        scale = getattr(self.module, "embed_scale", None)
        return found if scale is None else found * scale
