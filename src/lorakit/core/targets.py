"""The target language: which sites a pattern means, and what to say when it means none.

    q_proj, attn.c_attn      exact path, or its dotted end
    model.layers.*.mlp.up    glob: `*` and `?` stay within one name, `**` crosses dots
    re:.*\\.(q|v)_proj        regular expression over the whole path
    all-linear               every linear layer but the output head
    attention, mlp           the linear layers of the attention, or the other linear layers, of each block
    attention-out, mlp-out   the layer of each that leads back to the stream; mlp-module: the MLP around it
    c_attn[q,v], w[0:768]    rows of a fused layer, by part name or by number

Refuse rather than guess: a pattern that matched nothing, and a match that cannot be adapted, are errors that name the
near misses, all of them at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from lorakit.core.method import Context, Method, Settled
from lorakit.core.site import Site, Skeleton, layer_of
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.sublayers import KEYWORDS, LINEAR_KINDS
from lorakit.errors import SpecError, TargetError, did_you_mean, grouped, listing

__all__ = [
    "LINEAR_KINDS",
    "Match",
    "adapted_and_whole",
    "modules_named",
    "parameters_named",
    "parse_layers",
    "resolve",
    "select",
]

_SLICE = re.compile(r"(?P<pattern>.+)\[(?P<parts>[\w:, ]+)\]")


@dataclass(frozen=True)
class Match:
    """A site that will be adapted, the method it gets (overrides applied) and the pattern that caught it."""

    site: Site
    method: Method
    pattern: str


def resolve(spec: AdapterSpec, skeleton: Skeleton) -> tuple[Match, ...]:
    """Return every site the spec adapts, in the skeleton's order.

    Raises:
        TargetError: a pattern (of targets, exclude, overrides or layers) that matched nothing, or a matched module
            that cannot be adapted; all of them, with near misses.
        SpecError: a rank the site cannot have.
    """
    if spec.method is None:
        return ()
    if isinstance(spec.method, Context):
        return (_read(spec, spec.method, skeleton),)
    chosen = select(spec.targets, skeleton, blocks="module" in spec.method.kinds)
    everywhere = [site for site, _ in chosen]
    usual = _settled(spec.method, everywhere)
    overridden = [
        (_settled(spec.method_with(o), everywhere), _keys(o.targets, skeleton, chosen)) for o in spec.overrides
    ]
    matches, problems = [], []
    for site, pattern in chosen:
        method = usual
        for changed, keys in overridden:
            if site.key in keys:
                method = changed
        try:
            method.check(site)
        except SpecError as problem:
            problems.append(f"{site.key}: {problem}")
        matches.append(Match(site, method, pattern))
    if problems:
        raise SpecError(f"{len(problems)} of {len(chosen)} targets do not fit:\n{listing(grouped(problems))}")
    return tuple(matches)


def _read(spec: AdapterSpec, method: Context, skeleton: Skeleton) -> Match:
    """Return the one match of a method that acts on what the model reads."""
    chosen = {"targets": spec.targets.include != Targets().include, "exclude": spec.targets.exclude,
              "layers": spec.targets.layers, "overrides": spec.overrides, "dropout": spec.dropout}  # fmt: skip
    if said := [name for name, value in chosen.items() if value]:
        raise SpecError(f"{method.name} acts on what the model reads, on no layer; remove {', '.join(said)}")
    if skeleton.reader is None:
        raise TargetError(
            f"{method.name} acts on what a transformer reads, and this model has no part that is known to read "
            "embeddings: it takes a transformers decoder or encoder with inputs_embeds and one stack of blocks"
        )
    method.check(skeleton.reader)
    return Match(skeleton.reader, method, "what the model reads")


def select(targets: Targets, skeleton: Skeleton, *, blocks: bool = False) -> list[tuple[Site, str]]:
    """Return the sites `targets` mean and the pattern that caught each first, in the skeleton's order.

    With `blocks`, a pattern that means no layer may mean modules that hold layers, such as an MLP.
    """
    found: dict[str, tuple[Site, str]] = {}
    problems: list[str] = []
    for pattern in targets.include:
        try:
            for site in _expand(pattern, skeleton, blocks):
                found.setdefault(site.key, (site, pattern))
        except TargetError as problem:
            problems.append(str(problem))
    for pattern in targets.exclude:
        try:
            gone = set(_paths(pattern, skeleton, (*skeleton.by_path, *skeleton.others)))
        except TargetError as problem:
            problems.append(f"exclude {problem}")
            continue
        if not gone:
            problems.append(f"exclude {_nothing(pattern, skeleton)}")
        found = {key: hit for key, hit in found.items() if hit[0].path not in gone}
    if problems:
        raise TargetError(f"{len(problems)} target pattern(s) cannot be used:\n{listing(problems)}")
    if targets.layers is not None:
        inside = {key: hit for key, hit in found.items() if _in_layers(hit[0].path, targets.layers, skeleton)}
        gone = {pattern for _, pattern in found.values()} - {pattern for _, pattern in inside.values()}
        if inside and gone:
            raise TargetError(
                f"layers={targets.layers!r} leaves nothing of {', '.join(map(repr, sorted(gone)))}; give other layers, "
                "or leave it out of the targets"
            )
        found = inside
    if not found:
        raise TargetError(
            f"nothing is left to adapt after exclude={list(targets.exclude)} and layers={targets.layers!r}"
        )
    _refuse_overlaps(site for site, _ in found.values())
    order = {path: i for i, path in enumerate((*skeleton.by_path, *skeleton.blocks))}
    return sorted(found.values(), key=lambda hit: (order[hit[0].path], hit[0].rows or (0, 0)))


def modules_named(patterns: Iterable[str], paths: Iterable[str]) -> dict[str, list[str]]:
    """Return, for each pattern of `train`, the module paths it means: names and globs and `re:`, no keywords.

    Raises:
        TargetError: a pattern that matched nothing, with near misses.
    """
    known = [path for path in paths if path]
    hits = {pattern: [path for path in known if _matcher(pattern)(path)] for pattern in patterns}
    if missed := [f"{p!r} matched no module{_near(p, known)}" for p, found in hits.items() if not found]:
        raise TargetError(f"modules to train whole were not found:\n{listing(missed)}")
    return hits


def adapted_and_whole(adapted: Iterable[str], trained: Iterable[str], ties: Mapping[str, str]) -> str | None:
    """Return what speaks against training parameters whole whose layer is adapted as well, or None.

    Args:
        adapted: the paths of the adapted layers.
        trained: the names of the parameters.
        ties: the further names of tied parameters, each with the first name of the same one.
    """
    inside = set(adapted)
    weights = {ties.get(f"{path}.weight", f"{path}.weight"): f"{path}.weight" for path in inside}
    both = []
    for name in trained:
        if name.rpartition(".")[0] in inside:
            both.append(name)
        elif (other := weights.get(ties.get(name, name))) is not None:
            both.append(f"{name}, which is tied to {other}")
    if not both:
        return None
    return f"these are both adapted and trained whole; exclude them from the targets, or from `train`:\n{listing(both)}"


def parameters_named(
    patterns: Iterable[str], parameters: Iterable[str], skeleton: Skeleton, layers: str | None = None
) -> dict[str, list[str]]:
    """Return, for each pattern of `train`, the base's parameters it means.

    `*` is everything, `biases` every bias (those of norms included), `norms` every parameter of a normalisation layer,
    `heads` the output layers; any other pattern names modules, as in `modules_named`. `layers` keep the first three to
    those layers, so that the others stay untouched.

    Raises:
        TargetError: a pattern that means no parameter, with near misses.
    """
    known = list(parameters)
    paths = [*skeleton.by_path, *skeleton.others]
    found: dict[str, list[str]] = {}
    for pattern in patterns:
        if pattern in _PARTS:
            means = _PARTS[pattern]
            meant = [name for name in known if means(name, skeleton)]
            if not meant:
                raise TargetError(f"train {pattern!r}: this model has none{_WITHOUT.get(pattern, '')}")
            if layers is not None and pattern != "heads":
                meant = [name for name in meant if _in_layers(name, layers, skeleton)]
            found[pattern] = meant
            if not meant:
                raise TargetError(f"train {pattern!r}: there is none in layers {layers}")
        else:
            inside = tuple(f"{path}." for path in modules_named((pattern,), paths)[pattern])
            found[pattern] = [name for name in known if name.startswith(inside)]
    return found


def parse_layers(text: str, depth: int) -> frozenset[int]:
    """Return the layer numbers `20-24`, `top:5`, `bottom:2`, `0,3,8-11` mean in a stack of `depth`, counted from 0.

    Raises:
        TargetError: a number outside the stack, a range that runs backwards, or words that are none of these.
    """
    chosen: set[int] = set()
    for part in (p.strip() for p in text.split(",")):
        if ranged := re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part):
            first, last = int(ranged[1]), int(ranged[2] or ranged[1])
        elif counted := re.fullmatch(r"(top|bottom):(\d+)", part):
            n = int(counted[2])
            first, last = (depth - n, depth - 1) if counted[1] == "top" else (0, n - 1)
        else:
            raise TargetError(f"layers {part!r} is not understood; write 20-24, top:5, bottom:2 or 0,3,8-11")
        if ranged and first > last:
            raise TargetError(f"layers {part!r} runs backwards; write {last}-{first}")
        if first > last or first < 0 or last >= depth:
            raise TargetError(f"layers {part!r} lies outside this model: it has {depth} layers, 0 to {depth - 1}")
        chosen.update(range(first, last + 1))
    return frozenset(chosen)


def _settled(method: Method, sites: list[Site]) -> Method:
    return method.settled(sites) if isinstance(method, Settled) else method


def _expand(pattern: str, skeleton: Skeleton, blocks: bool = False) -> list[Site]:
    """Return the sites one pattern of `include` means, slices cut."""
    sliced = None if pattern.startswith("re:") else _SLICE.fullmatch(pattern)
    name = sliced["pattern"] if sliced else pattern
    paths = _paths(name, skeleton, (*skeleton.by_path, *skeleton.others))
    sites = [skeleton.by_path[path] for path in paths if path in skeleton.by_path]
    if blocks and not sites and all(path in skeleton.blocks for path in paths):
        sites = [skeleton.blocks[path] for path in paths]
    if not sites:
        unfit = [f"{path} is {' '.join(skeleton.others[path])}" for path in paths]
        raise TargetError(
            f"{pattern!r} matched only modules that cannot be adapted:\n{listing(unfit, 4)}"
            if unfit
            else _nothing(name, skeleton)
        )
    if unfit := [path for path in paths if path in skeleton.others and not _contains(path, sites)]:
        shown = listing([f"{path} is {' '.join(skeleton.others[path])}" for path in unfit], 4)
        raise TargetError(f"{pattern!r} also matched modules that cannot be adapted; narrow it:\n{shown}")
    return [cut for site in sites for cut in _cut(site, sliced["parts"], skeleton)] if sliced else sites


def _contains(path: str, sites: list[Site]) -> bool:
    """Return whether a matched container is a matched site, or only stands above some, as `**` and `re:.*` make it."""
    return any(f"{site.path}.".startswith(f"{path}.") for site in sites)


def _cut(site: Site, parts: str, skeleton: Skeleton) -> list[Site]:
    """Return the slices of a fused layer that `q,v` or `0:768` mean."""
    if site.groups > 1:
        raise TargetError(
            f"{site.path} is a convolution of {site.groups} groups, whose rows see different channels; adapt it whole"
        )
    named = skeleton.parts.get(site.path, {})
    cuts = []
    for part in (p.strip() for p in parts.split(",")):
        if numbered := re.fullmatch(r"(\d+):(\d+)", part):
            start, stop = int(numbered[1]), int(numbered[2])
        elif part in named:
            start, stop = named[part]
        else:
            known = ", ".join(f"{k} = {a}:{b}" for k, (a, b) in named.items()) or "none are known here; give rows a:b"
            raise TargetError(f"{site.path} has no part {part!r}; its parts: {known}")
        if not 0 <= start < stop <= site.out:
            raise TargetError(f"{site.path}[{part}] lies outside its {site.out} output rows")
        cuts.append(site.slice(start, stop))
    return cuts


def _paths(pattern: str, skeleton: Skeleton, candidates: Iterable[str]) -> list[str]:
    """Return the paths a pattern without slice means; a keyword means sites or blocks."""
    if pattern in KEYWORDS:
        return [site.path for site in KEYWORDS[pattern](skeleton)]
    matches = _matcher(pattern)
    return [path for path in candidates if matches(path)]


def _matcher(pattern: str) -> Callable[[str], bool]:
    if pattern.startswith("re:"):
        try:
            compiled = re.compile(pattern[3:])
        except re.error as bad:
            raise TargetError(f"{pattern!r} is not a regular expression: {bad}") from None
        return lambda path: compiled.fullmatch(path) is not None
    if "*" in pattern or "?" in pattern:
        steps = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
        glob = "".join(steps.get(t, re.escape(t)) for t in re.split(r"(\*\*|\*|\?)", pattern))
        return lambda path: re.fullmatch(glob, path) is not None
    return lambda path: path == pattern or path.endswith(f".{pattern}")


_PARTS: dict[str, Callable[[str, Skeleton], bool]] = {
    "*": lambda name, skeleton: True,
    "biases": lambda name, skeleton: name.rpartition(".")[2] == "bias",
    "norms": lambda name, skeleton: "norm" in skeleton.others.get(name.rpartition(".")[0], ("", ""))[0].lower(),
    "heads": lambda name, skeleton: name.startswith(tuple(f"{head}." for head in skeleton.heads)),
}
_WITHOUT = {"biases": "; models like LLaMA are built without biases, so train something else, for example norms"}


def _in_layers(path: str, text: str, skeleton: Skeleton) -> bool:
    place = layer_of(path)
    if place is None:
        return False
    return place[1] in parse_layers(text, skeleton.depths[place[0]])


def _keys(targets: Targets, skeleton: Skeleton, chosen: list[tuple[Site, str]]) -> set[str]:
    """Return the keys of the chosen sites an override applies to; one that applies to none is an error."""
    if targets.include == ("*",):
        paths = {site.path for site, _ in chosen}
        if targets.layers is not None:
            paths = {path for path in paths if _in_layers(path, targets.layers, skeleton)}
        for pattern in targets.exclude:
            paths -= set(_paths(pattern, skeleton, paths))
        hit = {site.key for site, _ in chosen if site.path in paths}
    else:
        try:
            meant = [site for site, _ in select(targets, skeleton, blocks=any(s.kind == "module" for s, _ in chosen))]
        except TargetError as error:
            raise TargetError(f"override of {'/'.join(targets.include)}: {error}") from error
        whole = {site.path for site in meant if site.rows is None}
        hit = {site.key for site, _ in chosen if site.path in whole or site in meant}
    if not hit:
        where = "/".join(targets.include) + (f" in layers {targets.layers}" if targets.layers else "")
        raise TargetError(f"the override of {where} applies to no adapted layer; remove it or widen the targets")
    return hit


def _refuse_overlaps(sites: Iterable[Site]) -> None:
    by_path: dict[str, list[Site]] = {}
    for site in sites:
        by_path.setdefault(site.path, []).append(site)
    for path, group in by_path.items():
        spans = sorted(site.rows or (0, site.out) for site in group)
        if any(a[1] > b[0] for a, b in pairwise(spans)):
            raise TargetError(f"{path}: targets overlap on rows {spans}; give each row to one target")


def _nothing(pattern: str, skeleton: Skeleton) -> str:
    return f"{pattern!r} matched nothing{_near(pattern, (*skeleton.by_path, *skeleton.others))}"


def _near(pattern: str, paths: Iterable[str]) -> str:
    """Return a hint: the nearest module names, as long as the pattern is."""
    length = pattern.count(".") + 1
    tails = {".".join(p.split(".")[-length:]) for p in paths}
    words = {t for t in (*tails, *KEYWORDS) if not re.fullmatch(r"[\d.]*", t)} - {pattern}
    return did_you_mean(pattern.removeprefix("re:"), words)
