"""Which parameter learns how fast: LoRA+ groups by the role a method declared, never by a parameter's name.

LoRA+ (arXiv 2402.12354) trains `up` (B) faster than `down` (A): eta_B = ratio * eta_A, the paper suggests 16.
With ratio 1 there is nothing to tell apart, and the optimizer steps exactly as one plain group would.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorakit.core.adapters import attached
from lorakit.core.site import Role
from lorakit.errors import SpecError

EMBEDDING_LR = 1e-6
"""What the LoRA+ authors' code gives adapters of embeddings, whose rows see few of the gradients."""


def param_groups(
    model: nn.Module,
    lr: float,
    up_ratio: float = 1.0,
    weight_decay: float = 0.0,
    embedding_lr: float = EMBEDDING_LR,
) -> list[dict[str, Any]]:
    """Return optimizer groups `{params, lr, weight_decay, name}` of every trainable parameter of an adapted model.

    `up` and one-dimensional tensors learn at `lr * up_ratio`, everything else, modules trained whole included, at `lr`;
    with a ratio other than 1, adapters of embeddings learn at `embedding_lr`. One-dimensional tensors (biases, norms,
    gains) never decay. Empty groups are left out.

    Raises:
        SpecError: a ratio where no method has an `up`.
    """
    roles = _roles(model)
    if up_ratio != 1 and not any(role is Role.UP for role, _ in roles.values()):
        raise SpecError("up_ratio is LoRA+'s and lets `up` learn faster, and nothing here has one; change lr instead")
    groups: dict[str, dict[str, Any]] = {
        "slow": {"lr": lr, "weight_decay": weight_decay},
        "embedding": {"lr": lr if up_ratio == 1 else embedding_lr, "weight_decay": weight_decay},
        "fast": {"lr": lr * up_ratio, "weight_decay": weight_decay},
        "fast, no decay": {"lr": lr * up_ratio, "weight_decay": 0.0},
    }
    for group in groups.values():
        group["params"] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            role, kind = roles.get(parameter, (None, None))
            groups[_group(role, kind, parameter.dim())]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]


def _group(role: Role | None, kind: str | None, dims: int) -> str:
    if kind == "embedding":
        return "embedding"
    if dims <= 1:
        return "fast, no decay"
    return "fast" if role is Role.UP else "slow"


def _roles(model: nn.Module) -> dict[nn.Parameter, tuple[Role, str]]:
    """Return role and layer kind of every adapter tensor, as its method declares them."""
    roles: dict[nn.Parameter, tuple[Role, str]] = {}
    for _, adapter in attached(model):
        declared = adapter.method.tensors(adapter.site)
        for name, parameter in adapter.named_parameters(recurse=False):
            roles[parameter] = (declared[name].role, adapter.site.kind)
    return roles
