"""What other tools will refuse or leave out of an adapter, told before it is trained.

lorakit can train more than PEFT has a form for, and servers read less than PEFT writes: the refusal, or worse the
silence, comes after the training. Every finding was read in the tool's source or in a thread of its users, named beside
it (docs/plan.md has the list). What is not here was not looked for, so an empty answer is no promise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorakit.core.init import init_of
from lorakit.core.method import WEIGHT_KINDS, Context, LowRank, Method, Static
from lorakit.core.peft_form import get
from lorakit.core.site import Site, layer_of
from lorakit.core.spec import AdapterSpec
from lorakit.core.state import Update
from lorakit.core.targets import LINEAR_KINDS, Match
from lorakit.errors import SpecError

TOOLS = PEFT, VLLM, LLAMA_CPP, TGI = "PEFT", "vLLM", "llama.cpp", "Text Generation Inference"

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT = 16
TGI_FAST_RANK = 128
TGI_LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"})

_PEFT = "PEFT 0.21.2"
_TIED = f"{_PEFT}, tuners_utils.py (_check_merge_allowed); github.com/huggingface/peft/issues/2777"
_HELPER = "vLLM 0.33, vllm/lora/peft_helper.py"
_RANK_CHOICES = "vLLM 0.33, vllm/config/lora.py (MaxLoRARanks)"
_NAMES = "vLLM, vllm/lora/utils.py (parse_fine_tuned_lora_name); github.com/vllm-project/vllm/issues/32599"
_SCALES = "vLLM 0.32, vllm/lora/lora_weights.py and peft_helper.py"
_MODULES = "vLLM, vllm/lora/utils.py (get_supported_lora_modules)"
_CONVERTER = "llama.cpp, convert_lora_to_gguf.py (get_tensors)"
_ALPHA = "llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.h (get_scale)"
_HEAD = "llama.cpp, convert_lora_to_gguf.py (modify_tensors); github.com/ggml-org/llama.cpp/issues/9065"
_TGI = "text-generation-inference, server/text_generation_server/adapters/lora.py"
_TGI_NAMES = "text-generation-inference, server/text_generation_server/utils/adapter.py"

_MERGE = "serve the merged model (lorakit merge)"
_CONVERT = "convert the merged model (lorakit merge)"
_OLDER = "0.32 reads alpha_pattern; an older one may give every layer the scale of the one alpha and rank, unsaid"
_ONE_SCALE = "it knows no alpha_pattern: every layer gets the scale of the file's one alpha and rank, unsaid"


@dataclass(frozen=True)
class Finding:
    """One thing a tool will refuse or leave out: which tool, what of the adapter, why, what to do, and who says so."""

    tool: str
    what: str
    why: str
    remedy: str
    source: str


@dataclass(frozen=True)
class _Layer:
    """A plain LoRA of a whole layer as its file will have it, of `parts` slices of rows or one."""

    path: str
    rank: int
    scale: float
    stabilised: bool
    parts: int
    doubled: bool

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def alpha(self) -> float:
        return self.scale * (math.sqrt(self.rank) if self.stabilised else self.rank)

    def __str__(self) -> str:
        sliced = f", its {self.parts} slices of rows together" if self.parts > 1 else ""
        doubled = ", its pair and the start that is subtracted together" if self.doubled else ""
        return f"rank {self.rank} at {self.path}{sliced}{doubled}"


@dataclass(frozen=True)
class _Adapter:
    matches: Sequence[Match]
    layers: tuple[_Layer, ...]
    tied: bool
    heads: Collection[str]
    depths: Mapping[str, int]

    @property
    def odd(self) -> Method | None:
        """Return the method of what is no plain LoRA, or None."""
        return next((match.method for match in self.matches if not _is_plain(match.method)), None)

    def where(self, *kinds: str) -> list[Match]:
        """Return what adapts an output layer, or a layer of one of these kinds."""
        return [match for match in self.matches if match.site.kind in kinds or match.site.path in self.heads]


def lint(
    spec: AdapterSpec,
    matches: Sequence[Match],
    *,
    tied: bool,
    heads: Collection[str] = frozenset(),
    trained: Sequence[str] = (),
    depths: Mapping[str, int] | None = None,
) -> tuple[Finding, ...]:
    """Return what PEFT, vLLM, llama.cpp and Text Generation Inference will refuse or leave out.

    Args:
        spec: the adapter.
        matches: what `resolve` found for it.
        tied: whether the output layer shares its weight with the input embedding.
        heads: the paths of the output layers (`Skeleton.heads`).
        trained: the parameters of the base that the spec's `train` means; unknown where it is empty.
        depths: the number of blocks of each stack (`Skeleton.depths`), for what is adapted in some blocks alone.
    """
    adapter = _Adapter(matches, _as_written(matches), tied, heads, depths or {})
    whole = tuple(_whole(spec, matches, trained))
    found = (*_peft(adapter), *_vllm(adapter), *_llama_cpp(adapter), *_tgi(adapter), *whole)
    return tuple(sorted(found, key=lambda finding: TOOLS.index(finding.tool)))


def _as_written(matches: Sequence[Match]) -> tuple[_Layer, ...]:
    """Return the plain LoRA of each layer in PEFT's files, where every update is one; else nothing."""
    if not all(_is_plain(match.method) for match in matches):
        return ()
    by_path: dict[str, list[Match]] = {}
    for match in matches:
        by_path.setdefault(match.site.path, []).append(match)
    started = any(_keeps_start(match.method) for match in matches)  # all are then written anew, at scale 1
    layers = []
    for path, parts in by_path.items():
        first = parts[0].method
        scale = 1.0 if started else float(get(first, "scale"))
        stabilised = not started and bool(get(first, "stabilised"))
        doubled = any(_keeps_start(part.method) for part in parts)
        layers.append(_Layer(path, sum(map(_rank, parts)), scale, stabilised, len(parts), doubled))
    return tuple(layers)


