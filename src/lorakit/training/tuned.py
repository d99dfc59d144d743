"""A tuned model beside its base: every tensor of the two in pairs, whatever names and files they lie under.

A weight with two names (a tied head) is one tensor; where the tuned model has parted it, no adapter says so and the
pair is refused. What transformers makes of several tensors, or has no place for, is compared as it is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakit.core.state import AdapterState
from lorakit.errors import CombineError, RecipeError, listing
from lorakit.inject.bases import check_base
from lorakit.inject.ledger import parameters_of
from lorakit.training.base import build_empty, task_of
from lorakit.training.dense_weights import probed
from lorakit.training.stored_tensors import StoredTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Twin:
    """One tensor of both models, under its first name in the base; `old` is None for a new one, such as a fresh head.

    `parameter` says whether an adapter could hold it: a buffer, or a part of another parameter, it cannot.
    """

    name: str
    old: Tensor | None
    new: Tensor
    parameter: bool


class Twins:
    """Two models of one architecture, or a base and what a run trained whole of it; iterating reads pair by pair."""

    def __init__(
        self,
        tuned: str | AdapterState,
        base: str,
        labels: Sequence[str],
        heads: Collection[str],
        model: PreTrainedModel,
    ) -> None:
        """Line the tensors of both up, without reading one.

        Args:
            tuned: a checkpoint, or an adapter without updates whose tensors were trained whole.
            base: what it was tuned from.
            labels: of the tuned model's classes.
            heads: paths of output layers, which may have another shape in the base: they are new then.
            model: the base without weights.

        Raises:
            RecipeError: models of other architectures or tasks, packed ones.
            AdapterFileError: a run on another base.
            CombineError: an adapter with updates, which is no tuned model.
        """
        self._model, self._heads, self._base = model, heads, base
        self.before = stored(base, model)
        self._partial = isinstance(tuned, AdapterState)
        self._tuned = "the adapter" if isinstance(tuned, AdapterState) else tuned
        if isinstance(tuned, AdapterState):
            if tuned.updates:
                raise CombineError("the adapter has updates already, and is no model that was tuned whole")
            check_base(tuned.base, probed(base, self.before, tuned.base.probes))
            self._after: Mapping[str, Tensor] = tuned.trained
            self._shapes = {name: tuple(value.shape) for name, value in tuned.trained.items()}
            self._rest: Mapping[str, tuple[int, ...]] = {}
        else:
            after = stored(tuned, empty(tuned, labels))
            self._after, self._shapes, self._rest = after, after.shapes, after.rest
        self._refuse_other_architecture()

    def __iter__(self) -> Iterator[Twin]:
        parameters = parameters_of(self._model)
        for name, found in self._found().items():
            new = [self._after[alias] for alias in found]
            if any(not torch.equal(new[0], other) for other in new[1:]):
                names = " and ".join(self.before.aliases[name])
                raise CombineError(
                    f"{names} are one tensor in {self._base} and differ in {self._tuned}, which no adapter says; tune "
                    "them tied, or take a base that has parted them"
                )
            yield Twin(name, self._old(name), new[0], name in parameters)
        for name in self._raw():
            assert isinstance(self._after, StoredTensors)
            yield Twin(name, self.before.read(name), self._after.read(name), False)

    def _found(self) -> dict[str, list[str]]:
        """Return by the first name of each of the base's tensors the names it has in the tuned model, of those tied."""
        known_as = self._after.known_as if isinstance(self._after, StoredTensors) else self._own
        made: dict[str, list[str]] = {}
        for name in dict.fromkeys(self.before.aliases[name][0] for name in (*self._after, *self.before)):
            every = [known_as(alias) for alias in self.before.aliases[name]]
            if names := [alias for alias in dict.fromkeys(every) if alias is not None]:
                made[name] = names
        return made

    def _own(self, name: str) -> str | None:
        return name if name in self._after else None

    def _old(self, name: str) -> Tensor | None:
        """Return the base's value, or None where it has none, or a head for other classes."""
        known = self.before.known_as(name)
        if known is None or self._is_other_head(name, known):
            return None
        return self.before[known]

    def _is_other_head(self, name: str, known: str) -> bool:
        inside = any(name.startswith(f"{head}.") for head in self._heads)
        return inside and self.before.shapes[known] != self._shapes.get(name, self.before.shapes[known])

    def _raw(self) -> list[str]:
        """Return what is compared as it is stored."""
        return [name for name in self._rest if name in self.before.rest]

    def _refuse_other_architecture(self) -> None:
        """Raise `RecipeError` where a tensor of one model has no counterpart, or one of another shape, in the other."""
        here = self._model.state_dict()
        wrong = [f"{name}: not in {self._base}" for name in self._shapes if name not in here]
        wrong += [f"{name}: {self._base} has no place for it" for name in self._rest if name not in self.before.rest]
        wrong += [
            f"{name}: {self._rest[name]}, and {self.before.rest[name]} in {self._base}"
            for name in self._raw()
            if self._rest[name] != self.before.rest[name]
        ]
        if not wrong and not self._partial:
            found = self._found()
            wrong += [f"{name}: missing" for name in self.before if self.before.aliases[name][0] not in found]
        for name, shape in self._shapes.items():
            known = self.before.known_as(name) if name in here else None
            ours = self.before.shapes[known] if known is not None else None
            if ours is not None and shape != ours and not self._is_other_head(name, str(known)):
                wrong.append(f"{name}: {shape}, and {ours} in {self._base}")
        if wrong:
            raise RecipeError(
                f"{self._tuned} was not tuned from {self._base}, or is for another task: {len(wrong)} tensor(s) have "
                f"no counterpart\n{listing(wrong)}"
            )


def empty(name: str, labels: Sequence[str]) -> PreTrainedModel:
    """Return a model without its weights: a classifier for its labels, else one that writes."""
    return build_empty(name, task=task_of(labels), labels=labels)


def stored(name: str, model: PreTrainedModel) -> StoredTensors:
    """Return the tensors of a checkpoint; errors speak of an extraction."""
    return StoredTensors(name, model, reader="extract", remedy="name the one in 16 bits that it was made of")
