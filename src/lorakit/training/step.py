"""How a step is run: fused, with blocks recomputed, with activations on the host, or compiled. It computes the same.

A compiled block is traced as the plain formulas: the compiler fuses them itself, and traced through the functions of
`fuse` it breaks each block into pieces and gains nothing (docs/results/performance.md). What is outside the blocks,
the embedding, the head and the loss, stays as it is, and so do evaluations, whose lengths are many.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.core.method import Context
from lorakit.core.reading import blocks_of
from lorakit.errors import DeviceError, LorakitError
from lorakit.inject.fuse import fuse
from lorakit.inject.lower import lower_of
from lorakit.inject.pooled import compute_first_alone, reads_first_alone
from lorakit.training import processes
from lorakit.training.head import head_of
from lorakit.training.optimizers import refuse_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorakit.core.spec import AdapterSpec
    from lorakit.training.recipe import TrainSection
    from lorakit.training.stage import Stage

Checkpointing = bool | float
"""Whether blocks are recomputed: all, none, a share of them below 1, or so many."""
SMALL = 2**16
"""Bytes below which a tensor is not worth a copy to the host."""


def prepare_step(stage: Stage, train: TrainSection) -> dict[str, dict[str, Any]]:
    """Make a model with its adapter run steps as the recipe says, and return the events that tell what runs how.

    Args:
        stage: what the run works on; its model has the adapter.
        train: the recipe's section.

    Raises:
        LorakitError: blocks to recompute or to compile that the model does not have.
    """
    model = stage.model
    recompute(model, train.checkpointing)
    ways: dict[str, dict[str, Any]] = {}
    if train.checkpointing and (found := _recomputed(model)):
        ways["recomputed"] = found
    if train.compile:
        head_of(model)  # measured as it is, and known from now on
        ways["compiled"] = {"blocks": compile_blocks(model, dynamic=not stage.one_shape), "fused": False}
    elif train.fused:
        ways["fused"] = _fused(stage, train)
    return ways


def _recomputed(model: PreTrainedModel) -> dict[str, int]:
    """Return how many blocks the backward computes again, and of how many; it reaches none below all that learns."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lower = lower_of(model, [name for name, parameter in model.named_parameters() if parameter.requires_grad])
    below = set() if isinstance(lower, str) else {id(block) for block in lower.blocks}
    blocks = [block for block in model.modules() if isinstance(block, GradientCheckpointingLayer)]
    again = [block for block in blocks if block.gradient_checkpointing and id(block) not in below]
    return {"blocks": len(again), "of": len(blocks)} if blocks else {}


def _fused(stage: Stage, train: TrainSection) -> dict[str, Any]:
    """Fuse what can be, and return how many layers run how."""
    model = stage.model
    counts = fuse(model).counts()
    if not train.cache_frozen and pools_first(stage.spec, model) and compute_first_alone(model):
        counts["runs"]["a last block at its first position"] = 1
    return counts


def pools_first(spec: AdapterSpec, model: nn.Module) -> bool:
    """Return whether a model with this adapter reads its first position alone; virtual ones would move the first."""
    return not isinstance(spec.method, Context) and reads_first_alone(model)


def refuse_step(train: TrainSection, device: torch.device) -> None:
    """Raise for a step that cannot be made on `device`, before a base is loaded.

    Raises:
        DeviceError: a way to run it, or an optimizer, that does not work there.
        MissingExtraError: an optimizer whose library is not installed.
    """
    refuse_optimizer(train.optimizer, device)
    if (train.compile or train.offload_activations) and processes.count() > 1:
        raise DeviceError(
            "train.compile and train.offload_activations are for one process; set them to false for several"
        )
    if train.offload_activations and device.type != "cuda":
        raise DeviceError(
            f"train.offload_activations moves activations from a CUDA device to the host's memory, and this run is on "
            f"{device.type}, where it would save nothing; remove it, or set train.checkpointing: true to hold less"
        )
    if train.compile and device.type == "cpu" and (lacking := _compiler_lacks()):
        raise DeviceError(
            f"train.compile needs {lacking}, on a CPU; install it (Debian: apt install g++ python3-dev) or name one in "
            "the environment variable CXX, or set train.compile: false"
        )


