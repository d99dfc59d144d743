"""From a recipe to numbers of steps, and from those to the Trainer's arguments, every one of which has a reason."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.errors import MissingExtraError, RecipeError
from lorakit.training import processes
from lorakit.training.rates import auto_rate
from lorakit.training.recipe import Recipe
from lorakit.training.stage import Stage

if TYPE_CHECKING:
    from transformers import TrainingArguments

SITTINGS = 5
"""Evaluations and checkpoints of a run, where the recipe does not say how often."""


@dataclass(frozen=True)
class Plan:
    """How a run will go: all counts in optimizer steps, batches in rows."""

    steps: int
    steps_per_epoch: int
    batch_rows: int
    accumulation: int
    lr: float
    evaluate_every_steps: int
    save_every_steps: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def make_plan(recipe: Recipe, stage: Stage) -> Plan:
    """Return the run's numbers: steps from epochs, intervals from steps, the learning rate from the base."""
    train = recipe.train
    batches = math.ceil(len(stage.train.dataset) / stage.batch_rows)
    per_epoch = math.ceil(batches / train.accumulation)
    steps = train.steps or math.ceil(train.epochs * per_epoch)
    every = max(1, math.ceil(steps / SITTINGS))
    return Plan(
        steps=steps,
        steps_per_epoch=per_epoch,
        batch_rows=stage.batch_rows,
        accumulation=train.accumulation,
        lr=auto_rate(stage.model.config, full="*" in stage.spec.train) if train.lr == "auto" else train.lr,
        evaluate_every_steps=train.evaluate_every or every,
        save_every_steps=train.save_every or every,
    )


def share_of(plan: Plan, among: int) -> tuple[int, int]:
    """Return rows and number of the micro-batches that each process takes of a step, which is the same on any number.

    Whole micro-batches are dealt where there are enough of them, else their rows.

    Raises:
        RecipeError: a step whose rows the processes cannot share evenly.
    """
    rows = plan.batch_rows * plan.accumulation
    if rows % among:
        raise RecipeError(
            f"a step of this recipe is {plan.accumulation} x {plan.batch_rows} rows, which {among} processes cannot "
            f"share evenly; set train.accumulation: {among} or a multiple of it (that many micro-batches make a step)"
        )
    share = rows // among
    size = max(size for size in range(1, min(plan.batch_rows, share) + 1) if share % size == 0)
    return size, share // size


def widen(model: nn.Module) -> bool:
    """Keep 16-bit parameters that are trained whole in fp32, as adapters are, and say whether there were any.

    A bf16 weight forgets every update below 0.4 % of it. The forward then needs autocast, which leaves norms alone: the
    vectors beside a widened one, such as a norm's gain beside its bias, are widened with it.
    """
    widened = False
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        narrow = [p for p in own if p.dtype in (torch.bfloat16, torch.float16)]
        if any(p.requires_grad for p in narrow):
            widened = True
            for parameter in narrow:
                if parameter.requires_grad or parameter.dim() <= 1:
                    parameter.data = parameter.data.float()
    return widened


def arguments(recipe: Recipe, stage: Stage, plan: Plan, output: Path) -> TrainingArguments:
    """Return the Trainer's arguments for a model with its adapter; it writes nowhere but in `output`."""
    from transformers import TrainingArguments  # it brings the Trainer's whole world, which a plan can do without

    train, device = recipe.train, stage.model.device
    rows, micro_batches = share_of(plan, processes.count())
    dtype, widened = stage.model.dtype, widen(stage.model)
    made = TrainingArguments(
        output_dir=str(output),
        max_steps=plan.steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=plan.batch_rows,
        gradient_accumulation_steps=micro_batches,
        learning_rate=plan.lr,
        lr_scheduler_type=train.schedule,
        warmup_steps=int(train.warmup * plan.steps),
        max_grad_norm=train.clip,
        eval_strategy="no" if stage.validation is None else "steps",
        eval_steps=plan.evaluate_every_steps,
        save_strategy="steps",
        save_steps=plan.save_every_steps,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a NaN behind the mean of earlier losses
        log_level="error",
        disable_tqdm=True,
        report_to=list(train.report_to),
        seed=train.seed,
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16 and widened,
        fp16=dtype == torch.float16,  # whose gradients need a scaler
        remove_unused_columns=False,  # the data room made exactly the columns the model takes
        dataloader_pin_memory=device.type == "cuda",
    )
    if device.type == "cuda":
        made._n_gpu = 1  # else several visible devices mean nn.DataParallel, which copies the model every step
    return made


def refuse_absent(trackers: Iterable[str]) -> None:
    """Raise `MissingExtraError` for trackers that are not installed; no extra of ours brings them."""
    if absent := [name for name in trackers if importlib.util.find_spec(name) is None]:
        raise MissingExtraError(
            f"train.report_to names {' and '.join(absent)}, not installed here; run: pip install {' '.join(absent)}"
        )
