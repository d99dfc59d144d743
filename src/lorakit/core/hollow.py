"""Tensors whose values are not here: on the meta device, fake ones of a rehearsed step, a share among processes."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_hollow(tensor: Tensor) -> bool:
    """Return whether a tensor has no values that could be read or written."""
    return tensor.is_meta or isinstance(getattr(tensor, "data", tensor), FakeTensor)


def is_divided(tensor: Tensor) -> bool:
    """Return whether only a share of a tensor is here: of a DTensor, or of one of DeepSpeed's that is not gathered."""
    return hasattr(tensor, "device_mesh") or whole_shape(tensor) != tuple(tensor.shape)


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor, which DeepSpeed tells beside one that is not gathered."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))
