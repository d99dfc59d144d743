"""Several examples in one row, each as blind to its neighbours as if it stood alone.

Positions start again at 0 with every example, and there is no attention mask: the attention backends read the borders
off the positions. Examples of one prompt may share it: the row holds the prompt but its last token once, and then a
branch for each of them, which begins with a copy of that last token and counts on from the prompt; a column `branches`
says which branch a token is of (0: none). So a token is still predicted from the place before it, and no sum changes.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.core.lazy import need
from lorakit.data.masking import IGNORE

if TYPE_CHECKING:
    from datasets import Dataset

ALIGNED = 8
"""Row lengths are multiples of it where they can be: the unit of matrix kernels and of their masks."""

EMPTIER = 0.05
"""How much emptier than the fullest rows the cheapest may be: a step holds fewer examples by as much."""

Chunk = list[int]
"""Numbers of examples that stand together: one alone, or several of one prompt."""


@dataclass(frozen=True)
class PackRule:
    """How long rows are, and whether examples of one prompt share it.

    Attributes:
        room: tokens of examples that a step holds, each with its own prompt.
        balance: the row length at which attention costs as much as all the rest of a token. With it the room is parted
            into the number of rows that costs least; without it a row is as long as the room (or the longest example).
        longest: no row is longer, whatever would cost less.
        share: prompts are shared where that saves this share of the tokens; None never shares.
    """

    room: int
    balance: float | None = None
    longest: int | None = None
    share: float | None = None

    def cost(self, space: int, length: int) -> float:
        """Return what `space` tokens in rows of `length` cost, in tokens that look at nothing."""
        return space * (1 + length / self.balance) if self.balance else float(space)


@dataclass(frozen=True, eq=False)
class Packs:
    """Packed rows, the tokens a row has room for, the rows that make up a step, and the prompt tokens saved."""

    rows: Dataset
    length: int
    together: int
    saved: int


@dataclass(frozen=True)
class _Layout:
    """Rows as chunks of examples with their tokens, and the length and the number together they are meant for."""

    rows: list[list[Chunk]]
    tokens: int
    length: int
    together: int = 1

    @property
    def space(self) -> int:
        return len(self.rows) * self.length

    @property
    def filled(self) -> float:
        return self.tokens / self.space


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


def pack(examples: Dataset, rule: PackRule, seed: int = 0) -> Packs:
    """Join examples of `input_ids` and `labels` into rows, with `position_ids` starting anew in each of them.

    The rows come in an order shuffled by `seed`, since best-fit decreasing leaves them sorted by length.
    """
    np, pa, datasets = need("numpy", "train"), need("pyarrow", "train"), need("datasets", "train")
    columns = {name: _column(examples, name) for name in ("input_ids", "labels")}
    offsets = columns["input_ids"].offsets.to_numpy().astype("int64")
    lengths: list[int] = np.diff(offsets).tolist()
    flat = {name: column.flatten() for name, column in columns.items()}
    alone = [[i] for i in range(len(lengths))]
    trunks, layout = [0] * len(lengths), _cheapest(rule, lengths, [0] * len(lengths), alone)
    if rule.share is not None:
        groups, prompts = _prompts(flat["input_ids"].to_numpy(), flat["labels"].to_numpy(), offsets)
        if len(groups) < len(lengths):
            shared = _cheapest(rule, lengths, prompts, groups)
            if 1 - shared.space / layout.space >= rule.share:
                trunks, layout = prompts, shared
    random.Random(seed).shuffle(layout.rows)
    pieces = np.array([piece for row in layout.rows for chunk in row for piece in _pieces(chunk, lengths, trunks)])
    index = _spread(offsets[pieces[:, 0]] + pieces[:, 1], pieces[:, 2])
    packed = {name: values.take(pa.array(index)) for name, values in flat.items()}
    packed["position_ids"] = pa.array(_spread(pieces[:, 1], pieces[:, 2]).astype("int32"))
    if any(trunks):
        packed["branches"] = pa.array(np.repeat(pieces[:, 3], pieces[:, 2]).astype("int32"))
    sizes = [sum(_tokens(chunk, lengths, trunks) for chunk in row) for row in layout.rows]
    borders = pa.array(np.cumsum([0, *sizes]).astype("int32"))
    rows = {name: pa.ListArray.from_arrays(borders, values) for name, values in packed.items()}
    return Packs(datasets.Dataset(pa.table(rows)), layout.length, layout.together, sum(lengths) - layout.tokens)


def unpack(packed: Dataset) -> Dataset:
    """Undo `pack` up to the order of the examples, each with its own prompt again."""
    np, pa, datasets = need("numpy", "train"), need("pyarrow", "train"), need("datasets", "train")
    starts, sizes = _examples(packed)
    index = pa.array(_spread(starts.ravel(), sizes.ravel()))
    offsets = pa.array(np.cumsum([0, *sizes.sum(1)]).astype("int32"))
    flat = {name: _column(packed, name).flatten().take(index) for name in ("input_ids", "labels")}
    examples: Dataset = datasets.Dataset(
        pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in flat.items()})
    )
    return examples


def row_lengths(rows: Dataset) -> list[int]:
    """Return the tokens of each row, from where it begins and ends: no token is read."""
    ids = rows.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
    lengths: list[int] = need("pyarrow.compute", "train").list_value_length(ids).to_pylist()
    return lengths


def tokens_of(rows: Dataset) -> int:
    """Return the tokens of all rows, without what pads them."""
    return sum(row_lengths(rows))


def example_lengths(rows: Dataset) -> list[int]:
    """Return the tokens of each example, of packed rows those of each one in them."""
    if "position_ids" not in rows.column_names:
        return row_lengths(rows)
    lengths: list[int] = _examples(rows)[1].sum(1).tolist()
    return lengths


@dataclass(frozen=True)
class Collator:
    """Stack rows into tensors `(batch, longest)`, padded on the right with `pad_id` and labels that carry no loss.

    Packed rows (those with `position_ids`) get no attention mask, which would switch isolation off; their padding is
    one more example with positions of its own. Rows of a classification keep their one label `(batch,)`. Hidden states
    that come with the rows, `frozen (length, d)`, are padded with zeros.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `labels` and `position_ids` (and `branches`) if packed, else `attention_mask`."""
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, pad: int) -> Tensor:
            lines = [[*row[name], *[pad] * (longest - len(row[name]))] for row in rows]
            return torch.tensor(lines, dtype=torch.long)

        batch = {"input_ids": padded("input_ids", self.pad_id)}
        if isinstance(rows[0]["labels"], int):
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        else:
            batch["labels"] = padded("labels", IGNORE)
        for name in ("token_type_ids", "branches"):
            if name in rows[0]:
                batch[name] = padded(name, 0)
        if "frozen" in rows[0]:
            batch["frozen"] = torch.nn.utils.rnn.pad_sequence([row["frozen"] for row in rows], batch_first=True)
        if "position_ids" in rows[0]:
            lines = [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in rows]
            batch["position_ids"] = torch.tensor(lines)
        else:
            lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
            batch["attention_mask"] = (torch.arange(longest) < lengths).long()
        return batch


def _cheapest(rule: PackRule, lengths: Sequence[int], trunks: Sequence[int], groups: Sequence[Chunk]) -> _Layout:
    """Return the layout that costs least, of those whose steps hold about as many examples as the rule has room for.

    Sharing prompts makes steps shorter, not larger: as many examples in fewer tokens.
    """
    longest, total = max(lengths), sum(lengths)
    if rule.balance is None:
        length = max(longest, rule.room)
        return _arranged(lengths, trunks, groups, length)
    most = max(longest, rule.longest or rule.room)
    needed = sum(_tokens(group, lengths, trunks) for group in groups) / total
    found: list[_Layout] = []
    for parts in sorted((1, *(i * 2**j for i in (2, 3) for j in range(rule.room.bit_length())))):
        if parts > 1 and rule.room * needed < parts * longest:
            break
        length = _aligned(rule.room * needed / parts, longest)
        if length > most:
            continue
        made = _arranged(lengths, trunks, groups, length, parts)
        for _ in range(2 if any(trunks) else 0):  # prompts stand once more at every cut, for which a step has room
            filled = rule.room * min(1.0, made.space / total) / parts
            length = _aligned(min((length + filled) / 2, most), longest)
            made = _arranged(lengths, trunks, groups, length, parts)
        found.append(made)
    if not found:
        parts = math.ceil(rule.room * needed / most)
        found.append(_arranged(lengths, trunks, groups, most, max(1, min(parts, rule.room // most))))
    least = max(made.filled for made in found) - EMPTIER
    return min((one for one in found if one.filled >= least), key=lambda one: rule.cost(one.space, one.length))


def _aligned(length: float, least: int) -> int:
    """Return a length rounded down to whole units, but no less than `least`."""
    down = int(length) // ALIGNED * ALIGNED
    return down if down >= least else max(int(length), least)


def _arranged(
    lengths: Sequence[int], trunks: Sequence[int], groups: Sequence[Chunk], length: int, together: int = 1
) -> _Layout:
    """Cut groups that are longer than a row, each piece with the prompt again, and fit all into rows by best fit."""
    chunks: list[Chunk] = []
    for group in groups:
        if len(group) > 1 and _tokens(group, lengths, trunks) > length:
            trunk = trunks[group[0]]
            cut = bins([lengths[i] - trunk for i in group], length - trunk)
            chunks += [[group[at] for at in piece] for piece in cut]
        else:
            chunks.append(group)
    sizes = [_tokens(chunk, lengths, trunks) for chunk in chunks]
    rows = [[chunks[at] for at in row] for row in bins(sizes, length)]
    return _Layout(rows, sum(sizes), length, together)


def _tokens(chunk: Chunk, lengths: Sequence[int], trunks: Sequence[int]) -> int:
    """Return the tokens of a chunk: its prompt once, and the rest of each example."""
    return sum(lengths[i] for i in chunk) - (len(chunk) - 1) * trunks[chunk[0]]


def _pieces(chunk: Chunk, lengths: Sequence[int], trunks: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (example, first position, tokens, branch) of each run of tokens of a chunk."""
    trunk = trunks[chunk[0]]
    if len(chunk) == 1:
        yield chunk[0], 0, lengths[chunk[0]], 0
        return
    yield chunk[0], 0, trunk, 0
    for branch, i in enumerate(chunk, 1):
        yield i, trunk, lengths[i] - trunk, branch


