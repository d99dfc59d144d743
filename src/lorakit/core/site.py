"""Where updates live: a site, the tensors a method declares for it, and the skeleton of a whole model.

Everything here is a plain value. A skeleton is read off a model (or a config on the meta device) once; targets,
plans and file checks work on it without touching a weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property


class Role(Enum):
    """What a declared tensor is for; parameter groups, freezing and reports go by it, never by name."""

    DOWN = "down"
    UP = "up"
    GAIN = "gain"
    GATE = "gate"
    BANK = "bank"
    TOKEN = "token"


@dataclass(frozen=True)
class Decl:
    """One tensor a method asks for at a site; sites that say the same word in `shared` hold one tensor together."""

    shape: tuple[int, ...]
    role: Role
    trainable: bool = True
    shared: str | None = None

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Site:
    """One weight an update can be added to, in canonical layout `(out, in_, *kernel)`.

    `in_` counts the inputs one output sees (a grouped convolution: in_channels / groups). `rows` restricts the
    update to a slice of the outputs of a fused layer; `out` is then the height of the slice and `height` the layer's.

    `bias` says whether the layer adds one, None where nobody looked. `habits` are what not every method or tool can go
    along with: a convolution's "dilation", and a "padding_mode" other than zeros; a model that takes "no cache".

    A site of kind "model" is the stack of blocks a model reads with: `out` is its width, `in_` the number of blocks and
    `kernel` the heads of a block's keys and the width of each.
    """

    path: str
    out: int
    in_: int
    kernel: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None
    kind: str = "linear"
    groups: int = 1
    fused_out: int | None = None
    bias: bool | None = field(default=None, compare=False)
    habits: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def height(self) -> int:
        """Return the number of outputs of the whole layer."""
        return self.out if self.fused_out is None else self.fused_out

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the canonical shape of the (sliced) weight."""
        return (self.out, self.in_, *self.kernel)

    @property
    def fan_in(self) -> int:
        """Return n of the matrix view (m, n) = (out, in * prod(kernel))."""
        return self.in_ * math.prod(self.kernel)

    @property
    def max_rank(self) -> int:
        """Return the highest rank an update of this weight can have."""
        return min(self.out, self.fan_in * self.groups)

    @property
    def key(self) -> str:
        """Return the path, with the slice where there is one: `h.0.attn.c_attn[0:768]`."""
        return self.path if self.rows is None else f"{self.path}[{self.rows[0]}:{self.rows[1]}]"

    def at(self, path: str) -> Site:
        """Return the same site under another path."""
        made = object.__new__(type(self))  # a fraction of the time that `replace` takes, and a load makes hundreds
        made.__dict__.update(self.__dict__, path=path)
        return made

    def slice(self, start: int, stop: int) -> Site:
        """Return the site of output rows `start:stop`."""
        return replace(self, out=stop - start, rows=(start, stop), fused_out=self.height)


_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Skeleton:
    """The shape of a model: every site, every other module, and how deep its layer stacks are.

    `others` maps the path of each module that has no host to `(class name, why it cannot be adapted)`; `heads` are the
    output layers `all-linear` leaves out; `parts` names the output slices of fused layers; `blocks` are modules such
    as an MLP that hold layers and give back the width they take, for methods that work beside a whole module. `reader`
    is the part of a transformer that reads embeddings, for methods that change what is read.
    """

    sites: tuple[Site, ...]
    others: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    heads: frozenset[str] = frozenset()
    parts: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    blocks: Mapping[str, Site] = field(default_factory=dict)
    reader: Site | None = None
    total_parameters: int = 0

    @cached_property
    def by_path(self) -> dict[str, Site]:
        """Return the sites by path."""
        return {site.path: site for site in self.sites}

    @cached_property
    def depths(self) -> dict[str, int]:
        """Return the number of layers of each stack, by the stack's path (`model.layers` -> 32)."""
        depths: dict[str, int] = {}
        for path in (*self.by_path, *self.others):
            if (place := layer_of(path)) is not None:
                stack, index = place
                depths[stack] = max(depths.get(stack, 0), index + 1)
        return depths


def layer_of(path: str) -> tuple[str, int] | None:
    """Return `(stack, layer index)` of a path, or None outside any layer stack.

    `model.layers.3.mlp.experts.7.w1` lies in layer 3 of `model.layers`: the first number counts.
    """
    found = _INDEX.search(path)
    return None if found is None else (path[: found.start()], int(found.group(1)))
