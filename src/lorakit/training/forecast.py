"""What a step of a recipe will hold and compute, from a model without weights.

A stack of blocks that are all alike is rehearsed with two blocks and with three, and continued in a straight line: each
block adds the same, to the byte (tests/training/test_forecast.py), so eighty blocks take no longer than five.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lorakit.core.method import Context
from lorakit.core.site import layer_of
from lorakit.core.spec import AdapterSpec
from lorakit.data.branches import seen
from lorakit.errors import LorakitError
from lorakit.inject.attach import attach
from lorakit.inject.fuse import fuse
from lorakit.inject.lower import run_lower
from lorakit.inject.penalty import penalty
from lorakit.inject.pooled import compute_first_alone
from lorakit.planning.memory import Parts, optimizer_bytes
from lorakit.training.arguments import widen
from lorakit.training.frozen import lower_or_refuse
from lorakit.training.groups import param_groups
from lorakit.training.loss import mean_of_batch
from lorakit.training.optimizers import PLAIN, make_optimizer
from lorakit.training.quantised import pack_hollow, state_tensors
from lorakit.training.recipe import QuantSection
from lorakit.training.rehearsal import Rehearsal, Scene, rehearse
from lorakit.training.step import Checkpointing, from_nowhere, offloaded, pools_first, recompute, to_nowhere

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEW = 4
"""Blocks that are rehearsed one and all; of more, two and three are, or three and four if the last is a smaller one."""


class Unrehearsed(LorakitError):
    """A step that cannot be run without values."""


@dataclass(frozen=True)
class Load:
    """What one micro-batch is: rows, their length in tokens, are they packed, are prompts shared; and how it is run."""

    rows: int
    length: int
    packed: bool = False
    shared: bool = False
    classes: bool = False
    checkpointing: Checkpointing = False
    dtype: torch.dtype = torch.float32
    quant: QuantSection | None = None
    optimizer: str = "adamw"
    fused: bool = True
    offload: bool = False


def forecast(model: PreTrainedModel, spec: AdapterSpec, load: Load, evaluation: Parts | None = None) -> Rehearsal:
    """Return what a step holds and computes.

    Args:
        model: the base, without weights or with; its class and its configuration count.
        spec: what will be attached.
        load: the batch, and how the step is run.
        evaluation: what an evaluation holds, where that is known: it is the same however the step is run.

    Raises:
        Unrehearsed: a model that takes something else than tokens, or whose shapes depend on values.
    """
    depth = _depth(model)
    try:
        if depth <= FEW or _depends_on_depth(spec) or not isinstance(load.checkpointing, bool):
            found = rehearse(scene(model, spec, load), evaluate=evaluation is None)
        else:
            asked, cached = evaluation is None, _narrows(spec, load)  # autocast keeps what it narrowed of each block
            few = 3 if load.fused and pools_first(spec, model) else 2
            one = rehearse(scene(model, spec, load, few), evaluate=asked)
            other = rehearse(scene(model, spec, load, few + 1), evaluate=asked and cached)
            found = one.continued(other if cached else other.evaluated_as(one), depth - few)
    except LorakitError:
        raise
    except Exception as error:  # a model's own code meets what it was not written for, and raises what it likes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Unrehearsed(f"a step of {type(model).__name__} cannot be rehearsed on tokens alone ({reason})") from error
    return replace(found, evaluation=evaluation or found.evaluation)


def lower_flops(model: PreTrainedModel, spec: AdapterSpec, load: Load) -> int:
    """Return the FLOPs of one micro-batch's forward below the lowest trained block, or raise `RecipeError`."""
    played = scene(model, spec, load)
    with FakeTensorMode(), torch.no_grad(), played.forward(), FlopCounterMode(display=False) as counted:
        made = played.build()
        played.prepare(made)
        run_lower(made, lower_or_refuse(made), seen(made, played.batch()))
    return int(counted.get_total_flops())


