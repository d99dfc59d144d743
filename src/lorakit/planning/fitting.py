"""Whether a run fits a device, in which form, and the largest batch or context that does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorakit.errors import SpecError, did_you_mean
from lorakit.planning.devices import Device
from lorakit.planning.memory import Parts

VERDICTS = {
    "plain": "fits",
    "checkpointing": "fits with checkpointing",
    "4 bits": "fits in 4 bits",
    "4 bits and checkpointing": "fits in 4 bits with checkpointing",
}
"""What is said of a device by the first variant that fits, in the order in which they cost speed, then quality."""
TOO_SMALL = "does not fit"


@dataclass(frozen=True)
class Fit:
    """A verdict on one device: bytes needed by the variant it is about, and bytes there are."""

    device: str
    verdict: str
    needed: int
    limit: int

    @property
    def spare(self) -> int:
        """Return the bytes left over; negative, the bytes that are missing."""
        return self.limit - self.needed

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {**asdict(self), "spare": self.spare}


def fits(device: Device, variants: Mapping[str, Parts]) -> Fit:
    """Return whether one of the variants fits, and which first; if none does, the one that is nearest to.

    Args:
        variants: what the device would hold at the peak, overhead included, by the names in `VERDICTS`.

    Raises:
        SpecError: no variant, or one of another name.
    """
    if not variants:
        raise SpecError(f"nothing to fit; give one of {', '.join(VERDICTS)}")
    for name in variants:
        if name not in VERDICTS:
            raise SpecError(f"unknown variant {name!r}{did_you_mean(name, VERDICTS)}; known are {', '.join(VERDICTS)}")
    for name, verdict in VERDICTS.items():
        if name in variants and variants[name].total <= device.memory:
            return Fit(device.name, verdict, variants[name].total, device.memory)
    return Fit(device.name, TOO_SMALL, min(parts.total for parts in variants.values()), device.memory)


def largest(needed: Callable[[int], int], limit: int, at: int = 1, ceiling: int = 2**20) -> int:
    """Return the largest n up to `ceiling` whose `needed(n)` bytes are within `limit`, or 0 where not even 1 is.

    `needed` must not fall with n. It is asked first at `at`, then at doubles, then halfway between: about
    2 log2(n / at) times.
    """
    low, high = 0, at
    while high <= ceiling and needed(high) <= limit:
        low, high = high, 2 * high
    high = min(high, ceiling + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= limit else (low, middle)
    return low
