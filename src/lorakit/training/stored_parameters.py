"""The parameters of a base by name, each read from its files when it is asked for, so that one at a time is held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lorakit.errors import RecipeError
from lorakit.training.base_files import open_tensors, place_of
from lorakit.training.quantised import settings_of
from lorakit.training.tensor_names import checkpoint_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StoredParameters(Mapping[str, Tensor]):
    """By the name of a parameter its value as it is stored, read anew each time.

    Left out are parameters that transformers makes of other tensors than one, such as the stacked experts of a mixture.
    """

    def __init__(self, base: str, model: PreTrainedModel, *, reader: str, remedy: str) -> None:
        """Find where each parameter lies in the files of a base.

        Args:
            base: a name or a directory.
            model: the base without its weights.
            reader: who asks, for errors.
            remedy: what to do about a base with packed weights, for errors.

        Raises:
            RecipeError: a base whose files are packed.
        """
        if settings_of(model.config) is not None:
            raise RecipeError(f"{reader} reads dense weights, and {base} holds packed ones; {remedy}")
        self._place = place_of(base)
        with open_tensors(self._place) as stored:
            destinations = checkpoint_of(model, stored).destinations
            self._names = {to.name: name for name, to in destinations.items() if to.name is not None}
            self._shapes = {name: tuple(stored[own].get_shape()) for name, own in self._names.items()}

    def __getitem__(self, name: str) -> Tensor:
        with open_tensors(self._place) as stored:
            return stored[self._names[name]][...]

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of each, which needs no tensor."""
        return self._shapes
