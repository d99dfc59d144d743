"""Where a pair of factors starts: an initialisation is a value, a field of the methods that have such a pair.

Most start at dW = 0. One that starts elsewhere, on the principal part of W for instance, does not move the base: the
pair keeps a copy of its start, and the update is what it has learned since, `dW = s (B A - B0 A0)`. So the base stays
as it was, adapters still add up in any order, and the update is exactly a LoRA of twice the rank.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.core.method import WEIGHT_KINDS, Method, Start
from lorakit.core.site import Site
from lorakit.errors import SpecError

Need = Literal["inputs", "gradients", "weight"]
_MEASURED: dict[str, str] = {
    "inputs": "the layer's inputs",
    "gradients": "the gradient of the weight",
    "weight": "the dense weight of a quantised base",
}
OVERSAMPLING = 8
"""Columns a randomised SVD samples beyond its rank; 5 to 10 in Halko et al., arXiv 0909.4061, section 1.3."""


@dataclass(frozen=True)
class Init(ABC):
    """The first values of `down (r, in, *kernel)` and `up (out, r / groups)`."""

    name: ClassVar[str]
    paper: ClassVar[str]
    starts_at_zero: ClassVar[bool] = True
    """Whether `up @ down` is 0 at the start."""
    keeps_start: ClassVar[bool] = False
    """Whether the method keeps a frozen copy of the start and subtracts it, for a start that is not 0."""
    needs: ClassVar[Need | None] = None
    """What has to be measured at each site first; it arrives as `start.evidence`."""
    kinds: ClassVar[frozenset[str]] = WEIGHT_KINDS

    @abstractmethod
    def fill(self, down: Tensor, up: Tensor, scale: float, start: Start) -> None:
        """Fill both factors in place, for an update `scale * up @ down`."""

    def check(self, rank: int, site: Site) -> None:
        """Raise `SpecError` where a pair of this rank at `site` cannot start so."""
        if site.kind not in self.kinds:
            raise SpecError(f"init {self.name} does not fit a layer of kind {site.kind}; it fits {sorted(self.kinds)}")

    def ranks(self, sites: Sequence[Site], ranks: Sequence[int], evidence: Sequence[Tensor]) -> Sequence[int]:
        """Return the rank of each site that starts so, shared out by what was measured there; by default as given."""
        return ranks

    def check_evidence(self, site: Site, weight: Tensor, evidence: Tensor | None) -> None:
        """Raise `SpecError` where what the start needs was not measured, or was measured elsewhere."""
        if self.needs is None:
            return
        if evidence is None:
            raise SpecError(
                f"init {self.name} starts from {_MEASURED[self.needs]}, which nobody measured; call "
                "gather(model, spec, batches) and pass what it returns to attach(..., evidence=...)"
            )
        if not evidence.isfinite().all():
            raise SpecError(
                f"init {self.name} starts from {_MEASURED[self.needs]}, and those of {site.key} hold NaN or infinity; "
                "look at the batches, or measure in a wider dtype"
            )
        square = (site.fan_in, site.fan_in)
        expected = site.shape if self.needs != "inputs" else square if site.groups == 1 else (site.groups, *square)
        if tuple(evidence.shape) != expected:
            raise SpecError(
                f"init {self.name}: evidence of shape {tuple(evidence.shape)}, expected {expected}; "
                "gather it with this model and this spec"
            )


def init_of(method: Method) -> Init | None:
    """Return the initialisation of a method, or of the method it wraps, or None where it has no such choice."""
    own = _holder(method)
    return None if own is None else _own_init(own)


@runtime_checkable
class Ranked(Protocol):
    """A method that can have another rank and the same scale."""

    @property
    def rank(self) -> int:
        """Return the rank."""

    def at_rank(self, rank: int) -> Method:
        """Return this method at another rank and the same scale."""


def shared_out(placed: Sequence[tuple[Site, Method]], evidence: Mapping[str, Tensor]) -> list[tuple[Site, Method]]:
    """Return the updates at the ranks their initialisation shares out by what was measured; one of rank 0 is left out.

    The sites of one initialisation share. Where nothing was measured, on the meta device, ranks stay as planned.
    """
    ranks: dict[str, int] = {}
    by_init: dict[Init, list[Site]] = {}
    for site, method in placed:
        own = _holder(method)
        if own is not None and site.key in evidence and isinstance(own, Ranked):
            ranks[site.key] = own.rank
            by_init.setdefault(_own_init(own), []).append(site)
    moved: dict[str, int] = {}
    for init, sites in by_init.items():
        found = init.ranks(sites, [ranks[s.key] for s in sites], [evidence[s.key] for s in sites])
        moved |= {s.key: rank for s, rank in zip(sites, found, strict=True) if rank != ranks[s.key]}
    return [(s, _at_rank(m, moved[s.key]) if s.key in moved else m) for s, m in placed if moved.get(s.key, 1)]


def _holder(method: Method) -> Method | None:
    """Return the method that has the initialisation among its fields: this one, or one inside."""
    values = [getattr(method, f.name) for f in dataclasses.fields(method)]
    if any(isinstance(value, Init) for value in values):
        return method
    return next((own for value in values if isinstance(value, Method) and (own := _holder(value))), None)


def _own_init(holder: Method) -> Init:
    values = (getattr(holder, f.name) for f in dataclasses.fields(holder))
    return next(value for value in values if isinstance(value, Init))


def _at_rank(method: Method, rank: int) -> Method:
    if isinstance(method, Ranked):
        return method.at_rank(rank)
    inside = {f.name: v for f in dataclasses.fields(method) if isinstance(v := getattr(method, f.name), Method)}
    return dataclasses.replace(method, **{name: _at_rank(value, rank) for name, value in inside.items()})


def by_group(site: Site, tensor: Tensor) -> Float[Tensor, "groups rows columns"]:
    """Return `(groups, rows / groups, columns)` of a weight or a factor: one matrix for each group of a convolution.

    `up[i] @ down[i]` is then the update of `weight[i]`. A contiguous tensor is viewed, so writing fills it.
    """
    return tensor.reshape(site.groups, tensor.shape[0] // site.groups, -1)


def leading(
    matrix: Float[Tensor, "groups m n"], rank: int, iterations: int | None = None, rng: torch.Generator | None = None
) -> tuple[Float[Tensor, "groups m r"], Float[Tensor, "groups r"], Float[Tensor, "groups r n"]]:
    """Return the `rank` largest singular triplets `(U, S, V^T)` of each matrix, in fp32 or better.

    Exact without `iterations`; else by that many rounds of randomised subspace iteration (Halko et al., arXiv
    0909.4061, algorithm 4.4) with a sketch drawn from `rng` on the CPU, so that a seed means the same on every device.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if iterations is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        groups, m, n = matrix.shape
        sketch = torch.randn(groups, n, min(rank + OVERSAMPLING, m, n), generator=rng, dtype=matrix.dtype)
        basis = torch.linalg.qr(matrix @ sketch.to(matrix.device)).Q
        for _ in range(iterations):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
        inner, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
        u = basis @ inner
    return u[..., :rank], s[..., :rank], vh[..., :rank, :]


def check_iterations(iterations: int | None) -> None:
    """Raise `SpecError` for a number of iterations that is neither None (an exact SVD) nor a whole number from 0."""
    whole = isinstance(iterations, int) and not isinstance(iterations, bool) and iterations >= 0
    if not (iterations is None or whole):
        raise SpecError(
            f"iterations must be a whole number from 0, or none for an exact SVD, not {iterations!r}; 16 is the usual"
        )
