"""What a run will be, before a weight is loaded: the values of a plan, which `training.plan` makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any

from lorakit.data.preview import Run
from lorakit.errors import SpecError
from lorakit.planning.advice import Advice
from lorakit.planning.counting import Counts
from lorakit.planning.devices import DEVICES, Device, device
from lorakit.planning.fitting import Fit
from lorakit.planning.lint import Finding
from lorakit.planning.memory import Forecast
from lorakit.planning.pace import Bill, Duration
from lorakit.training.forecast import Load
from lorakit.training.limits import Limits

if TYPE_CHECKING:
    from lorakit.data.report import DataReport


@dataclass(frozen=True)
class Where:
    """On what a run is planned: the devices to try, how many share the work and how, and what they cost.

    Without a name the common devices are tried, and without a strategy several share the work as `train.parallel` says.
    The prices are those of one device.
    """

    devices: tuple[str, ...] = ()
    count: int = 1
    strategy: str | None = None
    watts: float | None = None
    price_per_kwh: float | None = None
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        """Raise `SpecError` for numbers that make no bill."""
        for name in ("watts", "price_per_kwh", "price_per_hour"):
            if (value := getattr(self, name)) is not None and not 0 <= value < inf:
                raise SpecError(f"{name} is {value}; give a finite number, not below 0")
        if self.price_per_kwh is not None and self.watts is None:
            raise SpecError("a price per kWh needs the watts of a device; give both")

    @property
    def chosen(self) -> tuple[Device, ...]:
        """Return the devices."""
        return tuple(map(device, self.devices)) if self.devices else DEVICES


@dataclass(frozen=True)
class Time:
    """How long a run takes, and what that costs by the prices that were given."""

    duration: Duration
    bill: Bill


HERE = "this machine"
"""The name of the time that was measured."""


@dataclass(frozen=True)
class Pace:
    """What a run computes, and how long that takes on each device somebody named; None is not known.

    `tokens` are those of the whole run, with the padding that is computed. `times` are by the names of the devices
    whose speed is known, or the one that was measured, `HERE`. Under `train.cache_frozen` a step begins
    at the lowest trained block: `cache_flops` computes what is below once, and `cache_bytes` holds it.
    """

    flops_per_step: int
    steps: int | None = None
    tokens: int | None = None
    times: Mapping[str, Time] = field(default_factory=dict)
    cache_bytes: int = 0
    cache_flops: int = 0


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """What a run will be; `to_json` is all of it.

    `memory` is the recipe's own forecast on one device, without what the device itself needs; `ways` has the others,
    by the names of `planning.fitting.VERDICTS`, and `own` is the recipe's among them. `why` says for what reason rows
    are packed or not, nothing where there is no data.
    """

    model: str
    dtype: str
    quant: str | None
    method: str
    counts: Counts
    load: Load
    why: str
    memory: Forecast
    ways: Mapping[str, Forecast]
    own: str
    fits: tuple[Fit, ...]
    pace: Pace
    where: Where
    limits: Mapping[str, Limits] = field(default_factory=dict)
    """The largest batch and context by the name of each device that was asked for, each alone: of the recipe as it is
    where that fits, else of the first way that does."""
    data: Mapping[str, DataReport] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    """The tokens of each training example, in order of size."""
    example: tuple[Run, ...] = ()
    advice: tuple[Advice, ...] = ()
    findings: tuple[Finding, ...] = ()
    warnings: tuple[str, ...] = ()
    divided: int = 0
    """Numbers of the base that several devices may divide (`training/sharded.py`)."""

    @property
    def modules(self) -> list[dict[str, Any]]:
        """Return each adapted module as plain values."""
        return [{name: getattr(m, name) for name in _MODULE} | {"shape": list(m.shape)} for m in self.counts.modules]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "quant": self.quant,
            "method": self.method,
            "trainable_parameters": self.counts.trainable_parameters,
            "total_parameters": self.counts.total_parameters,
            "percent": self.counts.percent,
            "adapter_bytes": self.counts.adapter_bytes(),
            "modules": self.modules,
            "trained_whole": [asdict(one) for one in self.counts.whole],
            "patterns": dict(self.counts.hits),
            "batch": {"rows": self.load.rows, "length": self.load.length, "packed": self.load.packed, "why": self.why},
            "memory": self.memory.to_json(),
            "own": self.own,
            "where": asdict(self.where),
            "ways": {name: one.to_json() for name, one in self.ways.items()},
            "fits": [one.to_json() for one in self.fits],
            "largest": {name: asdict(one) for name, one in self.limits.items()},
            "pace": asdict(self.pace),
            "data": {part: report.to_json() for part, report in self.data.items()},
            "lengths": histogram(self.lengths),
            "example": [run._asdict() for run in self.example],
            "advice": [asdict(line) for line in self.advice],
            "findings": [asdict(one) for one in self.findings],
            "warnings": list(self.warnings),
        }


def histogram(lengths: Sequence[int], bins: int = 16) -> list[dict[str, int]]:
    """Return how many examples are in each of equal ranges of lengths: longer than `above`, no longer than `up_to`."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    bins = min(bins, high - low + 1)
    edges = [low - 1 + round((high - low + 1) * i / bins) for i in range(bins + 1)]
    return [
        {"above": one, "up_to": two, "examples": sum(one < n <= two for n in lengths)} for one, two in pairwise(edges)
    ]


_MODULE = ("path", "kind", "shape", "rank", "parameters", "pattern", "method")
