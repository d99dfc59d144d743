"""What a base is known by: a few values of a few of its weights, which an adapter remembers and asks for again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lorakit.core.hollow import is_divided, is_hollow
from lorakit.core.registry import host_at
from lorakit.core.site import Site, Skeleton
from lorakit.core.state import Base
from lorakit.errors import AdapterFileError, AttachError, listing
from lorakit.inject.ledger import ledger_of, parameters_of
from lorakit.inject.sites import sites

PROBES = 8
"""Of how many layers an adapter remembers weights, to know its base by."""


def base_of(model: nn.Module, most: int = PROBES) -> Base:
    """Return the base's name and probes: a few evenly spaced weights of the first adaptable layers.

    Left out are layers that an adapter trains whole, which are no longer the base's, embeddings and heads, which are
    resized when tokens are added, and quantised weights, which are near the base's and not the same.
    """
    if (known := ledger_of(model).base) is not None:
        return known
    refuse_divided(weights := known_weights(model, most))
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Base(name or None, {path: probe(weight) for path, weight in weights.items()})


def known_weights(model: nn.Module, most: int = PROBES) -> dict[str, nn.Parameter]:
    """Return the weights that `base_of` reads, by the paths of their layers."""
    named, trained = parameters_of(model), [key for keys in ledger_of(model).trained.values() for key in keys]
    moved = {id(named[key]) for key in trained}
    found: dict[str, nn.Parameter] = {}
    for site in known_by(sites(model)):
        if len(found) == most:
            break
        weight = named.get(f"{site.path}.weight")
        lossless = host_at(site, model.get_submodule(site.path)).store.lossless
        if weight is not None and lossless and not is_hollow(weight) and id(weight) not in moved:
            found[site.path] = weight
    return found


def known_by(skeleton: Skeleton) -> list[Site]:
    """Return the layers whose weights tell one base from another: no embedding and no head, which may be resized."""
    return [site for site in skeleton.sites if site.kind != "embedding" and site.path not in skeleton.heads]


def probe(weight: Tensor, values: int = 4) -> tuple[float, ...]:
    """Return a few evenly spaced values of a weight as its module keeps it, to know it by."""
    flat = weight.detach().reshape(-1)
    picked = flat[:: max(1, flat.numel() // values)][:values]
    return tuple(round(float(v), 6) for v in picked.float())


def check_base(wanted: Base, here: Base) -> None:
    """Raise `AdapterFileError` where the weights an adapter remembers of its base are not those that are here."""
    if differing := [f"{p}: expected {wanted.probes[p]}, found {here.probes[p]}" for p in wanted.unlike(here)]:
        raise AdapterFileError(
            f"the adapter was trained on another base ({wanted.name or 'unnamed'}) than this model "
            f"({here.name or 'unnamed'}): the weights differ; load the base it was trained on\n"
            f"{listing(differing, 4)}"
        )


def refuse_divided(named: Mapping[str, Tensor]) -> None:
    """Raise `AttachError` for tensors of which this process holds a share alone."""
    if divided := [name for name, tensor in named.items() if is_divided(tensor)]:
        raise AttachError(
            "these weights are divided among processes, and would be read here; do this before they are divided, or "
            f"gather them (with deepspeed.zero.GatheredParameters(handle.read_by_state()): ...):\n{listing(divided)}"
        )
