"""A LoRA out of a model that was tuned whole: of each weight's change `W' - W` the nearest product of r directions.

Both checkpoints are read tensor by tensor, so memory is bounded by the largest weight and its decomposition. Whatever
changed beside the adapted weights (norms, biases, embeddings) is either kept whole or counted as left out: a low error
of the weights says nothing of an adapter that lost a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.combining.change import Pair, update_of
from lorakit.combining.how import balanced, check_rank, own_rank, rank_for
from lorakit.combining.summary import exactly
from lorakit.core.approximation import Loss, total
from lorakit.core.as_lora import plain_lora, plain_spec
from lorakit.core.init import by_group, leading
from lorakit.core.site import Site, Skeleton
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.state import AdapterState, Purpose, Update
from lorakit.core.targets import resolve
from lorakit.errors import CombineError, RecipeError, SpecError, grouped, listing
from lorakit.inject.bases import PROBES, known_by
from lorakit.inject.sites import sites
from lorakit.training.dense_weights import LYING, canonical, probed
from lorakit.training.stored_tensors import StoredTensors
from lorakit.training.tuned import Twin, Twins, empty

EXACT, ITERATIONS = 1024, 8
"""The shorter side up to which a weight's SVD is exact, and the rounds of a randomised one beyond it."""


@dataclass(frozen=True, eq=False)
class Extracted:
    """The adapter, and what it is not.

    `losses` is `|D - B A|_F` beside `|D|_F`, `D = W' - W`, by key of each site, of what is stored. `left` has the size
    of the change of every other tensor that changed, by its name: what the adapter has not.
    """

    state: AdapterState
    losses: Mapping[str, Loss]
    left: Mapping[str, float]

    @property
    def error(self) -> float:
        """Return the relative error of the adapted weights' change, all as one long vector."""
        return total(self.losses)

    @property
    def missing(self) -> float:
        """Return what is missing of the whole change: the error of the weights and everything left out."""
        parts = {**self.losses, **{name: Loss(size, size) for name, size in self.left.items()}}
        return total(parts)


@torch.no_grad()
def extract(
    tuned: str | AdapterState,
    base: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Targets | None = None,
    whole: bool = False,
    dtype: torch.dtype = torch.float32,
    purpose: Purpose | None = None,
    done: Callable[[str], None] = lambda name: None,
) -> Extracted:
    """Return the LoRA nearest to what full fine-tuning did to a base, `B A ~ W' - W`, and what it leaves out.

    Of each weight `B A` are the leading singular triplets of its change (Eckart and Young 1936), exact for a weight of
    up to 1,024 on its shorter side or with `energy`, and else by randomised subspace iteration (Halko et al., arXiv
    0909.4061, algorithm 4.4); the error is that of what is stored, whichever it was.

    Args:
        tuned: a checkpoint of the same architecture, or an adapter whose tensors were trained whole.
        base: what it was tuned from.
        rank: the most directions of each weight.
        energy: the share of the squared size of each weight's change to keep, with the fewest directions.
        targets: which layers; every linear layer but the head by default.
        whole: also keep every other parameter that changed as it is. A bias of an adapted layer cannot be kept, nor a
            buffer, nor a part of a stacked parameter: those are always in `left`.
        dtype: what the factors are stored in.
        purpose: what the tuned model is for; a classifier's head, which the base has not, is always kept.
        done: called with the name of each tensor that was compared.

    Raises:
        SpecError: neither rank nor energy, both, or one that cannot be; a rank that groups do not divide.
        RecipeError: models of other architectures or tasks, packed ones; layers whose weight lies in no tensor of its
            own, or is tied to another.
        AdapterFileError: a run on another base.
        CombineError: a tuned model that is its base, that has parted tied weights, or that holds NaN or infinity; an
            adapter with updates; factors beyond what `dtype` holds.
    """
    check_rank(rank, energy)
    if rank is None and energy is None:
        raise SpecError("extract how much? give rank, or energy, the share of the squared size to keep, 0.9 for one")
    labels = purpose.labels if purpose is not None else ()
    model = empty(base, labels)
    skeleton, wanted = sites(model), targets or Targets()
    pairs = Twins(tuned, base, labels, skeleton.heads, model)
    adapted = _layers(wanted, skeleton, pairs.before, base, rank)
    found = _Changes(rank, energy, dtype, whole)
    for twin in pairs:
        found.add(twin, adapted.get(twin.name, ()))
        done(twin.name)
    updates = found.settled(base, wanted)
    spec = AdapterSpec(plain_lora(1), wanted, train=_modules(found.kept))
    if len(updates) < sum(map(len, adapted.values())):
        spec = replace(spec, targets=exactly(updates))
    known = [site.path for site in known_by(skeleton) if f"{site.path}.weight" in pairs.before][:PROBES]
    state = AdapterState(plain_spec(spec, updates), updates, found.kept, probed(base, pairs.before, known), purpose)
    return Extracted(state, found.losses, found.left)


