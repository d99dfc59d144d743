"""Many adapters on one base, chosen token by token as data: no attach, no detach, no copy of the base.

`Bank(model)` makes a `Place` of every layer an update may sit on. An adapter is prepared once, off the engine's thread,
into pairs `(down, up)` per layer; a step then only says which tokens are whose. What all decoded sequences share is one
product, what differs stands side by side in memory, row by row (kernels/grouped.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lorakit.core.fronts import put_in_front, take_from_front
from lorakit.core.site import Site
from lorakit.kernels import compiled, prepacked
from lorakit.serving.batching.place import Banked, Choice, Place, Prepared, Route, Span

KINDS = frozenset({"linear", "transposed-linear", "embedding"})
RESIDENT = 512 << 20
"""Bytes the rows of all layers may take together; above, sequences are gathered adapter by adapter instead."""
Groups = tuple[tuple[Tensor, Choice], ...]
"""Decoded rows by who acts on them."""
_STALE = Choice(Prepared("", {}))
"""Whose factors are in a row that must be written before it is used."""


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
        if self._device.type == "cpu":
            compiled.prepare()
        self._held: list[Prepared] = []
        self._seated: list[Choice | None] = [_STALE] * rows
        self._made, self._rows = (0, False), False
        self._begun: tuple[Choice | None, ...] | None = None

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
        """Take an adapter in, before its first step; raises, and holds what it held, where no memory is left for it."""
        self._held.append(adapter)
        try:
            self._fit()
        except BaseException:
            self._held.remove(adapter)
            self._make_rows(0, 0, False)
            self._rows, self._made = False, (-1, False)  # made anew the next time; until then rows are gathered
            raise

    def drop(self, adapter: Prepared) -> None:
        """Let an adapter go, after its last step."""
        self._held.remove(adapter)
        self._seated = [c if c is None or c.adapter is not adapter else _STALE for c in self._seated]
        self._fit()

    def begin(self, decoded: Sequence[Choice | None], pieces: Sequence[tuple[int, Choice | None, bool]]) -> None:
        """Say whose the tokens of the coming step are.

        Args:
            decoded: the choice of each decoded sequence, in the order of its tokens.
            pieces: `(tokens, choice, ends)` of each piece of a prompt; the head sees the last token where it ends.
        """
        if not pieces and tuple(decoded) == self._begun:
            return
        self._begun = None if pieces else tuple(decoded)
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
        body = _route(at, rows, groups, spans)
        last_of_each = _route(head, rows, groups, ends)
        embedding = _route(at, looked_up, groups, spans)
        for place in self.places.values():
            place.take(last_of_each if place.head else embedding if place.site.kind == "embedding" else body)

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
        self._begun = None
        rank = max((adapter.rank for adapter in self._held), default=0)
        stretched = any(adapter.stretched for adapter in self._held)
        if (rank, stretched) == self._made:
            return
        places = self._by_row()
        size = sum(4 * self._count * rank * (place.site.in_ + place.site.height) for place in places)
        self._rows, self._made = 0 < size <= RESIDENT, (rank, stretched)
        self._make_rows(self._count if self._rows else 0, rank, stretched)

    def _make_rows(self, count: int, rank: int, stretched: bool) -> None:
        self._seated = [_STALE] * self._count
        for place in self._by_row():
            place.make_rows(count, rank, stretched)

    def _unpack(self, place: Place) -> None:
        weight = place.module._parameters["weight"]
        assert weight is not None
        canonical = place.weight()
        place.packed = None
        if weight.numel() == 0:
            weight.data = canonical.T.contiguous() if place.site.kind == "transposed-linear" else canonical


def _route(tokens: int, rows: tuple[int, int, Groups], groups: Groups, spans: list[Span]) -> Route | None:
    """Return the route of so many tokens, or None where nobody acts on any of them."""
    choices = frozenset([*(choice for _, choice in groups), *(span.choice for span in spans)])
    return Route(tokens, *rows, _merged(spans), choices) if choices else None


def _merged(spans: list[Span]) -> tuple[Span, ...]:
    """Return the spans with neighbours of one choice joined."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].stop == span.start and joined[-1].choice == span.choice:
            joined[-1] = Span(joined[-1].start, span.stop, span.choice)
        else:
            joined.append(span)
    return tuple(joined)


def _gather(decoded: Sequence[Choice | None], device: torch.device) -> Groups:
    """Return each choice with the rows it acts on."""
    at: dict[Choice, list[int]] = {}
    for row, choice in enumerate(decoded):
        if choice is not None:
            at.setdefault(choice, []).append(row)
    return tuple((torch.tensor(rows, device=device), choice) for choice, rows in at.items())
