"""When a number that is not finite ends a run: always, but for gradients that a loss scaler overflowed on purpose.

fp16 training multiplies the loss by a large factor and halves it at every overflow; until it fits, gradient norms are
inf or NaN by design and those steps are skipped (arXiv 1710.03740, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lorakit.core.state import AdapterState
from lorakit.errors import LorakitError

OVERFLOWS = 20
"""Skipped steps in a row that end a run: halving 2^16, where the scaler starts, 20 times leaves less than 0.1."""


class FiniteCheck:
    """Raises at the first number that is not finite, and counts the overflows a loss scaler may have."""

    def __init__(self, lr: float) -> None:
        self._lr, self._overflows = lr, 0

    def __call__(self, logs: Mapping[str, float], step: int, *, scaled: bool) -> None:
        """Check one step's numbers; `scaled` says that a loss scaler is at work.

        Raises:
            LorakitError: a loss that is not finite, or such a gradient norm without a scaler or too often in a row.
        """
        grows = not math.isfinite(logs.get("grad_norm", 0.0))
        if "grad_norm" in logs:
            self._overflows = self._overflows + 1 if grows and scaled else 0
        tolerated = {"grad_norm"} if scaled and self._overflows < OVERFLOWS else set()
        often = f", {self._overflows} steps in a row" if grows and scaled else ""
        for name in ("loss", "grad_norm", "eval_loss"):
            if name not in tolerated and not math.isfinite(value := logs.get(name, 0.0)):
                raise LorakitError(
                    f"step {step}: {name} is {value}{often if name == 'grad_norm' else ''}{_remedy(self._lr)}"
                )


@torch.no_grad()
def refuse_exploded(adapter: AdapterState, step: int, lr: float) -> None:
    """Raise `LorakitError` for values that no later loss was there to tell of: the last step's, before a save.

    A tensor's sum of squares is finite in fp32 while its values are below 1e19, and no adapter that works has larger.
    """
    tensors = {f"{u.site.key}.{name}": t for u in adapter.updates for name, t in u.tensors.items()}
    tensors.update(adapter.trained)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().square().sum().isfinite():
            largest = float(tensor.float().abs().nan_to_num(math.inf).max())
            size = "no longer finite" if math.isinf(largest) else f"as large as {largest:.0e}"
            raise LorakitError(f"step {step}: {name} is {size}{_remedy(lr)}")


def _remedy(lr: float) -> str:
    return (
        f"; the last whole checkpoint is from before. Lower train.lr (it was {lr:g}), lengthen train.warmup, or use "
        "dtype: fp32"
    )
