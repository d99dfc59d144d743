"""Many adapters on one base, chosen token by token as data: no attach, no detach, no copy of the base.

`Bank(model)` puts `Banked` in front of every layer an update may sit on. An adapter is prepared once, off the engine's
thread, into pairs `(down, up)` per layer; a step then only says which tokens are whose. What all decoded sequences
share is one product, what differs stands side by side in memory, row by row (kernels/grouped.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.fronts import Front, put_in_front, take_from_front
from lorakit.core.registry import host_at
from lorakit.core.site import Site
from lorakit.errors import ServingError
from lorakit.kernels import grouped, prepacked

KINDS = frozenset({"linear", "transposed-linear", "embedding"})
RESIDENT = 512 << 20
"""Bytes the rows of all layers may take together; above, sequences are gathered adapter by adapter instead."""

class Pair(NamedTuple):
    """What an adapter adds at one layer: `y + x down up`, `down (in, r)`, `up (r, out)`, every scale folded in.

    With `stretch (out,)`, g - 1 of DoRA, `y + stretch y0 + x down up` and `up` has g folded in; y0 is y without bias.
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
        """Return the highest rank at a layer whose factors can stand by row."""
        return max((pair.down.shape[1] for pair in self.pairs.values()), default=0)

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


_STALE = Choice(Prepared("", {}))
"""Whose factors are in a row that must be written before it is used."""


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


class Banked(Front):
    """Mixin in front of a layer's class: its own output, then what the adapters of the step add."""

    renames = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the output with each token's own adapter."""
        place: Place = self.__dict__["banked"]
        y = super().forward(x) if place.packed is None else place.product(x)  # type: ignore[misc]
        if place.route is not None and place.used:
            place.add(x, y)
        return cast(Tensor, y)


@dataclass(eq=False)
class Place:
    """One layer of the bank."""

    site: Site
    module: nn.Module
    head: bool
    packed: Tensor | None = None
    bias: Tensor | None = None
    used: int = 0
    """How many of the adapters in memory have a pair here."""
    route: Route | None = None
    whole: bool = True
    """Whether the layer sees every token of a step, in order; a layer of a routed expert does not."""
    down: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))
    up: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))
    stretch: Tensor | None = None

    @property
    def like(self) -> Tensor:
        """Return an empty tensor where the layer is, in the dtype adapters multiply in: fp32, or a wider base's."""
        own = next(iter(self.module.parameters()))
        wide = torch.promote_types(own.dtype, torch.float32) if own.is_floating_point() else torch.float32
        return own.new_empty(0, dtype=wide)

    def product(self, x: Tensor) -> Tensor:
        """Return the layer's own output from its packed weight."""
        assert self.packed is not None
        return prepacked.product(x, self.packed, self.bias)

    @torch.no_grad()
    def weight(self) -> Tensor:
        """Return the layer's weight in canonical layout, also where only the packed one is left."""
        if self.packed is not None:
            return prepacked.unpacked(self.packed)
        return host_at(self.site, self.module).store.read(self.module).detach()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add what each token's adapter adds, in place."""
        route = self.route
        assert route is not None
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

    def seat(self, row: int, choice: Choice | None) -> None:
        """Write a row's own factors into the rows; zeros where nothing acts."""
        pair = None if choice is None else choice.adapter.pairs.get(self.site.path)
        rank = 0 if pair is None else pair.down.shape[1]
        self.down[row, :, rank:] = 0
        self.up[row, rank:] = 0
        if self.stretch is not None:
            self.stretch[row] = 0
        if pair is not None and choice is not None:
            self.down[row, :, :rank] = pair.down
            torch.mul(pair.up, choice.scale, out=self.up[row, :rank])
            if pair.stretch is not None and self.stretch is not None:
                torch.mul(pair.stretch, choice.scale, out=self.stretch[row])

    def make_rows(self, count: int, rank: int, stretched: bool) -> None:
        """Make room for `count` rows of up to `rank`."""
        like = self.like
        self.down = like.new_zeros(count, self.site.in_, rank)
        self.up = like.new_zeros(count, rank, self.site.height)
        self.stretch = like.new_zeros(count, self.site.height) if stretched else None

    def _rows(self, x: Tensor, y: Tensor, rank: int) -> None:
        n = y.shape[0]
        if self.stretch is not None:
            self._stretch(y, self.stretch[:n])
        grouped.rows(y, x, self.down[:n, :, :rank], self.up[:n, :rank])

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
        found = F.embedding(ids, pair.down)
        scale = getattr(self.module, "embed_scale", None)
        return found if scale is None else found * scale


