"""How long a run will take: from counted operations and a device's throughput, or from a few steps that were measured.

A multiplication by a weight is 2 FLOP a token forward, 2 for the gradient of its input and 2 for its own. A frozen
weight has no gradient of its own, so with N numbers in matrices and P in adapters a LoRA step takes 4N + 6P where a
full one takes 6N: at best 1.5 times as fast. How much of its throughput a device reaches cannot be counted: it is a
stated assumption with a range, and measuring a few steps replaces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorakit.errors import SpecError
from lorakit.planning.devices import Device

UTILISATION = 0.35
"""The share of the dense throughput a run is assumed to reach."""
UTILISATIONS = (0.2, 0.5)
"""The range around it. Published for pretraining: GPT-3 21 %, PaLM 46 % (arXiv 2204.02311, table 3), Llama 3 38 to 43 %
(arXiv 2407.21783, table 4). A small model or batch on a large device reaches less than any of these: calibrate."""


def flops_per_token(
    matrices: int,
    adapters: int = 0,
    *,
    full: bool = False,
    checkpointing: bool = False,
    layers: int = 0,
    width: int = 0,
    context: int = 0,
    causal: bool = True,
    unreached: int = 0,
) -> int:
    """Return the FLOP of one forward and backward, a token.

        full 6 N,  LoRA 4 N + 6 P,  attention 12 L h s, half of it where causal and the kernel makes use of that,
        checkpointing one more forward: 2 N + 2 P + a third of attention

    Args:
        matrices: N, the numbers in weights tokens are multiplied by: the output layer's, but no lookup's.
        adapters: P, the trained numbers.
        full: whether the N are trained too.
        layers, width, context: L, h (all heads together) and s of attention.
        unreached: numbers, of N and P, whose input needs no gradient, as nothing below is trained: 2 FLOP less each.
    """
    forward = 2 * (matrices + adapters)
    attention = 4 * layers * width * context // (2 if causal else 1)
    own = 2 * ((matrices if full else 0) + adapters)
    step = 2 * forward - 2 * unreached + own + 3 * attention
    return step + (forward + attention if checkpointing else 0)


@dataclass(frozen=True)
class Duration:
    """Seconds a run is expected to take, between the fastest and the slowest likely, and what that rests on."""

    seconds: float
    fastest: float
    slowest: float
    reason: str

    def shared(self, devices: int) -> Duration:
        """Return how long as many devices take, each as fast as the one this is about, and none waiting."""
        if devices == 1:
            return self
        each = f"{self.reason}; {devices} devices are assumed to be {devices} times as fast"
        return Duration(self.seconds / devices, self.fastest / devices, self.slowest / devices, each)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def from_throughput(
    flops: float, device: Device, dtype: str = "bf16", devices: int = 1, utilisation: float | None = None
) -> Duration:
    """Return how long `flops` take on `devices` devices at an assumed utilisation, within `UTILISATIONS` if not given.

    Raises:
        SpecError: a utilisation that is not in (0, 1], or a dtype the device has no throughput for.
    """
    if utilisation is not None and not 0 < utilisation <= 1:
        raise SpecError(f"utilisation is a share of the device's throughput, in (0, 1], not {utilisation:g}")
    peak = device.peak(dtype) * devices
    expected = UTILISATION if utilisation is None else utilisation
    low, high = UTILISATIONS if utilisation is None else (utilisation, utilisation)
    reason = (
        f"{expected:.0%} of {device.peak(dtype) / 1e12:,.0f} TFLOP/s in {dtype} on {devices} x {device.name}, assumed"
    )
    return Duration(flops / peak / expected, flops / peak / high, flops / peak / low, reason)


@dataclass(frozen=True)
class Measured:
    """One step that was run: its tokens, padding included, and its seconds."""

    tokens: int
    seconds: float


def per_token(steps: Sequence[Measured]) -> float:
    """Return the seconds a token took."""
    return sum(step.seconds for step in steps) / sum(step.tokens for step in steps)


def from_steps(steps: Sequence[Measured], tokens: int, extra_seconds: float = 0.0) -> Duration:
    """Return how long `tokens` take at the rate of measured steps, `extra_seconds` (evaluations, checkpoints) included.

    The first step also allocates and compiles, so the rate is that of the others; it counts only for the range, which
    reaches from the fastest step's rate to the slowest's.

    Raises:
        SpecError: fewer than two steps, or one without tokens or time.
    """
    if len(steps) < 2:
        raise SpecError(f"a rate needs two measured steps or more, the first of which warms up, not {len(steps)}")
    if any(step.tokens <= 0 or step.seconds <= 0 for step in steps):
        raise SpecError("a measured step has tokens and takes time; measure again")
    each = [step.seconds / step.tokens for step in steps]
    usual = per_token(steps[1:])
    reason = f"{1 / usual:,.0f} tokens/s over {len(steps) - 1} of {len(steps)} measured steps"
    seconds, fastest, slowest = (tokens * rate + extra_seconds for rate in (usual, min(each), max(each)))
    return Duration(seconds, fastest, slowest, reason)


@dataclass(frozen=True)
class Bill:
    """Energy in kWh and money in the user's currency; None for what was not asked."""

    kwh: float | None
    energy_price: float | None
    hire: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def bill(
    duration: Duration,
    *,
    devices: int = 1,
    watts: float | None = None,
    price_per_kwh: float | None = None,
    price_per_hour: float | None = None,
) -> Bill:
    """Return what the expected seconds cost where the user gave a device's watts or prices; nothing is assumed.

    Raises:
        SpecError: a price of energy without the watts.
    """
    if price_per_kwh is not None and watts is None:
        raise SpecError("a price per kWh needs the watts of a device; give both")
    hours = duration.seconds / 3600 * devices
    kwh = None if watts is None else watts * hours / 1000
    return Bill(
        kwh=kwh,
        energy_price=None if kwh is None or price_per_kwh is None else kwh * price_per_kwh,
        hire=None if price_per_hour is None else hours * price_per_hour,
    )
