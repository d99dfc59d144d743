"""LoKr: an update that is a Kronecker product, its larger factor of low rank.

`dW = s (W1 kron W2)` with `W1 (a, c)`, `W2 (b, e)`, `m = a b`, `n = c e` (LyCORIS, arXiv 2309.14859, after FedPara,
2108.06098). Where `r < max(b, e) / 2`, `W2 = W2a W2b`; with `decompose_both`, `W1 = W1a W1b` where `r < max(a, c) / 2`.

Two things are done otherwise than in PEFT 0.21. Where both factors are whole, `s = 1` as in LyCORIS: no factor has rank
r there, so PEFT's `alpha / r` would scale the update by a number that means nothing. And a one-dimensional convolution
with a whole W2 gets the Kronecker product of its channels, where PEFT's mixes channels and positions up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from lorakit.core.checks import check_flag, check_positive, check_whole
from lorakit.core.method import Call, Start, Static, Tensors
from lorakit.core.peft_form import LYCORIS, LYCORIS_PATTERNS, PeftForm, without_core
from lorakit.core.site import Decl, Role, Site
from lorakit.core.state import Update
from lorakit.errors import SpecError
from lorakit.methods.kronecker import factorization, kron_branch, kron_like

_KEYS = {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
"""`t2` is the core of PEFT's `use_effective_conv2d`, which is multiplied out when it is read."""
_MIXES = "PEFT's LoKr mixes channels and positions of a one-dimensional convolution whose W2 is whole"


@dataclass(frozen=True)
class LoKr(Static):
    """Add `s (W1 kron W2)`, W2 a product of rank r where that is smaller.

    `factor` is the first of the two numbers each width is cut into; None cuts as near the root as the width allows.
    `zero` is the factor that starts at 0: w1 as in PEFT, w2 as in LyCORIS.
    """

    rank: int = 8
    alpha: float = 8.0
    factor: int | None = None
    decompose_both: bool = False
    zero: Literal["w1", "w2"] = "w1"

    name: ClassVar[str] = "lokr"
    paper: ClassVar[str] = "arXiv 2309.14859 (LyCORIS), 2108.06098 (FedPara)"
    formula: ClassVar[str] = "dW = s (W1 kron W2), W2 = W2a W2b, s = alpha / rank (1 where W1 and W2 are whole)"
    count: ClassVar[str] = (
        "(rank * (a + c) if decompose_both and rank < max(a, c) / 2 else a * c)"
        " + (rank * (b + e) if rank < max(b, e) / 2 else b * e)"
    )
    peft: ClassVar[PeftForm | None] = PeftForm(
        "LOKR",
        {"r": "rank", "alpha": "alpha", "decompose_both": "decompose_both"},
        _KEYS,
        read=lambda method, q, embedding: _from_peft(method, q),
        kinds=frozenset({"linear", "conv1d", "conv2d"}),
        patterns=LYCORIS_PATTERNS,
        settings={"init_weights": True},
        no_bearing=LYCORIS | {"decompose_factor", "rank_dropout_scale"},
        optional=frozenset(_KEYS),
        folds=True,
        plain=True,
        config=lambda updates: _config(updates),
        of_config=lambda config, path: _of_config(config),
        refusal=lambda site, method: _refusal(site, method),
        says=lambda update: {"alpha": float(update.method.rank)} if {"w1", "w2"} <= update.tensors.keys() else {},
    )

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, hint="; exclude a layer to skip it")
        check_positive("alpha", self.alpha, hint="; alpha = rank makes the scale 1")
        check_flag("decompose_both", self.decompose_both)
        if self.factor is not None:
            check_whole("factor", self.factor, hint="; leave it out for a square split")
        if self.zero not in ("w1", "w2"):
            raise SpecError(f"zero must be w1 (as in PEFT) or w2 (as in LyCORIS), not {self.zero!r}")

    def letters(self, site: Site) -> dict[str, int]:
        """Return a, b, c, e: `m = a b` and `n = c e`."""
        (a, b), (c, e) = factorization(site.out, self.factor), factorization(site.in_, self.factor)
        return {"a": a, "b": b, "c": c, "e": e}

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare each factor whole, or as its pair; UP is what starts at 0, as in LoRA."""
        (a, b, c, e), r = self.letters(site).values(), self.rank
        first, second = (Role.UP, Role.DOWN) if self.zero == "w1" else (Role.DOWN, Role.UP)
        if self.decompose_both and r < max(a, c) / 2:
            w1 = {"w1_a": Decl((a, r), first), "w1_b": Decl((r, c), Role.DOWN)}
        else:
            w1 = {"w1": Decl((a, c), first)}
        if r < max(b, e) / 2:
            kernel = site.fan_in // site.in_
            return {**w1, "w2_a": Decl((b, r), Role.DOWN), "w2_b": Decl((r, e * kernel), second)}
        return {**w1, "w2": Decl((b, e, *site.kernel), second)}

    def init(self, p: Tensors, start: Start) -> None:
        """Start at dW = 0: w1 (or its first factor) or w2 (or its second) is 0, the rest U(-1/sqrt(in), 1/sqrt(in))."""
        for name in p:
            if name in (("w1", "w1_a") if self.zero == "w1" else ("w2", "w2_b")):
                nn.init.zeros_(p[name])
            else:
                nn.init.kaiming_uniform_(p[name], a=math.sqrt(5), generator=start.rng)

    def delta(self, p: Tensors, weight: Tensor) -> Tensor:
        """Return `s (W1 kron W2)`."""
        return kron_like(weight, *self._factors(p))

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return `s vec(W1 X W2^T)`; dW is formed for convolutions and embeddings alone."""
        return kron_branch(call, *self._factors(p))

    def _factors(self, p: Tensors) -> tuple[Tensor, ...]:
        """Return `s W1` and the one or two factors of W2."""
        whole = "w1" in p and "w2" in p
        w1 = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
        return w1 if whole else self.alpha / self.rank * w1, *([p["w2"]] if "w2" in p else [p["w2_a"], p["w2_b"]])


