"""Which layers of a block are its attention, which are its MLP, and which one of each writes the result back.

A skeleton knows names, widths and order. Attention is told by its module's name and its output projection by its own
(order tells nothing: some families declare a gate after it); an MLP's output by its widths, for it is the one layer
that leads from the wide inside back to the stream. Where it is not one, nothing is guessed: the error lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from lorakit.core.site import Site, Skeleton, layer_of
from lorakit.errors import TargetError, listing

K = TypeVar("K")
LINEAR_KINDS = ("linear", "transposed-linear")
_ATTENTION = re.compile(r"[^.]*(?:attn|attention)[^.]*", re.IGNORECASE)
_OUTPUTS = frozenset("o_proj out_proj c_proj dense o Wo out_lin output_proj to_out linear_out proj".split())
"""What families call the output projection of attention: `dense` is that of BERT, GPT-NeoX, BLOOM, Falcon and Phi."""
_EXPERTS = re.compile(r"\.experts(\.|$)")


def all_linear(skeleton: Skeleton) -> list[Site]:
    """Return every linear layer but the output heads."""
    return [site for site in skeleton.sites if site.kind in LINEAR_KINDS and site.path not in skeleton.heads]


def attention(skeleton: Skeleton) -> list[Site]:
    """Return the linear layers of each block whose path says attention."""
    return [site for site in all_linear(skeleton) if _attention_module(site.path) is not None]


def mlp(skeleton: Skeleton) -> list[Site]:
    """Return the other linear layers of each block."""
    inside = [site for site in all_linear(skeleton) if layer_of(site.path) is not None]
    return [site for site in inside if _attention_module(site.path) is None]


def attention_out(skeleton: Skeleton) -> list[Site]:
    """Return the output projection of each attention module: the layer with such a name and the stream's width."""
    found, problems = [], []
    for module, group in _grouped(attention(skeleton), lambda site: _attention_module(site.path) or "").items():
        named = [site for site in group if site.path.rpartition(".")[2] in _OUTPUTS]
        outs = [s for s in named if any(other.in_ == s.out for other in group if other is not s)]
        found += outs[:1]
        if len(outs) != 1:
            problems.append(f"{module} holds {_names(group, module)}")
    return _unless(problems, found, "attention-out", "which of its layers is attention's output projection")


def mlp_out(skeleton: Skeleton, asked: str = "mlp-out") -> list[Site]:
    """Return the layer of each block's MLP that leads back to the stream from what an earlier one widened it to.

    A gated MLP may compute gate and value in one layer of twice the width.
    """
    found, problems = [], []
    layers = _grouped(mlp(skeleton), lambda site: layer_of(site.path))
    outs = {layer: [s for i, s in enumerate(group) if _widening(s, group[:i])] for layer, group in layers.items()}
    stacks = {layer[0] for layer, some in outs.items() if layer and some}
    mixtures: dict[tuple[str, int] | None, list[Site]]
    mixtures = {layer_of(path): [] for path in (*skeleton.others, *skeleton.by_path) if _EXPERTS.search(path)}
    for layer, group in {**mixtures, **layers}.items():
        assert layer is not None, "every path with a layer's number lies in a layer"
        place = f"{layer[0]}.{layer[1]}"
        if layer in mixtures:
            problems.append(f"{place} is a mixture of experts, whose output is that of no one layer")
        elif layer[0] in stacks:
            found += outs[layer][:1]
            if len(outs[layer]) != 1:
                problems.append(f"{place} holds {_names(outs[layer] or group, place)}")
    return _unless(problems, found, asked, "which of its layers is the MLP's output")


def mlp_module(skeleton: Skeleton) -> list[Site]:
    """Return the smallest module around each block's MLP that takes and gives the stream's width and no attention."""
    found, problems = [], []
    others, apart = mlp(skeleton), attention(skeleton)
    for out in mlp_out(skeleton, "mlp-module"):
        inside = _widening(out, [site for site in others if layer_of(site.path) == layer_of(out.path)])
        parents = [path for path in skeleton.blocks if all(_within(site, path) for site in (out, *inside))]
        parents = [path for path in parents if not any(_within(site, path) for site in apart)]
        found += [skeleton.blocks[path] for path in sorted(parents, key=len)[-1:]]
        if not parents:
            problems.append(f"{out.path} stands in no module of the MLP alone")
    return _unless(problems, found, "mlp-module", "which module is its MLP")


KEYWORDS: dict[str, Callable[[Skeleton], list[Site]]] = {
    "all-linear": all_linear,
    "attention": attention,
    "mlp": mlp,
    "attention-out": attention_out,
    "mlp-out": mlp_out,
    "mlp-module": mlp_module,
}


def _attention_module(path: str) -> str | None:
    """Return the path up to the first name inside a layer that says attention, or None."""
    place = layer_of(path)
    found = place and _ATTENTION.search(path, len(place[0]))
    return path[: found.end()] if found else None


def _widening(out: Site, before: Iterable[Site]) -> list[Site]:
    """Return the layers of `before` that widen the stream to what `out` takes back to it."""
    return [s for s in before if s is not out and s.in_ == out.out and s.out in (out.in_, 2 * out.in_)]


def _within(site: Site, path: str) -> bool:
    return site.path.startswith(f"{path}.")


def _grouped(found: list[Site], key: Callable[[Site], K]) -> dict[K, list[Site]]:
    groups: dict[K, list[Site]] = {}
    for site in found:
        groups.setdefault(key(site), []).append(site)
    return groups


def _names(group: list[Site], place: str) -> str:
    return ", ".join(site.path.removeprefix(f"{place}.") for site in group)


def _unless(problems: list[str], found: list[Site], keyword: str, question: str) -> list[Site]:
    """Return what was found, or raise `TargetError` with what leaves the keyword's question open."""
    if problems:
        raise TargetError(f"{keyword!r}: this model does not tell {question}; name it:\n{listing(problems, 4)}")
    return found
