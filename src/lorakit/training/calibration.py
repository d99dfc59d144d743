"""A few real steps before the run: how long one takes here, and what it really holds.

The heaviest batch comes first, where an out-of-memory would come hours later otherwise; it warms up and counts for the
memory alone. The others are batches of the run's own, so that padding is as the run will have it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch

from lorakit.core.modes import evaluating
from lorakit.data.branches import seen
from lorakit.data.packing import row_lengths, tokens_of
from lorakit.errors import LorakitError
from lorakit.inject.lower import GIVEN, Lower, answering, run_lower
from lorakit.inject.penalty import penalty
from lorakit.planning.pace import Duration, Measured, from_steps, per_token
from lorakit.training.arguments import make_plan, widen
from lorakit.training.base import quiet
from lorakit.training.frozen import lower_or_refuse
from lorakit.training.groups import param_groups
from lorakit.training.loss import batches, mean_loss, mean_of_batch
from lorakit.training.optimizers import make_optimizer
from lorakit.training.order import longest_first, padded_tokens, row_order
from lorakit.training.precondition import precondition
from lorakit.training.run import attached
from lorakit.training.stage import build_stage
from lorakit.training.step import prepare_step, uncompiled

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.training.recipe import Recipe
    from lorakit.training.stage import Stage

STEPS = 5
"""Steps that are run: the heaviest batch, and four of the run's own."""
WATCHED = 64
"""Validation rows at most whose time is taken."""


@dataclass(frozen=True)
class Calibration:
    """What a few real steps showed: times, how long the run will take by them, and the most memory one held.

    `peak_bytes` is what torch allocated on a CUDA device; None on a CPU, where nothing counts it.
    """

    steps: tuple[Measured, ...]
    duration: Duration
    peak_bytes: int | None


def calibrate(recipe: Recipe) -> Calibration:
    """Run a few steps of a recipe, on weights that are thrown away, and return how long the whole will take.

    Raises:
        LorakitError: a step that does not fit into memory, with what to change.
    """
    with quiet():
        stage = build_stage(recipe)
        attached(recipe, stage, None)
        prepare_step(stage, recipe.train)
        model, dtype = stage.model, stage.model.dtype  # a widened model no longer says which it was
        narrow = widen(model) and dtype != torch.float32
        forward = partial(torch.autocast, model.device.type, dtype, enabled=narrow)
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        chosen, below, rest = list(_chosen(recipe, stage)), 0.0, 0.0
        lower = lower_or_refuse(model) if recipe.train.cache_frozen else None
        if lower is not None:
            below = per_token([_give(model, lower, batch, forward) for batch in chosen][1:])
            rest = below * sum(tokens_of(part.dataset) for part in stage.parts.values())
        with nullcontext() if lower is None else answering(model, lower):
            steps = tuple(_steps(recipe, stage, forward, chosen))
        peak = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else None
        with forward(), uncompiled() if recipe.train.compile else nullcontext():
            rest += _evaluations(recipe, stage, below)
    numbers = make_plan(recipe, stage)
    tokens = padded_tokens(recipe, stage) * numbers.steps // numbers.steps_per_epoch
    return Calibration(steps, from_steps(steps, tokens, rest), peak)


def _give(model: Any, lower: Lower, batch: dict[str, Tensor], forward: Callable[[], Any]) -> Measured:
    """Add to a batch what lies below its lowest trained block, as `train.cache_frozen` computes it once a row."""
    began = time.perf_counter()
    with evaluating(model), torch.no_grad(), forward():
        batch[GIVEN] = run_lower(model, lower, seen(model, batch)).hidden
    _wait(model.device)
    return Measured(batch["input_ids"].numel(), time.perf_counter() - began)


def _steps(
    recipe: Recipe, stage: Stage, forward: Callable[[], Any], chosen: Sequence[dict[str, Tensor]]
) -> Iterator[Measured]:
    """Yield micro-batches that were run, each with its share of the optimizer's step that several have in common."""
    model, train = stage.model, recipe.train
    optimizer = make_optimizer(train.optimizer, param_groups(model, 1e-8, train.up_ratio, train.weight_decay))
    precondition(model, optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train(True)
    if train.compile:  # the first batch compiles
        with forward():
            loss = mean_of_batch(model, chosen[0])
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
    for batch in chosen:
        _wait(model.device)
        began = time.perf_counter()
        try:
            with forward():
                loss, term = mean_of_batch(model, batch), penalty(model)
            (loss if term is None else loss + term).backward()  # type: ignore[no-untyped-call]
            _wait(model.device)
            summed = time.perf_counter()
            torch.nn.utils.clip_grad_norm_(trained, train.clip)
            optimizer.step()
            if train.accumulation == 1:  # else the gradients of a micro-batch are there while the next one computes
                optimizer.zero_grad()
        except torch.OutOfMemoryError as full:
            rows, length = batch["input_ids"].shape
            raise LorakitError(
                f"{rows} rows of {length} tokens do not fit into the memory of {model.device}; lower "
                "train.batch_tokens (or batch_size), set train.checkpointing: true, or quant: nf4"
            ) from full
        _wait(model.device)
        share = (time.perf_counter() - summed) / train.accumulation
        yield Measured(batch["input_ids"].numel(), summed - began + share)


def _chosen(recipe: Recipe, stage: Stage) -> Iterator[dict[str, Tensor]]:
    """Yield the heaviest batch, then the first ones of the second epoch, whose rows are as mixed as any."""
    rows, pad = stage.train.dataset, stage.tokenizer.pad_token_id
    size = min(stage.batch_rows, len(rows))
    heaviest = longest_first(row_lengths(rows))[:size]
    own = row_order(recipe, stage)
    own.set_epoch(1)
    order = list(islice(cycle(own), size * (STEPS - 1)))
    yield from batches(rows.select([*heaviest, *order]), size, pad, stage.model.device)


def _evaluations(recipe: Recipe, stage: Stage, below: float) -> float:
    """Return the seconds of all evaluations of the run, from the time of some rows.

    Of it `below` a token are not computed again, as what they compute is kept.
    """
    if stage.validation is None:
        return 0.0
    rows = stage.validation.dataset
    few = rows.select(range(min(len(rows), WATCHED)))
    began = time.perf_counter()
    mean_loss(stage.model, few, stage.batch_rows, stage.tokenizer.pad_token_id)
    each = max(0.0, (time.perf_counter() - began) / tokens_of(few) - below) * tokens_of(rows)
    numbers = make_plan(recipe, stage)
    return each * (numbers.steps // numbers.evaluate_every_steps)


def _wait(device: Any) -> None:
    """Let a device that works in the background end what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
