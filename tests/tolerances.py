"""How close is equal: one place that says it, by dtype, with the reason.

Two correct computations of one value differ only by the order of their sums and by the rounding at the border.
A tolerance wider than that hides a bug; one that is tuned until a test passes hides it better.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The error allowed, relative to the largest value summed (entries may cancel to zero; their error does not).
TOLERANCES: dict[torch.dtype, float] = {
    # eps 2.2e-16: thousands of reordered terms through a few layers stay four digits above it.
    torch.float64: 1e-12,
    # eps 1.2e-7: n reordered terms err by about sqrt(n) eps, 1e-6 at a thousand terms; a dozen layers of it make 2e-5.
    torch.float32: 2e-5,
    # eps 9.8e-4: sums run in fp32, so each side rounds a few times at the border; four roundings.
    torch.float16: 4e-3,
    # eps 7.8e-3: the same four roundings with three bits less.
    torch.bfloat16: 3.2e-2,
}


def tolerance(*dtypes: torch.dtype) -> float:
    """Return the tolerance of the coarsest of these dtypes; exact (0) for integers and booleans."""
    return max(TOLERANCES.get(dtype, 0.0) for dtype in dtypes)


def assert_close(
    actual: Tensor, expected: Tensor, *, scale: float | None = None, dtype: torch.dtype | None = None
) -> None:
    """Assert that two tensors agree in shape and to within `tolerance * scale`.

    `scale` is the size of what was summed, by default the largest magnitude in `expected`; give it where the result
    is a small difference of large terms. `dtype` names a coarser dtype the value passed through on its way.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    allowed = tolerance(actual.dtype, expected.dtype, *([dtype] if dtype else []))
    wide = torch.promote_types(torch.promote_types(actual.dtype, expected.dtype), torch.float64)
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    if scale is None:
        scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=allowed * scale)
