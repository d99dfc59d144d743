"""Small adapters without a model, and the dense sums they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakit.core.method import Method, Static
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.state import AdapterState, Base, Update
from lorakit.methods.lora import LoRA

Q, V = Site("h.0.attn.q", 7, 5), Site("h.0.attn.v", 6, 9)
"""A wider weight and a taller one, so that no test passes with out and in exchanged."""


def update(site: Site, method: Method, **values: Tensor) -> Update:
    """Return an update with random tensors, or with those given."""
    made = {name: values.get(name, torch.randn(decl.shape)) for name, decl in method.tensors(site).items()}
    return Update(site, method, made)


def adapter(
    *methods: Method, sites: Sequence[Site] = (Q, V), trained: Mapping[str, Tensor] | None = None
) -> AdapterState:
    """Return an adapter with one random update at each site, all of the same method where one is given."""
    each = methods * len(sites) if len(methods) == 1 else methods
    updates = tuple(update(site, method) for site, method in zip(sites, each, strict=True))
    spec = AdapterSpec(methods[0], Targets([f"re:{site.path}" for site in sites]), train=tuple(trained or ()))
    return AdapterState(spec, updates, trained or {}, Base("some/base"))


def pair(up: Sequence[Sequence[float]], down: Sequence[Sequence[float]], method: LoRA | None = None) -> AdapterState:
    """Return an adapter of one weight with these factors, of scale 1 unless a method says otherwise."""
    b, a = torch.tensor(up), torch.tensor(down)
    site = Site("layer", b.shape[0], a.shape[1])
    method = method or LoRA(len(a), float(len(a)))
    return AdapterState(AdapterSpec(method, Targets("re:layer")), (update(site, method, down=a, up=b),))


def product(matrix: Sequence[Sequence[float]]) -> AdapterState:
    """Return the adapter whose dW is this matrix, as the matrix times the identity."""
    eye = torch.eye(len(matrix[0])).tolist()
    return pair(matrix, eye)


def deltas(state: AdapterState, base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return dW of every update in fp64, formed in full."""
    found = {}
    for u in state.updates:
        assert isinstance(u.method, Static)
        weight = (base or {}).get(u.site.key, torch.zeros(u.site.shape)).double()
        found[u.site.key] = u.method.delta({name: t.double() for name, t in u.tensors.items()}, weight)
    return found


def delta(state: AdapterState) -> Tensor:
    """Return dW of the only update."""
    (only,) = deltas(state).values()
    return only


def summed(states: Sequence[AdapterState], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return `sum_i w_i dW_i` of every weight that any of the adapters changes, formed in full."""
    total: dict[str, Tensor] = {}
    for state, weight in zip(states, weights, strict=True):
        for key, change in deltas(state).items():
            total[key] = total.get(key, torch.zeros_like(change)) + weight * change
    return total


def ranks(state: AdapterState) -> list[int]:
    """Return the rank of every update."""
    return [len(u.tensors["down"]) for u in state.updates]
