"""From a rehearsed step to what each phase of a run holds: the recipe as it is, and what would make it smaller."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorakit.core.site import Site, Skeleton
from lorakit.core.spec import AdapterSpec
from lorakit.core.sublayers import LINEAR_KINDS
from lorakit.core.targets import resolve
from lorakit.errors import LorakitError
from lorakit.inject.skeleton import size_of
from lorakit.planning.memory import (
    Forecast,
    Parts,
    activations_by_formula,
    logits_by_formula,
    nf4_bytes,
    trained_parts,
)
from lorakit.planning.pace import flops_per_token
from lorakit.training.forecast import Load, Unrehearsed, forecast
from lorakit.training.quantised import DENSE_AT_ONCE, refuse_packing
from lorakit.training.recipe import QuantSection
from lorakit.training.rehearsal import Rehearsal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDE = 4
"""Bytes of a number in fp32, in which updates are added to weights."""


@dataclass(frozen=True)
class Ways:
    """The forecasts by the names of `planning.fitting.VERDICTS`, which of them is the recipe's, and its rehearsal.

    `guessed` says why a published formula stands in for the rehearsal, where it does, and `lacking` which of its parts
    are not counted, as the configuration has no number for them.
    """

    forecasts: Mapping[str, Forecast]
    own: str
    rehearsal: Rehearsal
    guessed: str = ""
    lacking: str = ""


CHOICES = {
    "plain": (False, False),
    "checkpointing": (True, False),
    "4 bits": (False, True),
    "4 bits and checkpointing": (True, True),
}
"""Of each way whether it checkpoints, and whether its base is packed."""


def ways(model: PreTrainedModel, skeleton: Skeleton, spec: AdapterSpec, load: Load, trained: Collection[str]) -> Ways:
    """Return what a run holds plain, with checkpointing, in 4 bits and with both; `trained` is what of the base trains.

    In 4 bits a step computes the same and saves the same (bench/plan.py), so only the weights are counted anew, and the
    block that is dense at a time. Where linear weights are trained whole they cannot be packed.

    Raises:
        LorakitError: whatever packing or a step would raise.
    """
    packable = [s for s in skeleton.sites if s.kind in LINEAR_KINDS and s.path not in skeleton.heads]
    if load.quant is not None:
        refuse_packing(load.quant, packable)
    forecasts: dict[str, Forecast] = {}
    rehearsals: dict[str, Rehearsal] = {}
    sizes, guessed = _Sizes.of(model, packable), ""
    for checkpointing in (False, True):
        name = "checkpointing" if checkpointing else "plain"
        asked = replace(load, checkpointing=checkpointing and (load.checkpointing or True), quant=None)
        try:
            known = rehearsals["plain"].evaluation if "plain" in rehearsals else None
            rehearsals[name] = forecast(model, spec, asked, known)
        except Unrehearsed as reason:
            rehearsals[name], guessed = by_formula(model, skeleton, spec, asked, trained), str(reason)
        except LorakitError:  # such as a prefix in the cache, which checkpointing switches off
            if checkpointing == bool(load.checkpointing):
                raise
            continue
        forecasts[name] = phases(rehearsals[name], load, sizes)
        if not {f"{site.path}.weight" for site in packable} & set(trained):
            packed = sizes.packed(rehearsals[name], load)
            other = "4 bits and checkpointing" if checkpointing else "4 bits"
            rehearsals[other], forecasts[other] = packed, phases(packed, load, sizes, in_4_bits=True)
    own = next(name for name, choice in CHOICES.items() if choice == (bool(load.checkpointing), load.quant is not None))
    return Ways(forecasts, own, rehearsals[own], guessed, _lacking(model.config) if guessed else "")


@dataclass(frozen=True)
class _Sizes:
    """`(out, in)` of each weight that can be packed, and the numbers in the largest and in all."""

    packable: tuple[tuple[int, int], ...]
    largest: int
    every: int

    @classmethod
    def of(cls, model: Any, packable: list[Site]) -> _Sizes:
        numbers = [p.numel() for p in model.parameters()]
        return cls(tuple((site.out, site.in_) for site in packable), max(numbers), sum(numbers))

    def packed(self, dense: Rehearsal, load: Load) -> Rehearsal:
        """Return a dense rehearsal with its linear weights in 4 bits."""
        quant, width = load.quant or QuantSection(), load.dtype.itemsize
        numbers = [out * in_ for out, in_ in self.packable]
        small = sum(nf4_bytes(n, quant.double_quant, quant.block_size) for n in numbers)
        beside = quant.principal * sum(out + in_ for out, in_ in self.packable) * width
        gone = sum(numbers) * width - small - beside
        block = min(max(numbers, default=0), DENSE_AT_ONCE) * width

        def less(held: Parts) -> Parts:
            return replace(held, weights=held.weights - gone, temporaries=held.temporaries + block)

        return Rehearsal(tuple(map(less, dense.moments)), less(dense.between), less(dense.evaluation), dense.flops)


def phases(rehearsal: Rehearsal, load: Load, sizes: _Sizes, *, in_4_bits: bool = False) -> Forecast:
    """Return what loading, a step, an evaluation, a checkpoint and a merge hold.

    Loading reads tensor by tensor, packing one at a time; a checkpoint is written from the live tensors; a merge loads
    the base in its own dtype and adds one layer's update in fp32 at a time.
    """
    step = rehearsal.step
    width = load.dtype.itemsize
    return Forecast(
        load=Parts(
            weights=rehearsal.evaluation.weights if in_4_bits else sizes.every * width,
            temporaries=sizes.largest * width if in_4_bits else 0,
        ),
        step=step,
        evaluation=rehearsal.evaluation,
        checkpoint=Parts(weights=step.weights, adapters=step.adapters, optimizer=step.optimizer),
        merge=Parts(weights=sizes.every * width, adapters=step.adapters, temporaries=2 * WIDE * sizes.largest),
    )


_FORMULA = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")


def _lacking(config: Any) -> str:
    """Return which parts of the formulas have no number to start from."""
    if size_of(config, "hidden_size") is None:
        return "its configuration has no hidden_size, so activations and attention are not counted"
    if size_of(config, "num_attention_heads") is None:
        return "its configuration has no num_attention_heads, so attention is not counted"
    return ""


def by_formula(
    model: PreTrainedModel, skeleton: Skeleton, spec: AdapterSpec, load: Load, trained: Collection[str]
) -> Rehearsal:
    """Return a step whose weights and trained tensors are counted, and whose activations are by a published formula.

    A tensor that sites share is held once, and multiplied with at each of them.
    """
    hidden, heads, inner, vocabulary = (size_of(model.config, name) or 0 for name in _FORMULA)
    layers = sum(skeleton.depths.values())
    wide = load.dtype.itemsize / 2  # the formulas are for 16 bits
    saved = activations_by_formula(layers=layers, hidden=hidden, sequence=load.length, batch=load.rows, heads=heads,
                                   intermediate=inner or None, checkpointing=bool(load.checkpointing))  # fmt: skip
    logits = logits_by_formula(load.length, load.rows, 0 if load.classes else vocabulary)
    base = sum(p.numel() for p in model.parameters())
    whole = [p.numel() for name, p in model.named_parameters() if name in trained]
    declared = [d for m in resolve(spec, skeleton) for d in m.method.tensors(m.site).values() if d.trainable]
    shared = {d.shared: d.numel for d in declared if d.shared is not None}
    adapters = [d.numel for d in declared if d.shared is None] + list(shared.values())
    parts = trained_parts([*adapters, *whole], load.optimizer)
    held = Parts(
        weights=(base - sum(whole)) * load.dtype.itemsize,
        adapters=parts.adapters,
        gradients=parts.gradients,
        optimizer=parts.optimizer,
        activations=round(saved * wide) if hidden else 0,
        logits=logits,
    )
    matrices = sum(site.out * site.fan_in for site in skeleton.sites if site.kind != "embedding")
    work = flops_per_token(matrices, sum(d.numel for d in declared), full=bool(whole), layers=layers if heads else 0,
                           checkpointing=bool(load.checkpointing), width=hidden, context=load.length)  # fmt: skip
    quiet = replace(held, gradients=0, activations=0)
    return Rehearsal((held,), replace(held, gradients=0), quiet, work * load.rows * load.length)
