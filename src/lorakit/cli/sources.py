"""What the user named: a run, an adapter, or a base. A run's folder remembers its recipe, so nothing is repeated."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import AdapterFileError, LorakitError, RecipeError, few

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.core.state import AdapterState, Purpose
    from lorakit.training.base import Loaded
    from lorakit.training.dense_weights import DenseWeights
    from lorakit.training.recipe import DataSection, Recipe

SOURCE_HELP = "The folder of a run, an adapter (directory or file), or a base model."
BASE_HELP = "The base of the adapter, if its files do not say it or it moved."
ALPHA_HELP = "The alpha of a loralib file, which does not store it."
ENABLED_HELP = "Which projections the merged layers of a loralib file adapt: yes,no,yes for q and v."
_ADAPTER_FILES = ("adapter_config.json", "adapter.lorakit.safetensors")


@dataclass(frozen=True)
class Source:
    """A base by name; the adapter on it, if any; the recipe that made it, where its run is at hand; and what it is for.

    `purpose` is None for a base that continues text and for an adapter of another tool: nothing says how their rows
    are read.
    """

    base: str
    state: AdapterState | None = None
    recipe: Recipe | None = None
    purpose: Purpose | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the classes of a classifier, else nothing."""
        return self.purpose.labels if self.purpose is not None else ()

    @property
    def data(self) -> DataSection:
        """Return how rows are read: as the recipe says, as the adapter remembers, or as they look."""
        from lorakit.training.recipe import DataSection

        if self.recipe is not None:
            return self.recipe.data
        if self.purpose is None:
            return DataSection()
        return DataSection(separator=self.purpose.separator, labels=self.purpose.labels)

    def load_base(self, dtype: str = "auto", *, packed: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the bare base, for the task of the recipe, and its tokenizer; in 4 bits if its run had it so."""
        loaded, tokenizer = self.load(dtype, packed=packed)
        return loaded.model, tokenizer

    def load(self, dtype: str = "auto", *, packed: bool = True) -> tuple[Loaded, PreTrainedTokenizerBase]:
        """Return as `load_base` does, with what its files have no values for: the head of a classifier."""
        from lorakit.training.base import AbsentBaseError, load_model, load_tokenizer, packing_of, task_of

        train = self.recipe.train if self.recipe is not None else None
        try:
            tokenizer = load_tokenizer(self.base)
        except AbsentBaseError as absent:
            if self.state is None:
                raise
            raise LorakitError(
                f"{absent}\nthe adapter has this name of its base; name where it is with --base"
            ) from absent
        loaded = load_model(
            self.base,
            tokenizer,
            task=task_of(self.labels),
            labels=self.labels,
            dtype=train.dtype if train is not None and dtype == "auto" else dtype,
            device=train.device if train is not None else "auto",
            packing=packing_of(self.recipe.quant if self.recipe is not None and packed else None),
        )
        return loaded, tokenizer


def find(given: str, base: str | None = None) -> Source:
    """Return what `given` names; `base` overrides the base an adapter remembers.

    Raises:
        RecipeError: a run that has no adapter yet.
        AdapterFileError: an adapter that cannot be read.
        LorakitError: an adapter that does not say its base.
    """
    place = Path(given)
    run = _run_of(place)
    if run is not None:
        return _from_run(run, base)
    if place.is_file() or (place.is_dir() and not (place / "config.json").is_file()) or _is_adapter(place):
        state = _read(given)
        return Source(base or named_base(given, state), state, purpose=state.purpose)
    if base is not None:
        raise AdapterFileError(f"{given} is a base, so it cannot sit on --base {base}; give an adapter or a run")
    return Source(given, purpose=classifier_in(place))


def adapter_in(given: str) -> Path:
    """Return where the adapter of a run lies, or the adapter's own place.

    Raises:
        AdapterFileError: a base.
    """
    place, inside = Path(given), Path(given) / "adapter"
    if (place / "recipe.yaml").is_file() and inside.is_dir():
        return inside
    if is_base(place):
        raise AdapterFileError(f"{given} is a base without an adapter; give the folder of a run or an adapter")
    return place


def load_adapter(given: str, base: str | None = None) -> AdapterState:
    """Return the adapter of a run, or at a place, for a verb that is not told an alpha; `base` names its base anew.

    Raises:
        AdapterFileError: a base, a file of loralib, an adapter that cannot be read, or one for another base.
    """
    state = _read(given)
    return with_widths(state if base is None else on_base(state, base))


def on_base(state: AdapterState, base: str) -> AdapterState:
    """Return an adapter that names its base anew; packed weights alone cannot tell whether it is the one.

    Raises:
        RecipeError: weights of other shapes than the adapter's.
        AdapterFileError: weights other than the adapter remembers, or none of its layers.
    """
    if state.base.probes:
        from lorakit.training.base import build_empty, task_of
        from lorakit.training.quantised import holds_packed
        from lorakit.training.stored_tensors import StoredTensors

        model = build_empty(base, task=task_of(state.labels), labels=state.labels)
        if not holds_packed(model.config):
            stored = StoredTensors(base, model, reader="--base", remedy="name the one in 16 bits")
            known = tuple(u for u in state.updates if stored.known_as(f"{u.site.path}.weight") is not None)
            if state.updates and not known:
                raise AdapterFileError(
                    f"the adapter was trained on another base ({state.base.name or 'unnamed'}) than {base}, which has "
                    f"none of its layers ({few([update.site.key for update in state.updates])})"
                )
            weights_under(replace(state, updates=known), base, "--base")
    return replace(state, base=replace(state.base, name=base))


def with_widths(state: AdapterState) -> AdapterState:
    """Return an adapter with the widths of its layers, from its base where its file does not tell them (PEFT's IA3)."""
    if all(update.site.in_ for update in state.updates) or state.base.name is None:
        return state
    from lorakit.inject.attach import fitted
    from lorakit.inject.sites import sites
    from lorakit.training.base import build_empty, task_of

    model = build_empty(state.base.name, task=task_of(state.labels), labels=state.labels)
    return replace(state, updates=fitted(state, sites(model)))


def adapter_bytes(output: str) -> int:
    """Return the bytes of the files of an adapter that was written."""
    return sum(file.stat().st_size for file in Path(output).glob("adapter*"))


def refuse_full_folder(output: Path) -> None:
    """Raise `AdapterFileError` for a folder with something in it: an adapter is written beside nothing."""
    if output.is_dir() and any(output.iterdir()):
        raise AdapterFileError(f"{output} is not empty; name another --output")


def switches(enabled: str | None) -> tuple[bool, ...] | None:
    """Return `yes,no,yes` as booleans."""
    if enabled is None:
        return None
    words = [word.strip().lower() for word in enabled.split(",")]
    if wrong := [word for word in words if word not in ("yes", "no")]:
        raise RecipeError(f"--enabled {enabled!r}: {wrong[0]!r} is neither yes nor no; for q and v write yes,no,yes")
    return tuple(word == "yes" for word in words)


def weights_under(state: AdapterState, base: str, reader: str) -> DenseWeights:
    """Return the weights of a base under an adapter's layers, read one at a time; `reader` is the verb, for errors.

    Raises:
        RecipeError: a base whose weights cannot be read, or have other shapes.
        AdapterFileError: another base than the adapter's.
    """
    from lorakit.inject.bases import check_base
    from lorakit.training.base import task_of
    from lorakit.training.dense_weights import DenseWeights

    found = DenseWeights(
        base,
        [update.site for update in state.updates],
        task_of(state.labels),
        state.labels,
        reader=reader,
        remedy="name the base it was made of with --base",
        tied=True,
    )
    check_base(state.base, found.probed(state.base.probes))
    return found


def weights_if_asked(given: str, state: AdapterState, reader: str) -> Mapping[str, Tensor] | None:
    """Return the weights of the base of an adapter where a change of one depends on them, else None."""
    from lorakit.core.state import leans_on_weights

    if not leans_on_weights(state):
        return None
    return weights_under(state, named_base(given, state), reader)


def need_adapter(source: Source, given: str) -> AdapterState:
    """Return the adapter of a source, or say that the user named a base."""
    if source.state is None and not Path(given).exists() and not is_base(Path(given)):
        raise AdapterFileError(f"there is no {given} here; give the folder of a run or an adapter")
    if source.state is None:
        raise AdapterFileError(f"{given} is a base without an adapter; give the folder of a run or an adapter")
    return source.state


def refuse_classifier(given: str, labels: tuple[str, ...]) -> None:
    """Raise `RecipeError` for the classifier of these labels, where answers are to be written."""
    if labels:
        raise RecipeError(f"{given} is a classifier, which writes no answers; score it: lorakit evaluate {given}")


def named_base(given: str, state: AdapterState) -> str:
    """Return the name of an adapter's base, or raise `LorakitError` where it has none."""
    if not state.base.name:
        raise LorakitError(f"{given} does not say which base it was trained on; name it with --base")
    return state.base.name


def _read(given: str) -> AdapterState:
    from lorakit.persist import LORALIB, load

    place = adapter_in(given)
    if place.is_file() and place.suffix in LORALIB:
        way = shlex.join(["lorakit", "convert", given, "--to", "peft", "--alpha", "ALPHA", "--output", "DIR"])
        raise AdapterFileError(
            f"{given} is an adapter of the original loralib, which stores neither its alpha nor its base; convert it "
            f"first:\n  {way}"
        )
    return load(place)


def is_base(place: Path) -> bool:
    """Return whether a place is a bundled base, or a directory with a model and no adapter."""
    from lorakit.training.base import bundled

    return str(place) in bundled() or ((place / "config.json").is_file() and not _is_adapter(place))


def _run_of(place: Path) -> Path | None:
    """Return the run's folder when `place` is one, or the adapter in one."""
    for folder in (place, place.parent) if place.name == "adapter" else (place,):
        if (folder / "recipe.yaml").is_file():
            return folder
    return None


def _from_run(run: Path, base: str | None) -> Source:
    from lorakit.persist import load
    from lorakit.training.recipe import load_recipe

    recipe = load_recipe(run / "recipe.yaml")
    if not (run / "adapter").is_dir():
        again = shlex.join(["lorakit", "train", str(run / "recipe.yaml"), "--resume"])
        raise RecipeError(f"{run} is a run without its adapter: it has not ended; go on with\n  {again}")
    state = load(run / "adapter")
    return Source(base or recipe.model, state, recipe, state.purpose)


def classifier_in(base: Path) -> Purpose | None:
    """Return the purpose of a base that is a classifier with its head, as a merge writes one; else nothing."""
    from lorakit.core.state import Purpose
    from lorakit.persist.files import read_json

    if not (base / "config.json").is_file():
        return None
    config = read_json(base / "config.json")
    names = config.get("id2label")
    if not any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        return None
    labels = [str(names[key]) for key in sorted(names, key=int)] if isinstance(names, dict) else ["LABEL_0", "LABEL_1"]
    return Purpose("classification", "classification", None, tuple(labels))


def _is_adapter(place: Path) -> bool:
    return any((place / name).is_file() for name in _ADAPTER_FILES)
