"""How a layer uses its weight (an op) and how the weight is kept (a store); a host is one pair of them.

Every host layer computes `y = op(x; W) + b` with op linear in the canonical weight `W (out, in, *kernel)`. That one
fact is what lets a method know tensors only, and a layer kind be one row of a table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lorakit.core.fronts import Front
from lorakit.core.site import Site


class Op(ABC):
    """How a weight acts on an input."""

    axis: int
    """The dimension of the output that counts the output features."""

    @abstractmethod
    def apply(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Return `op(x; weight)`, without bias, for any number of output features in `weight`."""

    @abstractmethod
    def mix(self, module: nn.Module, hidden: Tensor, up: Tensor) -> Tensor:
        """Return `up (out, r / groups)` applied along the feature axis of `hidden`, the output of `apply(down)`."""

    @abstractmethod
    def channel(self, values: Tensor, like: Tensor) -> Tensor:
        """Return `values (out,)` shaped to broadcast over the output `like`."""


class Store(ABC):
    """How a weight is kept in its module."""

    lossless: bool = True
    """Whether `write(read())` changes nothing and `write(W)` keeps every value of W (up to its dtype)."""

    def like(self, module: nn.Module) -> Tensor:
        """Return a tensor of the weight's dtype and device, whatever its shape; reading it need not be cheap."""
        return self.read(module)

    @abstractmethod
    def read(self, module: nn.Module) -> Tensor:
        """Return the weight in canonical layout; it may be a view of the module's own."""

    @abstractmethod
    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Put a canonical weight into the module, in place, cast to the dtype it is kept in."""


@dataclass(frozen=True)
class Host:
    """One kind of layer: which modules it is, and how they use and keep their weight.

    Methods know kinds; several rows may be of one kind and differ in how the weight is kept, each with its own `name`.
    """

    kind: str
    matches: Callable[[nn.Module], bool]
    op: Op
    store: Store
    site: Callable[[str, nn.Module], Site]
    fronts: Callable[[nn.Module], list[tuple[nn.Module, type[Front]]]] | None = None
    """The mixin that goes in front of the module's class, and of which classes inside it; `Adapted` alone if None."""
    store_name: str = ""
    """How the weight is kept, where that is not as torch keeps it: nf4, bnb-4bit, ..."""

    @property
    def name(self) -> str:
        """Return what the row is called: its kind, and how its weight is kept."""
        return f"{self.kind}, {self.store_name}" if self.store_name else self.kind

    def __reduce__(self) -> tuple[Callable[[str], Host], tuple[str]]:
        """Copy and pickle as the name of a row: a host is a constant of the table."""
        return _row, (self.name,)


def _row(name: str) -> Host:
    from lorakit.core.registry import hosts

    return hosts()[name]
