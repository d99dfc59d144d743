"""Merge an adapter into the files of a base, tensor by tensor, without the model: memory does not grow with its size.

The same files come out, with the same names and dtypes, and with everything beside the weights; what the adapter does
not touch is copied. What can be known from names and shapes is checked before the first byte is written.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.core.state import AdapterState
from lorakit.errors import MergeError
from lorakit.inject.ledger import parameters_of
from lorakit.inject.merge import refuse_lost
from lorakit.inject.streaming import StreamedMerge
from lorakit.persist.files import read_json, to_json, write_file
from lorakit.persist.shard import FLOATING, STORED, Slot, name_of, write_shard
from lorakit.training.base import Task, build_empty, load_tokenizer
from lorakit.training.base_files import INDEX, open_shards, place_of
from lorakit.training.merge_checks import refuse
from lorakit.training.tensor_names import Checkpoint, checkpoint_of, kept_wide

_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "additional_chat_templates/*")
"""What is copied: generation settings, the tokenizer in all its forms, code of the model's own."""
_OURS = ("config.json", INDEX, "lorakit-merge.json")
"""But these are written anew."""


@dataclass(frozen=True)
class FilesReport:
    """What was merged, how well it was proved, in which files and dtypes."""

    layers: int
    update_lost: float
    """`|kept - exact|_F / |update|_F` over all layers: how much of the update the weights could not hold."""
    difference: float
    """Of a merged layer from the adapted one at most, on random inputs, as a share of its largest output."""
    worst: str
    """The layer with that difference."""
    files: int
    tensors: int
    dtypes: tuple[str, ...]
    """Of the floating tensors that were written, the one with the most bytes first."""


