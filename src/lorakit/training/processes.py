"""The processes of one run: which of them this one is, and what they add up.

A run on several devices is one process for each. `lorakit train --nproc`, torchrun, accelerate or Slurm start them, and
tell each its place in the environment (RANK, WORLD_SIZE, MASTER_ADDR ...). All read the same recipe and the same rows;
process 0 alone writes and speaks. Where a run is one process, everything here does nothing.

The Trainer is told of none of this: each process runs it as if it were alone, and what must be one number or one
gradient is added up here. So a model is never wrapped, and a batch without rows or a parameter that no row reached is
no special case.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorakit.errors import DeviceError, LorakitError

_TOLD = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""By these accelerate would find the others, and wrap and deal for itself."""
_ERROR = "error"
PATIENCE = timedelta(hours=12)
"""How long processes wait for each other: the first may write what the frozen blocks make of every row meanwhile. That
one is gone is noticed at once; torch's own half an hour would part those that are only slow."""


class Lost(LorakitError):
    """Another process of the run is gone, and left no word."""


def count() -> int:
    """Return how many processes the run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def here() -> int:
    """Return which of them this one is, from 0; known before they are joined and after."""
    if count() > 1:
        return dist.get_rank()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # a RANK alone is left from some other run
    return int(os.environ.get("RANK", "0")) if several else 0


def orphaned() -> bool:
    """Return whether the `lorakit train --nproc` that started this process and its siblings is gone."""
    launcher = os.environ.get("LORAKIT_LAUNCHER")
    return launcher is not None and os.getppid() != int(launcher)


def beside() -> int:
    """Return how many of them are on this machine, as far as whoever started them said."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count()))


def first() -> bool:
    """Return whether this process is the one that writes and speaks."""
    return here() == 0


@contextmanager
def joined(device: str) -> Iterator[Callable[[BaseException], BaseException]]:
    """Meet the other processes of the run that the environment tells of, and part at the end.

    Inside, the function that is given tells the others of an error and returns its cause, which may be
    theirs. `device` is the recipe's; of several CUDA devices each process takes one, and sees no other. Processes that
    torch.distributed has joined already stay joined.

    Raises:
        DeviceError: more processes on this machine than CUDA devices.
        LorakitError: an environment that tells of other processes and not how to meet them.
        LorakitError: what went wrong in another process, where this one only noticed that it was gone.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes < 2:
        yield lambda error: error
        return
    store = None if dist.is_initialized() else _meet(_has_cuda(device))
    hidden = {name: os.environ.pop(name) for name in _TOLD if name in os.environ}
    try:
        yield partial(_cause, store)
    except BaseException as error:
        if (cause := _cause(store, error)) is error:
            raise
        raise cause from error
    finally:
        os.environ.update(hidden)
        if store is not None:
            dist.destroy_process_group()


def _has_cuda(device: str) -> bool:
    """Let this process see its own CUDA device alone, before anything asks for one, and return whether it has one."""
    if device in ("auto", "mps") and torch.backends.mps.is_available():
        raise DeviceError("a run on mps is one process, and several were started; set train.device: cpu, or start one")
    if device not in ("auto", "cuda") or torch.cuda.device_count() == 0:
        return False
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]
    place = int(os.environ.get("LOCAL_RANK", "0"))
    if place >= len(there):
        beside = os.environ.get("LOCAL_WORLD_SIZE", str(place + 1))
        raise DeviceError(
            f"{beside} processes were started on a machine with {len(there)} CUDA devices, and each takes one; start "
            f"{len(there)}, or set train.device: cpu"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = there[place]
    return True


def _meet(cuda: bool) -> Any:
    """Join the processes and return the store they share: tensors of a CPU go by gloo, those of CUDA by NCCL."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise LorakitError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {', '.join(missing)} not set, by which the processes of a "
            "run meet; start them with lorakit train --nproc, torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    store, rank, processes = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, store=PrefixStore("run", store), rank=rank, world_size=processes)
    return store


def _cause(store: Any, error: BaseException) -> BaseException:
    """Leave word of an error for the others; return theirs where they were first and this one only lost them."""
    if store is None:
        return error
    own = {"process": here(), "message": str(error) if isinstance(error, LorakitError) else f"{error!r}"}
    word = own
    with suppress(Exception):  # the store may be gone with the process that kept it
        if not isinstance(error, Lost):
            word = json.loads(store.compare_set(_ERROR, "", json.dumps(own)))
        elif store.check([_ERROR]):
            word = json.loads(store.get(_ERROR))
    mine = isinstance(error, LorakitError) and not isinstance(error, Lost)
    same = word["process"] == own["process"] or word["message"] == own["message"]
    return error if mine or same else LorakitError(f"process {word['process']}: {word['message']}")


def total(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; in place where there are several.

    Raises:
        Lost: one of them is gone.
    """
    if count() > 1:
        try:
            dist.all_reduce(values)
        except RuntimeError as fault:
            raise Lost("another process of this run is gone: it was killed, or its memory was full") from fault
    return values


def any_of(flag: bool) -> bool:
    """Return whether any process says so."""
    return flag if count() == 1 else bool(total(torch.tensor(int(flag))))


def wait() -> None:
    """Go on when all processes are here."""
    any_of(False)


def alike(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place: a start that was computed may differ in its last bit."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def add_gradients(parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Add up the gradients of the processes in place, and return the sum of their losses.

    They travel as one flat tensor for each dtype. A parameter that no process reached keeps no gradient.
    """
    if count() == 1:
        return loss
    learned = list(parameters)
    word = torch.tensor([float(p.grad is not None) for p in learned], dtype=loss.dtype, device=loss.device)
    word = total(torch.cat([loss.reshape(1), word]))
    reached = [p for p, times in zip(learned, word[1:].tolist(), strict=True) if times]
    for dtype in dict.fromkeys(p.dtype for p in reached):
        of_one = [p for p in reached if p.dtype == dtype]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in of_one])
        for p, part in zip(of_one, torch.split(total(flat), [p.numel() for p in of_one]), strict=True):
            p.grad = part.view_as(p)
    return word[0]
