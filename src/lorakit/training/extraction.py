"""A LoRA out of a model that was tuned whole: of each weight's change `W' - W` the nearest product of r directions.

Both checkpoints are read tensor by tensor, so memory is bounded by the largest weight and its decomposition. Whatever
changed beside the adapted weights (norms, biases, embeddings) is either kept whole or counted as left out: a low error
of the weights says nothing of an adapter that lost a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.combining.change import Pair, update_of
from lorakit.combining.how import balanced, check_rank, own_rank, rank_for
from lorakit.combining.summary import exactly
from lorakit.core.as_lora import plain_lora, plain_spec
from lorakit.core.init import by_group, leading
from lorakit.core.nearest_lora import Loss, total
from lorakit.core.site import Site, Skeleton
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.state import AdapterState, Base, Purpose, Update
from lorakit.core.targets import resolve
from lorakit.errors import CombineError, RecipeError, SpecError, grouped, listing
from lorakit.inject.attach import PROBES, known_by, probe
from lorakit.inject.ledger import parameters_of
from lorakit.inject.sites import sites
from lorakit.training.base import build_empty
from lorakit.training.dense_weights import canonical
from lorakit.training.stored_parameters import StoredParameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXACT, ITERATIONS = 1024, 8
"""The shorter side up to which a weight's SVD is exact, and the rounds of a randomised one beyond it."""


