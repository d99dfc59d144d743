"""Choose which attached adapters act, and how strongly: off, scaled, stacked and per row are one notion."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import cast

from torch import Tensor, nn

from lorakit.core.adapters import Adapted, Weight
from lorakit.core.checks import is_number
from lorakit.errors import AttachError
from lorakit.inject.context import contexts, refuse_two, refuse_weight
from lorakit.inject.ledger import ledger_of


class Using:
    """What `use` returns: the choice is made; as a context manager, leaving it puts the former one back."""

    def __init__(self, model: nn.Module, before: dict[nn.Module, dict[str, Weight]], shown: set[str]) -> None:
        self._model, self._before, self._shown = model, before, shown

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        attached = ledger_of(self._model).specs
        for module, weights in self._before.items():
            if isinstance(module, Adapted):
                module.adapters.weights = {name: weight for name, weight in weights.items() if name in attached}
        ledger_of(self._model).show(self._model, self._shown & attached.keys())


def use(model: nn.Module, weights: Mapping[str, Weight]) -> Using:
    """Make exactly the named adapters act: `y + sum_i w_i branch_i(x)`.

    Args:
        model: a model with attached adapters.
        weights: adapter name -> a number, or a `(batch,)` tensor with one number per row; `{}` is the bare base.

    Raises:
        AttachError: a name that is not attached; a weight that is no finite number; one other than 1 for an adapter
            that trained modules whole or that the model reads; two of the latter at once.
    """
    ledger, chosen = ledger_of(model), dict[str, Weight]()
    for name, weight in weights.items():
        ledger.require(name)
        chosen[name] = _checked(name, weight)
        per_row = isinstance(weight, Tensor) and weight.dim() > 0
        if ledger.trained[name] and (per_row or float(weight) != 1.0):
            raise AttachError(
                f"{name!r} trained {ledger.trained[name][0]} whole, which is there or not for the whole batch; "
                "use it with weight 1.0, or leave it out"
            )
    read = [name for name in contexts(model) if name in weights]
    for name in read:
        refuse_weight(name, chosen[name])
    refuse_two(read)
    layers = [module for module in model.modules() if isinstance(module, Adapted)]
    using = Using(model, {cast(nn.Module, m): m.adapters.weights for m in layers}, set(ledger.swapped_in))
    for module in layers:
        here = {name for name, _ in module.adapters.named()}
        module.adapters.weights = {name: weight for name, weight in chosen.items() if name in here}
    ledger.show(model, set(weights))
    return using


def _checked(name: str, weight: Weight) -> Weight:
    """Return a weight as the layers take it, a number as a float."""
    if isinstance(weight, Tensor):
        if weight.dim() > 1:
            raise AttachError(f"{name}: a weight is a number or a (batch,) tensor, not of shape {tuple(weight.shape)}")
        return weight
    if not is_number(weight):
        raise AttachError(f"{name}: a weight is a finite number or a (batch,) tensor, not {weight!r}")
    return float(weight)


def active(model: nn.Module) -> dict[str, Weight]:
    """Return the adapters that act now, with their weights."""
    return {
        k: w for module in model.modules() if isinstance(module, Adapted) for k, w in module.adapters.weights.items()
    }
