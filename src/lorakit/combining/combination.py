"""Several adapters become one, as values: `combine`, and what follows from it, `truncate` and `negate`.

Every result says how far it is from the exact weighted sum `sum_i w_i dW_i`, weight by weight and as a whole: what is
measured is what is returned, rounding included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.combining.change import Pair, added, size, update_of
from lorakit.combining.how import How, Term, rounding
from lorakit.combining.lineup import Place, checked_weights, lineup
from lorakit.combining.sparse import Dare, Ties
from lorakit.combining.summary import summary
from lorakit.combining.sums import Concat, Factorwise, Linear, Svd
from lorakit.combining.trained import combined_whole
from lorakit.core.approximation import Loss, total
from lorakit.core.state import AdapterState, Update
from lorakit.errors import CombineError, SpecError, did_you_mean, grouped, listing

HOWS: dict[str, type[How]] = {cls.name: cls for cls in (Linear, Concat, Svd, Ties, Dare, Factorwise)}
"""Every way to combine by name."""


@dataclass(frozen=True, eq=False)
class Combined:
    """One adapter made of several, and by key of each site what it differs by.

    `losses` is `|result - sum_i w_i dW_i|_F` beside `|sum_i w_i dW_i|_F`. `cuts` is what the rank left out of what the
    way had made, beside the size of that: all of the loss for svd, the lesser part of it for ties and dare, which do
    not mean to be the sum.
    """

    state: AdapterState
    losses: Mapping[str, Loss]
    cuts: Mapping[str, Loss]

    @property
    def error(self) -> float:
        """Return the relative error against the exact weighted sum, of all weights as one long vector."""
        return total(self.losses)

    @property
    def cut(self) -> float:
        """Return the part of what the way made that the rank left out, of all weights as one long vector."""
        return total(self.cuts)


@torch.no_grad()
def combine(
    states: Sequence[AdapterState],
    how: How | str = "linear",
    weights: Sequence[float] | None = None,
    *,
    base: Mapping[str, Tensor] | None = None,
    rng: torch.Generator | None = None,
) -> Combined:
    """Return one plain LoRA made of several adapters of one base, and how far it is from their weighted sum.

    The sum is `sum_i w_i dW_i`, each dW with its own scale: alpha / r, alpha / sqrt(r) when stabilised, of its own
    layer. It is what the adapters do attached together with `use(model, {name: w_i})`.

    Args:
        states: adapters whose updates are changes of weights; a layer that one of them leaves alone changes by 0.
        how: "linear" (exact), "concat" (exact, factors kept), `Svd(rank)`, `Ties(density)`, `Dare(density)`,
            "factorwise" (as PEFT's linear), by value or, with its defaults, by name.
        weights: one an adapter, of any sign; 1 each unless given, which is the sum.
        base: the base's own values, where they are asked for: canonical weights by key of their site for a dW such as
            DoRA's, and tensors trained whole by name for weights that do not sum to 1.
        rng: what DARE draws from.

    Raises:
        CombineError: other bases or shapes, updates without a dW, tensors that do not fit or are not finite, values of
            the base that are needed and not given; with the names of all layers concerned.
    """
    how, given, own = _how(how), checked_weights(states, weights), base or {}
    how.check(given, rng)
    places = lineup(states, given)
    trained = combined_whole(states, given, own, how.averages)
    _refuse_adapted_and_whole(places, trained)
    if not places and not trained:
        raise CombineError("none of the adapters changes anything, so there is nothing to combine")
    updates, problems = [], []
    losses: dict[str, Loss] = {}
    cuts: dict[str, Loss] = {}
    for place in places:
        key = place.site.key
        try:
            terms = place.terms(own)
            made = how.made(terms, place.dtype, rng)
            updates.append(_update(place, made.pair))
        except CombineError as problem:
            problems.append(f"{key}: {problem}")
            continue
        losses[key] = _loss(updates[-1], terms)
        if made.cut is not None:
            cuts[key] = made.cut
    if problems:
        raise CombineError(f"{len(problems)} of {len(places)} layers cannot be combined:\n{listing(grouped(problems))}")
    return Combined(summary(states, tuple(updates), trained), losses, cuts)


def truncate(
    state: AdapterState,
    rank: int | None = None,
    energy: float | None = None,
    *,
    base: Mapping[str, Tensor] | None = None,
) -> Combined:
    """Return the nearest adapter of at most `rank`, or of the lowest ranks that keep `energy`, and its error.

    The error of each layer is `sqrt(sum_(i > r) sigma_i^2)` (Eckart and Young 1936); with `energy`, each layer has the
    lowest r with `sum_(i <= r) sigma_i^2 >= energy sum_i sigma_i^2`. Takes every change of a weight, as `combine` does.

    Raises:
        CombineError: as `combine`.
        SpecError: neither rank nor energy, both, or one that cannot be.
    """
    if rank is None and energy is None:
        raise SpecError("truncate to what? give rank, or energy, the share of the squared size to keep, 0.99 for one")
    return combine([state], Svd(rank, energy), base=base)


def negate(state: AdapterState, *, base: Mapping[str, Tensor] | None = None) -> Combined:
    """Return the adapter whose dW is `-dW`: what it taught, forgotten (task arithmetic, arXiv 2212.04089, section 3).

    Raises:
        CombineError: as `combine`; a tensor trained whole becomes `2 W0 - T`, so it asks for W0 in `base`.
    """
    return combine([state], Linear(), [-1.0], base=base)


def _how(how: How | str) -> How:
    if isinstance(how, How):
        return how
    if how not in HOWS:
        raise CombineError(f"unknown way to combine {how!r}{did_you_mean(how, HOWS)}; known: {', '.join(HOWS)}")
    return HOWS[how]()


def _refuse_adapted_and_whole(places: Sequence[Place], trained: Mapping[str, Tensor]) -> None:
    """Raise `CombineError` for layers that one adapter changes and another trained whole: no one adapter does both."""
    paths = {place.site.path for place in places}
    if both := [name for name in trained if name.rpartition(".")[0] in paths]:
        raise CombineError(
            "some of the adapters change layers of which others trained a tensor whole, and one adapter does not do "
            f"both; merge one of them into the base first:\n{listing(both)}"
        )


def _update(place: Place, pair: Pair) -> Update:
    """Return the product as a plain LoRA where the place's first update is kept, in its dtype or fp32."""
    update = update_of(place.site, pair, place.dtype)
    if not all(tensor.isfinite().all() for tensor in update.tensors.values()):
        raise CombineError(f"the sum is beyond what {place.dtype} holds; lower the weights")
    return replace(update, tensors={name: tensor.to(place.device) for name, tensor in update.tensors.items()})


def _loss(update: Update, terms: Sequence[Term]) -> Loss:
    """Return how far an update is from the weighted sum of the terms, as it is stored; rounding in fp64 is none."""
    down, up = (update.tensors[name].cpu().double() for name in ("down", "up"))
    stored = Pair.of(down, up)
    changes, weights = [term.change for term in terms], [term.weight for term in terms]
    exact = added(changes, weights)
    error, whole = size(added([*changes, stored], [*weights, -1.0])), size(exact)
    nothing = rounding(exact, terms)
    return Loss(error if error > nothing else 0.0, whole if whole > nothing else 0.0)