class Bank:
    """The adapters of one base, and which of them act on the tokens of the coming step."""

    def __init__(self, model: nn.Module, found: Iterable[Site], rows: int) -> None:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        self.places: dict[str, Place] = {}
        for site in found:
            if site.kind in KINDS:
                module = model.get_submodule(site.path)
                place = Place(site, module, head=module is output)
                module.__dict__["banked"] = self.places[site.path] = place
                put_in_front(module, Banked)
        self._count, self._device = rows, next(model.parameters()).device
        self._held: list[Prepared] = []
        self._seated: list[Choice | None] = [_STALE] * rows
        self._made, self._rows = (0, False), False

    def close(self) -> None:
        """Give the layers their classes and weights back."""
        for place in self.places.values():
            if place.packed is not None:
                self._unpack(place)
            del place.module.__dict__["banked"]
            take_from_front(place.module, Banked)

    @torch.no_grad()
    def pack(self) -> int:
        """Keep plain weights in oneDNN's blocks instead, where that is faster; return how many."""
        shared: dict[int, int] = {}
        for place in self.places.values():
            weight = place.module._parameters.get("weight")
            shared[id(weight)] = shared.get(id(weight), 0) + 1
        for place in self.places.values():
            weight = place.module._parameters.get("weight")
            if place.site.kind == "embedding" or not isinstance(weight, Tensor) or not weight.is_floating_point():
                continue
            place.packed = prepacked.pack(place.weight())
            if place.packed is None:
                continue
            place.bias = place.module._parameters.get("bias")
            if shared[id(weight)] == 1:  # a head tied to the embeddings keeps the table they read
                weight.data = weight.new_empty(0)
        return sum(place.packed is not None for place in self.places.values())

    def hold(self, adapter: Prepared) -> None:
        """Take an adapter in, before its first step."""
        self._held.append(adapter)
        for path in adapter.pairs:
            self.places[path].used += 1
        self._fit()

    def drop(self, adapter: Prepared) -> None:
        """Let an adapter go, after its last step."""
        self._held.remove(adapter)
        for path in adapter.pairs:
            self.places[path].used -= 1
        self._seated = [c if c is None or c.adapter is not adapter else _STALE for c in self._seated]
        self._fit()

    def begin(self, decoded: Sequence[Choice | None], pieces: Sequence[tuple[int, Choice | None, bool]]) -> None:
        """Say whose the tokens of the coming step are.

        Args:
            decoded: the choice of each decoded sequence, in the order of its tokens.
            pieces: `(tokens, choice, ends)` of each piece of a prompt; the head sees the last token where it ends.
        """
        n, groups = len(decoded), _gather(decoded, self._device)
        spans = [Span(0, n, groups[0][1])] if len(groups) == 1 and None not in decoded else []
        by_row = self._rows and bool(groups) and not spans
        if by_row:
            self._seat(decoded)
        rank = max((choice.adapter.rank for _, choice in groups), default=0)
        rows = (n, rank, ()) if by_row else (0, 0, () if spans else groups)
        looked_up = (0, 0, groups) if by_row else rows
        ends, at, head = list(spans), n, n
        for tokens, choice, last in pieces:
            if choice is not None:
                spans.append(Span(at, at + tokens, choice))
                ends += [Span(head, head + 1, choice)] * last
            at, head = at + tokens, head + last
        routes: tuple[Route | None, ...] = (None, None, None)
        if groups or spans:
            routes = (
                Route(at, *rows, _merged(spans)),
                Route(head, *rows, _merged(ends)),
                Route(at, *looked_up, _merged(spans)),
            )
        for place in self.places.values():
            place.route = routes[1 if place.head else 2 if place.site.kind == "embedding" else 0]

    def _seat(self, decoded: Sequence[Choice | None]) -> None:
        for row, choice in enumerate(decoded):
            if self._seated[row] != choice:
                self._seated[row] = choice
                for place in self._by_row():
                    place.seat(row, choice)

    def _by_row(self) -> list[Place]:
        """Return the layers whose factors stand by row; an embedding's are as tall as the vocabulary."""
        return [place for place in self.places.values() if place.site.kind != "embedding"]

    def _fit(self) -> None:
        """Make rows as wide as the highest rank that is held."""
        rank = max((adapter.rank for adapter in self._held), default=0)
        stretched = any(adapter.stretched for adapter in self._held)
        if (rank, stretched) == self._made:
            return
        places = self._by_row()
        size = sum(4 * self._count * rank * (place.site.in_ + place.site.height) for place in places)
        self._rows, self._made = 0 < size <= RESIDENT, (rank, stretched)
        self._seated = [_STALE] * self._count
        for place in places:
            place.make_rows(self._count if self._rows else 0, rank, stretched)

    def _unpack(self, place: Place) -> None:
        weight = place.module._parameters["weight"]
        assert weight is not None
        canonical = place.weight()
        place.packed = None
        if weight.numel() == 0:
            weight.data = canonical.T.contiguous() if place.site.kind == "transposed-linear" else canonical


def _merged(spans: list[Span]) -> tuple[Span, ...]:
    """Return the spans with neighbours of one choice joined."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].stop == span.start and joined[-1].choice == span.choice:
            joined[-1] = Span(joined[-1].start, span.stop, span.choice)
        else:
            joined.append(span)
    return tuple(joined)


def _gather(decoded: Sequence[Choice | None], device: torch.device) -> tuple[tuple[Tensor, Choice], ...]:
    """Return each choice with the rows it acts on."""
    at: dict[Choice, list[int]] = {}
    for row, choice in enumerate(decoded):
        if choice is not None:
            at.setdefault(choice, []).append(row)
    return tuple((torch.tensor(rows, device=device), choice) for choice, rows in at.items())
