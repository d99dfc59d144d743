"""The method tower: what an update is, from "adds a term to y" up to "is a low-rank product".

    Method    branch(p, call) -> the term added to y       input-dependent updates stop here
    Context   branch is what stands at virtual positions   acts on what a model reads, on no layer
    Static    + delta(p, W) -> dW in canonical layout      can be merged and analysed
    Dense     writes delta; branch follows
    LowRank   writes factors(p) -> (down, up); delta and branch follow; can be banked for serving

One law ties the rungs and is the main test: `op(x; W) + branch(x) == op(x; W + delta(W))`. Rungs are abstract, methods
are final frozen dataclasses whose fields are their configuration, and the mathematics that a rung gives, `delta` and
`branch`, is never overridden; to `check` a method may add.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.core.host import Host
from lorakit.core.site import Decl, Role, Site
from lorakit.errors import SpecError

if TYPE_CHECKING:
    from lorakit.core.peft_form import PeftForm

Tensors = Mapping[str, Tensor]

WEIGHT_KINDS = frozenset({"linear", "transposed-linear", "embedding", "conv1d", "conv2d", "conv3d"})


@dataclass
class Call:
    """One forward of one adapted layer, as a method sees it: input `x` after dropout, base output `y` with bias."""

    host: Host
    module: nn.Module
    x: Tensor
    y: Tensor
    whole: Tensor
    """The input before dropout: what a router reads."""
    rows: tuple[int, int] | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)
    """What a method wants to know of this forward later: a mixture's routing, for its penalty and statistics."""
    kept: Tensors = field(default_factory=dict)
    """The update's tensors in the dtype they are kept in; `p` has them in the output's, where a gain near 1 loses
    most of what it learned: bf16's steps are 0.004 below 1 and 0.008 above."""

    @property
    def y0(self) -> Tensor:
        """Return the base output without its bias, sliced to this update's rows, in the output's dtype."""
        bias = getattr(self.module, "bias", None)
        y = self.y if bias is None else (self.y - self.host.op.channel(bias, self.y)).to(self.y.dtype)
        return y if self.rows is None else y.narrow(self.host.op.axis, self.rows[0], self.rows[1] - self.rows[0])

    @property
    def weight(self) -> Tensor:
        """Return the base weight in canonical layout, sliced to this update's rows."""
        store = self.host.store
        weight = store.read(self.module)
        weight = weight if store.lossless else weight.to(self.y.dtype)  # as the layer's own product rounds it
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]

    def apply(self, weight: Tensor) -> Tensor:
        """Return `op(x; weight)`."""
        return self.host.op.apply(self.module, self.x, weight)

    def mix(self, hidden: Tensor, up: Tensor) -> Tensor:
        """Return `up` applied to the features of `hidden`."""
        return self.host.op.mix(self.module, hidden, up)

    def scale(self, values: Tensor, y: Tensor) -> Tensor:
        """Return `y` with output feature i multiplied by `values[i]`."""
        return self.host.op.channel(values, y) * y


@dataclass(frozen=True)
class Start:
    """What the first values of an update may depend on: its site, the frozen weight, a generator of the site's own.

    `evidence` is what was measured at the site beforehand, for initialisations that ask for it (inits/).
    """

    site: Site
    read: Callable[[], Tensor]
    """Gives the frozen weight; a quantised one is dense only while somebody asks for it."""
    rng: torch.Generator
    evidence: Tensor | None = None

    @cached_property
    def weight(self) -> Tensor:
        """Return the frozen weight in canonical layout, sliced to the site's rows."""
        return self.read()


