"""What speaks against merging an adapter into the files of a base, found before a byte is written.

Names, shapes and dtypes tell it, and a few weights the adapter knows its base by. Everything is refused at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.errors import MergeError, grouped, listing
from lorakit.inject.bases import probe
from lorakit.inject.streaming import StreamedMerge
from lorakit.persist.shard import FLOATING
from lorakit.training.tensor_names import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refuse(found: Checkpoint, merge: StreamedMerge, absent: Sequence[str], base: str) -> None:
    """Raise unless every tensor that `merge` changes can be, and is the one the adapter was trained on.

    Args:
        found: the tensors of the base.
        merge: the adapter on the empty model.
        absent: what the model has and the files do not.
        base: its name, for the error.

    Raises:
        MergeError: listing every layer that cannot be merged, and everything the files lack.
        AdapterFileError: the adapter was trained on another base.
    """
    method, problems = _quantised(found.model), list(merge.problems)
    named = {problem.partition(": ")[0] for problem in problems}
    for name, path in merge.layers.items():
        if path not in named:
            problems += [f"{path}: {why}" for why in _against(found, name, method)]
    for name in merge.whole:
        if name in found.sources:
            problems += [f"{name}: {why}" for why in _against(found, name, method)]
    if method is None:
        problems += [f"{name}: the files of the base have no tensor for it" for name in absent]
    if problems:
        count = len({problem.partition(": ")[0] for problem in problems})
        raise MergeError(
            f"nothing was written; {count} layer(s) cannot be merged from files:\n{listing(grouped(problems))}"
        )
    _check_base(found, merge, base)


def _against(found: Checkpoint, name: str, method: str | None) -> list[str]:
    """Return why a parameter cannot be merged from the tensors that are there."""
    sources = found.sources.get(name, [])
    packed = {found.stored[source].get_dtype() for source in sources} - FLOATING
    if packed or (method is not None and not sources):
        how = method or f"kept as {', '.join(sorted(packed))}"
        return [f"its weight is quantised ({how}); merge into the 16-bit base, or in memory with lossy=True"]
    if len(sources) > 1 or any(found.destinations[source].converted for source in sources):
        made = ", ".join(sources[:2]) + (" ..." if len(sources) > 2 else "")
        return [f"its weight is made of other tensors on loading ({made}); merge in memory"]
    here = tuple(found.model.get_parameter(name).shape)
    shapes = [tuple(found.stored[source].get_shape()) for source in sources]
    return [f"the files have shape {shape}, the model {here}" for shape in shapes if shape != here]


def _quantised(model: PreTrainedModel) -> str | None:
    """Return how a base is quantised, or None for a dense one."""
    kept = getattr(model.config, "quantization_config", None)
    if kept is None:
        return None
    return str((kept if isinstance(kept, dict) else kept.to_dict()).get("quant_method", "unknown"))


def _check_base(found: Checkpoint, merge: StreamedMerge, base: str) -> None:
    """Compare the weights the adapter knows its base by with those of the files, one tensor at a time."""
    asked = {f"{path}.weight": path for path in merge.known_by}
    sources = {name: place.name for name, place in found.destinations.items() if place.name in asked}
    dense = {name: target for name, target in sources.items() if found.stored[name].get_dtype() in FLOATING}
    merge.check_base(base, {asked[str(target)]: probe(found.stored[name][...]) for name, target in dense.items()})
