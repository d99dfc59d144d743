"""Count what an adapter will train, from the declarations that attach allocates from, without a model.

A tensor that sites share counts once, at the first site that holds it, so the modules add up to the total. What of the
base is trained whole counts beside them, a tied parameter once. All numbers are values, not bytes, unless they say so.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from lorakit.core.method import Method
from lorakit.core.site import Decl, Skeleton, layer_of
from lorakit.core.spec import AdapterSpec
from lorakit.core.sublayers import KEYWORDS, attention, mlp
from lorakit.core.targets import Match, adapted_and_whole, modules_named, parameters_named, resolve
from lorakit.errors import SpecError, listing

Shapes = Mapping[str, tuple[int, ...]]
_SLICE = re.compile(r"(?P<name>.+?)(?P<rows>\[[\w:, ]+\])?")


@dataclass(frozen=True)
class Trained:
    """One update: where, how large the weight is, and what it trains there.

    `rank` is the method's own field (the leaf's where ranks are nested), None for a method without one. `parameters`
    hold the shared tensors this site is the first to hold; `shared` names all it trains, each with its size.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    parameters: int
    pattern: str
    method: str
    alone: int
    """What it trains that no other site holds."""
    shared: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Whole:
    """One parameter of the base that is trained itself, and the pattern of `train` that meant it first."""

    name: str
    parameters: int
    pattern: str


@dataclass(frozen=True)
class Layer:
    """What is trained in one layer of a stack; `index` is None for everything outside of any stack."""

    stack: str
    index: int | None
    modules: int
    parameters: int