@dataclass(frozen=True)
class Method(ABC):
    """An update of one weight."""

    name: ClassVar[str]
    paper: ClassVar[str]
    formula: ClassVar[str]
    """The update in one line, in the paper's letters."""
    count: ClassVar[str]
    """Trained parameters at an `(m, n)` weight, as an expression of m, n and the method's fields; tested against it.

    Tensors that sites share are not in it. At a model (`Context`) m is its width and n its number of blocks."""
    kinds: ClassVar[frozenset[str]] = WEIGHT_KINDS
    peft: ClassVar[PeftForm | None] = None
    """How it looks in PEFT's files, if it does."""
    targets: ClassVar[Sequence[str]] = "all-linear"
    """Where its authors put it: what a recipe takes that names no targets."""
    train: ClassVar[Sequence[str]] = ()
    """What of the base its authors train beside it: what a recipe takes that does not say."""
    reads: ClassVar[Literal["input", "output"]] = "input"
    """What its branch computes from, which is what dropout thins."""

    @property
    def drops(self) -> bool:
        """Return whether dropout reaches its branch."""
        return True

    @abstractmethod
    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare the tensors of this update at `site`: planned, allocated, loaded and documented from here."""

    @abstractmethod
    def init(self, p: Tensors, start: Start) -> None:
        """Fill `p` in place so that the first forward equals the base's.

        A shared tensor is in `p` at the first site that holds it alone: the others find it filled.
        """

    @abstractmethod
    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return the term added to the layer's output."""

    def check(self, site: Site) -> None:
        """Raise `SpecError` where this method does not fit `site`."""
        if site.kind not in self.kinds:
            raise SpecError(f"{self.name} does not fit a layer of kind {site.kind}; it fits {sorted(self.kinds)}")


class Static(Method):
    """An update that is a change of the weight, the same for every input."""

    @abstractmethod
    def delta(self, p: Tensors, weight: Tensor) -> Tensor:
        """Return dW, shaped like `weight (out, in, *kernel)`."""


class Dense(Static):
    """A static update known by its dW alone."""

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return `op(x; dW)`."""
        return call.apply(self.delta(p, call.weight))


class LowRank(Static):
    """A static update that is a product `up @ down` of rank r."""

    rank: int

    @abstractmethod
    def factors(self, p: Tensors) -> tuple[Float[Tensor, "r in *kernel"], Float[Tensor, "out rg"]]:
        """Return `(down (r, in, *kernel), up (out, r / groups))` with every scale folded in."""

    def delta(self, p: Tensors, weight: Tensor) -> Tensor:
        """Return `up @ down` in the weight's shape; with g groups, the product of each group's own block."""
        down, up = per_group(*self.factors(p))
        return (up @ down).reshape(weight.shape)

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return `up @ op(x; down)`, never forming dW; what factors subtract is subtracted before it is rounded."""
        down, up = (t.to(call.y.dtype) for t in self.factors(call.kept))
        return call.mix(call.apply(down), up)

    def check(self, site: Site) -> None:
        """Raise `SpecError` for a rank the weight cannot have, or one its groups do not divide."""
        super().check(site)
        if self.rank > site.max_rank:
            raise SpecError(
                f"rank {self.rank} exceeds min(out, in) = {site.max_rank}; lower the rank or exclude this path"
            )
        if self.rank % site.groups:
            raise SpecError(
                f"rank {self.rank} is not a multiple of the convolution's {site.groups} groups; "
                f"use rank {math.ceil(self.rank / site.groups) * site.groups} or exclude this path"
            )


@runtime_checkable
class Paired(Protocol):
    """A low-rank method whose factors are a pair and one number, which need not be multiplied first."""

    def pair(self, p: Tensors) -> tuple[Tensor, Tensor, float]:
        """Return `(down, up, scale)`; `factors` are `(down, scale * up)`."""


@runtime_checkable
class Stretched(Protocol):
    """An update that stretches each output of the changed weight: `dW = g (W + dW_inner) - W`."""

    @property
    def inner(self) -> Static:
        """Return the update inside."""

    def gain(self, p: Tensors, weight: Tensor) -> Tensor:
        """Return g `(out,)`."""