def _rank(match: Match) -> int:
    """Return the rank an update is written with: twice its own, as far as the weight goes, where it keeps a start."""
    rank = int(get(match.method, "rank"))
    return min(2 * rank, match.site.max_rank) if _keeps_start(match.method) else rank


def _keeps_start(method: Method) -> bool:
    init = init_of(method)
    return init is not None and init.keeps_start


def _is_plain(method: Method) -> bool:
    """Return whether PEFT's files hold the update as a pair of LoRA and nothing else."""
    form = method.peft
    return form is not None and form.type == "LORA" and form.flag is None


def _usual(layers: Sequence[_Layer]) -> _Layer:
    """Return a layer of the rank and alpha that the configuration states for all: the commonest."""
    (rank, alpha), _ = Counter((layer.rank, layer.alpha) for layer in layers).most_common(1)[0]
    return next(layer for layer in layers if (layer.rank, layer.alpha) == (rank, alpha))


def _instead(method: Method) -> str:
    """Return what other tools can read of a method they have no form for."""
    if isinstance(method, LowRank):
        return f"write the plain LoRA that it equals (lorakit convert RUN --as-lora --output DIR), or {_MERGE}"
    if isinstance(method, Static):
        nearest = "lorakit convert RUN --as-lora --rank R --output DIR"
        return f"write the nearest plain LoRA ({nearest}), or {_MERGE}"
    readers = "lorakit" if method.peft is None else "lorakit or PEFT"
    return f"it is no change of a weight, so nothing can be merged or converted: use it with {readers}"


# PEFT


def _peft(adapter: _Adapter) -> Iterator[Finding]:
    if not adapter.matches:
        why = "its format holds an adapter, and parts of the base alone are none"
        yield Finding(PEFT, "no layer is adapted", why, "keep lorakit's own format, or merge (lorakit merge)", _PEFT)
        return
    groups: dict[str, list[Match]] = {}
    for match in adapter.matches:
        if (reason := _no_form(match)) is not None:
            groups.setdefault(reason, []).append(match)
    for reason, where in groups.items():
        yield Finding(PEFT, _named(where), reason, _instead(where[0].method), _PEFT)
    yield from _one_value_for_all(adapter.matches)
    ends = adapter.where("embedding")
    if adapter.tied and ends:
        why = (
            "the base ties its input embedding to its output layer, and an update of one is none of the other: PEFT "
            "warns of it, and what it merges may not compute what was trained"
        )
        remedy = "leave out the embedding and the output layer, or merge with lorakit merge --untie"
        yield Finding(PEFT, _named(ends), why, remedy, _TIED)


def _no_form(match: Match) -> str | None:
    """Return why PEFT's files cannot hold an update, or None."""
    method, site, form = match.method, match.site, match.method.peft
    if form is None:
        return f"PEFT has no {method.name}"
    if site.rows is not None and not (_is_plain(method) and site.groups == 1):
        return f"PEFT has no {method.name} for rows of a layer"
    return form.why_not(Update(site, method, {} if _is_plain(method) else _declared(method, site)))


def _declared(method: Method, site: Site) -> dict[str, torch.Tensor]:
    return {name: torch.empty(decl.shape, device="meta") for name, decl in method.tensors(site).items()}