def scene(
    model: PreTrainedModel,
    spec: AdapterSpec,
    load: Load,
    blocks: int | None = None,
    pack: Callable[[nn.Module, QuantSection], None] = pack_hollow,
) -> Scene:
    """Return the functions that make a step of this model, or of the same one with fewer blocks.

    They make real tensors where nobody says otherwise; `pack` then has to pack real weights.
    """
    config = model.config if blocks is None else _shortened(model.config, blocks)

    def build() -> nn.Module:
        made: nn.Module = type(model)._from_config(copy.deepcopy(config), dtype=load.dtype)  # type: ignore[no-untyped-call]
        made.config.use_cache = False  # type: ignore[union-attr]
        if load.quant is not None:
            pack(made, load.quant)
        return made

    def prepare(made: nn.Module) -> None:
        attach(made, spec)
        if load.fused:
            fuse(made)
            if pools_first(spec, made):
                compute_first_alone(made)
        widen(made)
        recompute(made, load.checkpointing)  # type: ignore[arg-type]

    def loss(made: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with offloaded(made, to_nowhere, from_nowhere) if load.offload else nullcontext():
            own, term = mean_of_batch(made, batch), penalty(made)  # type: ignore[arg-type]
        return own if term is None else own + term

    return Scene(
        build,
        prepare,
        partial(_batch, load),
        loss,
        lambda made: make_optimizer(PLAIN, param_groups(made, 1e-3)),
        state_tensors,
        partial(torch.autocast, "cpu", load.dtype) if _narrows(spec, load) else nullcontext,
        partial(optimizer_bytes, optimizer=load.optimizer),
        load.fused and pools_first(spec, model),
    )


def _narrows(spec: AdapterSpec, load: Load) -> bool:
    """Return whether a forward is under autocast: 16-bit weights that are trained whole are widened."""
    return bool(spec.train) and load.dtype != torch.float32


def _batch(load: Load) -> dict[str, Tensor]:
    """Return one micro-batch, as the collator makes it."""
    shape = (load.rows, load.length)
    batch = {"input_ids": torch.zeros(shape, dtype=torch.long)}
    batch["labels"] = torch.zeros(load.rows if load.classes else shape, dtype=torch.long)
    batch["position_ids" if load.packed else "attention_mask"] = torch.zeros(shape, dtype=torch.long)
    if load.shared:
        batch["branches"] = torch.zeros(shape, dtype=torch.long)
    return batch


def _depth(model: nn.Module) -> int:
    """Return the number of blocks of a model's one stack of equal blocks; 0 where there is no such stack."""
    shapes: dict[tuple[str, int], Counter[tuple[str, torch.Size]]] = {}
    for name, parameter in model.named_parameters():
        if (place := layer_of(name)) is not None:
            inside = name.partition(f"{place[0]}.{place[1]}.")[2]
            shapes.setdefault(place, Counter())[inside, parameter.shape] += 1
    stacks = {stack for stack, _ in shapes}
    equal = all(one == next(iter(shapes.values())) for one in shapes.values())
    told = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return len(shapes) if len(stacks) == 1 and equal and told == len(shapes) else 0


def _depends_on_depth(spec: AdapterSpec) -> bool:
    """Return whether a spec means other blocks in a shorter model: it numbers them, or shares tensors among them."""
    targets = [spec.targets, *(override.targets for override in spec.overrides)]
    words = [word for one in targets for word in (*one.include, *one.exclude)] + list(spec.train)
    by_path = any(word.startswith("re:") or any(part.isdigit() for part in word.split(".")) for word in words)
    numbered = by_path or any(one.layers is not None for one in targets)
    return numbered or isinstance(spec.method, Context)


def _shortened(config: Any, blocks: int) -> Any:
    """Return the configuration of the same model with fewer blocks."""
    short = copy.deepcopy(config)
    kinds = vars(short).get("layer_types")  # some families work them out from the depth
    short.num_hidden_layers = blocks
    if kinds is not None:
        short.layer_types = list(kinds[:blocks])
    return short
