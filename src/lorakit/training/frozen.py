"""`train.cache_frozen`: what lies below the lowest trained block is computed once a row, and read from disk afterwards.

The hidden states of every row, as long as the row, lie one after the other in `<output>/frozen-cache/`, in the dtype
the model passes on. They are read through the page cache as the rows are, and given to the model with the batch, so
every step and evaluation begins at that block. The folder goes when the run is done; of one that stopped it stays, and
a resumed run takes what was made from the same rows by the same weights.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.core.modes import evaluating, in_mode
from lorakit.data.branches import seen
from lorakit.data.packing import row_lengths, tokens_of
from lorakit.errors import LorakitError, RecipeError
from lorakit.inject.lower import GIVEN, Lower, answering, lower_of, run_lower, values_of, why_not_frozen
from lorakit.training import processes
from lorakit.training.checkpoints import checkpoints, fingerprint
from lorakit.training.folder import writing
from lorakit.training.head import alike, given_to, head_of
from lorakit.training.loss import batches, logits_of
from lorakit.training.order import longest_first

if TYPE_CHECKING:
    from datasets import Dataset

    from lorakit.training.events import EventLog
    from lorakit.training.trainer import AdapterTrainer

FOLDER = "frozen-cache"


def needed_bytes(rows: Sequence[Dataset], width: int, dtype: torch.dtype) -> int:
    """Return the bytes that the hidden states of all rows take."""
    return sum(map(tokens_of, rows)) * width * dtype.itemsize


def lower_or_refuse(model: Any, trained: Sequence[str] | None = None) -> Lower:
    """Return the part of a model below what is `trained`, by default all that learns, or raise `RecipeError`."""
    learns = [name for name, p in model.named_parameters() if p.requires_grad] if trained is None else trained
    lower = lower_of(model, learns)
    if isinstance(lower, str):
        raise _refusal(lower)
    return lower


@contextmanager
def cached(trainer: AdapterTrainer, output: Path, log: EventLog) -> Iterator[None]:
    """Let a trainer take the hidden states of its rows from disk, where they are written first unless they are there.

    Raises:
        RecipeError: something below the adapter is trained, random, or more than hidden states; a base that is divided.
        LorakitError: a disk without the room, with the bytes that are needed.
    """
    model, folder = trainer.adapted, output / FOLDER
    if processes.count() > 1 and trainer.recipe.train.parallel != "ddp":
        raise _refusal("the base is divided among processes, and its blocks cannot be left out of a step")
    lower = lower_or_refuse(model)
    parts = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
    rows = {name: part for name, part in parts.items() if part is not None}
    with _forward(trainer), answering(model, lower):
        try:
            digest, hidden = _checked(model, lower, rows["train"], trainer.pad_id)
            files = {name: folder / f"{name}-{_named(digest, part)}.bin" for name, part in rows.items()}
            total = needed_bytes(list(rows.values()), hidden.shape[-1], hidden.dtype)
            began, fresh = time.perf_counter(), {name for name, file in files.items() if not file.is_file()}
            processes.wait()
            if processes.first():
                with writing(folder):
                    _make_room(folder, files.values(), total)
                for name in fresh:
                    with writing(files[name]):
                        _write(model, lower, rows[name], files[name], trainer)
            processes.wait()
            log.append("frozen", trainer.state.global_step, blocks=lower.count, of=lower.of, bytes=total,
                       computed=sorted(fresh), seconds=round(time.perf_counter() - began, 3))  # fmt: skip
            if missing := [str(file) for file in files.values() if not file.is_file()]:
                raise _refusal(f"{missing[0]} is not on this machine's disk, as it is on the first process's")
            read = {name: _Reader(files[name], part, hidden).rows(part) for name, part in rows.items()}
        except BaseException:
            discard(output)
            raise
    with answering(model, lower):
        trainer.train_dataset, trainer.eval_dataset = read["train"], read.get("validation")
        try:
            yield
        except BaseException:
            if not checkpoints(output):  # nothing that could go on
                discard(output)
            raise
        finally:
            trainer.train_dataset, trainer.eval_dataset = parts["train"], parts["validation"]


def discard(output: Path) -> None:
    """Delete the hidden states of a run."""
    if processes.first():
        shutil.rmtree(output / FOLDER, ignore_errors=True)


def _refusal(why: str) -> RecipeError:
    return RecipeError(
        f"train.cache_frozen: {why}; what lies below the adapter must be the same in every epoch. Set it to false, or "
        "adapt and train upper blocks alone (adapter.layers)"
    )


@contextmanager
def _forward(trainer: AdapterTrainer) -> Iterator[None]:
    """Compute as a training step does, under its autocast, and keep nothing for a backward."""
    args = trainer.args
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    narrow = torch.autocast(trainer.adapted.device.type, dtype) if args.bf16 or args.fp16 else nullcontext()
    with torch.no_grad(), narrow:
        yield


def _checked(model: Any, lower: Lower, rows: Dataset, pad_id: int) -> tuple[str, Tensor]:
    """Return a digest of the lower part, and the hidden states of a row, proved to be all that the rest reads of it.

    The shortest row goes through the model three times: as ever, from its hidden states, and in training mode. Of
    several processes the first one's digest counts, for their last bits may differ.
    """
    lengths = row_lengths(rows)
    shortest = rows.select([min(range(len(rows)), key=lengths.__getitem__)])
    (batch,) = batches(shortest, 1, pad_id, model.device)
    labels = batch.pop("labels")
    with evaluating(model):
        passed = run_lower(model, lower, seen(model, batch))
        if why := why_not_frozen(model, lower, passed):
            raise _refusal(f"{why}" + ("; set its rate to 0 in the base's config.json" if "drop" in why else ""))
        plain, given = _made(model, batch, labels), _made(model, {**batch, GIVEN: passed.hidden}, labels)
    if not alike(given, plain):
        raise _refusal("the upper blocks of this model read more of the lower ones than hidden states")
    with torch.random.fork_rng(), in_mode(model, training=True):
        again = run_lower(model, lower, seen(model, batch)).hidden
    if not alike(passed.hidden, again):
        raise _refusal("the lower blocks compute something else in training than in evaluation")
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (passed.hidden, *values_of(lower, passed)):
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    first = torch.tensor(list(digest.digest()), dtype=torch.uint8)
    processes.alike([first])
    return f"{lower.path} {lower.count} {bytes(first.tolist()).hex()}", passed.hidden


def _made(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Return a model's logits, or what its head reads where they need not be made."""
    head = head_of(model) if labels.dim() == 2 else ""
    if isinstance(head, str):
        return logits_of(model, inputs, labels)
    with given_to(head.layer) as given:
        logits_of(model, inputs, labels)
    return given[0]


