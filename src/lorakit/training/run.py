"""`train(recipe) -> Run`: from a recipe to a folder that holds an adapter, its events and its summary.

<output>/recipe.yaml      the whole recipe, every default written out
<output>/events.jsonl     what happened, line by line (events.py)
<output>/frozen-cache/    hidden states below the adapter, while the run may go on (frozen.py)
<output>/checkpoint-N/    whole or absent, resumable (checkpoints.py)
<output>/adapter/         the best adapter, trimmed to what acts, in the PEFT format where it has one
<output>/run.json         the summary, written last: a run that has it is finished
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.core.jsontext import JsonFault, parse_json
from lorakit.core.lazy import need
from lorakit.core.state import Purpose, trim
from lorakit.errors import LorakitError, RecipeError
from lorakit.training import folder, processes
from lorakit.training.folder import SUMMARY

if TYPE_CHECKING:
    from lorakit.inject.attach import Handle
    from lorakit.training.events import EventLog, Listen
    from lorakit.training.recipe import Recipe
    from lorakit.training.stage import Stage
    from lorakit.training.trainer import AdapterTrainer

EVIDENCE_BATCHES = 8
"""Training batches an initialisation such as EVA or LoRA-GA measures; at 16 rows each, LoRA-GA's 128 examples."""


@dataclass(frozen=True)
class Run:
    """What a finished run was: losses are in nats per trained token (per row for a classifier)."""

    output: str
    adapter_dir: str
    task: str
    steps: int
    seconds: float
    train_loss: float
    validation_loss: float | None
    best_step: int | None
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    trainable_parameters: int
    lr: float
    labels: tuple[str, ...]
    data: dict[str, dict[str, Any]]
    device: str = "cpu"
    """Where it ran; the peak is that device's memory on CUDA, elsewhere that of the whole process."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    @classmethod
    def read(cls, output: str | Path) -> Run:
        """Read the summary of a finished run; raises `RecipeError` for one that is damaged."""
        file = Path(output) / SUMMARY
        try:
            values = parse_json(file.read_bytes())
            return cls(**{**values, "labels": tuple(values["labels"])})
        except OSError as failed:
            reason = failed.strerror or str(failed)
        except JsonFault as fault:
            reason = str(fault)
        except (KeyError, TypeError) as fault:
            reason = f"it is not a run's summary ({fault})"
        raise RecipeError(f"{file} cannot be read: {reason}; delete it and resume, and the run writes it again")


def train(recipe: Recipe, *, resume: bool = False, listen: Listen | None = None, beside: Collection[str] = ()) -> Run:
    """Train the adapter a recipe describes and return what came of it.

    Args:
        recipe: from `load_recipe` or `Recipe(...)`.
        resume: go on from the last whole checkpoint in the output folder; a finished run is returned as it was.
        listen: called with every event (a dict, see events.py) as it happens.
        beside: names of what the caller put into the output folder; anything else there is refused.

    Raises:
        RecipeError: the output holds a run already, or foreign files, or nothing to resume, or another recipe's
            checkpoint.
        LorakitError: whatever is wrong with base, data or adapter; or a run stopped by Ctrl-C, saved, resumable.
    """
    need("transformers", "train")
    with processes.joined(recipe.train.device) as cause:
        return _joined(recipe, resume, listen, beside, cause)


def _joined(
    recipe: Recipe,
    resume: bool,
    listen: Listen | None,
    beside: Collection[str],
    cause: Callable[[BaseException], BaseException],
) -> Run:
    """Do what `train` promises in each of the processes that share the run."""
    from lorakit.training.base import quiet
    from lorakit.training.events import EventLog

    output = Path(recipe.output)
    with folder.taken(output, resume, beside) if processes.first() else nullcontext(list[Path]()) as made:
        processes.wait()
        if (output / SUMMARY).exists():
            return _finished(recipe, output)
        log = EventLog(output / folder.EVENTS, listen)
        try:
            with quiet():
                done = _train(recipe, output, log)
        except Exception as error:
            with suppress(LorakitError):  # a full disk must not hide what happened
                why = cause(error)
                log.append("error", kind=type(why).__name__, message=str(why))
            if isinstance(error, LorakitError) and not log.stepped:
                folder.forget(made)
            raise
    if isinstance(done, Run):
        return done
    raise done


def _finished(recipe: Recipe, output: Path) -> Run:
    """Return the run that is there, unless the recipe now asks for another one."""
    from lorakit.training.checkpoints import refuse_other_recipe
    from lorakit.training.recipe import load_recipe
    from lorakit.training.stage import fill, task_named

    kept = load_recipe(output / "recipe.yaml")
    refuse_other_recipe(output, kept, fill(recipe, task_named(kept.task), kept.data.separator, kept.data.labels))
    return Run.read(output)


def _train(recipe: Recipe, output: Path, log: EventLog) -> Run | LorakitError:
    """Return the finished run, or what to tell the user of one stopped by Ctrl-C, which is no fault of the run."""
    from transformers import set_seed

    from lorakit.data.preview import example
    from lorakit.inject.attach import adapters_named
    from lorakit.planning.counting import percent
    from lorakit.training.arguments import refuse_absent
    from lorakit.training.base import choose_device
    from lorakit.training.checkpoints import Memory, checkpoints, fingerprint, refuse_changes, refuse_damaged
    from lorakit.training.flow import Interrupt
    from lorakit.training.frozen import cached, discard
    from lorakit.training.progress import Progress
    from lorakit.training.stage import build_stage, decided
    from lorakit.training.step import prepare_step, refuse_step

    refuse_step(recipe.train, choose_device(recipe.train.device))
    refuse_absent(recipe.train.report_to)
    saved = next(reversed(checkpoints(output)), None)
    if saved is not None:
        refuse_damaged(saved)
    progress, interrupt = Progress(), Interrupt()
    changed = {} if saved is None else Memory.read(saved).versions_changed()
    log.append("start", model=recipe.model, resumed_from_step=_step(saved), versions_changed=changed)
    set_seed(recipe.train.seed)
    stage = build_stage(recipe)
    recipe = decided(recipe, stage)
    data = fingerprint(stage.train.dataset)
    if saved is not None:
        progress.go_on(refuse_changes(saved, recipe, data).progress)
    for part, prepared in stage.parts.items():
        log.append("data", part=part, **prepared.report.to_json())
    if saved is None:
        log.append("example", runs=[list(run) for run in example(stage.train, stage.tokenizer)])
    targets = _targets(stage)
    handle = attached(recipe, stage, saved)
    ways = prepare_step(stage, recipe.train)
    trainable = sum(p.numel() for p in handle.parameters())
    own = {id(t): t.numel() for one in adapters_named(stage.model, handle.name) for t in one.tensors().values()}
    share = percent(trainable, targets["base_parameters"], sum(own.values()))
    log.append("targets", trainable_parameters=trainable, percent=share, **targets)
    for way, told in ways.items():
        log.append(way, **told)
    _share(recipe, stage, handle)
    if processes.first():
        folder.write(output / folder.RECIPE, recipe.to_yaml())
    trainer = _trainer(recipe, stage, output, log, progress, interrupt, data)
    lower = cached(trainer, output, log) if recipe.train.cache_frozen else nullcontext()
    with lower, interrupt.heard():  # what is written first may be broken off: it is whole or it is not there
        _go(trainer, saved, recipe)
    step = trainer.state.global_step
    if interrupt.granted and step < trainer.state.max_steps:
        log.append("interrupted", step, path=f"{output}/checkpoint-{step}")
        return LorakitError(
            f"stopped at step {step} of {trainer.state.max_steps}, and saved; to go on, run the same recipe with resume"
        )
    discard(output)
    run = _finish(recipe, stage, trainer, output, trainable, log)
    log.append("end", run.steps, **run.to_json())
    return run


def _targets(stage: Stage) -> dict[str, Any]:
    """Return what the adapter reaches of the bare base, by its patterns, and in words what no pattern can reach."""
    from lorakit.core.targets import parameters_named
    from lorakit.inject.sites import sites
    from lorakit.inject.skeleton import shapes_of
    from lorakit.planning.counting import fused_experts
    from lorakit.training.stage import target_counts

    spec, skeleton, shapes = stage.spec, sites(stage.model), shapes_of(stage.model)
    whole = parameters_named(spec.train, shapes, skeleton, spec.targets.layers)
    trained = {name for names in whole.values() for name in names}
    total = skeleton.total_parameters
    return {"patterns": target_counts(stage), "base_parameters": total, "trained_whole": list(spec.train),
            "out_of_reach": fused_experts(shapes, total, trained)}  # fmt: skip


def _share(recipe: Recipe, stage: Stage, handle: Handle) -> None:
    """Start every process from the same adapter, and divide the base among them where the recipe says so."""
    from lorakit.inject.attach import adapters_named
    from lorakit.training.base import choose_device
    from lorakit.training.sharded import shard

    own = [t for adapter in adapters_named(stage.model, handle.name) for t in adapter.tensors().values()]
    processes.alike({id(t): t for t in [*own, *handle.parameters()]}.values())
    if processes.count() > 1 and recipe.train.parallel != "ddp":
        shard(stage.model, choose_device(recipe.train.device), by_machine=recipe.train.parallel == "hybrid")


def attached(recipe: Recipe, stage: Stage, saved: Path | None) -> Handle:
    """Attach the adapter; an initialisation that asks for evidence gets it from the first batches of the training.

    They are the rows the seed puts first in the second epoch, read in evaluation mode, so no random number is drawn and
    the same recipe starts the same. A checkpoint holds what it led to, so a resumed run measures nothing.
    """
    from itertools import islice

    from lorakit.inject.attach import attach
    from lorakit.inject.evidence import gather, needs, sites_that_need
    from lorakit.persist.native import load_native
    from lorakit.training.dense_weights import DenseWeights
    from lorakit.training.head import head_of
    from lorakit.training.loss import batches, mean_of_batch
    from lorakit.training.order import row_order
    from lorakit.training.quantised import is_packed

    if not needs(stage.spec):
        return attach(stage.model, stage.spec)
    if saved is not None:
        return attach(stage.model, load_native(saved))
    order = row_order(recipe, stage)
    order.set_epoch(1)  # the first epoch begins with the longest rows
    first = stage.train.dataset.select(list(islice(order, EVIDENCE_BATCHES * stage.batch_rows)))
    few = batches(first, stage.batch_rows, stage.tokenizer.pad_token_id, stage.model.device)
    dense = None
    if is_packed(stage.model) and (weighed := sites_that_need(stage.model, stage.spec, "weight")):
        remedy = "set model to the base it was made of, and quant to how to pack it"
        dense = DenseWeights(recipe.model, weighed, stage.task, stage.labels, reader="init loftq", remedy=remedy)
    head_of(stage.model)  # measured here, or its two tokens would be among the evidence
    evidence = gather(stage.model, stage.spec, few, loss=mean_of_batch, weights=dense)
    return attach(stage.model, stage.spec, evidence=evidence)


def _trainer(
    recipe: Recipe, stage: Stage, output: Path, log: EventLog, progress: Any, interrupt: Any, data: str
) -> AdapterTrainer:
    from lorakit.training.arguments import arguments, make_plan
    from lorakit.training.events import Narrator
    from lorakit.training.flow import KeepBest
    from lorakit.training.loss import how_lost
    from lorakit.training.order import Dealt, row_order
    from lorakit.training.rank_schedule import RankSchedules
    from lorakit.training.trainer import AdapterTrainer

    plan = make_plan(recipe, stage)
    log.append("plan", **plan.to_json(), packed=stage.packed, why=stage.why, task=stage.task,
               processes=processes.count(), parallel=recipe.train.parallel,
               loss=how_lost(stage.model), device=str(stage.model.device),
               dtype=str(stage.model.dtype).removeprefix("torch."))  # fmt: skip
    ranks = RankSchedules(stage.model, plan.steps)
    callbacks = [Narrator(log, progress, ranks.settled), interrupt]
    if stage.validation is not None:
        callbacks.append(KeepBest(recipe.train.patience, log, ranks.settled))
    return AdapterTrainer(
        stage.model,
        arguments(recipe, stage, plan, output),
        recipe,
        stage.train.dataset,
        None if stage.validation is None else stage.validation.dataset,
        pad_id=stage.tokenizer.pad_token_id,
        order=Dealt(row_order(recipe, stage), plan.batch_rows * plan.accumulation, processes.here(), processes.count()),
        data=data,
        progress=progress,
        ranks=ranks,
        callbacks=callbacks,
    )


def _go(trainer: AdapterTrainer, saved: Path | None, recipe: Recipe) -> None:
    """Train from the beginning or from a checkpoint, unless the checkpoint is where patience ended."""
    import torch
    from transformers import TrainerState

    from lorakit.training.checkpoints import STATE
    from lorakit.training.flow import evaluations_since_best
    from lorakit.training.step import compiling

    if saved is not None and recipe.train.patience is not None:
        state = TrainerState.load_from_json(str(saved / STATE))
        if evaluations_since_best(state.log_history, trainer.ranks.settled) >= recipe.train.patience:
            trainer._load_from_checkpoint(str(saved))
            trainer.state = state
            return
    try:
        with compiling(trainer.adapted) if recipe.train.compile else nullcontext():
            trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
    except torch.OutOfMemoryError as full:
        raise LorakitError(
            f"step {trainer.state.global_step + 1}: out of memory on {trainer.args.device}. Halve train.batch_tokens "
            "(or batch_size) and double train.accumulation, which changes no result; or set train.checkpointing: true"
        ) from full


def _finish(recipe: Recipe, stage: Stage, trainer: AdapterTrainer, output: Path, trainable: int, log: EventLog) -> Run:
    """Restore the best adapter, save what of it acts, and write the summary last."""
    from lorakit.inject.attach import state
    from lorakit.persist import peft_refusal, save
    from lorakit.training.events import peak_memory_bytes

    trainer._load_best_model()
    adapter = trim(replace(state(stage.model, live=True), purpose=_purpose(recipe, stage)))
    in_peft = bool(adapter.updates) and all(update.method.peft for update in adapter.updates)
    if in_peft and (why := peft_refusal(adapter)):
        log.append("format", trainer.state.global_step, format="native", why=why)
        in_peft = False
    if processes.first():
        save(adapter, output / "adapter", "peft" if in_peft else "native")
    progress, history = trainer.progress, trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    run = Run(
        output=str(output),
        adapter_dir=str(output / "adapter"),
        task=stage.task,
        steps=trainer.state.global_step,
        seconds=progress.seconds,
        train_loss=sum(losses) / len(losses),
        validation_loss=trainer.state.best_metric,
        best_step=trainer.state.best_global_step,
        tokens=progress.tokens,
        trained_tokens=progress.trained_tokens,
        tokens_per_second=progress.tokens / progress.step_seconds,
        peak_memory_bytes=peak_memory_bytes(),
        trainable_parameters=trainable,
        lr=trainer.args.learning_rate,
        labels=stage.labels,
        data={part: prepared.report.to_json() for part, prepared in stage.parts.items()},
        device=str(stage.model.device),
    )
    if processes.first():
        folder.write(output / SUMMARY, json.dumps(run.to_json(), indent=2))
    processes.wait()
    return run


def _purpose(recipe: Recipe, stage: Stage) -> Purpose:
    """Return how the rows of this run were read; the recipe has its open choices decided."""
    return Purpose(stage.task, stage.train.report.format, recipe.data.separator, stage.labels)


def _step(checkpoint: Path | None) -> int | None:
    return None if checkpoint is None else int(checkpoint.name.partition("-")[2])
