"""An adapter outside any model: a pure value that files, analysis and combination work on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from lorakit.core.method import Method, Static, Trimmed
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec
from lorakit.errors import AdapterFileError, SpecError, grouped, listing


@dataclass(frozen=True)
class Update:
    """One update at one site: its method (overrides applied) and its tensors, as the method declares them.

    A tensor that sites share is one tensor object in all of their updates.
    """

    site: Site
    method: Method
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Base:
    """Which base an adapter was trained on: its name, and a few of its weights to know it by.

    `probes` maps a site's path to evenly spaced values of its weight; two dtypes of one base agree on them to rounding,
    two bases do not.
    """

    name: str | None = None
    probes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def unlike(self, other: Base, tolerance: float = 0.02) -> list[str]:
        """Return the paths whose weights both remember, and differently (2 %: bf16 rounds at 0.4 %)."""
        return [
            path
            for path, values in self.probes.items()
            if path in other.probes and not _near(values, other.probes[path], tolerance)
        ]


@dataclass(frozen=True)
class Purpose:
    """What an adapter was trained for, so that its rows are read the same way wherever its folder goes.

    The task, the format of the rows, what stands between prompt and answer (None: a chat template does that), and the
    classes of a classifier.
    """

    task: str = "causal-lm"
    format: str = "text"
    separator: str | None = None
    labels: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {**asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> Purpose | None:
        """Return what `to_json` wrote, or None where nothing was."""
        if values is None:
            return None
        return cls(values["task"], values["format"], values["separator"], tuple(values["labels"]))


@dataclass(frozen=True, eq=False)
class AdapterState:
    """Everything an adapter is: its spec, its updates, and the base's own tensors it trained whole."""

    spec: AdapterSpec
    updates: tuple[Update, ...]
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    base: Base = field(default_factory=Base)
    purpose: Purpose | None = None
    apart: tuple[str, ...] = ()
    """Names in `trained` of copies that PEFT made (`modules_to_save`), which no tied weight follows."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the classes of a classifier, else nothing."""
        return self.purpose.labels if self.purpose is not None else ()

    @property
    def parameters(self) -> int:
        """Return the number of stored values; a tensor that several sites share counts once."""
        stored = sum({id(t): t.numel() for u in self.updates for t in u.tensors.values()}.values())
        return stored + sum(t.numel() for t in self.trained.values())


def expect_adapter(given: object) -> None:
    """Raise `SpecError` for what is no adapter, such as the path of one, and say how it is read."""
    if isinstance(given, AdapterState):
        return
    what, way = f"a {type(given).__name__}", "lorakit.load and lorakit.state return one"
    if isinstance(given, str | PurePath):
        what = repr(str(given))
        way = f"read it first: lorakit.load({what})"
    raise SpecError(f"an adapter is needed here, not {what}; {way}")


def trim(state: AdapterState) -> AdapterState:
    """Return the same adapter without the parts that no longer act, such as triplets AdaLoRA pruned.

    An update of which nothing acts is left out; updates of methods without such parts stay as they are. The spec says
    how the adapter was trained, so it stays too.
    """
    shrinking = tuple(kind for kind in {type(u.method) for u in state.updates} if issubclass(kind, Trimmed))
    updates = []
    for update in state.updates:
        if not isinstance(update.method, shrinking):
            updates.append(update)
        elif (smaller := update.method.trimmed(update.site, update.tensors)) is not None:
            updates.append(Update(update.site, *smaller))
    return replace(state, updates=tuple(updates))


def delta_of(update: Update, weight: Tensor | None = None) -> Tensor | None:
    """Return dW of a static update in fp32 or better, or None where it depends on a weight that is not there.

    The method itself shows which: beside a weight of NaN, its dW holds NaN or does not.
    """
    assert isinstance(update.method, Static)
    wide = {k: t.to(torch.promote_types(t.dtype, torch.float32)) for k, t in update.tensors.items()}
    first = next(iter(wide.values()))
    unknown = weight is None
    given = first.new_full((), math.nan).expand(update.site.shape) if weight is None else weight.to(first)
    delta = update.method.delta(wide, given)
    return None if unknown and delta.isnan().any() else delta


def leans_on_weights(state: AdapterState) -> bool:
    """Return whether a change of a weight is not known without the weight, as one update of each method shows."""
    one = {type(u.method): u for u in state.updates if isinstance(u.method, Static)}
    return any(delta_of(update) is None for update in one.values())


def _near(one: tuple[float, ...], other: tuple[float, ...], tolerance: float) -> bool:
    scale = max((abs(v) for v in one), default=0.0)
    return len(one) == len(other) and all(abs(a - b) <= tolerance * scale for a, b in zip(one, other, strict=True))


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether no value is NaN or infinite.

    A finite norm has finite terms, and is one call for all tensors; where squares overflow, or where tensors have
    several dtypes, each value is looked at.
    """
    floats = [t.detach() if t.requires_grad else t for t in tensors if t.is_floating_point()]
    if len({(t.dtype, t.device) for t in floats}) == 1 and torch.stack(torch._foreach_norm(floats)).isfinite().all():
        return True
    return all(bool(t.isfinite().all()) for t in floats)


def check_tensors(updates: tuple[Update, ...]) -> None:
    """Raise `AdapterFileError` listing every missing, extra, misshaped or non-finite tensor."""
    _check(updates, all_finite([t for update in updates for t in update.tensors.values()]))


def check_shapes(updates: tuple[Update, ...]) -> None:
    """Raise `AdapterFileError` as `check_tensors` does, for tensors whose values were looked at before."""
    _check(updates, finite=True)


def _check(updates: tuple[Update, ...], finite: bool) -> None:
    problems: list[str] = []
    alike: dict[Any, Mapping[str, tuple[int, ...]]] = {}  # what updates of one method declare at layers of one shape
    for update in updates:
        site, key = update.site, (id(update.method), update.site.shape, update.site.groups, update.site.kind)
        if key not in alike:
            alike[key] = {name: decl.shape for name, decl in update.method.tensors(site).items()}
        if finite and alike[key] == {name: tensor.shape for name, tensor in update.tensors.items()}:
            continue
        declared = update.method.tensors(site)
        for name in sorted(declared.keys() | update.tensors.keys()):
            where = f"{update.site.key}.{name}"
            if name not in update.tensors:
                problems.append(f"{where}: missing, expected shape {declared[name].shape}")
            elif name not in declared:
                problems.append(
                    f"{where}: not a tensor of {update.method.name}, shape {tuple(update.tensors[name].shape)}"
                )
            elif (shape := tuple(update.tensors[name].shape)) != declared[name].shape:
                problems.append(f"{where}: shape {shape}, expected {declared[name].shape}")
            elif not (finite or update.tensors[name].isfinite().all()):
                problems.append(f"{where}: holds NaN or infinity")
    if problems:
        raise AdapterFileError(f"{len(problems)} adapter tensor(s) do not fit:\n{listing(grouped(problems))}")