class _Changes:
    """What changed, as it is found: the updates and their losses, tensors to keep whole, and the size of the others."""

    def __init__(self, rank: int | None, energy: float | None, dtype: torch.dtype, whole: bool) -> None:
        self._rank, self._energy, self._dtype, self._whole = rank, energy, dtype, whole
        self._updates: list[Update] = []
        self._rng = torch.Generator().manual_seed(0)
        self._problems: list[str] = []
        self._others: dict[str, Tensor] = {}
        self.losses: dict[str, Loss] = {}
        self.kept: dict[str, Tensor] = {}
        self.left: dict[str, float] = {}

    def add(self, twin: Twin, own: Sequence[Site]) -> None:
        """Take what a tensor changed by: as updates at its sites, as it is, or as the size of what is left out."""
        new, old = twin.new, twin.old
        if not new.is_floating_point():
            if old is not None and not torch.equal(old, new):
                self._problems.append(f"{twin.name}: whole numbers, which differ")
        elif not (new.isfinite().all() and (old is None or old.isfinite().all())):
            self._problems.append(f"{twin.name}: holds NaN or infinity")
        elif old is None:
            self.kept[twin.name] = new
        elif not _same(old, new):
            left = new.double() - old.double()
            for site in own:
                self._update(site, canonical(site, new) - canonical(site, old))
                at = slice(None) if site.rows is None else slice(*site.rows)
                (left.T if site.kind in LYING else left)[at] = 0
            if size := float(torch.linalg.vector_norm(left)):
                self.left[twin.name] = size
                if self._whole and not own and twin.parameter:
                    self._others[twin.name] = new

    def settled(self, base: str, wanted: Targets) -> tuple[Update, ...]:
        """Return the updates, once what is kept whole is no longer left out, or raise `CombineError` without any."""
        if self._problems:
            raise CombineError(f"{len(self._problems)} tensor(s) have no change:\n{listing(grouped(self._problems))}")
        if not self._updates:
            elsewhere = self.left or self.kept
            raise CombineError(
                f"none of the layers that {', '.join(wanted.include)} means differs from {base}: "
                f"{'what changed lies elsewhere' if elsewhere else 'the models are the same'}"
            )
        paths = [update.site.path for update in self._updates]
        for name, value in self._others.items():
            module = name.rpartition(".")[0]
            if not any(f"{path}.".startswith(f"{module}.") for path in paths):  # else `train` would mean the layer too
                self.kept[name] = value
                del self.left[name]
        return tuple(self._updates)

    def _update(self, site: Site, change: Float[Tensor, "out in *kernel"]) -> None:
        matrices = by_group(site, change)
        size = float(torch.linalg.vector_norm(change, dtype=torch.float64))
        if not size:  # rows of a fused layer that stayed
            return
        most = min(matrices.shape[1:])
        rank = most if self._rank is None else min(self._rank // site.groups, most)
        near = self._rank is not None and most > EXACT
        u, s, vh = leading(matrices, rank, ITERATIONS if near else None, self._rng)
        kept = rank if self._energy is None else rank_for(s.double(), self._energy)
        pair = balanced(u, s, vh, min(kept, own_rank(s, 0.0)))
        update = update_of(site, pair, self._dtype)
        if not all(tensor.isfinite().all() for tensor in update.tensors.values()):
            self._problems.append(f"{site.key}: its factors are beyond what {self._dtype} holds; take another dtype")
            return
        stored = Pair.of(*(update.tensors[name].to(matrices) for name in ("down", "up")))
        lost = torch.linalg.vector_norm(matrices - stored.left @ stored.right, dtype=torch.float64)
        self._updates.append(update)
        self.losses[site.key] = Loss(float(lost), size)


def _same(old: Tensor, new: Tensor) -> bool:
    """Return whether two tensors are equal; in other dtypes, as far as rounding to the coarser one tells."""
    if old.dtype == new.dtype:
        return torch.equal(old, new)
    coarse = max(torch.finfo(old.dtype).eps, torch.finfo(new.dtype).eps)
    return torch.allclose(old.double(), new.double(), rtol=coarse, atol=torch.finfo(torch.float16).smallest_normal)


def _layers(
    wanted: Targets, skeleton: Skeleton, before: StoredTensors, base: str, rank: int | None
) -> dict[str, list[Site]]:
    """Return the sites that are wanted by the parameter their weight is.

    Raises:
        RecipeError: weights that lie in no tensor of their own, or that another module shares: an update would act on
            one of the two.
        SpecError: a rank that groups of a convolution do not divide.
    """
    found: dict[str, list[Site]] = {}
    problems, uneven = [], []
    for match in resolve(AdapterSpec(plain_lora(1), wanted), skeleton):
        name = f"{match.site.path}.weight"
        if name not in before:
            problems.append(f"{name}: no tensor of its own")
        elif others := [alias for alias in before.aliases[name] if alias != name]:
            problems.append(f"{name}: is {others[0]} too, and an update would act on one of them")
        if rank is not None and rank % match.site.groups:
            uneven.append(f"{match.site.key}: {match.site.groups} groups")
        found.setdefault(name, []).append(match.site)
    if problems:
        raise RecipeError(f"extract: layers of {base} whose weight no update says; name others:\n{listing(problems)}")
    if uneven:
        raise SpecError(f"rank {rank} is not a multiple of the groups of these layers:\n{listing(grouped(uneven))}")
    return found


def _modules(kept: Mapping[str, Tensor]) -> list[str]:
    """Return the patterns that mean the modules of these parameters alone."""
    return [f"re:{re.escape(path)}" for path in dict.fromkeys(name.rpartition(".")[0] for name in kept)]
