"""A base too large for one device, divided among the processes of a run (FSDP2, `torch.distributed.fsdp.fully_shard`).

What is divided are the frozen matrices inside the blocks: nearly all of a large model. Each process keeps its share; a
block is gathered when it is its turn and let go after, forward and backward. Everything that learns is whole in every
process, with its gradient and its moments, and so are embeddings, head, norms and biases. Adapters are small: methods,
rank schedules, optimizers and checkpoints are the same as on one device, and a checkpoint goes on with any number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lorakit.core.site import layer_of
from lorakit.errors import RecipeError
from lorakit.inject.bases import base_of
from lorakit.inject.ledger import ledger_of
from lorakit.training import processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(model: PreTrainedModel, device: torch.device, *, by_machine: bool = False) -> None:
    """Divide the frozen matrices of a model's blocks among the processes, in place, and move the rest to `device`.

    With `by_machine` each machine's processes divide a copy of their own, so that no weight travels between machines.

    The model may lie on the CPU until then: no more than one block at a time is whole on the device.

    Raises:
        RecipeError: a model without blocks, or whose blocks are trained whole.
    """
    from torch.distributed.fsdp import fully_shard

    blocks = stacks_of(model)
    divided = {p for stack in blocks.values() for block in stack for p in divided_of(block)}
    if not divided:
        what = "trains its blocks whole" if blocks else f"has a {type(model).__name__} without blocks"
        raise RecipeError(
            f"train.parallel: fsdp divides the frozen weights of a model's blocks, and this recipe {what}; "
            "use train.parallel: ddp"
        )
    ledger_of(model).base = base_of(model)  # a share of a weight is nothing to know it by
    whole = {p for p in model.parameters() if p not in divided}
    mesh = init_device_mesh(device.type, machines(by_machine), mesh_dim_names=("copy", "share"))["share"]
    for path, stack in blocks.items():
        for block in stack:
            fully_shard(block, mesh=mesh, ignored_params=whole)
        fully_shard(model.get_submodule(path.rpartition(".")[0]), mesh=mesh, ignored_params=whole)
    cast(nn.Module, model).to(device)


def machines(by_machine: bool) -> tuple[int, int]:
    """Return how many copies of the base there are, and among how many processes each is divided.

    Raises:
        RecipeError: processes that are not evenly spread over the machines.
    """
    among = processes.beside() if by_machine else processes.count()
    if processes.count() % among:
        raise RecipeError(
            f"train.parallel: hybrid divides the base among the processes of each machine, and {processes.count()} are "
            f"no multiple of the {among} here; start as many on every machine"
        )
    return processes.count() // among, among


def stacks_of(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the blocks of each stack, by its path."""
    found: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if (place := layer_of(path)) is not None and path == f"{place[0]}.{place[1]}":
            found.setdefault(place[0], []).append(module)
    return found


def divided_of(block: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a block that are divided: frozen matrices, but for those of an adapter."""
    return [
        p
        for name, p in block.named_parameters()
        if not p.requires_grad and p.dim() > 1 and ".adapters.by_name." not in f".{name}"
    ]
