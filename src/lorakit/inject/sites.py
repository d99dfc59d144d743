"""Read the skeleton of a model: what can be adapted, what cannot and why, which layers are heads, how rows are fused.

A configuration is enough: the model is then built on the meta device, where a 70B shape costs no memory.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import nn

from lorakit.core.adapters import Adapters
from lorakit.core.fronts import base_class
from lorakit.core.registry import host_of
from lorakit.core.site import Site, Skeleton
from lorakit.inject.context import reader
from lorakit.inject.skeleton import head_width, on_meta
from lorakit.inject.statements import weights_read

INTERLEAVED = frozenset(
    {"CodeGenAttention", "DisentangledSelfAttention", "GPTBigCodeAttention", "MiniMaxLightningAttention"}
)
"""Attention whose fused layer has the query, key and value of each head, or group of heads, side by side."""


def sites(model_or_config: Any) -> Skeleton:
    """Return the skeleton of a model, or of a Hugging Face configuration through the meta device."""
    model = model_or_config if isinstance(model_or_config, nn.Module) else on_meta(model_or_config)
    found: list[Site] = []
    others: dict[str, tuple[str, str]] = {}
    readers = _readers(model)
    ours: tuple[str, ...] = ()
    hidden = 0
    for path, module in model.named_modules():
        if isinstance(module, Adapters):
            ours += (f"{path}.",)
        if not path or f"{path}.".startswith(ours):
            continue
        host = host_of(module)
        name = type(module).__name__
        if host is None:
            others[path] = (name, _why_not(module))
        elif path in readers:
            others[path] = (name, f"whose weight {readers[path]} reads directly, past the layer's forward")
        else:
            found.append(replace(host.site(path, module), bias=getattr(module, "bias", None) is not None))
            if not host.store.lossless:  # a packed tensor stands for more weights than it has values
                hidden += found[-1].out * found[-1].in_ - module.get_parameter("weight").numel()
    blocks = {path: block for path in others if (block := _block(path, model.get_submodule(path), found)) is not None}
    return Skeleton(
        sites=tuple(found),
        others=others,
        heads=_heads(model, found),
        parts={site.path: parts for site in found if (parts := _parts(site, model))},
        blocks=blocks,
        reader=reader(model),
        total_parameters=sum(p.numel() for p in _base_parameters(model)) + hidden,
    )


def _block(path: str, module: nn.Module, found: list[Site]) -> Site | None:
    """Return the site of a module that holds layers and gives back the width it takes, or None.

    A plain `nn.Sequential` is none: it would run an adapter inside it as one more of its layers.
    """
    callable_ = type(module).forward not in (nn.Module.forward, nn.Sequential.forward)
    if not (callable_ and any(True for _ in module.children())):
        return None
    inside = [site for site in found if site.path.startswith(f"{path}.")]
    flat = inside and {inside[0].kind, inside[-1].kind} <= {"linear", "transposed-linear"}
    if not (flat and inside[0].in_ == inside[-1].out):
        return None
    return Site(path, inside[-1].out, inside[0].in_, kind="module")


def _base_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".adapters.by_name." not in f".{name}"]


def _readers(model: nn.Module) -> dict[str, str]:
    """Return the layers whose weight a module around them reads past their forward, by path, and its class's name.

    An update there would be called by no one.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        cls: Any = base_class(module)
        if module._modules:
            found |= {f"{path}.{layer}".lstrip("."): cls.__name__ for layer in weights_read(cls)}
    return found


def _why_not(module: nn.Module) -> str:
    known = isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd)
    if known and "weight" not in module._parameters:
        return (
            "whose weight is made of others at each reading (weight_norm or another parametrization); make it plain "
            "first: torch.nn.utils.parametrize.remove_parametrizations"
        )
    if known and getattr(module, "max_norm", None) is not None:
        return "which shrinks the rows that it reads (max_norm)"
    if any(True for _ in module.children()):
        if any(host_of(part) is not None for part in module.modules() if part is not module):
            return "which holds other layers; name those"
        return "which keeps its weights in tensors of its own, not in layers, as fused experts do"
    if known:
        return "whose forward is its own, so its weight may mean anything"
    if not any(True for _ in module.parameters(recurse=False)):
        return "which has no weight"
    return "whose output is not linear in its weight, or whose kind has no row in hosts/rows.py"


def _heads(model: nn.Module, found: list[Site]) -> frozenset[str]:
    """Return the output layers: the model's own word for it, and classification heads by the layer they stand in."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    named = {path for path, module in model.named_modules() if output is not None and module is output}
    outside = {s.path for s in found if re.match(r"(lm_head|classifier|score|cls|qa_outputs|embed_out)(\.|$)", s.path)}
    return frozenset(named | outside)


def _parts(site: Site, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the named output slices of a fused layer, where its name and the configuration tell them for sure."""
    around, _, name = site.path.rpartition(".")
    kind = base_class(model.get_submodule(around)).__name__
    attends = "att" in f"{around} {kind}".lower() and kind not in INTERLEAVED
    if name in ("c_attn", "qkv", "Wqkv") and attends and site.out == 3 * site.in_:
        return _spans(q=site.in_, k=site.in_, v=site.in_)
    if name == "gate_up_proj" and site.out % 2 == 0:
        return _spans(gate=site.out // 2, up=site.out // 2)
    if name in ("qkv_proj", "Wqkv") and attends:
        config = getattr(model, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if heads and (width := head_width(config)):
            groups = getattr(config, "num_key_value_heads", None) or heads
            if (heads + 2 * groups) * width == site.out:
                return _spans(q=heads * width, k=groups * width, v=groups * width)
    return {}


def _spans(**sizes: int) -> dict[str, tuple[int, int]]:
    spans, start = {}, 0
    for name, size in sizes.items():
        spans[name] = (start, start + size)
        start += size
    return spans