def _config(updates: Sequence[Update]) -> dict[str, Any]:
    factors = {cast(LoKr, update.method).factor for update in updates}
    if len(factors) > 1:
        raise SpecError(f"PEFT has one decompose_factor for all layers, not {sorted(map(str, factors))}")
    factor = factors.pop()
    return {"decompose_factor": -1 if factor is None else factor}


def _of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    factor = config.get("decompose_factor", -1)
    return {"factor": None if factor == -1 else factor}


def _refusal(site: Site, method: LoKr) -> str | None:
    return _MIXES if site.kind == "conv1d" and "w2" in method.tensors(site) else None


def _from_peft(method: LoKr, q: dict[str, Tensor]) -> Update:
    """Return the update; where both factors are whole PEFT scales by alpha / r and this does not, so W1 takes it in."""
    if {"t2", "w2_a", "w2_b"} <= q.keys():
        w2_a, w2_b = without_core(q["t2"], q["w2_a"], q["w2_b"])
        q = {name: t for name, t in q.items() if name != "t2"} | {"w2_a": w2_a, "w2_b": w2_b}
    whole = [name for name in ("w1", "w2") if name in q]
    pairs = [name for name in ("w1", "w2") if {f"{name}_a", f"{name}_b"} <= q.keys()]
    if sorted(whole + pairs) != ["w1", "w2"] or len(q) != len(whole) + 2 * len(pairs):
        raise SpecError(f"{', '.join(f'lokr_{name}' for name in q)} are not the factors of one Kronecker product")
    if any(t.dim() < 2 for t in q.values()) or any(q[f"{w}_a"].shape[1] != q[f"{w}_b"].shape[0] for w in pairs):
        raise SpecError(
            "the factors " + ", ".join(f"lokr_{n} {tuple(t.shape)}" for n, t in q.items()) + " do not multiply"
        )
    if "w2" in q and q["w2"].dim() == 3:
        raise SpecError(_MIXES)
    if len(whole) == 2 and method.alpha != method.rank:
        q = {**q, "w1": q["w1"] * (method.alpha / method.rank)}
    (a, c), (b, e) = (
        q[w].shape[:2] if w in whole else (q[f"{w}_a"].shape[0], q[f"{w}_b"].shape[1]) for w in ("w1", "w2")
    )
    site = Site("", a * b, c * e, tuple(q["w2"].shape[2:]) if "w2" in q else ())
    fits = {name: decl.shape for name, decl in method.tensors(site).items()} == {
        n: tuple(t.shape) for n, t in q.items()
    }
    return Update(site if fits else replace(site, in_=0), method, q)  # W2b may have a kernel folded in: attach knows
