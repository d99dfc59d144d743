"""From an adapter's state to what the bank serves: a pair per layer, or a refusal that says what to do instead.

What can be told apart token by token is a low-rank change of a weight, stretched or not. A method that reads its whole
input, changes the base's own tensors or is a full matrix is refused by name, before anything is served with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lorakit.core.method import LowRank, Method, Static, Stretched, Tensors
from lorakit.core.site import Skeleton
from lorakit.core.state import AdapterState, Base, Update, check_shapes, trim
from lorakit.errors import AdapterFileError, SpecError, grouped, listing
from lorakit.inject.attach import fitted
from lorakit.inject.bases import check_base
from lorakit.serving.batching.bank import KINDS
from lorakit.serving.batching.place import Pair, Place, Prepared


@torch.no_grad()
def prepare(digest: str, state: AdapterState, skeleton: Skeleton, base: Base, places: Mapping[str, Place]) -> Prepared:
    """Return an adapter as pairs of this base's layers.

    Raises:
        AdapterFileError: an adapter of another base, with each module, what was expected and what is there.
        SpecError: an adapter that no batch of several adapters can serve, with what to do instead.
    """
    _check_servable(state, places)
    updates = fitted(trim(state), skeleton)
    check_shapes(updates)
    check_base(state.base, base)
    if not updates:
        raise AdapterFileError("the adapter changes nothing: no layer of it acts")
    refused = [f"{u.site.key}: {why}" for u in updates if (why := _why_not(u, places))]
    if refused:
        raise SpecError(f"{len(refused)} of {len(updates)} updates cannot be served:\n{listing(grouped(refused))}")
    by_path: dict[str, list[Update]] = {}
    for update in updates:
        by_path.setdefault(update.site.path, []).append(update)
    return Prepared(digest, {path: _pair(parts, places[path]) for path, parts in by_path.items()})


def _check_servable(state: AdapterState, places: Mapping[str, Place]) -> None:
    if state.purpose is not None and state.purpose.labels:
        raise SpecError("the adapter is a classifier, which writes no answers; score it: lorakit evaluate")
    kinds = {type(u.method): u.method for u in state.updates}.values()
    if moving := sorted({method.name for method in kinds if not isinstance(method, Static)}):
        raise SpecError(
            f"{', '.join(moving)} is no change of a weight, so it is neither served beside others nor merged; "
            "use it by itself: lorakit generate"
        )
    if trained := sorted(name for name, tensor in state.trained.items() if not _of_the_base(name, tensor, places)):
        raise SpecError(
            f"the adapter trained {len(trained)} of the base's own tensors, which all requests share:\n"
            f"{listing(trained)}\nmerge it and serve the result as a base: lorakit merge"
        )
    refused = sorted({method.name for method in kinds if not isinstance(_inner(method), LowRank)})
    if refused:
        raise SpecError(
            f"{', '.join(refused)} is no low-rank change of a weight, so it cannot differ from token to token; "
            "write it as one (lorakit convert --as-lora), or merge it and serve the result as a base (lorakit merge)"
        )


def _of_the_base(name: str, tensor: Tensor, places: Mapping[str, Place]) -> bool:
    """Return whether a tensor is the base's own weight: PEFT saves that of an adapted embedding or head beside it."""
    path, _, leaf = name.rpartition(".")
    place = places.get(path)
    if place is None or leaf != "weight":
        return False
    weight = place.weight().to(tensor)
    return weight.shape == tensor.shape and torch.equal(weight, tensor)


def _inner(method: Method) -> Method:
    return method.inner if not isinstance(method, LowRank) and isinstance(method, Stretched) else method


def _why_not(update: Update, places: Mapping[str, Place]) -> str:
    """Return why a layer cannot take an update of its own per token, or nothing."""
    place = places.get(update.site.path)
    if update.site.kind not in KINDS or place is None:
        return f"a layer of kind {update.site.kind} is not served; exclude it, or merge the adapter"
    if not place.whole:
        return "the layer sees only some tokens of a batch; exclude it, or merge the adapter"
    return ""


def _pair(parts: list[Update], place: Place) -> Pair:
    """Return the pair of one layer, of all its slices: `x [D_1; ...]^T` times the `U_i`, each at its own outputs."""
    if len(parts) == 1 and parts[0].site.rows is None:
        down, up, scale, gain = _factors(parts[0], place)
        return Pair(down.contiguous(), _across(up, scale), None if gain is None else gain - 1)
    downs, ups = [], []
    stretch: Tensor | None = None
    for update in parts:
        down, up, scale, gain = _factors(update, place)
        start, stop = update.site.rows or (0, place.site.height)
        wide = up.new_zeros(up.shape[1], place.site.height)
        wide[:, start:stop] = scale * up.T
        downs.append(down)
        ups.append(wide)
        if gain is not None:
            stretch = up.new_zeros(place.site.height) if stretch is None else stretch
            stretch[start:stop] = gain - 1
    return Pair(torch.cat(downs), torch.cat(ups), stretch)


def _across(up: Tensor, scale: float) -> Tensor:
    """Return `s U^T`, row by row in memory; on a CPU numpy writes such a copy several times as fast as torch."""
    if up.device.type != "cpu":
        return (scale * up).T.contiguous()
    values = (up.detach() if up.requires_grad else up).numpy()
    return torch.from_numpy(np.multiply(values.T, values.dtype.type(scale), order="C"))


def _factors(update: Update, place: Place) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """Return `down (r, in)`, `up (out, r)`, s and, of a stretched update, g: `up` has it folded in."""
    dtype, device = place.like.dtype, place.like.device
    p = {name: t if (t.dtype, t.device) == (dtype, device) else t.to(place.like) for name, t in update.tensors.items()}
    if isinstance(update.method, LowRank):
        return *_thin(update.method, p), None
    assert isinstance(update.method, Stretched)
    assert isinstance(update.method.inner, LowRank)
    down, up, scale = _thin(update.method.inner, p)
    weight, rows = place.weight(), update.site.rows
    gain = update.method.gain(p, (weight if rows is None else weight[rows[0] : rows[1]]).to(place.like))
    return down, gain[:, None] * up, scale, gain


def _thin(method: LowRank, p: Tensors) -> tuple[Tensor, Tensor, float]:
    """Return `down`, `up` and s, the product of all three the update."""
    pair = getattr(method, "pair", None)  # asked of a `Paired`: the protocol itself is slow to ask
    return (*method.factors(p), 1.0) if pair is None else pair(p)
