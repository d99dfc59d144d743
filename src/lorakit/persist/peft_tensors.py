"""The tensors of PEFT's format: which key and shape an update has there, and which update a key and shape mean.

    layer                 down (r, in, *k)  <->  lora_A             up (out, r / g)  <->  lora_B
    Linear, GPT-2 Conv1D  base_model.model.<path>.lora_A.weight (r, in)         .lora_B.weight (out, r)
    Embedding             base_model.model.<path>.lora_embedding_A (r, V)       .lora_embedding_B (d, r)
    Conv1d/2d/3d          (r, in, *k)                                           (out, r / g, 1, ...)
    trained whole         base_model.model.<path>.weight                        (.base_layer.weight beside a LoRA)

Under g groups PEFT's A sees every input channel, ours only its own group's: ours is PEFT's with zeros elsewhere. A
convolution's A has neither dilation nor a padding mode in PEFT, so only PEFT's own limits keep it from running those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.core.method import Method
from lorakit.core.site import Site
from lorakit.core.state import Update

PREFIX = "base_model.model."
_LORA = re.compile(
    r"(?P<path>.+?)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?!weight$)(?P<adapter>[^.]+))?(?P<weight>\.weight)?"
)
_KINDS = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}


def update_to_peft(update: Update) -> dict[str, Tensor]:
    """Return the two tensors of a whole-layer LoRA update under PEFT's keys."""
    site, down, up = update.site, update.tensors["down"], update.tensors["up"]
    place = f"{PREFIX}{site.path}"
    if site.kind == "embedding":
        return {f"{place}.lora_embedding_A": down, f"{place}.lora_embedding_B": up}
    if site.groups > 1:
        down = _on_all_channels(down, site.groups)
    return {
        f"{place}.lora_A.weight": down,
        f"{place}.lora_B.weight": up.reshape(*up.shape, *[1] * len(site.kernel)),
    }


def trained_to_peft(trained: Mapping[str, Tensor], adapted: set[str]) -> dict[str, Tensor]:
    """Return the base's own tensors under PEFT's keys; a layer that is adapted as well keeps them in `base_layer`."""
    keys: dict[str, Tensor] = {}
    for name, tensor in trained.items():
        path, _, leaf = name.rpartition(".")
        keys[f"{PREFIX}{path}.base_layer.{leaf}" if path in adapted else f"{PREFIX}{name}"] = tensor
    return keys


