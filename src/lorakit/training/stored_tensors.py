"""The tensors of a checkpoint by the names its model has for them, each read when it is asked for and not kept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lorakit.errors import RecipeError
from lorakit.training.base_files import open_shards, place_of, read_tensor
from lorakit.training.quantised import holds_packed
from lorakit.training.tensor_names import checkpoint_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StoredTensors(Mapping[str, Tensor]):
    """By the name of a parameter or a buffer its value as it is stored, read anew each time.

    aliases: for each name of the model all names of that tensor, those that are tied to it too.
    shapes: of what is stored, by the same names as the values.
    rest: the shapes of stored tensors, by their own names, that are no one tensor of the model: they become part of
        another, such as the experts of a mixture, or have no place in it. `read` returns them.
    """

    def __init__(self, base: str, model: PreTrainedModel, *, reader: str, remedy: str) -> None:
        """Find where each tensor lies in the files of a base.

        Args:
            base: a name or a directory.
            model: the base without its weights.
            reader: who asks, for errors.
            remedy: what to do about a base with packed weights, for errors.

        Raises:
            RecipeError: a base whose files are packed.
        """
        if holds_packed(model.config):
            raise RecipeError(f"{reader} reads dense weights, and {base} holds packed ones; {remedy}")
        self._files: dict[str, Path] = {}
        with open_shards(place_of(base)) as files:
            stored = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
            self._files = {name: file for file, tensors in files.items() for name in tensors}
            places = checkpoint_of(model, stored).destinations
            self._names = {to.name: name for name, to in places.items() if to.name is not None}
            self.shapes = {name: tuple(stored[own].get_shape()) for name, own in self._names.items()}
            taken = set(self._names.values())
            unused = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
            self.rest = {
                name: tuple(tensor.get_shape())
                for name, tensor in stored.items()
                if name not in taken and not any(pattern.search(name) for pattern in unused)
            }
        by_id: dict[int, list[str]] = {}
        for name, value in model.state_dict(keep_vars=True).items():
            by_id.setdefault(id(value), []).append(name)
        self.aliases = {name: tuple(names) for names in by_id.values() for name in names}

    def __getitem__(self, name: str) -> Tensor:
        return self.read(self._names[name])

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, name: str) -> Tensor:
        """Return a tensor by the name it is stored by."""
        return read_tensor(self._files[name], name)

    def known_as(self, name: str) -> str | None:
        """Return the name under which a tensor of the model is stored, its own or one that is tied to it, or None."""
        return next((alias for alias in self.aliases.get(name, (name,)) if alias in self._names), None)
