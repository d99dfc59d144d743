"""Which parameter a checkpoint's tensor becomes: transformers' own renaming, asked name by name, without a weight.

Most names are equal up to the base model's prefix. Some tensors become part of another (the experts of a mixture are
stacked): those are conversions, and only transformers' loading can do and undo them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorakit.core.lazy import need
from lorakit.training.base_files import Later

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Destination:
    """What a tensor becomes: parameters or buffers by name, none where the model has no place for it."""

    names: tuple[str, ...]
    converted: bool = False
    """Whether it is more than a renaming: values move, and other tensors may go into the same parameter."""

    @property
    def name(self) -> str | None:
        """Return the parameter that the tensor is as it is stored, or None."""
        return self.names[0] if len(self.names) == 1 and not self.converted else None


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a base's files, and where each goes in the model, which may be on the meta device."""

    model: PreTrainedModel
    stored: Mapping[str, Later]
    destinations: Mapping[str, Destination]

    @cached_property
    def sources(self) -> dict[str, list[str]]:
        """Return the tensors that each parameter is made of, where there are any."""
        made: dict[str, list[str]] = {}
        for name, place in self.destinations.items():
            for target in place.names:
                made.setdefault(target, []).append(name)
        return made

    def missing(self, known: Collection[str] = ()) -> list[str]:
        """Return the parameters and buffers without a tensor that are not `known` from elsewhere.

        A tied parameter has the tensor of any of its names; what transformers does not ask for is not missing.
        """
        here = self.model.state_dict(keep_vars=True)
        there = {id(here[name]) for name in self.sources}
        there |= {id(here[name]) for name in known if name in here}
        optional = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        absent = [name for name, value in here.items() if id(value) not in there]
        return [name for name in absent if not any(pattern.search(name) for pattern in optional)]


def checkpoint_of(model: PreTrainedModel, stored: Mapping[str, Later]) -> Checkpoint:
    """Return where the tensors of a checkpoint go in `model`.

    Tied parameters of which the files hold both, with other values, are parted in the model: transformers does so on
    loading, whatever the configuration says.
    """
    found = Checkpoint(model, stored, _destinations(model, stored))
    source = {place.name: stored[name] for name, place in found.destinations.items() if place.name is not None}
    for target, origin in (model.all_tied_weights_keys or {}).items():
        if target in source and origin in source and not _equal(source[target], source[origin]):
            path, _, name = target.rpartition(".")
            setattr(model.get_submodule(path), name, nn.Parameter(torch.empty_like(model.get_parameter(target))))
    return found


def kept_wide(model: PreTrainedModel, name: str) -> bool:
    """Return whether transformers keeps a parameter in fp32 whatever dtype is asked for."""
    patterns = model._keep_in_fp32_modules_strict or ()
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


def _destinations(model: PreTrainedModel, stored: Collection[str]) -> dict[str, Destination]:
    need("transformers", "train")
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping, prefix, here = get_model_conversion_mapping(model), model.base_model_prefix, model.state_dict()
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    found = {}
    for name in sorted(stored, key=dot_natural_key):  # some renamings of transformers remember what came before
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, here)
        if renamed not in here and name in here:
            renamed, pattern = rename_source_key(name, [], [], prefix, here)
        targets = [renamed]
        if pattern is not None:
            first, *others = by_pattern[pattern].target_patterns
            targets += [renamed.replace(first, other) for other in others]
        found[name] = Destination(tuple(target for target in targets if target in here), pattern is not None)
    return found


def _equal(one: Later, other: Later, rows: int = 4096) -> bool:
    """Return whether two tensors hold the same values, read in blocks of rows."""
    if one.get_shape() != other.get_shape() or one.get_dtype() != other.get_dtype():
        return False
    count = one.get_shape()[0]
    blocks = [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
    return all(torch.equal(one[block], other[block]) for block in blocks)