@dataclass(frozen=True)
class Counts:
    """What an adapter trains, exactly."""

    modules: tuple[Trained, ...]
    whole: tuple[Whole, ...]
    total_parameters: int
    """The base's, a tied one once."""
    frozen_in_adapter: int
    """Values an adapter holds and does not train: random banks, kept starts, gates; shared ones once."""
    hits: Mapping[str, int]
    """How many modules each target pattern caught first; 0 where the patterns before it, or `exclude`, left none."""
    whole_hits: Mapping[str, int]
    """How many parameters of the base each pattern of `train` meant first."""
    depths: Mapping[str, int]
    """The number of layers of each stack of the base."""

    @property
    def adapter_parameters(self) -> int:
        """Return what the updates train, without parameters of the base."""
        return sum(module.parameters for module in self.modules)

    @property
    def trainable_parameters(self) -> int:
        """Return everything that trains."""
        return self.adapter_parameters + sum(one.parameters for one in self.whole)

    @property
    def percent(self) -> float:
        """Return 100 * trainable / (base + all values of the adapter), the share that papers and PEFT print."""
        return percent(
            self.trainable_parameters, self.total_parameters, self.adapter_parameters + self.frozen_in_adapter
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """Return the names of the methods, in order of first use."""
        return tuple(dict.fromkeys(module.method for module in self.modules))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Return the sum over each layer of each stack, those where nothing trains included, then over the rest."""
        sums = {(stack, index): [0, 0] for stack, depth in self.depths.items() for index in range(depth)}
        rest = [0, 0]
        for path, count, is_module in [
            *((m.path, m.parameters, 1) for m in self.modules),
            *((w.name, w.parameters, 0) for w in self.whole),
        ]:
            place = layer_of(path)
            entry = rest if place is None else sums[place]
            entry[0] += is_module
            entry[1] += count
        found = [Layer(stack, index, *entry) for (stack, index), entry in sums.items()]
        return (*found, Layer("", None, *rest)) if rest[1] else tuple(found)

    def adapter_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Return the bytes of the tensors in the adapter's file: trained and frozen ones, and what is trained whole.

        Adapters are kept and written in fp32. That is lorakit's own format; PEFT's is the same but for what it makes
        again on loading, and VeRA's banks, which it writes once at the width of the widest layer.
        """
        return (self.trainable_parameters + self.frozen_in_adapter) * dtype.itemsize


@dataclass(frozen=True)
class Role:
    """What a pattern caught in one role, and what the adapter would be if the pattern meant that role alone."""

    name: str
    """`attention`, `mlp`, `the rest` outside of all layers, or the name of the module around the layer."""
    paths: tuple[str, ...]
    patterns: tuple[str, ...]
    """The narrower patterns: together they mean what was caught in this role, and nothing in another."""
    modules: int
    """Modules of the whole adapter with these in the pattern's place."""
    parameters: int
    """Trainable parameters of its updates then."""


@dataclass(frozen=True)
class Spread:
    """A pattern that caught layers of one name in several roles; `modules` and `parameters` are the whole adapter's."""

    pattern: str
    layer: str
    roles: tuple[Role, ...]
    modules: int
    parameters: int

    def __str__(self) -> str:
        """Return the warning in the user's words, with what to write for each role."""
        caught = ", ".join(f"{len(role.paths)} of {role.name}" for role in self.roles)
        lines = [
            f"{role.name} alone: write {', '.join(role.patterns)}, which makes it {_modules(role.modules)} and "
            f"{role.parameters:,} parameters"
            for role in self.roles
        ]
        return (
            f"{self.pattern!r} catches every {self.layer}, whatever it is for ({caught}): {_modules(self.modules)} and "
            f"{self.parameters:,} parameters in all. If you do not mean them all:\n{listing(lines)}"
        )


def percent(trainable: int, base: int, adapter: int) -> float:
    """Return 100 * trainable / (base + all values of the adapter, trained or not): what is called the share trained."""
    return 100 * trainable / (base + adapter)


def count(spec: AdapterSpec, skeleton: Skeleton, shapes: Shapes, ties: Mapping[str, str] | None = None) -> Counts:
    """Return what `spec` trains on a base of this skeleton: the same numbers that `attach` allocates.

    Args:
        spec: the adapter.
        skeleton: of the base, from `sites`.
        shapes: the shape of each parameter of the base by every name it has.
        ties: the further names of tied parameters, each with the first name of the same one.

    Raises:
        TargetError: a pattern that matched nothing, or matched what cannot be adapted.
        SpecError: a method or rank that does not fit a site, a layer that is adapted and trained whole as well, tied
            parameters without `ties`.
    """
    matches = resolve(spec, skeleton)
    whole = _whole(spec, skeleton, shapes, ties or {})
    if both := adapted_and_whole([m.site.path for m in matches], [one.name for one in whole], ties or {}):
        raise SpecError(both)
    seen: set[str] = set()
    modules, frozen = [], 0
    for match in matches:
        declared = match.method.tensors(match.site)
        modules.append(_trained(match, declared, seen))
        frozen += sum(d.numel for d in declared.values() if not d.trainable and d.shared not in seen)
        seen |= {d.shared for d in declared.values() if d.shared is not None}
    on_layers = bool(matches) and matches[0].site.kind != "model"
    return Counts(
        tuple(modules),
        tuple(whole),
        skeleton.total_parameters,
        frozen,
        _hits(spec.targets.include if on_layers else [m.pattern for m in modules], modules),
        _hits(spec.train, whole),
        skeleton.depths,
    )


def roles(counts: Counts, skeleton: Skeleton) -> tuple[Spread, ...]:
    """Return the patterns that caught layers of one name in several roles, as `c_proj` does in GPT-2's two halves.

    Keywords such as `all-linear` say that they mean several, and are left out; so are patterns that name the layers of
    each role themselves, such as `re:.*(q_proj|down_proj)`.
    """
    role_of = _roles(skeleton)
    found = []
    for pattern in (p for p in counts.hits if _parts(p)[0] not in KEYWORDS):
        by_name: dict[str, dict[str, list[str]]] = {}
        for path in dict.fromkeys(_bare(m.path) for m in counts.modules if m.pattern == pattern):
            if path in role_of:
                by_name.setdefault(path.rpartition(".")[2], {}).setdefault(role_of[path], []).append(path)
        found += [_spread(counts, skeleton, role_of, pattern, parts) for parts in by_name.values() if len(parts) > 1]
    return tuple(found)


def fused_experts(shapes: Shapes, total: int, trained: Collection[str] = ()) -> list[str]:
    """Say of experts whose weights are one parameter that no target reaches them, nor packing.

    Nothing is said of those that are `trained` whole, nor of less than a tenth of the base's `total` parameters.
    """
    fused = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) == 3 and name not in trained}
    if not fused or sum(fused.values()) < total / 10:
        return []
    return [
        f"{sum(fused.values()):,} of the {total:,} parameters are experts in one tensor each, such as "
        f"{next(iter(fused))}: no target reaches them, and `quant` leaves them in 16 bits"
    ]