def _one_value_for_all(matches: Sequence[Match]) -> Iterator[Finding]:
    """Find the settings that PEFT has once for all layers, and the adapter several times."""
    form = matches[0].method.peft
    if form is None:
        return
    if form.config is not None:
        try:
            form.config([Update(m.site, m.method, _declared(m.method, m.site)) for m in matches])
        except SpecError as refused:
            yield Finding(PEFT, _named(matches), str(refused), _instead(matches[0].method), _PEFT)
    for key, name in form.fields.items():
        if key in form.patterns or key == "use_rslora":  # whose scale is written with the alpha
            continue
        values = dict.fromkeys(get(match.method, name) for match in matches)
        if len(values) > 1:
            what = f"overrides of {name}: {', '.join(map(str, values))}"
            why = f"PEFT's {form.type} has one {key} for all layers"
            yield Finding(PEFT, what, why, f"give all layers one {name}, or {_instead(matches[0].method)}", _PEFT)


# What is trained whole, by every tool


def _whole(spec: AdapterSpec, matches: Sequence[Match], trained: Sequence[str]) -> Iterator[Finding]:
    if not spec.train or not matches:
        return
    what = f"trained whole: {', '.join(spec.train)}"
    why = "it takes pairs of LoRA alone: modules_to_save is refused, and any other tensor is an unsupported LoRA weight"
    yield Finding(VLLM, what, why, f"train no module whole, or {_MERGE}", f"{_HELPER}; {_NAMES}")
    adapted = {match.site.path for match in matches}
    lost = [name for name in trained if not _kept_by_converter(name, adapted)]
    if lost or not trained:
        why = (
            "its converter stops at a tensor that is no pair of LoRA (it keeps those named .norm or _layernorm), and "
            "leaves out a weight that is trained whole under a pair"
        )
        remedy = f"train no module whole, or {_CONVERT}"
        yield Finding(LLAMA_CPP, what, why, remedy, f"{_CONVERTER}; github.com/ggml-org/llama.cpp/issues/11554")
    why = "it looks up lora_A and lora_B alone and says nothing of what else is in the file"
    yield Finding(TGI, what, why, f"train no module whole, or {_MERGE}", _TGI)


def _kept_by_converter(name: str, adapted: Collection[str]) -> bool:
    return ("_layernorm" in name or ".norm" in name) and name.rpartition(".")[0] not in adapted


# Servers


def _vllm(adapter: _Adapter) -> Iterator[Finding]:
    if adapter.odd is not None:
        told = _only_pairs(adapter.odd, "vLLM does not support it yet", "it reads pairs of LoRA alone")
        yield Finding(VLLM, *told, _HELPER)
    if not adapter.layers:
        return
    highest = max(adapter.layers, key=lambda layer: layer.rank)
    fits = next((choice for choice in VLLM_RANKS if choice >= highest.rank), None)
    if fits is None:
        why = f"max_lora_rank ends at {VLLM_RANKS[-1]}"
        truncated = "lorakit convert RUN --as-lora --rank R --output DIR"
        remedy = f"lower the rank, or truncate the adapter ({truncated}), or {_MERGE}"
        yield Finding(VLLM, str(highest), why, remedy, _RANK_CHOICES)
    elif fits > VLLM_DEFAULT:
        why = f"max_lora_rank is {VLLM_DEFAULT} unless it is told otherwise, and takes {_listed(VLLM_RANKS)}"
        yield Finding(VLLM, str(highest), why, f"start the server with --max-lora-rank {fits}", _RANK_CHOICES)
    if differ := _of_another_scale(adapter.layers):
        yield Finding(VLLM, differ, _OLDER, f"run 0.32 or newer, keep one scale over all layers, or {_MERGE}", _SCALES)
    if ends := adapter.where(*WEIGHT_KINDS - {*LINEAR_KINDS}):
        why = (
            "beside linear layers it takes those embeddings and output layers alone that the model's class lists "
            "(embedding_modules), and refuses the adapter elsewhere"
        )
        yield Finding(VLLM, _named(ends), why, f"leave them out, or {_MERGE}", _MODULES)


