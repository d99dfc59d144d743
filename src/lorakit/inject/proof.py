"""Prove a layer's merge on random inputs: `op(x; W') == op(x; W) + branch(x)`, which needs no model around it.

Whole models are proved by their logits. Where a layer is all there is, the law of the layer is the proof: the branch is
what training ran, the merged weight is what will be written, and they share no line of code beyond the method's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.adapters import Adapters
from lorakit.errors import MergeError
from lorakit.inject.merge import Merged

EXACT = 1e-5
"""Allowed difference before the cast, as a share of the largest output: eighty roundings of fp32, in one layer."""
ROUNDED = 2.0
"""Allowed difference after the cast, in eps of its dtype. A weight is off by a fifth of one (root mean square), the
errors of a row add up as its terms do, and so an output is off by a quarter: measured 0.2 to 0.6, once in 20,000 tiny
layers 1.3. What a cast cannot explain, the sum before it is held to far more closely."""
_ROWS = 16  # so many that the largest output is no small one by chance, even of a layer with one output


@torch.no_grad()
def prove(path: str, module: nn.Module, merged: Merged, rng: torch.Generator) -> float:
    """Return `max |op(x; W') - (op(x; W) + branch(x))| / max |outputs|` of an adapted layer, for a few random x.

    Args:
        path: the layer's, for the error.
        module: the layer with its adapters, holding the base weight W, in fp32 or better, and no bias.
        merged: the exact sum and W', what is kept of it.
        rng: draws x, normal, or token ids of an embedding.

    Raises:
        MergeError: the difference is more than rounding.
    """
    adapters = cast(Adapters, module.adapters)
    op, weight = adapters.host.op, adapters.host.store.read(module)
    x = _INPUTS[adapters.host.kind](module, weight, rng)
    y = op.apply(module, x, weight)
    adapted = adapters(module, x, y)
    scale = max(float(y.abs().max()), float(adapted.abs().max())) or 1.0
    exact = float((op.apply(module, x, merged.total) - adapted).abs().max()) / scale
    kept = float((op.apply(module, x, merged.kept.to(weight.dtype)) - adapted).abs().max()) / scale
    cast_to = merged.kept.dtype
    allowed = EXACT + (0.0 if cast_to == weight.dtype else ROUNDED * torch.finfo(cast_to).eps)
    if not (exact <= EXACT and kept <= allowed):
        raise MergeError(
            f"{path}: on random inputs the merged and the adapted layer differ by {max(exact, kept):.3g} of the "
            f"largest output, where rounding explains {EXACT if exact > EXACT else allowed:.3g}; please report it"
        )
    return kept


def _vectors(module: Any, weight: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(_ROWS, weight.shape[1], generator=rng, dtype=weight.dtype)


def _tokens(module: Any, weight: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randint(weight.shape[1], (4 * _ROWS,), generator=rng)


def _images(module: Any, weight: Tensor, rng: torch.Generator) -> Tensor:
    """Return inputs wide enough for a few places of the kernel in each direction."""
    spans = [
        d * (k - 1) + 1 + 2 * s for d, k, s in zip(module.dilation, module.kernel_size, module.stride, strict=True)
    ]
    return torch.randn(_ROWS, module.in_channels, *spans, generator=rng, dtype=weight.dtype)


_INPUTS: dict[str, Callable[[Any, Tensor, torch.Generator], Tensor]] = {
    "linear": _vectors,
    "transposed-linear": _vectors,
    "embedding": _tokens,
    "conv1d": _images,
    "conv2d": _images,
    "conv3d": _images,
}