@dataclass(frozen=True, eq=False)
class Extracted:
    """The adapter, and what it is not.

    `losses` is `|D - B A|_F` beside `|D|_F`, `D = W' - W`, by key of each site, of what is stored. `left` has the size
    of the change of every tensor that changed and is not in the adapter, and `tensors` is how many both models hold.
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
        whole: also keep every other tensor that changed as it is. A bias of an adapted layer cannot be kept.
        dtype: what the factors are stored in.
        purpose: what the tuned model is for; a classifier's head, which the base has not, is always kept.
        done: called with the name of each tensor that was compared.

    Raises:
        SpecError: neither rank nor energy, both, or one that cannot be.
        RecipeError: models of other architectures, packed ones, layers whose weight lies in no tensor of its own.
        CombineError: a tuned model that is its base, or that holds NaN or infinity.
    """
    check_rank(rank, energy)
    if rank is None and energy is None:
        raise SpecError("extract how much? give rank, or energy, the share of the squared size to keep, 0.9 for one")
    labels = purpose.labels if purpose is not None else ()
    model = _empty(base, labels)
    before = _stored(base, model)
    after = tuned.trained if isinstance(tuned, AdapterState) else _stored(tuned, _empty(tuned, labels))
    _refuse_other_architecture(tuned, base, model, before, after)
    skeleton, wanted = sites(model), targets or Targets()
    adapted = _layers(wanted, skeleton, before, base)
    found = _Changes(rank, energy, dtype, whole)
    for name, new in after.items():
        found.add(name, new, before.get(name), adapted.get(name, ()))
        done(name)
    updates = found.settled(base, wanted)
    spec = AdapterSpec(plain_lora(1), wanted, train=_modules(found.kept))
    if len(updates) < sum(map(len, adapted.values())):
        spec = replace(spec, targets=exactly(updates))
    known = [site.path for site in known_by(skeleton) if f"{site.path}.weight" in before][:PROBES]
    probes = {path: probe(before[f"{path}.weight"]) for path in known}
    state = AdapterState(plain_spec(spec, updates), updates, found.kept, Base(base, probes), purpose)
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

    def add(self, name: str, new: Tensor, old: Tensor | None, own: Sequence[Site]) -> None:
        """Compare one parameter with the base's, which has none for a new head."""
        if not new.is_floating_point():
            return
        if not (new.isfinite().all() and (old is None or old.isfinite().all())):
            self._problems.append(f"{name}: holds NaN or infinity")
        elif old is None:
            self.kept[name] = new
        elif not _same(old, new):
            for site in own:
                self._update(site, canonical(site, new) - canonical(site, old))
            if not own:
                self.left[name] = float(torch.linalg.vector_norm(new.double() - old.double()))
                if self._whole:
                    self._others[name] = new

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
        paths = {update.site.path for update in self._updates}
        for name, value in self._others.items():
            if name.rpartition(".")[0] not in paths:
                self.kept[name] = value
                del self.left[name]
        return tuple(self._updates)

    def _update(self, site: Site, change: Float[Tensor, "out in *kernel"]) -> None:
        matrices = by_group(site, change)
        size = float(torch.linalg.vector_norm(change, dtype=torch.float64))
        if not size:  # rows of a fused layer that stayed
            return
        most = min(matrices.shape[1:])
        if self._rank is not None and self._rank % site.groups:
            raise CombineError(f"{site.key}: rank {self._rank} is not a multiple of its {site.groups} groups")
        rank = most if self._rank is None else min(self._rank // site.groups, most)
        near = self._rank is not None and most > EXACT
        u, s, vh = leading(matrices, rank, ITERATIONS if near else None, self._rng)
        kept = rank if self._energy is None else rank_for(s.double(), self._energy)
        pair = balanced(u, s, vh, min(kept, own_rank(s, 0.0)))
        update = update_of(site, pair, self._dtype)
        if not all(tensor.isfinite().all() for tensor in update.tensors.values()):
            raise CombineError(f"{site.key}: its factors are beyond what {self._dtype} holds; take another dtype")
        stored = Pair.of(*(update.tensors[name].to(matrices) for name in ("down", "up")))
        lost = torch.linalg.vector_norm(matrices - stored.left @ stored.right, dtype=torch.float64)
        self._updates.append(update)
        self.losses[site.key] = Loss(float(lost), size)


def _same(old: Tensor, new: Tensor) -> bool:
    """Return whether two tensors are equal, as far as the narrower of their dtypes tells."""
    narrow = min((old.dtype, new.dtype), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.equal(old.to(narrow), new.to(narrow))


def _empty(name: str, labels: Sequence[str]) -> PreTrainedModel:
    return build_empty(name, task="classification" if labels else "causal-lm", labels=labels)


def _layers(wanted: Targets, skeleton: Skeleton, before: StoredParameters, base: str) -> dict[str, list[Site]]:
    """Return the sites that are wanted by the parameter their weight is, which the base must hold as one tensor."""
    found: dict[str, list[Site]] = {}
    for match in resolve(AdapterSpec(plain_lora(1), wanted), skeleton):
        found.setdefault(f"{match.site.path}.weight", []).append(match.site)
    if absent := [name for name in found if name not in before]:
        raise RecipeError(f"extract: {base} has no tensor of its own for\n{listing(absent)}")
    return found


def _stored(name: str, model: PreTrainedModel) -> StoredParameters:
    return StoredParameters(name, model, reader="extract", remedy="name the one in 16 bits that it was made of")


def _refuse_other_architecture(
    tuned: str | AdapterState,
    base: str,
    model: PreTrainedModel,
    before: StoredParameters,
    after: Mapping[str, Tensor] | StoredParameters,
) -> None:
    """Raise `RecipeError` where a parameter of the base is missing from the tuned model, or has another shape there."""
    shapes = after.shapes if isinstance(after, StoredParameters) else {k: tuple(v.shape) for k, v in after.items()}
    partial = isinstance(tuned, AdapterState)
    known = parameters_of(model)
    wrong = [f"{name}: not in {base}" for name in shapes if name not in known]
    wrong += [f"{name}: missing" for name in before if name not in shapes and not partial]
    wrong += [
        f"{name}: {shapes[name]}, and {tuple(known[name].shape)} in {base}"
        for name in shapes
        if name in known and shapes[name] != tuple(known[name].shape)
    ]
    if wrong:
        given = "the adapter" if partial else tuned
        raise RecipeError(f"{given} was not tuned from {base}: {len(wrong)} tensor(s) differ in kind\n{listing(wrong)}")


def _modules(kept: Mapping[str, Tensor]) -> list[str]:
    """Return the patterns that mean the modules of these parameters alone."""
    return [f"re:{re.escape(path)}" for path in dict.fromkeys(name.rpartition(".")[0] for name in kept)]