def _compiler_lacks() -> str:
    """Return what the compiler of torch does not find here, or ""."""
    compiler = os.environ.get("CXX", "g++")
    if os.name == "nt":
        compiler = os.environ.get("CXX", "cl")
    if shutil.which(compiler) is None:
        return f"a C++ compiler, and there is no {compiler!r}"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.exists() else f"Python's headers, and there is no {header}"


# ---- blocks that are recomputed ----


def recompute(model: PreTrainedModel, choice: Checkpointing) -> None:
    """Let the backward compute blocks again instead of keeping what they made: all, a share or a number of them.

    Of some, they are the first ones: their turn comes when the backward is through the others, which hold nothing by
    then.

    Raises:
        LorakitError: more blocks than there are, or some blocks of a model that has no stack of them.
    """
    if choice is False:
        return
    model.activation_checkpointing_enable({"use_reentrant": False})
    if choice is not True:
        blocks = [block for block in blocks_of(model) if hasattr(block, "gradient_checkpointing")]
        if not blocks:
            raise LorakitError(
                f"train.checkpointing: {choice:g} counts blocks, and {type(model).__name__} has no one stack of them; "
                "set it to true or false"
            )
        if choice > len(blocks):
            raise LorakitError(
                f"train.checkpointing: {choice:g} blocks, and {type(model).__name__} has {len(blocks)}; set it to a "
                "number up to that, to a share such as 0.5, or to true"
            )
        for block in blocks[round(choice * len(blocks)) if choice < 1 else int(choice) :]:
            block.gradient_checkpointing = False  # type: ignore[assignment]


# ---- activations on the host ----


def to_host(tensor: Tensor) -> Any:
    """Copy a tensor into the host's pinned memory, without waiting for it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return tensor.device, host.copy_(tensor, non_blocking=True)


def from_host(kept: Any) -> Tensor:
    """Copy what `to_host` returned back to its device, without waiting for it."""
    device, host = kept
    return host.to(device, non_blocking=True)  # type: ignore[no-any-return]


def to_nowhere(tensor: Tensor) -> Any:
    """Stand for `to_host` in a rehearsal, which counts the device's memory."""
    return tensor.shape, tensor.dtype, tensor.device


def from_nowhere(kept: Any) -> Tensor:
    """Stand for `from_host` in a rehearsal."""
    shape, dtype, device = kept
    return torch.empty(shape, dtype=dtype, device=device)


def offloaded(
    model: nn.Module,
    away: Callable[[Tensor], Any] = to_host,
    back: Callable[[Any], Tensor] = from_host,
    small: int = SMALL,
) -> AbstractContextManager[Any]:
    """Return the context of a forward whose saved activations wait for the backward elsewhere.

    Parameters and buffers are there anyway, so they stay, and so do small tensors. A tensor that several functions save
    moves once.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    moved: dict[tuple[Any, ...], tuple[weakref.ref[Any], Any]] = {}

    def pack(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata in own or tensor.nbytes < small:
            return tensor
        key = (storage._cdata, tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        known = moved.get(key)
        if known is None or known[0]() is None:
            moved[key] = known = (weakref.ref(storage), _Moved(away(tensor)))
        return known[1]

    def unpack(kept: Any) -> Tensor:
        return back(kept.where) if isinstance(kept, _Moved) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _Moved:
    """A tensor that is elsewhere."""

    def __init__(self, where: Any) -> None:
        self.where = where


# ---- compiled blocks ----


def compile_blocks(model: nn.Module, *, dynamic: bool) -> int:
    """Compile each block of a model, and return how many there are; equal blocks share what was compiled.

    With `dynamic` rows and length may change from batch to batch.

    Raises:
        LorakitError: a model without a stack of blocks.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise LorakitError(
            f"train.compile compiles blocks, and {type(model).__name__} has no one stack of them; "
            "set train.compile: false"
        )
    for block in blocks:
        block.compile(dynamic=dynamic)
    return len(blocks)


def uncompiled() -> AbstractContextManager[Any]:
    """Return the context in which compiled blocks run as they are written."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def compiling(model: nn.Module) -> AbstractContextManager[Any]:
    """Return the context of a run with compiled blocks: torch's limit of 8 graphs has no room for unequal blocks."""
    import torch._dynamo

    limit: AbstractContextManager[Any] = torch._dynamo.config.patch(recompile_limit=max(8, 4 * len(blocks_of(model))))
    return limit