def _prompts(ids: Any, labels: Any, offsets: Any) -> tuple[list[Chunk], list[int]]:
    """Group examples by what comes before their first trained token; return the groups, and what each may share.

    Shared is all of it but the last token: a prompt of one token shares nothing, and stands alone.
    """
    np = need("numpy", "train")
    trained = np.append(np.flatnonzero(labels != IGNORE), len(labels))
    ends = np.minimum(trained[np.searchsorted(trained, offsets[:-1])], offsets[1:])
    prompts, groups = (ends - offsets[:-1]).tolist(), dict[Any, Chunk]()
    for i, (start, end) in enumerate(zip(offsets[:-1].tolist(), ends.tolist(), strict=True)):
        groups.setdefault(ids[start:end].tobytes() if end - start > 1 else i, []).append(i)
    trunks = [0] * len(prompts)
    for group in groups.values():
        for i in group if len(group) > 1 else ():
            trunks[i] = prompts[i] - 1
    return list(groups.values()), trunks


def _examples(packed: Dataset) -> tuple[Any, Any]:
    """Return where each example of packed rows begins and how long it is, `(examples, 2)`: what it shares, its own."""
    np = need("numpy", "train")
    positions = _column(packed, "position_ids").flatten().to_numpy()
    branches = np.zeros_like(positions)
    if "branches" in packed.column_names:
        branches = _column(packed, "branches").flatten().to_numpy()
    starts = np.flatnonzero((positions == 0) | (np.diff(branches, prepend=0) != 0))
    sizes = np.diff(np.append(starts, len(positions)))
    first = positions[starts] == 0
    group = np.cumsum(first) - 1
    branched = np.bincount(group)[group] > 1  # of a group with branches, the prompt is no example
    own = ~(first & branched)
    shared = np.where(branched, sizes[first][group], 0)
    return np.stack([starts[first][group], starts], 1)[own], np.stack([shared, sizes], 1)[own]


def _spread(starts: Any, sizes: Iterable[int]) -> Any:
    """Return `start, start + 1, ...` for each pair, one after the other."""
    np = need("numpy", "train")
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes)


def _column(rows: Dataset, name: str) -> Any:
    """The column as one Arrow list array that begins at offset 0."""
    return need("pyarrow", "train").concat_arrays(rows.with_format("arrow")[:][name].chunks)