class Reading:
    """What the keys of a PEFT file say: pairs of factors by path, tensors trained whole by name, and what is wrong."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.pairs: dict[str, dict[str, Tensor]] = {}
        self.embeddings: set[str] = set()
        self.trained: dict[str, Tensor] = {}
        self.problems: list[str] = []
        names, rest = {"default"}, {}
        for key, tensor in tensors.items():
            found = _LORA.fullmatch(key.removeprefix(PREFIX))
            if not key.startswith(PREFIX):
                self.problems.append(f"{key}: extra, not under {PREFIX}")
            elif found is None or (found["weight"] is None and found["embedding"] is None):
                rest[key] = tensor
            elif ".base_layer" in f".{found['path']}":
                self.problems.append(f"{key}: extra, nested in base_layer (MultiheadAttention or target_parameters)")
            else:
                names.add(found["adapter"] or "default")
                self.pairs.setdefault(found["path"], {})[found["side"]] = tensor
                if found["embedding"]:
                    self.embeddings.add(found["path"])
        for key, tensor in rest.items():
            self._whole(key, tensor, names)

    def _whole(self, key: str, tensor: Tensor, adapters: set[str]) -> None:
        """Take a tensor that is no factor: a module saved whole, or nothing that is known here."""
        name = key.removeprefix(PREFIX)
        marked = "|".join(map(re.escape, sorted(adapters)))
        name = re.sub(rf"\.modules_to_save(?:\.(?:{marked}))?\.", ".", name, count=1)
        if found := re.fullmatch(r"(.+)\.base_layer\.([^.]+)", name):
            name = f"{found[1]}.{found[2]}" if found[1] in self.pairs else name
        if re.search(r"(^|\.)(base_layer|original_module|token_adapter|lora_\w+)(\.|$)", name):
            self.problems.append(f"{key}: extra, not a tensor of a LoRA adapter, shape {tuple(tensor.shape)}")
        else:
            self.trained[name] = tensor

    def update(self, path: str, method: Method) -> Update | None:
        """Return the update at `path`, or None with the reason added to `problems`."""
        pair = self.pairs[path]
        if missing := [side for side in "AB" if side not in pair]:
            known = next(iter(pair.values()))
            self.problems.append(f"{path}.lora_{missing[0]}: missing, its partner has shape {tuple(known.shape)}")
            return None
        a, b = pair["A"], pair["B"]
        rank: Any = getattr(method, "rank")  # noqa: B009 - methods are reached through the registry, so by field name
        wrong = _wrong_shapes(a, b, path in self.embeddings)
        if wrong is None and a.shape[0] != rank:
            wrong = f"lora_A has rank {a.shape[0]}, the configuration says {rank} (r, or rank_pattern in its order)"
        if wrong is None and (groups := a.shape[0] // b.shape[1]) > 1 and _beyond_groups(a, groups):
            wrong = (
                f"lora_A mixes the channels of {groups} groups, which no change of the grouped weight equals; "
                "PEFT cannot merge it either"
            )
        if wrong is not None:
            self.problems.append(f"{path}: {wrong}")
            return None
        groups = a.shape[0] // b.shape[1]
        down = _on_own_channels(a, groups)
        kind = "embedding" if path in self.embeddings else _KINDS[a.dim()]
        site = Site(path, b.shape[0], down.shape[1], tuple(a.shape[2:]), kind=kind, groups=groups)
        return Update(site, method, {"down": down, "up": b.reshape(b.shape[0], b.shape[1])})


def _wrong_shapes(a: Tensor, b: Tensor, embedding: bool) -> str | None:
    shapes = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
    if a.dim() not in _KINDS or a.dim() != b.dim() or any(n != 1 for n in b.shape[2:]) or (embedding and a.dim() != 2):
        return f"{shapes} are no pair; expected (r, in, *kernel) and (out, r, 1, ...)"
    if 0 in (*a.shape, *b.shape):
        return f"{shapes} have an empty dimension; the file was saved from shards that were not gathered"
    if a.shape[0] % b.shape[1] or (a.dim() == 2 and a.shape[0] != b.shape[1]):
        return f"{shapes} do not multiply: the rank differs"
    if a.shape[1] % (a.shape[0] // b.shape[1]):
        return f"{shapes} mean {a.shape[0] // b.shape[1]} groups, which do not divide {a.shape[1]} input channels"
    return None


def _on_all_channels(down: Tensor, groups: int) -> Tensor:
    """Return `(r, in, *k)` from `(r, in / g, *k)`: each group's rows at its own channels, zeros elsewhere."""
    rows, width = down.shape[0] // groups, down.shape[1]
    full = down.new_zeros(down.shape[0], width * groups, *down.shape[2:])
    for i in range(groups):
        full[i * rows : (i + 1) * rows, i * width : (i + 1) * width] = down[i * rows : (i + 1) * rows]
    return full


def _on_own_channels(full: Tensor, groups: int) -> Tensor:
    """Return `(r, in / g, *k)` from `(r, in, *k)`, the inverse of `_on_all_channels`."""
    if groups == 1:
        return full
    rows, width = full.shape[0] // groups, full.shape[1] // groups
    return torch.cat([full[i * rows : (i + 1) * rows, i * width : (i + 1) * width] for i in range(groups)])


def _beyond_groups(full: Tensor, groups: int) -> bool:
    return bool((_on_all_channels(_on_own_channels(full, groups), groups) != full).any())
