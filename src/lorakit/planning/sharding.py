"""What each of several devices holds, and what they send one another.

    single   one device holds everything
    ddp      each device holds everything, and the buckets its gradients travel in
    fsdp     the frozen weights of the blocks are divided, a block is gathered when it is its turn; the rest as in ddp
    hybrid   fsdp within a machine, ddp among machines: of one machine, what fsdp is
    zero3    all four parts are divided; what was gathered may stay until a number of parameters is reached

lorakit trains with the first four (`train.parallel`); zero3 is what DeepSpeed does, and with `resident=0` what FSDP2
does to a model that is given to it whole.

Activations, logits, temporaries and overhead belong to a device's own rows and are never divided. Sources: ZeRO, arXiv
1910.02054, sections 5 and 7; docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html and its tutorial, where the
next layer is gathered while one computes (implicit prefetching), so that two are whole at a time.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from lorakit.errors import SpecError, did_you_mean
from lorakit.planning.memory import Parts

STRATEGIES = ("single", "ddp", "fsdp", "hybrid", "zero3")
IN_FLIGHT = 2
"""Layers that are whole at a time: the one that computes, and the one that is gathered ahead."""
DIVIDED = ("weights", "adapters", "gradients", "optimizer")


def per_device(
    parts: Parts,
    devices: int,
    strategy: str,
    *,
    layer: int = 0,
    layer_gradients: int = 0,
    undivided: int = 0,
    resident: int = 2 * 10**9,
    bucket_view: bool = False,
) -> Parts:
    """Return what one of `devices` holds, in bytes, of a step that takes `parts` on one device alone.

    Args:
        layer: bytes of the largest layer that is gathered as one; they appear twice, as temporaries, under fsdp and
            zero3, whose layer has its adapters with it.
        layer_gradients: bytes of its gradients before zero3 divides them; they appear twice too.
        undivided: bytes of the weights that fsdp leaves on every device: embeddings, head, norms, what is trained.
        resident: under zero3, bytes of gathered weights that may stay: DeepSpeed's stage3_max_live_parameters, 10^9
            parameters of 2 bytes unless set; never more than there are.
        bucket_view: under ddp, whether gradients are views of the buckets (gradient_as_bucket_view) and so not twice.

    Raises:
        SpecError: an unknown strategy, or a number of devices it does not go with.
    """
    _check(devices, strategy)
    if devices == 1:
        return parts
    if strategy == "ddp":
        return parts if bucket_view else replace(parts, temporaries=parts.temporaries + parts.gradients)
    if strategy in ("fsdp", "hybrid"):
        mine = parts.weights - undivided
        gathered = min(mine, IN_FLIGHT * layer)
        kept = undivided + ceil(mine / devices)
        return replace(parts, weights=kept, temporaries=parts.temporaries + gathered + parts.gradients)
    weights = parts.weights + parts.adapters
    gathered = min(weights, max(IN_FLIGHT * layer, resident))
    transient = gathered + min(parts.gradients, IN_FLIGHT * layer_gradients)
    divided = {name: ceil(getattr(parts, name) / devices) for name in DIVIDED}
    return replace(parts, **divided, temporaries=parts.temporaries + transient)


def traffic(parts: Parts, devices: int, strategy: str, *, undivided: int = 0) -> int:
    """Return the bytes each device sends in one forward and backward (arXiv 1910.02054, section 7).

    With rings and n devices, gathering or scattering x bytes sends `x (n - 1) / n`. ddp reduces gradients and hands the
    sums out: twice the gradients. fsdp also gathers what is divided for the forward and again for the backward. zero3
    gathers all weights twice and scatters the gradients; of a model that is trained whole in one dtype that is 3/2 of
    ddp. With accumulation, weights are gathered for every micro-batch, gradients added up once a step.

    Raises:
        SpecError: as `per_device`.
    """
    _check(devices, strategy)
    moved = {
        "single": 0,
        "ddp": 2 * parts.gradients,
        "fsdp": (divided := 2 * (parts.weights - undivided) + 2 * parts.gradients),
        "hybrid": divided,
        "zero3": 2 * (parts.weights + parts.adapters) + parts.gradients,
    }[strategy]
    return ceil(moved * (devices - 1) / devices)


def _check(devices: int, strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise SpecError(
            f"unknown strategy {strategy!r}{did_you_mean(strategy, STRATEGIES)}; known are {', '.join(STRATEGIES)}"
        )
    if devices < 1:
        raise SpecError(f"a run takes one device or more, not {devices}")
    if strategy == "single" and devices > 1:
        raise SpecError(f"'single' is one device, not {devices}; use 'ddp' or 'fsdp'")
