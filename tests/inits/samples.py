"""Every initialisation once, and a one-layer model that starts with it, measured first where it asks for that."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.adapters import Adapter
from lorakit.core.init import Init
from lorakit.core.registry import host_of
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inits.eva import Eva
from lorakit.inits.gaussian import Gaussian
from lorakit.inits.kaiming import Kaiming
from lorakit.inits.loftq import LoftQ
from lorakit.inits.lora_ga import LoRAGA
from lorakit.inits.olora import OLoRA
from lorakit.inits.orthogonal import Orthogonal
from lorakit.inits.pissa import Pissa
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.evidence import gather
from lorakit.methods.lora import LoRA
from tests.law.cases import KINDS, Net, inputs, weight_of

INITS: dict[str, Init] = {
    "eva": Eva(),
    "gaussian": Gaussian(),
    "kaiming": Kaiming(),
    "loftq": LoftQ(),
    "lora-ga": LoRAGA(),
    "olora": OLoRA(),
    "orthogonal": Orthogonal(),
    "pissa": Pissa(),
    "pissa, randomised": Pissa(iterations=4),
}

PAIRS = [(kind, name) for kind in KINDS for name, init in INITS.items() if kind.split(",")[0] in init.kinds]


def square(model: Net, x: Tensor) -> Tensor:
    """Return a loss with a gradient of full rank."""
    return model(x).square().mean()


def started(kind: str, name: str, **fields: float) -> tuple[Net, Adapter, Tensor, Tensor]:
    """Return a layer that starts so, its adapter, an input, and the output before the adapter came."""
    model, x = Net(KINDS[kind].layer()), inputs(kind)
    rank = 8 if kind == "conv3d" and name == "orthogonal" else 4  # four groups, and each one's rank is halved
    spec = AdapterSpec(LoRA(**{"rank": rank, "alpha": 8.0, **fields}, init_=INITS[name]), Targets("layer"))  # type: ignore[arg-type]
    evidence = gather(model, spec, [x, inputs(kind)], loss=square)
    if name == "loftq":
        quantise(model)
    before = model(x)
    attach(model, spec, evidence=evidence)
    return model, adapters_named(model, "default")[0], x, before


def quantise(model: Net) -> None:
    """Round the weight to quarters of its largest value."""
    host, weight = host_of(model.layer), weight_of(model)
    assert host is not None
    host.store.write(model.layer, rounded(weight))


def rounded(weight: Tensor) -> Tensor:
    """Return the weight on a grid of nine values; the step follows the largest one."""
    step = weight.abs().max() / 4
    return torch.round(weight / step) * step
