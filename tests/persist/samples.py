"""Small adapters without a model, for tests of files."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.state import AdapterState, Base, Purpose, Update
from lorakit.methods.lora import LoRA

PATHS = ("h.0.attn.q", "h.1.attn.q")


def lora_update(site: Site, method: LoRA, value: float | None = None) -> Update:
    """Return an update with random factors, or with one value everywhere."""
    tensors: dict[str, Tensor] = {
        name: torch.randn(decl.shape) if value is None else torch.full(decl.shape, value)
        for name, decl in method.tensors(site).items()
    }
    return Update(site, method, tensors)


def adapter(value: float | None = None) -> AdapterState:
    """Return a LoRA of two linear layers, the second of another rank, with a head trained whole."""
    sites = [Site(path, 6, 5) for path in PATHS]
    other = LoRA(2, 3.0)
    updates = (lora_update(sites[0], LoRA(4, 8.0), value), lora_update(sites[1], other, value))
    spec = AdapterSpec(
        LoRA(4, 8.0),
        Targets("q"),
        train=("score",),
        dropout=0.1,
        overrides=(Override.of("q", layers="1", rank=2, alpha=3.0),),
    )
    head = torch.randn(3, 5) if value is None else torch.full((3, 5), value)
    base = Base("some/base", {"h.0.attn.q": (0.5, -1.25)})
    purpose = Purpose("classification", "classification", None, ("no", "yes"))
    return AdapterState(spec, updates, {"score.weight": head}, base, purpose)


def slices() -> AdapterState:
    """Return a LoRA of two row slices of a fused layer, of different rank and scale, and of its neighbour."""
    fused, method = Site("h.0.attn.qkv", 12, 5), LoRA(3, 6.0)
    updates = (
        lora_update(fused.slice(0, 4), method),
        lora_update(fused.slice(8, 12), LoRA(2, 5.0)),
        lora_update(Site("h.0.attn.out", 5, 4), method),
    )
    spec = AdapterSpec(method, Targets(("qkv[0:4]", "qkv[8:12]", "out")))
    return AdapterState(spec, updates)


def same(one: AdapterState, other: AdapterState) -> bool:
    """Return whether two adapters hold the same values, bit for bit, under the same spec, base and purpose."""
    mine, yours = ({u.site.key: u for u in s.updates} for s in (one, other))
    return (
        one.spec == other.spec
        and one.base == other.base
        and one.purpose == other.purpose
        and mine.keys() == yours.keys()
        and all((u.site, u.method) == (yours[k].site, yours[k].method) for k, u in mine.items())
        and all(torch.equal(t, yours[k].tensors[n]) for k, u in mine.items() for n, t in u.tensors.items())
        and one.trained.keys() == other.trained.keys()
        and all(torch.equal(t, other.trained[n]) for n, t in one.trained.items())
    )
