"""What each of several devices holds, and what they send one another.

    single   one device holds everything
    ddp      each device holds everything, and the buckets its gradients travel in
    fsdp2    weights, adapters, gradients and moments are divided; a layer is gathered when it is its turn
    zero3    the same division; what was gathered may stay until a number of parameters is reached

Activations, logits, temporaries and overhead belong to a device's own rows and are never divided. Sources: ZeRO, arXiv
1910.02054, sections 5 and 7; docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html and its tutorial, where the
next layer is gathered while one computes (implicit prefetching), so that two are whole at a time.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from lorakit.errors import SpecError, did_you_mean
from lorakit.planning.memory import Parts

STRATEGIES = ("single", "ddp", "fsdp2", "zero3")
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
    resident: int = 2 * 10**9,
    bucket_view: bool = False,
) -> Parts:
    """Return what one of `devices` holds, in bytes, of a step that takes `parts` on one device alone.

    Args:
        layer: bytes of the largest layer that is gathered as one, weights and adapters; they appear twice, as
            temporaries, under fsdp2 and zero3.
        layer_gradients: bytes of its gradients before they are divided; they appear twice too.
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
    weights = parts.weights + parts.adapters
    gathered = min(weights, IN_FLIGHT * layer if strategy == "fsdp2" else max(IN_FLIGHT * layer, resident))
    transient = gathered + min(parts.gradients, IN_FLIGHT * layer_gradients)
    divided = {name: ceil(getattr(parts, name) / devices) for name in DIVIDED}
    return replace(parts, **divided, temporaries=parts.temporaries + transient)


def traffic(parts: Parts, devices: int, strategy: str) -> int:
    """Return the bytes each device sends in one forward and backward (arXiv 1910.02054, section 7).

    With rings and n devices, gathering or scattering x bytes sends `x (n - 1) / n`. ddp reduces gradients and hands the
    sums out: twice the gradients. fsdp2 and zero3 gather all weights, frozen ones too, for the forward and again for
    the backward, and scatter the gradients; of a model that is trained whole in one dtype that is 3/2 of ddp.

    Raises:
        SpecError: as `per_device`.
    """
    _check(devices, strategy)
    weights = parts.weights + parts.adapters
    moved = {"single": 0, "ddp": 2 * parts.gradients}.get(strategy, 2 * weights + parts.gradients)
    return ceil(moved * (devices - 1) / devices)


def _check(devices: int, strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise SpecError(
            f"unknown strategy {strategy!r}{did_you_mean(strategy, STRATEGIES)}; known are {', '.join(STRATEGIES)}"
        )
    if devices < 1:
        raise SpecError(f"a run takes one device or more, not {devices}")
    if strategy == "single" and devices > 1:
        raise SpecError(f"'single' is one device, not {devices}; use 'ddp' or 'fsdp2'")
