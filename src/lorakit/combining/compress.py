"""Smaller adapters with a stated error: fewer directions, shared out among all weights, and fewer bits for each.

The nearest product of r directions has the error `sqrt(sum_(i > r) sigma_i^2)` (Eckart and Young 1936). With a budget
of bytes for the whole adapter, a direction of weight l saves `sigma_i^2` of squared error for `m_l + n_l` numbers, so
the directions with the most of it for each byte are kept: within a weight they come in order, and the squared error is
the least for the bytes that are used.

In 8 bits a factor is integers, or numbers of 3 bits and an exponent, times one scale, which is put into alpha: other
tools read such a file as they read any, and get what is stated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.combining.change import Change, Pair, added, dense, triplets
from lorakit.combining.how import balanced, check_rank, own_rank, rank_for, rounding
from lorakit.combining.lineup import Place, lineup
from lorakit.combining.summary import summary
from lorakit.core.approximation import Loss, total
from lorakit.core.factored import factored_values
from lorakit.core.method import LowRank
from lorakit.core.spec import method_from_json
from lorakit.core.state import AdapterState, Update, expect_adapter
from lorakit.errors import CombineError, SpecError, did_you_mean, grouped, listing

STORED = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
"""What the numbers of a factor can be kept in."""
_MOST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@dataclass(frozen=True, eq=False)
class Compressed:
    """A smaller adapter, and for each key of a site what it lost.

    `ranks` are what is left, 0 where an update was left out. `losses` is `|dW - dW'|_F` beside `|dW|_F`, and `bounds`
    the largest singular value of `dW - dW'` beside that of dW: on an input x of any kind the output moves by at most
    `bound |x|`. Both are of what is stored, rounding included. `bytes` are those of all tensors.
    """

    state: AdapterState
    dtype: torch.dtype | None
    ranks: Mapping[str, int]
    losses: Mapping[str, Loss]
    bounds: Mapping[str, Loss]
    bytes: int

    @property
    def error(self) -> float:
        """Return the relative error of all weights as one long vector."""
        return total(self.losses)


@torch.no_grad()
def compress(
    state: AdapterState,
    *,
    rank: int | None = None,
    energy: float | None = None,
    size: int | None = None,
    dtype: str | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> Compressed:
    """Return the nearest plain LoRA with fewer directions, in fewer bits, or both, and what that costs.

    Args:
        state: an adapter whose updates are changes of weights.
        rank: the most directions of each weight.
        energy: the share of each weight's squared size to keep, with the fewest directions.
        size: the most bytes of all its tensors; directions go where they keep the most, so a weight may lose all.
        dtype: what its numbers are kept in, a key of `STORED`; as they are if None.
        base: the base's canonical weights by key of their site, for a dW that depends on them.

    Raises:
        SpecError: more than one of rank, energy and size; a dtype that is not known; nothing asked for.
        CombineError: a size no adapter can have, updates without a dW, tensors that do not fit or are not finite.
    """
    expect_adapter(state)
    kept_in = _checked(rank, energy, size, dtype)
    places = lineup([state], [1.0])
    if not places:
        kept = f" but {len(state.trained)} tensors trained whole: lorakit extract makes a LoRA of them"
        raise CombineError(f"the adapter has no update to compress{kept if state.trained else ''}")
    parts, problems = [], []
    for place in places:
        try:
            parts.append(_Part(place, base or {}, kept_in))
        except CombineError as problem:
            problems.append(f"{place.site.key}: {problem}")
    if problems:
        raise CombineError(
            f"{len(problems)} of {len(places)} weights cannot be compressed:\n{listing(grouped(problems))}"
        )
    if size is not None:
        whole = sum(tensor.nbytes for tensor in state.trained.values())
        ranks = _within(parts, size - whole)
        if not any(ranks):
            stays = f"tensors trained whole take {whole:,} of them and stay, and " if whole else ""
            least = min(part.cost for part in parts)
            raise CombineError(
                f"{size:,} bytes hold nothing of it: {stays}a single direction of a weight takes {least:,}"
            )
    else:
        ranks = [part.rank(rank, energy) for part in parts]
    made = {part.key: part.cut(r) for part, r in zip(parts, ranks, strict=True)}
    updates = tuple(cut.update for cut in made.values() if cut.update is not None)
    slim = summary([state], updates, state.trained)
    return Compressed(
        slim,
        kept_in,
        dict(zip(made, ranks, strict=True)),
        {key: cut.loss for key, cut in made.items()},
        {key: cut.bound for key, cut in made.items()},
        stored_bytes(slim, kept_in),
    )


def stored_bytes(state: AdapterState, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of an adapter's tensors, those of its updates in `dtype`; a shared tensor counts once."""
    own = {id(tensor): tensor for update in state.updates for tensor in update.tensors.values()}
    updates = sum(tensor.numel() * (tensor.dtype if dtype is None else dtype).itemsize for tensor in own.values())
    return updates + sum(tensor.nbytes for tensor in state.trained.values())


