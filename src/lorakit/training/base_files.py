"""The files of a base: where they are, and their tensors one by one, so that one at a time is held."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.core.lazy import need
from lorakit.errors import LorakitError

INDEX = "model.safetensors.index.json"


def place_of(name: str) -> Path:
    """Return the directory with the files of a base, fetched from the hub if it is not here."""
    from lorakit.training.base import check_place, explained, resolve

    check_place(name, "config.json")
    place = Path(resolve(name))
    if place.is_dir():
        return place
    files = ["*.safetensors*", "*.json", "*.model", "*.txt", "*.jinja"]
    with explained(name):
        return Path(need("huggingface_hub", "train").snapshot_download(name, allow_patterns=files))


def shards(place: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint's directory.

    Raises:
        LorakitError: there are none, or one of them is missing.
    """
    index = place / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [place / name for name in names]
    else:
        files = sorted(place.glob("model.safetensors"))
    if missing := [file.name for file in files if not file.is_file()]:
        raise LorakitError(f"{place}: {', '.join(missing)} named in {index.name} and not there; download it again")
    if not files:
        pickled = sorted(file.name for file in place.glob("pytorch_model*.bin"))
        way_out = f"it holds {pickled[0]}; convert it to safetensors first" if pickled else "it holds no weights"
        raise LorakitError(f"{place}: a base is read tensor by tensor from model.safetensors, and {way_out}")
    return files


def checkpoint(name: str) -> tuple[list[str], int]:
    """Return the names of a base's tensors, and the bytes of its files."""
    place = place_of(name)
    with open_tensors(place) as tensors:
        return list(tensors), sum(file.stat().st_size for file in shards(place))


@contextmanager
def open_tensors(place: Path, done: Callable[[str], None] = lambda name: None) -> Iterator[Mapping[str, Later]]:
    """Yield every tensor of a checkpoint by name, read by `pread`: a mapped file would count as memory, all of it."""
    with open_shards(place, done) as files:
        yield {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


@contextmanager
def open_shards(
    place: Path, done: Callable[[str], None] = lambda name: None
) -> Iterator[Mapping[Path, Mapping[str, Later]]]:
    """Yield the files of a checkpoint, each with its tensors by name.

    Raises:
        LorakitError: a file that is missing, truncated or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        files = {}
        for file in shards(place):
            try:
                files[file] = stack.enter_context(safe_open(file, "pt", backend="pread"))
            except SafetensorError as bad:
                raise LorakitError(f"{file} is truncated or corrupt: {bad}; get the file again") from bad
        yield {
            file: {name: Later(name, opened.get_slice(name), done) for name in opened.keys()}  # noqa: SIM118
            for file, opened in files.items()
        }


def read_tensor(file: Path, name: str) -> Tensor:
    """Return one tensor of a file that was opened before.

    Raises:
        LorakitError: a file that was taken away or changed since.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt", backend="pread") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as bad:
        raise LorakitError(f"{file}: {name} cannot be read any more: {bad}") from bad


class Later:
    """A tensor of a file; indexing it reads it."""

    def __init__(self, name: str, stored: Any, done: Callable[[str], None]) -> None:
        self._name, self._stored, self._done = name, stored, done

    def __getitem__(self, index: Any) -> Tensor:
        tensor: Tensor = self._stored[index]
        self._done(self._name)
        return tensor

    def get_shape(self) -> list[int]:
        """Return the shape."""
        shape: list[int] = self._stored.get_shape()
        return shape

    def get_dtype(self) -> str:
        """Return safetensors' name of the dtype."""
        dtype: str = self._stored.get_dtype()
        return dtype
