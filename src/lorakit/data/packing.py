"""Several examples in one row, each as blind to its neighbours as if it stood alone.

The isolation rests on two things: positions that start again at 0 with every example, and the absence of an attention
mask and of a cache, for only then do the attention backends read the borders off the positions. Whether a given model
honours this is measured, not believed.
"""

from __future__ import annotations

import inspect
import math
import random
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.core.lazy import need
from lorakit.data.masking import IGNORE
from lorakit.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


def bins(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Best-fit decreasing: put each example, longest first, where it leaves the least room; return indices per bin."""
    filled: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {}  # room left -> bins with just that room
    rooms: list[int] = []  # its keys, sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[index])
        if at == len(rooms):
            room, chosen = size, list[int]()
            filled.append(chosen)
        else:
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        chosen.append(index)
        left = room - lengths[index]
        if left not in by_room:
            insort(rooms, left)
        by_room.setdefault(left, []).append(chosen)
    return filled


def pack(examples: Dataset, size: int, seed: int = 0) -> Dataset:
    """Join examples of `input_ids` and `labels` into rows of at most `size`, with `position_ids` starting anew in each.

    The rows come in an order shuffled by `seed`, since best-fit decreasing leaves them sorted by length.
    """
    np, pa, datasets = need("numpy", "train"), need("pyarrow", "train"), need("datasets", "train")
    columns = {name: _column(examples, name) for name in ("input_ids", "labels")}
    lengths = np.diff(columns["input_ids"].offsets.to_numpy())
    packs = bins(lengths.tolist(), size)
    random.Random(seed).shuffle(packs)
    order = np.concatenate(packs)
    ends = np.cumsum(lengths[order])
    starts = ends - lengths[order]
    borders = np.concatenate([[0], ends[np.cumsum([len(members) for members in packs]) - 1]])
    flat = {name: column.take(pa.array(order)).flatten() for name, column in columns.items()}
    flat["position_ids"] = pa.array((np.arange(ends[-1]) - np.repeat(starts, lengths[order])).astype("int32"))
    offsets = pa.array(borders.astype("int32"))
    packed: Dataset = datasets.Dataset(
        pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in flat.items()})
    )
    return packed


def unpack(packed: Dataset) -> Dataset:
    """Undo `pack` up to the order of the examples: cut wherever a position is 0."""
    np, pa, datasets = need("numpy", "train"), need("pyarrow", "train"), need("datasets", "train")
    positions = _column(packed, "position_ids").flatten().to_numpy()
    offsets = pa.array(np.append(np.flatnonzero(positions == 0), len(positions)).astype("int32"))
    flat = {name: _column(packed, name).flatten() for name in ("input_ids", "labels")}
    examples: Dataset = datasets.Dataset(
        pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in flat.items()})
    )
    return examples


def example_lengths(rows: Dataset) -> list[int]:
    """Return the tokens of each example, of packed rows those of each one in them."""
    whole = unpack(rows) if "position_ids" in rows.column_names else rows
    return [len(ids) for ids in whole["input_ids"]]


@dataclass(frozen=True)
class Collator:
    """Stack rows into tensors `(batch, longest)`, padded on the right with `pad_id` and labels that carry no loss.

    Packed rows (those with `position_ids`) get no attention mask, which would switch isolation off; their padding is
    one more example with positions of its own. Rows of a classification keep their one label `(batch,)`.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `labels` and `position_ids` if packed, else `attention_mask`."""
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, pad: int) -> Tensor:
            lines = [[*row[name], *[pad] * (longest - len(row[name]))] for row in rows]
            return torch.tensor(lines, dtype=torch.long)

        batch = {"input_ids": padded("input_ids", self.pad_id)}
        if isinstance(rows[0]["labels"], int):
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        else:
            batch["labels"] = padded("labels", IGNORE)
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = padded("token_type_ids", 0)
        if "position_ids" in rows[0]:
            lines = [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in rows]
            batch["position_ids"] = torch.tensor(lines)
        else:
            lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
            batch["attention_mask"] = (torch.arange(longest) < lengths).long()
        return batch


def packing_leak(model: PreTrainedModel, **forward: Any) -> float:
    """Measure how far an example's logits move, relative to their size, when its neighbours and its place change.

    The same six tokens stand once after 3 and before 7 tokens, once after 7 and before 3 others; an isolated example
    cannot tell. `forward` is passed on to the model as it will be in training. Measured on random two-layer models:
    0 for Llama, Qwen2, Mistral, GPT-2, GPT-NeoX without a cache; 0.3 to 1.1 with one; 0.7 for OPT and Mamba; infinite
    for a model that takes no positions.
    """
    takes = inspect.signature(model.forward).parameters
    if "position_ids" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return math.inf
    embedding: Any = model.get_input_embeddings()
    rng = torch.Generator().manual_seed(0)

    def some(length: int) -> Tensor:
        return torch.randint(embedding.num_embeddings, (length,), generator=rng)

    def logits(before: Tensor, after: Tensor) -> Tensor:
        parts = (before, watched, after)
        ids = torch.cat(parts)[None].to(model.device)
        positions = torch.cat([torch.arange(len(part)) for part in parts])[None].to(model.device)
        out: Tensor = model(input_ids=ids, position_ids=positions, **forward).logits
        return out[0, len(before) : len(before) + len(watched)].float()

    watched, was_training = some(6), model.training
    model.train(False)
    try:
        with torch.no_grad():
            here, there = logits(some(3), some(7)), logits(some(7), some(3))
    finally:
        model.train(was_training)
    return float((here - there).abs().max() / here.std())


def packing_is_isolated(model: PreTrainedModel, **forward: Any) -> bool:
    """Say whether packed examples leave each other alone in this model, with its attention backend and dtype.

    The bound is sqrt(eps) of the dtype, half way (in digits) between rounding and a difference anyone would see.
    """
    return packing_leak(model, **forward) < math.sqrt(torch.finfo(model.dtype).eps)


def refuse_leaky_packing(model: PreTrainedModel, **forward: Any) -> None:
    """Raise `DataError` with the remedy unless `packing_is_isolated`."""
    if not packing_is_isolated(model, **forward):
        backend = getattr(model.config, "_attn_implementation", "unknown")
        raise DataError(
            f"packing leaks in {type(model).__name__} with attention '{backend}': an example's logits move by "
            f"{packing_leak(model, **forward):.2g} of their spread with its neighbours; set packing: false, or choose "
            "another attention backend (the cache must be off too: config.use_cache = False)"
        )


def _column(rows: Dataset, name: str) -> Any:
    """The column as one Arrow list array that begins at offset 0."""
    return need("pyarrow", "train").concat_arrays(rows.with_format("arrow")[:][name].chunks)