class Context(Method):
    """An update of what a model reads: trained vectors at virtual positions beside the input.

    What `branch` returns is not added to anything, it stands at those positions, for every row of the batch:

        input    (t, d)                in the row of input embeddings
        blocks   (L, t, d)             in what each of the L blocks reads
        cache    (t, L * 2 * keys)     as the key and the value that each block finds in its cache
    """

    where: ClassVar[Literal["input", "blocks", "cache"]]
    kinds: ClassVar[frozenset[str]] = frozenset({"model"})

    @abstractmethod
    def lengths(self) -> tuple[int, int]:
        """Return how many virtual positions stand before a row, and how many after its prompt."""

    def check(self, site: Site) -> None:
        """Raise `SpecError` where this method does not fit `site`."""
        super().check(site)
        if self.where == "cache" and "no cache" in site.habits:
            raise SpecError(
                f"{self.name} acts through the cache, and this model takes none; use prompt-tuning or prefix-layer"
            )


@runtime_checkable
class Tokenized(Protocol):
    """A method that starts from a text: it wants the text's token ids, which only a tokenizer knows."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Return the token ids it starts from; none before `tokenized`, or without a text."""

    def tokenized(self, encode: Callable[[str], Sequence[int]]) -> Method:
        """Return this method with the token ids of its text written into its fields."""


@runtime_checkable
class Settled(Protocol):
    """A method whose tensors depend on all of its sites: a bank as wide as the widest."""

    def settled(self, sites: Sequence[Site]) -> Method:
        """Return this method with what it needs to know of `sites` written into its fields."""


@runtime_checkable
class Penalised(Protocol):
    """A method that adds a term to the loss; the mean over its sites counts."""

    def penalty(self, p: Tensors, notes: Tensors) -> Tensor:
        """Return one site's term, weighted; `notes` are what the last forward noted there."""


@runtime_checkable
class Scheduled(Protocol):
    """A method whose tensors change between optimizer steps, by a budget over all of its sites."""

    def schedule(self, adapters: Mapping[str, tuple[Site, Tensors]], steps: int) -> Schedule:
        """Return the schedule of a run of `steps`; the tensors are the live ones, by the key of their site."""


class Schedule(ABC):
    """What acts on the tensors after each optimizer step, before the gradients are cleared; resumable."""

    @property
    @abstractmethod
    def settled(self) -> int:
        """Return the step after which no part starts or stops acting any more: only then the budget holds."""

    @abstractmethod
    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Act after optimizer step `step`, counted from 1."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return everything a resumed run needs to go on bit for bit."""

    @abstractmethod
    def load_state_dict(self, state: Tensors) -> None:
        """Take what `state_dict` returned."""


@runtime_checkable
class Trimmed(Protocol):
    """A method that may hold parts which no longer act: `trimmed` is the same update without them."""

    def trimmed(self, site: Site, p: Tensors) -> tuple[Method, Tensors] | None:
        """Return the smaller method and its tensors, which give the same update; None where nothing acts at all."""


@runtime_checkable
class Preconditioned(Protocol):
    """A method that corrects its gradients before each optimizer step."""

    def precondition(self, p: Tensors) -> None:
        """Replace the gradients of one site's live tensors, in place; a tensor may have none."""


def per_group(
    down: Float[Tensor, "gr *in"], up: Float[Tensor, "out r"]
) -> tuple[Float[Tensor, "g r n"], Float[Tensor, "g m r"]]:
    """Return a pair as the g pairs it stands for, one for each group of a convolution; elsewhere g is 1."""
    groups, rank = down.shape[0] // up.shape[1], up.shape[1]
    return down.reshape(groups, rank, -1), up.reshape(groups, -1, rank)


def down_up(rank: int, site: Site) -> dict[str, Decl]:
    """Declare the pair `down (r, in, *kernel)`, `up (out, r / groups)` every low-rank method starts from."""
    return {
        "down": Decl((rank, site.in_, *site.kernel), Role.DOWN),
        "up": Decl((site.out, rank // site.groups), Role.UP),
    }
