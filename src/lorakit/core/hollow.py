"""Tensors that have a shape and no values: on the meta device, or the fake ones a training step is rehearsed with."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_hollow(tensor: Tensor) -> bool:
    """Return whether a tensor has no values that could be read or written."""
    return tensor.is_meta or isinstance(getattr(tensor, "data", tensor), FakeTensor)
