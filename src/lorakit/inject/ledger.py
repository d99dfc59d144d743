"""What a model remembers of the adapters attached to it, so that taking them off restores it.

The ledger is a plain attribute of the model: copies and pickles carry it along, and nothing lives outside the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorakit.core.spec import AdapterSpec
from lorakit.core.state import Base
from lorakit.errors import AttachError, did_you_mean

ATTRIBUTE = "_lorakit"


@dataclass
class Ledger:
    """The adapters of one model: their specs, the base parameters they train whole, and the base as it was."""

    specs: dict[str, AdapterSpec] = field(default_factory=dict)
    trained: dict[str, list[str]] = field(default_factory=dict)
    resting: dict[str, Tensor] = field(default_factory=dict)
    """For each parameter trained whole, the value that is not in the model now: the base's, or the adapter's."""
    swapped_in: set[str] = field(default_factory=set)
    """The adapters whose wholly trained modules are in the model now."""
    learning: set[str] = field(default_factory=set)
    """The parameters trained whole that learn again when their adapter is active again: the base's never do."""
    requires_grad: dict[str, bool] = field(default_factory=dict)
    base: Base | None = None
    """What the base was known by before its weights were divided among processes; None while they are whole."""

    def require(self, name: str) -> None:
        """Raise `AttachError` unless an adapter of that name is attached."""
        if name not in self.specs:
            known = ", ".join(self.specs) or "none"
            raise AttachError(
                f"no adapter named {name!r} is attached{did_you_mean(name, self.specs)}; attached: {known}"
            )

    def freeze(self, model: nn.Module) -> None:
        """Freeze the base, remembering each parameter's flag the first time."""
        if not self.specs:
            self.requires_grad = {key: p.requires_grad for key, p in model.named_parameters()}
            for parameter in model.parameters():
                parameter.requires_grad_(False)

    @torch.no_grad()
    def add(
        self,
        model: nn.Module,
        name: str,
        spec: AdapterSpec,
        trained: list[str],
        values: Mapping[str, Tensor],
        trainable: list[str],
    ) -> None:
        """Enter an adapter; the parameters it holds whole start from the base, or from the values it brings.

        Those in `trainable` learn; the others are only kept, as PEFT keeps the embedding of a resized vocabulary.
        """
        named = parameters_of(model)
        learning = {id(named[key]) for key in trainable}
        for key in trained:
            self.resting[key] = named[key].detach().clone()
            named[key].requires_grad_(id(named[key]) in learning)
            if key in values:
                named[key].copy_(values[key])
        self.specs[name], self.trained[name] = spec, list(trained)
        self.swapped_in.add(name)
        setattr(model, ATTRIBUTE, self)

    def refuse_shared(self, name: str, trained: list[str]) -> None:
        """Raise `AttachError` when another adapter already trains one of these parameters whole."""
        for other, keys in self.trained.items():
            if shared := sorted(set(keys) & set(trained)):
                raise AttachError(
                    f"adapters {other!r} and {name!r} both train {shared[0]} whole, and a model holds one value of it; "
                    f"detach {other!r} first, or load {name!r} into another copy of the model"
                )

    @torch.no_grad()
    def show(self, model: nn.Module, active: set[str]) -> None:
        """Put the wholly trained modules of the active adapters in, and the base's own back for the others."""
        named = parameters_of(model)
        for name, keys in self.trained.items():
            if (name in active) != (name in self.swapped_in):
                for key in keys:
                    here = named[key].detach().clone()
                    named[key].copy_(self.resting[key])
                    self.resting[key] = here
                    if name not in active and named[key].requires_grad:
                        self.learning.add(key)
                    named[key].requires_grad_(name in active and key in self.learning)
                    self.learning -= {key} if name in active else set()
                self.swapped_in ^= {name}

    def trained_values(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """Return the live values of an adapter's wholly trained parameters, wherever they rest."""
        named = parameters_of(model)
        source = named if name in self.swapped_in else self.resting
        return {key: source[key].detach() for key in self.trained[name]}

    def remove(self, model: nn.Module, name: str) -> None:
        """Strike an adapter out, its wholly trained modules back to the base's; the last one restores the flags."""
        self.show(model, self.swapped_in - {name})
        self._strike(model, name)

    def keep_trained(self, model: nn.Module, name: str) -> None:
        """Make an adapter's wholly trained parameters the model's own, as a merge does."""
        named = parameters_of(model)
        for key in self.trained[name]:
            del self.resting[key]
            named[key].requires_grad_(False)
        self.trained[name] = []

    def _strike(self, model: nn.Module, name: str) -> None:
        named = parameters_of(model)
        for key in self.trained.pop(name):
            del self.resting[key]
            named[key].requires_grad_(False)
        del self.specs[name]
        self.swapped_in.discard(name)
        if not self.specs:
            for key, parameter in model.named_parameters():
                parameter.requires_grad_(self.requires_grad.get(key, parameter.requires_grad))
            delattr(model, ATTRIBUTE)


def ledger_of(model: nn.Module) -> Ledger:
    """Return the model's ledger; a model without adapters has none, and gets an empty one that `add` will enter."""
    kept = getattr(model, ATTRIBUTE, None)
    return kept if isinstance(kept, Ledger) else Ledger()


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by every name they have: a tied one has two."""
    return dict(model.named_parameters(remove_duplicate=False))