def _named(digest: str, rows: Dataset) -> str:
    return hashlib.blake2b(f"{digest} {fingerprint(rows)}".encode(), digest_size=16).hexdigest()


def _make_room(folder: Path, files: Any, total: int) -> None:
    """Make the folder, delete what is of other rows or weights, and refuse a disk without the room."""
    folder.mkdir(exist_ok=True)
    for file in set(folder.iterdir()) - set(files):
        file.unlink()
    needed, free = total - sum(file.stat().st_size for file in folder.iterdir()), shutil.disk_usage(folder).free
    if needed > free:
        raise LorakitError(
            f"train.cache_frozen needs {needed:,} bytes on the disk of {folder}, which has {free:,} free; make room, "
            "name an output on another disk, or set it to false"
        )


def _write(model: Any, lower: Lower, rows: Dataset, file: Path, trainer: AdapterTrainer) -> None:
    """Write the hidden states of all rows, and give the file its name when it is whole."""
    lengths = row_lengths(rows)
    order = longest_first(lengths)  # which pads least
    draft, size = file.with_suffix(".part"), trainer.args.per_device_eval_batch_size
    numbers = iter(order)
    with evaluating(model), draft.open("wb") as out:
        for batch in batches(rows.select(order), size, trainer.pad_id, model.device):
            del batch["labels"]
            for hidden in run_lower(model, lower, seen(model, batch)).hidden.cpu():
                out.write(_bytes(hidden[: lengths[next(numbers)]]))
        out.flush()
        os.fsync(out.fileno())
    draft.replace(file)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class _Reader:
    """Gives rows their hidden states, as views of a file that is mapped when the first of them is asked for."""

    def __init__(self, file: Path, rows: Dataset, like: Tensor) -> None:
        self._lengths = row_lengths(rows)
        order = longest_first(self._lengths)
        ends = accumulate(self._lengths[i] for i in order)
        self._starts = {i: end - self._lengths[i] for i, end in zip(order, ends, strict=True)}
        self._file, self._dtype, self._width = file, like.dtype, like.shape[-1]
        self._held: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapping out: a worker opens its own, and a digest of this object reads no file."""
        return {**vars(self), "_held": None}

    def rows(self, rows: Dataset) -> Dataset:
        """Return the rows with their hidden states in the column `frozen`."""
        numbered: Dataset = rows.add_column(GIVEN, list(range(len(rows)))).with_transform(self)
        return numbered

    def __call__(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Replace row numbers by hidden states `(length, d)`."""
        if GIVEN not in columns:
            return columns
        if self._held is None:
            size = sum(self._lengths) * self._width
            held = torch.from_file(str(self._file), shared=False, size=size, dtype=self._dtype)
            self._held = held.view(-1, self._width)
        return {**columns, GIVEN: [self._held[(s := self._starts[i]) : s + self._lengths[i]] for i in columns[GIVEN]]}