def compare(counted: Mapping[str, Counts], dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Return one plain row for each adapter, in the given order, for a table or JSON; bytes are those of its file."""
    return [
        {
            "name": name,
            "method": ", ".join(counts.methods) or "none",
            "modules": len(counts.modules),
            "trainable_parameters": counts.trainable_parameters,
            "percent": counts.percent,
            "frozen_in_adapter": counts.frozen_in_adapter,
            "adapter_bytes": counts.adapter_bytes(dtype),
        }
        for name, counts in counted.items()
    ]


def _trained(match: Match, declared: Mapping[str, Decl], seen: set[str]) -> Trained:
    """Return the count of one update; `seen` are the shared tensors that sites before it hold."""
    site, trained = match.site, [d for d in declared.values() if d.trainable]
    alone = sum(d.numel for d in trained if d.shared is None)
    shared = {d.shared: d.numel for d in trained if d.shared is not None}
    first = sum(size for word, size in shared.items() if word not in seen)
    return Trained(
        site.key, site.kind, site.shape, _rank(match.method), alone + first, match.pattern, match.method.name,
        alone, tuple(shared.items()),
    )  # fmt: skip


def _rank(method: Method) -> int | None:
    """Return the rank of a method, or of the one it wraps."""
    rank = getattr(method, "rank", None)
    inner = (getattr(method, f.name) for f in fields(method))
    return rank if isinstance(rank, int) else next((_rank(m) for m in inner if isinstance(m, Method)), None)


def _whole(spec: AdapterSpec, skeleton: Skeleton, shapes: Shapes, ties: Mapping[str, str]) -> list[Whole]:
    """Return the parameters that `spec.train` means, in the base's order, each tied one under its first name meant."""
    named = parameters_named(spec.train, shapes, skeleton, spec.targets.layers)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    if named and sum(size[name] for name in size if name not in ties) > skeleton.total_parameters:
        raise SpecError(
            "these shapes hold more than the base: some are of tied parameters; pass `ties` to count them once"
        )
    pattern_of = {name: pattern for pattern, names in reversed(named.items()) for name in names}
    once: dict[str, str] = {}
    for name in shapes:
        if name in pattern_of:
            once.setdefault(ties.get(name, name), name)
    return [Whole(name, size[name], pattern_of[name]) for name in once.values()]


def _hits(patterns: Iterable[str], caught: Iterable[Trained | Whole]) -> dict[str, int]:
    counted = Counter(one.pattern for one in caught)
    return {pattern: counted[pattern] for pattern in patterns}


def _roles(skeleton: Skeleton) -> dict[str, str]:
    """Return the role of each site: by its path for linear layers, else by the name of the module around it."""
    parents = {s.path: s.path.rpartition(".")[0].rpartition(".")[2] for s in skeleton.sites}
    found = {path: parent if layer_of(path) else "the rest" for path, parent in parents.items()}
    found |= {site.path: "mlp" for site in mlp(skeleton)}
    return found | {site.path: "attention" for site in attention(skeleton)}


def _spread(
    counts: Counts, skeleton: Skeleton, role_of: Mapping[str, str], pattern: str, parts: Mapping[str, list[str]]
) -> Spread:
    """Return the warning for one pattern and one name, `parts` being the paths it caught by role."""
    meant = set(_meant(pattern, skeleton))
    kept = {path for other in counts.hits if other != pattern for path in _meant(other, skeleton)}
    rows = _parts(pattern)[1]
    layer = next(iter(parts.values()))[0].rpartition(".")[2]
    roles = []
    for role, paths in parts.items():
        allowed = {path for path in meant if role_of.get(path) == role}
        left_out = {path for other, some in parts.items() if other != role for path in some} - kept
        rest = [module for module in counts.modules if _bare(module.path) not in left_out]
        narrower = tuple(f"{one}{rows}" for one in _narrower(paths, allowed, _known(skeleton)))
        roles.append(Role(role, tuple(paths), narrower, len(rest), _together(rest)))
    return Spread(pattern, layer, tuple(roles), len(counts.modules), counts.adapter_parameters)


def _narrower(paths: Iterable[str], allowed: Collection[str], known: Collection[str]) -> list[str]:
    """Return the shortest dotted ends or globs that mean these paths and no module outside of `allowed`."""
    alike: dict[str, list[str]] = {}
    for path in paths:
        alike.setdefault(".".join("*" if name.isdigit() else name for name in path.split(".")), []).append(path)
    found: list[str] = []
    for form, group in alike.items():
        names = form.split(".")
        ends = [".".join(names[-n:]) for n in range(2, len(names)) if "*" not in names[-n:]]
        fitting = (one for one in [*ends, form] if set(modules_named([one], known)[one]) <= set(allowed))
        best = next(fitting, None)
        found += [best] if best is not None else group
    return list(dict.fromkeys(found))


def _meant(pattern: str, skeleton: Skeleton) -> list[str]:
    """Return the paths a target pattern means, whichever rows of them."""
    name = _parts(pattern)[0]
    if name in KEYWORDS:
        return [site.path for site in KEYWORDS[name](skeleton)]
    return modules_named([name], _known(skeleton))[name]


def _known(skeleton: Skeleton) -> list[str]:
    return [*skeleton.by_path, *skeleton.others]


def _parts(pattern: str) -> tuple[str, str]:
    """Return a pattern and its rows: `c_attn[q,v]` -> `("c_attn", "[q,v]")`."""
    sliced = None if pattern.startswith("re:") else _SLICE.fullmatch(pattern)
    return (sliced["name"], sliced["rows"] or "") if sliced else (pattern, "")


def _bare(key: str) -> str:
    """Return the path of a site's key, without its rows."""
    return key.partition("[")[0]


def _together(modules: Iterable[Trained]) -> int:
    """Return what some modules train together, shared tensors once."""
    some = list(modules)
    return sum(m.alone for m in some) + sum(dict(pair for m in some for pair in m.shared).values())


def _modules(number: int) -> str:
    return f"{number} module{'s' * (number != 1)}"
