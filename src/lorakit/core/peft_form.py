"""How a method looks in PEFT's files, as the method itself says it: fields, ends of keys, shapes, and what PEFT lacks.

    adapter_config.json    peft_type = `type`, one value or pattern per key of `fields`
    adapter_model          base_model.model.<path>.<end of `keys`>, and base_model.<`banks`> once for all layers

`persist` does the rest and knows no method. What a file does not tell of a layer (IA3 stores one side's width, VeRA
one bank for all) stays open as `in_ = 0` until `settle` puts the update on a site that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from lorakit.core.method import Method, Tensors
from lorakit.core.site import Site
from lorakit.core.state import Update
from lorakit.core.targets import LINEAR_KINDS
from lorakit.errors import SpecError

PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
"""The keys PEFT's LoRA gives other values by layer."""
LYCORIS_PATTERNS = {"r": "rank_pattern", "alpha": "alpha_pattern"}
LYCORIS = frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d"})
LORA_NO_BEARING = frozenset({"megatron_core", "qalora_group_size", "eva_config"})
UNGROUPED = frozenset({*LINEAR_KINDS, "embedding", "conv1d", "conv2d", "conv3d"})
_KINDS = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}


def as_they_are(update: Update) -> Tensors:
    """Return the tensors, whose shapes are PEFT's."""
    return update.tensors


@dataclass(frozen=True)
class PeftForm:
    """One method in PEFT's files.

    `write(update)` returns our tensors in PEFT's shapes; `read(method, q, embedding)` is its inverse, on a site without
    path as far as the shapes tell it, and raises `SpecError` for shapes that do not fit.
    """

    type: str
    fields: Mapping[str, str]
    """Key of the configuration -> field of the method, with a dot into a method inside."""
    keys: Mapping[str, str]
    """Our tensor -> the end of its key."""
    read: Callable[[Any, dict[str, Tensor], bool], Update]
    write: Callable[[Update], Tensors] = as_they_are
    kinds: frozenset[str] = UNGROUPED
    grouped: bool = False
    """Whether PEFT's own computes a grouped convolution as ours does."""
    forgets: frozenset[str] = frozenset({"padding_mode"})
    """Habits of a convolution that PEFT's own has not, so that it would compute something else."""
    patterns: Mapping[str, str] = field(default_factory=dict)
    """Key of the configuration -> the key beside it that holds other values by layer."""
    flag: str | None = None
    """What tells this method from the others of its type."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the configuration says besides; another value is another method."""
    no_bearing: frozenset[str] = frozenset()
    """Keys that do not change what the saved tensors compute."""
    dropout: str | None = None
    embedding: Mapping[str, str] = field(default_factory=dict)
    """Ends of keys at an embedding, where they differ."""
    banks: Mapping[str, str] = field(default_factory=dict)
    """Our tensor -> the key under which all layers share it."""
    folds: bool = False
    """Whether a convolution's kernel is folded into its inputs there."""
    optional: frozenset[str] = frozenset()
    """Tensors only some layers have; `read` sees to it that the rest fit together."""
    alone: bool = False
    """Whether it is one tensor for the whole model, under its key without a path."""
    plain: bool = False
    """Whether PEFT's files of this type, without a flag, are read as this method."""
    config: Callable[[Sequence[Update]], Mapping[str, Any]] | None = None
    """More of the configuration, from all updates."""
    of_config: Callable[[Mapping[str, Any], str], Mapping[str, Any]] | None = None
    """Fields of the method at a path, from more of the configuration; with the keys it reads in `no_bearing`."""
    says: Callable[[Any], Mapping[str, Any]] | None = None
    """What the configuration says otherwise of one update than its fields do."""
    refusal: Callable[[Site, Any], str | None] | None = None
    """Why PEFT's would compute something else at a site, or None."""

    def why_not(self, update: Update) -> str | None:
        """Return why PEFT has no form for this update, or None."""
        site, method = update.site, update.method
        if site.kind not in self.kinds:
            return f"PEFT's {self.type} has no layer of kind {site.kind}"
        if site.groups > 1 and not self.grouped:
            return f"PEFT's {self.type} has no grouped convolution"
        if lost := sorted(site.habits & self.forgets):
            return f"PEFT's {self.type} forgets the {' and the '.join(lost)} of a convolution"
        if self.refusal is not None and (why := self.refusal(site, method)):
            return why
        if extra := sorted(update.tensors.keys() - self.keys.keys() - self.banks.keys()):
            return f"PEFT's {self.type} has no place for {', '.join(extra)}"
        return None