def _llama_cpp(adapter: _Adapter) -> Iterator[Finding]:
    if adapter.odd is not None:
        dora = "its converter stops at the magnitudes, which are no tensors of a pair"
        yield Finding(LLAMA_CPP, *_only_pairs(adapter.odd, dora, "it converts pairs of LoRA alone"), _CONVERTER)
    if adapter.tied and (ends := adapter.where()):
        why = "its converter stops: the output layer is in the adapter, and the base has none of its own"
        yield Finding(LLAMA_CPP, _named(ends), why, "leave the output layer out, or merge and convert the model", _HEAD)
    if not adapter.layers:
        return
    usual = _usual(adapter.layers)
    wrong = [layer for layer in adapter.layers if not _near(usual.alpha / layer.rank, layer.scale)]
    if not wrong:
        return
    one = len({(layer.rank, layer.alpha) for layer in adapter.layers}) == 1
    scales = (
        f"{wrong[0].path}{_more(wrong)} would have scale {usual.alpha / wrong[0].rank:.3g}, not {wrong[0].scale:.3g}"
    )
    what = "a rank-stabilised scale" if one else "ranks or alphas that differ between layers"
    remedy = (
        f"write it as a plain LoRA (lorakit convert RUN --as-lora --output DIR), or {_CONVERT}"
        if one
        else f"give all layers one rank and one alpha, or {_CONVERT}"
    )
    why = f"it divides the one lora_alpha by the rank of each layer, whatever the file says besides: {scales}"
    yield Finding(LLAMA_CPP, what, why, remedy, _ALPHA)


def _tgi(adapter: _Adapter) -> Iterator[Finding]:
    if adapter.odd is not None:
        dora = "it looks up lora_A and lora_B alone and leaves the magnitudes out, unsaid"
        yield Finding(TGI, *_only_pairs(adapter.odd, dora, "it looks up lora_A and lora_B alone"), _TGI)
    if other := sorted({layer.name for layer in adapter.layers} - TGI_LAYERS):
        why = f"it looks up {_listed(sorted(TGI_LAYERS))} and leaves others out, unsaid"
        yield Finding(TGI, f"layers named {', '.join(other)}", why, _MERGE, _TGI_NAMES)
    known = [layer for layer in adapter.layers if layer.name in TGI_LAYERS]
    ranks: dict[str, set[int]] = {}
    blocks: dict[tuple[str, str], set[int]] = {}
    for layer in known:
        ranks.setdefault(layer.name, set()).add(8 if layer.rank <= 8 else math.ceil(layer.rank / 16) * 16)
        if (place := layer_of(layer.path)) is not None:
            blocks.setdefault((place[0], layer.name), set()).add(place[1])
    if mixed := [name for name, several in ranks.items() if len(several) > 1]:
        why = (
            "it stacks the layers of one name over the blocks, which takes one rank (padded to 8, 16, 32, 48 and so on)"
        )
        yield Finding(TGI, f"several ranks of {', '.join(mixed)}", why, f"give them one rank, or {_MERGE}", _TGI)
    if some := [name for (stack, name), where in blocks.items() if len(where) < adapter.depths.get(stack, 0)]:
        why = "a layer that is not adapted in every block is left out in all, unsaid"
        yield Finding(TGI, f"{', '.join(some)} in some blocks", why, f"adapt all blocks, or {_MERGE}", _TGI)
    if differ := _of_another_scale(known):
        yield Finding(TGI, differ, _ONE_SCALE, f"keep one scale over all layers, or {_MERGE}", _TGI)
    if known and (highest := max(known, key=lambda layer: layer.rank)).rank > TGI_FAST_RANK:
        why = f"its kernels end at rank {TGI_FAST_RANK}, so the adapters of a batch are no longer computed together"
        yield Finding(TGI, str(highest), why, f"lower the rank, or {_MERGE}", _TGI)


def _only_pairs(method: Method, dora: str, other: str) -> tuple[str, str, str]:
    """Return `(what, why, remedy)` for a method that a server does not read."""
    form = method.peft
    if form is not None and form.flag == "use_dora":
        return "DoRA", dora, _instead(method)
    called = method.name if form is None else f"{method.name} (PEFT's {form.flag or form.type})"
    return called, other, _instead(method)


def _of_another_scale(layers: Sequence[_Layer]) -> str | None:
    """Return in words which layers have another scale than the configuration states, or None."""
    if not layers:
        return None
    usual = _usual(layers)
    other = [layer for layer in layers if not _near(layer.scale, usual.scale)]
    if not other:
        return None
    return f"scale {other[0].scale:.3g} at {other[0].path}{_more(other)} beside {usual.scale:.3g}"


def _named(matches: Sequence[Match]) -> str:
    first = matches[0]
    where = "" if isinstance(first.method, Context) else f" at {first.site.key}{_more(matches)}"
    return f"{first.method.name}{where}"


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


def _more(things: Sequence[object]) -> str:
    return f" and {len(things) - 1} more" if len(things) > 1 else ""


def _listed(values: Sequence[object]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"
