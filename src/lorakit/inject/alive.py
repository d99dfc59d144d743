"""Prove that attached adapters take part: called in the forward, reached by the backward.

Guard 3. An adapter can be attached and do nothing: the layer's parent reads the weight itself, a cached path skips it,
checkpointing cut the gradient off. One watched step tells, by path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lorakit.core.adapters import Adapted, Adapter, attached
from lorakit.errors import AliveError, listing
from lorakit.inject.ledger import ledger_of, parameters_of


@contextmanager
def alive(model: nn.Module, backward: bool = True) -> Iterator[None]:
    """Watch one forward (and backward) and raise `AliveError` naming every active adapter it did not involve.

    Args:
        model: a model with attached adapters, in eager mode.
        backward: also require a gradient on every trainable tensor of the active adapters, and on something of what an
            adapter without a method trains whole (a model may own parameters that its task does not use).
    """
    watched, whole = [adapter for _, adapter in attached(model, acting=True)], _trained_whole(model)
    if not watched and not whole:
        raise AliveError("no adapter is active on this model; attach one, or switch it on with use(model, {name: 1.0})")
    called: set[Adapter] = set()
    layers = [module.adapters for module in model.modules() if isinstance(module, Adapted)]
    for layer in layers:
        layer.witness = called.add
    try:
        yield
    finally:
        for layer in layers:
            layer.witness = None
    silent = [a.site.key for a in watched if a not in called]
    if silent:
        raise AliveError(
            f"{len(silent)} of {len(watched)} active adapters were never called in the forward; their layers' outputs "
            f"are made some other way, so exclude them:\n{listing(silent)}"
        )
    if backward and not watched and all(p.grad is None for p in whole.values()):
        raise AliveError(f"no parameter that is trained whole got a gradient:\n{listing(list(whole))}")
    if backward:
        cut = [a.site.key for a in watched if any(p.requires_grad and p.grad is None for p in a.parameters())]
        if cut:
            raise AliveError(
                f"{len(cut)} of {len(watched)} active adapters got no gradient; with reentrant gradient checkpointing "
                f"call model.enable_input_require_grads(), or use use_reentrant=False:\n{listing(cut)}"
            )


def _trained_whole(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base's own parameters that the active adapters train."""
    ledger, named = ledger_of(model), parameters_of(model)
    return {key: named[key] for name in ledger.swapped_in for key in ledger.trained[name] if named[key].requires_grad}