def get(method: Any, name: str) -> Any:
    """Return a field of a method, `inner.rank` being that of the method inside."""
    for step in name.split("."):
        method = getattr(method, step)
    return method


def put(method: Any, values: Mapping[str, Any]) -> Any:
    """Return a method with other values of fields, `inner.rank` being that of the method inside."""
    own = {name: value for name, value in values.items() if "." not in name}
    for step in {name.partition(".")[0] for name in values if "." in name}:
        inside = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{step}.")}
        own[step] = put(getattr(method, step), inside)
    return replace(method, **own)


def differing(method: Method, usual: Method) -> tuple[tuple[str, Any], ...]:
    """Return the fields in which a method differs from another of its class, sorted by name."""
    if method is usual:
        return ()
    pairs = [(f.name, getattr(method, f.name)) for f in fields(method)]
    return tuple(sorted((name.rstrip("_"), value) for name, value in pairs if value != getattr(usual, name)))


def settle(updates: Sequence[Update], sites: Sequence[Site]) -> tuple[Update, ...]:
    """Return updates on sites that may tell more than theirs: kernels unfolded, shared banks cut to the layer.

    Tensors that fit no such way stay as they are, for whoever checks shapes.
    """
    held: dict[str, Tensor] = {}
    return tuple(_settled(update, site, held) for update, site in zip(updates, sites, strict=True))


def _settled(update: Update, site: Site, held: dict[str, Tensor]) -> Update:
    if site is update.site:
        return update
    form, unfolded = update.method.peft, len(update.site.kernel) == len(site.kernel)
    if form is None or not site.in_ or (update.site.in_ and (unfolded or not form.folds)):
        return Update(site, update.method, update.tensors)
    tensors = dict(update.tensors)
    for name, decl in update.method.tensors(site).items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) == decl.shape:
            continue
        if decl.shared is not None and all(n <= m for n, m in zip(decl.shape, tensor.shape, strict=True)):
            cut = tensor[tuple(slice(n) for n in decl.shape)].contiguous()
            tensors[name] = held.setdefault(decl.shared, cut)
        elif tensor.shape[0] == decl.shape[0] and tensor.numel() == decl.numel:
            tensors[name] = tensor.reshape(decl.shape)
    return Update(site, update.method, tensors)


def pair_to_peft(update: Update) -> Tensors:
    """Return `down` with every channel of a grouped convolution, zeros beyond its own, and `up (out, r, 1, ...)`."""
    site, down, up = update.site, update.tensors["down"], update.tensors["up"]
    if site.groups > 1:
        down = on_all_channels(down, site.groups)
    return {**update.tensors, "down": down, "up": up.reshape(*up.shape, *[1] * len(site.kernel))}


def pair_from_peft(method: Any, q: Mapping[str, Tensor], embedding: bool, rank: int | None = None) -> Update:
    """Return the update of `lora_A (r, in, *k)` and `lora_B (out, r / g, 1, ...)`.

    Raises:
        SpecError: shapes that are no pair, another rank, or an A that mixes the channels of groups.
    """
    a, b = q["down"], q["up"]
    rank = method.rank if rank is None else rank
    if wrong := _wrong_shapes(a, b, embedding):
        raise SpecError(wrong)
    if a.shape[0] != rank:
        raise SpecError(
            f"lora_A has rank {a.shape[0]}, the configuration says {rank} (r, or rank_pattern in its order)"
        )
    groups = a.shape[0] // b.shape[1]
    down = _on_own_channels(a, groups)
    if groups > 1 and (on_all_channels(down, groups) != a).any():
        raise SpecError(
            f"lora_A mixes the channels of {groups} groups, which no change of the grouped weight equals; "
            "PEFT cannot merge it either"
        )
    kind = "embedding" if embedding else _KINDS[a.dim()]
    site = Site("", b.shape[0], down.shape[1], tuple(a.shape[2:]), kind=kind, groups=groups)
    return Update(site, method, {**q, "down": down, "up": b if b.dim() == 2 else b.flatten(1)})


