"""The optimizer of a run: torch's AdamW, or bitsandbytes' with its moments in 8 bits, in pages, or both.

All take the same groups and torch's constants (betas 0.9 and 0.999, eps 1e-8): what a recipe chooses is the memory. One
that does not work here is refused before a base is loaded, by trying one small step: what bitsandbytes serves changes
with its version and with the device. Pages it would silently leave out on a CPU, so those are refused by name.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from lorakit.core.lazy import need
from lorakit.errors import DeviceError, MissingExtraError

PLAIN = "adamw"
IN_8_BITS = frozenset({"adamw-8bit", "paged-adamw-8bit"})
UNPAGED = {"paged-adamw": "adamw", "paged-adamw-8bit": "adamw-8bit"}
"""The optimizers that keep large moments in pages, and what each is without."""
ENOUGH = 100_000
"""So many numbers of a parameter have 8-bit moments (from 4096 on) and paged ones; the trial step takes as many."""


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> Optimizer:
    """Return the optimizer of this name over groups that say their own rate and decay.

    Raises:
        MissingExtraError: bitsandbytes is not installed and the name asks for it.
    """
    if name == PLAIN:
        return torch.optim.AdamW(groups, fused=True)
    made: Optimizer = _bitsandbytes().optim.AdamW(
        groups, optim_bits=8 if name in IN_8_BITS else 32, is_paged=name in UNPAGED
    )
    return made


def refuse_optimizer(name: str, device: torch.device) -> None:
    """Raise for an optimizer that does not work on `device`, and say which one to use instead.

    Raises:
        DeviceError: pages without CUDA, or a bitsandbytes whose step fails here.
        MissingExtraError: bitsandbytes is not installed.
    """
    if name == PLAIN:
        return
    if name in UNPAGED and device.type != "cuda":
        raise DeviceError(
            f"train.optimizer: {name} keeps its moments in memory that a CUDA device and its host share, and this run "
            f"is on {device.type}; use train.optimizer: {UNPAGED[name]}"
        )
    try:
        parameter = torch.nn.Parameter(torch.zeros(ENOUGH, device=device))
        parameter.grad = torch.ones_like(parameter)
        make_optimizer(name, [{"params": [parameter], "lr": 1.0, "weight_decay": 0.0}]).step()
        moved = parameter.detach()
        fault = None if bool((moved < -0.5).all()) else f"a step of -1 was one of {float(moved[0]):g}"
    except MissingExtraError:
        raise
    except Exception as error:  # a library that does not fit this torch or driver raises anything
        fault = " ".join(str(error).split())[:300] or type(error).__name__
    if fault is not None:
        raise DeviceError(
            f"train.optimizer: {name} does not work on {device.type} with bitsandbytes {version('bitsandbytes')} "
            f"({fault}); use train.optimizer: {PLAIN}, or another bitsandbytes"
        )


def into_pages(optimizer: Any) -> None:
    """Put the moments of a paged optimizer into pages again; bitsandbytes loads a checkpoint's into plain memory.

    Any other optimizer stays as it is. The values do not change.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has the one that steps inside
    if getattr(inner, "is_paged", False):
        for parameter, state in inner.state.items():
            for moment in ("state1", "state2"):
                buffer = inner.get_state_buffer(parameter, dtype=state[moment].dtype)
                state[moment] = buffer.copy_(state[moment])


def package_of(name: str) -> dict[str, str]:
    """Return the version of the package an optimizer comes from, unless it is torch: its steps are that version's."""
    return {} if name == PLAIN else {"bitsandbytes": version("bitsandbytes")}


def _bitsandbytes() -> ModuleType:
    noisy = logging.getLogger("bitsandbytes")
    level, noisy.level = noisy.level, logging.ERROR  # it tells of kernels it could fetch from the network
    try:
        return need("bitsandbytes", "quant")
    finally:
        noisy.level = level
