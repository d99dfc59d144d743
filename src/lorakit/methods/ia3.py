"""IA3: scale what a layer reads or what it writes, feature by feature.

`W' = diag(l) W` (side "output": keys and values; arXiv 2205.05638, section 3.3) or `W' = W diag(l)` (side "input": the
feed-forward layer that reads the scaled activations), l = 1 at the start. The paper's T5 has no biases. Where a layer
has one, it stays as it is here, for the update is a change of the weight; PEFT's output side multiplies the bias by l
too, so with equal l its output is larger by `(l - 1) b`. A recipe that names no place scales the outputs of every
linear layer; the paper's place is keys, values and the feed-forward's inner activations, the latter by an override.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from lorakit.core.method import Call, Start, Static, Tensors
from lorakit.core.peft_form import PeftForm
from lorakit.core.site import Decl, Role, Site
from lorakit.core.state import Update
from lorakit.errors import SpecError

SIDES = ("output", "input")


@dataclass(frozen=True)
class IA3(Static):
    """Scale each output feature, or each input feature, by a trained factor; dropout reaches the input side alone."""

    side: Literal["output", "input"] = "output"

    name: ClassVar[str] = "ia3"
    paper: ClassVar[str] = "arXiv 2205.05638"
    formula: ClassVar[str] = "dW = diag(l - 1) W, or W diag(l - 1) at the input side"
    count: ClassVar[str] = "m if side == 'output' else n"
    peft: ClassVar[PeftForm | None] = PeftForm(
        "IA3",
        {},
        {"gain": "ia3_l"},
        read=lambda method, q, embedding: _from_peft(method, q),
        write=lambda update: {"gain": _shaped(update)},
        kinds=frozenset({"linear", "transposed-linear", "conv2d", "conv3d"}),
        grouped=True,
        forgets=frozenset(),
        settings={"init_ia3_weights": True},
        no_bearing=frozenset({"feedforward_modules"}),
        plain=True,
        config=lambda updates: _config(updates),
        of_config=lambda config, path: {"side": "input" if _feeds_forward(config, path) else "output"},
        refusal=lambda site, method: _refusal(site, method),
    )

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise SpecError(
                f"side must be output (keys, values) or input (a feed-forward's last layer), not {self.side!r}"
            )

    @property
    def drops(self) -> bool:
        """Return whether dropout reaches it: the output side never reads the layer's input."""
        return self.side == "input"

    def check(self, site: Site) -> None:
        """Raise `SpecError` for part of a grouped convolution, whose rows read only some of the inputs."""
        super().check(site)
        if self.side == "input" and site.rows is not None and site.groups > 1:
            raise SpecError("the input side of part of a grouped convolution is not one vector; target the whole layer")

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare one factor per feature of the side."""
        features = site.out if self.side == "output" else site.in_ * site.groups
        return {"gain": Decl((features,), Role.GAIN)}

    def init(self, p: Tensors, start: Start) -> None:
        """Start at l = 1."""
        nn.init.ones_(p["gain"])

    def delta(self, p: Tensors, weight: Tensor) -> Tensor:
        """Return `diag(l - 1) W` or `W diag(l - 1)`; output i of a grouped convolution reads its own group's inputs."""
        change, kernel = p["gain"] - 1, [1] * (weight.dim() - 2)
        if self.side == "output":
            return change.view(-1, 1, *kernel) * weight
        per_group = change.view(-1, 1, weight.shape[1], *kernel)
        return (per_group * weight.reshape(len(per_group), -1, *weight.shape[1:])).flatten(0, 1)

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return `(l - 1) y0` or `op((l - 1) x; W)`, never forming dW but where x is token ids."""
        change = (call.kept["gain"] - 1).to(call.y.dtype)
        if self.side == "output":
            return call.scale(change, call.y0)
        if not call.x.is_floating_point():
            return call.apply(self.delta(p, call.weight))
        return call.host.op.apply(call.module, call.scale(change, call.x), call.weight)


def _shaped(update: Update) -> Tensor:
    """Return PEFT's `(out, 1)` or `(1, in)`, at a convolution `(1, features, 1, ...)`."""
    gain, kernel = update.tensors["gain"], update.site.kernel
    down = not kernel and cast(IA3, update.method).side == "output"
    return gain.view(-1, 1) if down else gain.view(1, -1, *[1] * len(kernel))


def _config(updates: Sequence[Update]) -> dict[str, Any]:
    fed = "|".join(re.escape(u.site.path) for u in updates if cast(IA3, u.method).side == "input")
    return {"feedforward_modules": fed or []}


def _feeds_forward(config: Mapping[str, Any], path: str) -> bool:
    """Return whether PEFT scales the inputs of a path: one expression for all of it, or ends, with or without a dot."""
    named = config.get("feedforward_modules") or []
    return bool(re.fullmatch(named, path)) if isinstance(named, str) else path.endswith(tuple(named))


def _refusal(site: Site, method: IA3) -> str | None:
    if method.side == "input" or site.bias is False:
        return None
    has = "its bias" if site.bias else "a bias, which this layer may have,"
    return f"PEFT's output side multiplies {has} too, which no change of the weight equals"


def _from_peft(method: IA3, q: dict[str, Tensor]) -> Update:
    """Return the update of one side; the other side's width is not in the file."""
    gain = q["gain"].flatten()
    if gain.numel() != max(q["gain"].shape, default=0):
        raise SpecError(f"ia3_l of shape {tuple(q['gain'].shape)} is no vector")
    if method.side == "input":
        return Update(Site("", 0, 0), method, {"gain": gain})
    return Update(Site("", len(gain), 0, bias=False), method, {"gain": gain})