def prompt_embeddings(type: str, name: str, *no_bearing: str) -> PeftForm:
    """Return the form of vectors at virtual positions: one tensor `(tokens, width)` beside a causal language model."""

    def read(method: Any, q: dict[str, Tensor], embedding: bool) -> Update:
        if q[name].dim() != 2 or len(q[name]) != method.tokens:
            shape = tuple(q[name].shape)
            raise SpecError(f"prompt_embeddings {shape} has not one row for each of {method.tokens} num_virtual_tokens")
        return Update(Site("", q[name].shape[1], 0, kind="model"), method, q)

    shapes = {"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
    return PeftForm(
        type,
        {"num_virtual_tokens": "tokens"},
        {name: "prompt_embeddings"},
        read=read,
        kinds=frozenset({"model"}),
        settings={"task_type": "CAUSAL_LM"},
        no_bearing=frozenset({*shapes, *no_bearing}),
        alone=True,
        plain=True,
    )


def matrices(wrong: str, *pairs: tuple[Tensor, Tensor]) -> None:
    """Raise `SpecError` unless each `(up, down)` is a pair of matrices that multiply, all to one shape."""
    flat = all(t.dim() == 2 and t.numel() for pair in pairs for t in pair)
    if not (flat and all(up.shape[1] == down.shape[0] for up, down in pairs)) or len(
        {(up.shape[0], down.shape[1]) for up, down in pairs}
    ) > 1:  # fmt: skip
        shapes = ", ".join(str(tuple(t.shape)) for pair in pairs for t in pair)
        raise SpecError(f"{wrong} of shapes {shapes} do not multiply")


def without_core(core: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(out, r)` and `(r, in * kernel)` of a Tucker-2 decomposition, its core `(r, r, *kernel)` taken into down.

    `W[o, i, s] = sum_kl core[k, l, s] up[k, o] down[l, i]`, PEFT's `use_effective_conv2d` (LyCORIS, arXiv 2309.14859,
    section 3.3).

    Raises:
        SpecError: shapes that do not multiply.
    """
    if core.dim() < 3 or (up.dim(), down.dim()) != (2, 2) or tuple(core.shape[:2]) != (len(up), len(down)):
        shapes = ", ".join(str(tuple(t.shape)) for t in (core, up, down))
        raise SpecError(f"a core and two factors of shapes {shapes} do not multiply")
    return up.T.contiguous(), torch.einsum("klf,li->kif", core.flatten(2), down).flatten(1)


def _wrong_shapes(a: Tensor, b: Tensor, embedding: bool) -> str | None:
    if a.dim() not in _KINDS or a.dim() != b.dim() or any(n != 1 for n in b.shape[2:]) or (embedding and a.dim() != 2):
        why = "are no pair; expected (r, in, *kernel) and (out, r, 1, ...)"
    elif 0 in (*a.shape, *b.shape):
        why = "have an empty dimension; the file was saved from shards that were not gathered"
    elif a.shape[0] % b.shape[1] or (a.dim() == 2 and a.shape[0] != b.shape[1]):
        why = "do not multiply: the rank differs"
    elif a.shape[1] % (groups := a.shape[0] // b.shape[1]):
        why = f"mean {groups} groups, which do not divide {a.shape[1]} input channels"
    else:
        return None
    return f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} {why}"


def on_all_channels(down: Tensor, groups: int) -> Tensor:
    """Return `(r, in, *k)` from `(r, in / g, *k)`: each group's rows at its own channels, zeros elsewhere."""
    rows, width = down.shape[0] // groups, down.shape[1]
    full = down.new_zeros(down.shape[0], width * groups, *down.shape[2:])
    for i in range(groups):
        full[i * rows : (i + 1) * rows, i * width : (i + 1) * width] = down[i * rows : (i + 1) * rows]
    return full


def _on_own_channels(full: Tensor, groups: int) -> Tensor:
    """Return `(r, in / g, *k)` from `(r, in, *k)`, the inverse of `on_all_channels`."""
    if groups == 1:
        return full
    rows, width = full.shape[0] // groups, full.shape[1] // groups
    return torch.cat([full[i * rows : (i + 1) * rows, i * width : (i + 1) * width] for i in range(groups)])
