"""Checkpoints: the adapter, the optimizer, every random state, and the whole recipe that made them.

A folder `checkpoint-<step>` exists only when it is whole: it is written beside its place, synced and renamed, and an
old one is renamed away before it is deleted. So the last one that is there can be resumed, whenever the power went.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit import __version__
from lorakit.core.lazy import need
from lorakit.core.state import AdapterState
from lorakit.errors import AdapterFileError, RecipeError, listing
from lorakit.inject.attach import adapters_named
from lorakit.inject.ledger import parameters_of
from lorakit.persist.files import sha256
from lorakit.persist.native import NATIVE
from lorakit.training.optimizers import package_of
from lorakit.training.progress import Progress
from lorakit.training.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

MEMORY = "checkpoint.json"
STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Memory:
    """What a checkpoint remembers beside the Trainer's own files."""

    recipe: Recipe
    data: str
    progress: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, str]
    """The SHA-256 of every other file, once they are written."""

    @classmethod
    def of(cls, recipe: Recipe, data: str, progress: Progress) -> Memory:
        """Return the memory of this moment."""
        return cls(recipe, data, progress.to_json(), _versions(recipe), {})

    def versions_changed(self) -> dict[str, tuple[str, str]]:
        """Return the version then and now of every package that differs: its steps may not be bitwise the same."""
        now = _versions(self.recipe)
        return {name: (then, now[name]) for name, then in self.versions.items() if then != now[name]}

    def write(self, folder: Path) -> None:
        """Write `checkpoint.json` into a checkpoint whose other files are there."""
        files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        values = {**vars(self), "recipe": self.recipe.model_dump(mode="json"), "files": files}
        (folder / MEMORY).write_text(json.dumps({**values, "seal": _seal(values)}, indent=2), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Memory:
        """Read `checkpoint.json` of a checkpoint; a ValueError says that it is not what was written."""
        values = json.loads((folder / MEMORY).read_text(encoding="utf-8"))
        if values.pop("seal") != _seal(values):
            raise ValueError(f"{folder / MEMORY} is damaged")
        return cls(**{**values, "recipe": Recipe.model_validate(values["recipe"])})


def _seal(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the values in JSON, by which a memory is known to be whole."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def checkpoints(output: str | Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first; what lacks one of its files is no checkpoint."""
    found = [(int(named[1]), path) for path in Path(output).glob("*") if (named := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if all((path / name).is_file() for name in (MEMORY, STATE, NATIVE))]


def refuse_damaged(checkpoint: Path) -> None:
    """Raise `RecipeError` for a checkpoint with a file that is not what the run wrote, and say what to do."""
    what = _fault(checkpoint)
    if what is None:
        return
    bad = [checkpoint]
    for earlier in reversed([one for one in checkpoints(checkpoint.parent) if one != checkpoint]):
        if _fault(earlier) is None:
            raise RecipeError(f"{what}; delete {' and '.join(map(str, bad))} to go on from {earlier.name}")
        bad.append(earlier)
    raise RecipeError(f"{what}; delete {' and '.join(map(str, bad))} to start from the beginning")


def _fault(checkpoint: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, by their checksums."""
    try:
        for name, digest in Memory.read(checkpoint).files.items():
            if sha256(checkpoint / name) != digest:
                return f"{checkpoint / name} is damaged: it is not what the run wrote (SHA-256)"
    except AdapterFileError as fault:
        return str(fault)
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return f"{checkpoint / MEMORY} is damaged or of another version"
    return None


def prune(output: str | Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one, each in one step."""
    for path in checkpoints(output)[:-keep]:
        if path.name != f"checkpoint-{best_step}":
            going = path.with_name(f".{path.name}.going")
            shutil.rmtree(going, ignore_errors=True)
            path.rename(going)
            shutil.rmtree(going, ignore_errors=True)


def refuse_changes(checkpoint: Path, recipe: Recipe, data: str) -> Memory:
    """Return a checkpoint's memory, or refuse to go on with another recipe or other data.

    Raises:
        RecipeError: every difference, old and new; where the run may go instead.
    """
    memory = Memory.read(checkpoint)
    refuse_other_recipe(checkpoint, memory.recipe, recipe)
    if memory.data != data:
        raise RecipeError(
            f"{checkpoint} was made with other training data (the rows of {recipe.data.train} gave other tokens then); "
            "restore the file, or give the new run another output"
        )
    return memory


def refuse_other_recipe(where: Path, kept: Recipe, recipe: Recipe) -> None:
    """Raise `RecipeError` listing what `recipe` changes of the one `where` was made with; its place may change.

    So may how the work is shared among processes, and how many there are: no result depends on it.
    """
    changed = [line for line in kept.differences(recipe) if not line.startswith(("output:", "train.parallel:"))]
    longer = any(line.startswith(("train.epochs:", "train.steps:")) for line in changed)
    advice = "; a longer run has another schedule from its first step on, so it is a new run" if longer else ""
    if changed:
        raise RecipeError(
            f"{where} was made with another recipe; a resumed run must equal an uninterrupted one{advice}. "
            f"Undo the changes, or give the changed recipe another output:\n{listing(changed)}"
        )


@torch.no_grad()
def restore(model: nn.Module, state: AdapterState, name: str = "default") -> None:
    """Copy a state into an adapter that is attached already, in place, so that optimizers keep their parameters.

    Raises:
        AdapterFileError: the state has other layers or modules than the adapter.
    """
    adapters = {adapter.site.key: adapter for adapter in adapters_named(model, name)}
    updates = {update.site.key: update for update in state.updates}
    base = parameters_of(model)
    if strangers := sorted(adapters.keys() ^ updates.keys()) + [key for key in state.trained if key not in base]:
        raise AdapterFileError(f"the checkpoint has other layers than the adapter:\n{listing(strangers)}")
    for key, adapter in adapters.items():
        for tensor, own in adapter.tensors().items():
            own.copy_(updates[key].tensors[tensor])
    for key, values in state.trained.items():
        base[key].copy_(values)


def _versions(recipe: Recipe) -> dict[str, str]:
    transformers = need("transformers", "train")
    own = {"lorakit": __version__, "torch": str(torch.__version__), "transformers": str(transformers.__version__)}
    return own | package_of(recipe.train.optimizer)


def fingerprint(rows: Dataset) -> str:
    """Return a digest of every value of a prepared dataset, to know it by."""
    pc = need("pyarrow.compute", "train")
    digest = hashlib.blake2b(digest_size=16)
    table = rows.with_format("arrow")[:]
    for name in sorted(table.column_names):
        column = table.column(name).combine_chunks()
        digest.update(name.encode())
        if "list" in str(column.type):
            digest.update(pc.list_value_length(column).to_numpy(zero_copy_only=False).tobytes())
            column = column.flatten()
        digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