@dataclass(frozen=True, eq=False)
class _Cut:
    update: Update | None
    loss: Loss
    bound: Loss


class _Part:
    """One weight while it is decided how many of its directions stay: its change, and the sizes of its directions."""

    def __init__(self, place: Place, base: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        self.place, self.key = place, place.site.key
        self.dtype = place.kept_in if dtype is None else dtype
        (term,) = place.terms(base)
        self.change: Change = term.change
        self.nothing = rounding(term.change, [term])
        left, right = (term.change.left, term.change.right) if isinstance(term.change, Pair) else (term.change,) * 2
        self.groups = len(left)
        self.cost = self.groups * (left.shape[1] + right.shape[2]) * self.dtype.itemsize
        self.sigma = triplets(term.change)[1]

    def rank(self, rank: int | None, energy: float | None) -> int:
        """Return how many directions of each group stay, at least one."""
        acting = own_rank(self.sigma, self.nothing)
        if energy is not None:
            return min(rank_for(self.sigma, energy), acting)
        return acting if rank is None else min(max(1, rank // self.groups), acting)

    def cut(self, rank: int) -> _Cut:
        """Return the update of so many directions, and what it lost."""
        if not rank:
            largest = Loss(float(self.sigma.max()), float(self.sigma.max()))
            norm = float(self.sigma.norm())
            return _Cut(None, Loss(norm, norm), largest)
        pair = balanced(*triplets(self.change), rank)
        update, stored = self._update(pair)
        left = _values(added([self.change, stored], [1.0, -1.0]))
        norm, most = float(left.norm()), float(left.max())
        if norm <= self.nothing:
            norm = most = 0.0
        return _Cut(update, Loss(norm, float(self.sigma.norm())), Loss(most, float(self.sigma.max())))

    def _update(self, pair: Pair) -> tuple[Update, Pair]:
        """Return a product as it is stored, and the product that this is."""
        site, place = self.place.site, self.place
        scale, kept = 1.0, []
        for factor in pair.factors:
            if self.dtype in _MOST:
                rounded, by = _in_8_bits(factor, self.dtype)
                scale *= by
            else:
                rounded = factor.to(self.dtype)
            kept.append(rounded)
        down, up = kept
        if not (down.isfinite().all() and up.isfinite().all()):
            raise CombineError(f"{self.key}: its numbers are beyond what {self.dtype} holds; take another dtype")
        stored = Pair.of(down.double(), scale * up.double())
        method = method_from_json({"name": "lora", "rank": len(down), "alpha": scale * len(down)})
        assert isinstance(method, LowRank)
        tensors = {"down": down.reshape(-1, site.in_, *site.kernel), "up": up}
        return Update(site, method, {k: t.contiguous().to(place.device) for k, t in tensors.items()}), stored


def _in_8_bits(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return the nearest numbers of 8 bits as fp32, and the scale they are to be multiplied by."""
    most = float(factor.abs().max())
    scale = most / _MOST[dtype] if most else 1.0
    scaled = (factor / scale).to(torch.float32)
    return (scaled.round() if dtype == torch.int8 else scaled.to(dtype).to(torch.float32)), scale


def _values(change: Change) -> Tensor:
    """Return the singular values of all groups."""
    if isinstance(change, Pair):
        return factored_values(*change.factors)
    values: Tensor = torch.linalg.svdvals(dense(change, torch.float64))
    return values.flatten()


def _within(parts: Sequence[_Part], size: int) -> list[int]:
    """Return how many directions of each weight fit into so many bytes with the least squared error in all."""
    worth = [
        (float(square) / part.cost, place, i)
        for place, part in enumerate(parts)
        for i, square in enumerate(part.sigma.square().sum(0)[: part.rank(None, None)])
    ]
    ranks = [0] * len(parts)
    for _, place, i in sorted(worth, key=lambda item: (-item[0], item[1], item[2])):
        cost = parts[place].cost
        if cost <= size and ranks[place] == i:
            size -= cost
            ranks[place] += 1
    return ranks


def _checked(rank: int | None, energy: float | None, size: int | None, dtype: str | None) -> torch.dtype | None:
    """Return the dtype to store, or raise `SpecError` for what cannot be asked for."""
    given = [name for name, value in (("rank", rank), ("energy", energy), ("size", size)) if value is not None]
    if len(given) > 1:
        raise SpecError(f"{' and '.join(given)} all say how much to keep; give one of them")
    if not given and dtype is None:
        raise SpecError("compress to what? give rank, energy, size, or dtype")
    check_rank(rank, energy)
    if size is not None and (not isinstance(size, int) or size <= 0):
        raise SpecError(f"size is a number of bytes above 0, not {size!r}")
    if dtype is not None and dtype not in STORED:
        raise SpecError(f"unknown dtype {dtype!r}{did_you_mean(str(dtype), STORED)}; known: {', '.join(STORED)}")
    return None if dtype is None else STORED[dtype]
