"""Tensors that nobody needs to keep for backward, because something that is kept anyway gives them again.

The output of a norm is its input times a number per row and a constant per column: whoever wants it in backward keeps
the norm's input, which the norm keeps as well, and pays one pass over memory instead of one more activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

_ATTRIBUTE = "_lorakit_remade"


@dataclass(frozen=True)
class Remade:
    """`make(*kept)` is the tensor again, to the bit."""

    make: Callable[..., Tensor]
    kept: tuple[Tensor, ...]


def remember(tensor: Tensor, make: Callable[..., Tensor], *kept: Tensor) -> Tensor:
    """Return `tensor`, which from now on tells how it is made again; it forgets that as soon as it is written to."""
    setattr(tensor, _ATTRIBUTE, (tensor._version, Remade(make, kept)))
    return tensor


def forget(tensor: object) -> None:
    """Make a tensor tell nothing about how it was made."""
    if isinstance(tensor, Tensor):
        vars(tensor).pop(_ATTRIBUTE, None)


def remade(tensor: Tensor) -> Remade | None:
    """Return how `tensor` is made again, where somebody said so and nobody wrote to it since."""
    version, how = getattr(tensor, _ATTRIBUTE, (None, None))
    return how if version == tensor._version else None
