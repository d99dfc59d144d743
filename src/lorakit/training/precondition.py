"""Methods that correct their gradients before each optimizer step, for any optimizer and any loop.

LoRA-FA's correction, for one, was released as an optimizer of its own. As a hook in front of the step it leaves the
choice of optimizer, schedule and weight decay free, and sees gradients after unscaling and clipping, as that one does.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lorakit.core.adapters import attached
from lorakit.core.method import Preconditioned


def precondition(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Let every `Preconditioned` method attached to `model` correct its gradients before each step of `optimizer`.

    Returns the hook, whose `remove()` undoes it. Gradients are corrected in place: clear them after each step.
    """
    adapters = [(a, a.method) for _, a in attached(model) if isinstance(a.method, Preconditioned)]

    def correct(*_: object) -> None:
        for adapter, method in adapters:
            method.precondition(adapter.tensors())

    return optimizer.register_step_pre_hook(correct)