@contextmanager
def merging_files(
    base: str,
    state: AdapterState,
    *,
    task: Task = "causal-lm",
    labels: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Iterator[FilesMerge]:
    """Open the files of a base for an adapter to be folded into them; `write` does it.

    Args:
        base: a bundled name, a directory, or a Hugging Face id, in safetensors.
        state: the adapter.
        task: what the adapter was trained for; a classifier's head is among what it trained whole.
        labels: a classifier's.
        dtype: of all floating tensors; by default each keeps its own.

    Raises:
        MergeError: layers that cannot be merged, or not from files, all of them listed.
        AdapterFileError: an adapter for another model or another base.
    """
    model = build_empty(base, task=task, labels=labels)
    place = place_of(base)
    with open_shards(place) as files:
        found = checkpoint_of(model, {name: tensor for tensors in files.values() for name, tensor in tensors.items()})
        absent = found.missing(state.trained)
        merge = StreamedMerge(model, state)
        refuse(found, merge, absent, base)
        config = read_json(place / "config.json")
        if dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = _word(dtype)
        if task == "classification":
            config |= {key: model.config.to_dict()[key] for key in ("id2label", "label2id")}
            config["architectures"] = [type(model).__name__]
            config["pad_token_id"] = load_tokenizer(base).pad_token_id  # decoders look for the last token that is none
        yield FilesMerge(place, found, merge, {file.name: tuple(names) for file, names in files.items()}, config, dtype)


@dataclass(frozen=True)
class FilesMerge:
    """An adapter on an empty model beside the open files of its base: checked, and ready to be written."""

    place: Path
    found: Checkpoint
    merge: StreamedMerge
    shards: Mapping[str, tuple[str, ...]]
    config: Mapping[str, Any]
    dtype: torch.dtype | None

    @property
    def tensors(self) -> int:
        """Return how many tensors there are to be written."""
        return sum(map(len, self.shards.values())) + len(self._fresh())

    def write(self, folder: Path, done: Callable[[str], None] = lambda name: None) -> FilesReport:
        """Write the merged base to `folder`, which is empty; after an error, what is in it is nobody's.

        Args:
            folder: where to.
            done: called with the name of each tensor that is written.

        Raises:
            MergeError: NaN and infinity, a layer that fails its proof, an update that rounding would swallow.
        """
        fresh, written = self._fresh(), {}
        for file, names in self.shards.items():
            more = fresh if file == list(self.shards)[-1] else {}
            slots = {**{name: self._slot(name) for name in names}, **more}
            write_shard(folder / file, slots, self._reader(slots, done))
            written[file] = slots
        report = self.merge.report()
        refuse_lost(report.update_lost)
        for source in {file for pattern in _BESIDE for file in self.place.glob(pattern) if file.name not in _OURS}:
            target = folder / source.relative_to(self.place)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
        write_file(folder / "config.json", to_json(self.config))
        if (self.place / INDEX).is_file():
            write_file(folder / INDEX, to_json(_index(read_json(self.place / INDEX), written)))
        every = [slot for slots in written.values() for slot in slots.values()]
        proven = self.merge.proven
        return FilesReport(
            report.layers, report.update_lost, proven.difference, proven.layer, len(written), len(every), _dtypes(every)
        )

    def _slot(self, name: str) -> Slot:
        """Return the dtype and the shape a tensor of the base is written in."""
        stored = self.found.stored[name]
        dtype = stored.get_dtype()
        if self.dtype is not None and dtype in FLOATING:
            wide = any(kept_wide(self.found.model, target) for target in self.found.destinations[name].names)
            dtype = "F32" if wide else name_of(self.dtype)
        return Slot(dtype, tuple(stored.get_shape()))

    def _fresh(self) -> dict[str, Slot]:
        """Return what the adapter trained whole and the files have no tensor for: the head of a new classifier."""
        named = parameters_of(self.found.model)
        there = {id(named[name]) for name in self.merge.whole if name in self.found.sources}
        new = {id(named[name]): name for name in reversed(self.merge.whole) if id(named[name]) not in there}
        kept = name_of(self.dtype or getattr(torch, str(self.config.get("dtype") or "float32")))
        return {name: Slot(kept, tuple(named[name].shape)) for name in reversed(new.values())}

    def _reader(self, slots: Mapping[str, Slot], done: Callable[[str], None]) -> Callable[[str], Tensor]:
        """Return what gives each tensor of a file as it is to be written."""

        def read(name: str) -> Tensor:
            place, dtype = self.found.destinations.get(name), STORED[slots[name].dtype]
            parameter = name if place is None else place.name
            done(name)
            if parameter in self.merge.whole:
                before = None if place is None else self.found.stored[name][...]
                return self.merge.trained(str(parameter), dtype, before)
            tensor = _cast(name, self.found.stored[name][...], dtype)
            return self.merge.merged(str(parameter), tensor) if parameter in self.merge.layers else tensor

        return read


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the base in the dtype to write; what was finite stays so."""
    if tensor.dtype == dtype:
        return tensor
    kept = tensor.to(dtype)
    if lost := int((tensor.isfinite() & ~kept.isfinite()).sum()):
        raise MergeError(
            f"{name}: {lost:,} of its {kept.numel():,} values are too large for {dtype}; use a wider dtype"
        )
    return kept


def _index(index: dict[str, Any], written: Mapping[str, Mapping[str, Slot]]) -> dict[str, Any]:
    """Return the index of the shards as they are now."""
    slots = {name: slot for part in written.values() for name, slot in part.items()}
    new = slots.keys() - index["weight_map"].keys()
    index["weight_map"] |= {name: file for file, part in written.items() for name in part if name in new}
    metadata = index.setdefault("metadata", {})
    metadata["total_size"] = sum(slot.bytes for slot in slots.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] += sum(math.prod(slots[name].shape) for name in new)
    return index


def _dtypes(slots: Sequence[Slot]) -> tuple[str, ...]:
    sizes: dict[str, int] = {}
    for slot in slots:
        if slot.dtype in FLOATING:
            sizes[slot.dtype] = sizes.get(slot.dtype, 0) + slot.bytes
    return tuple(_word(STORED[name]) for name in sorted(sizes, key=lambda name: -sizes[name]))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
