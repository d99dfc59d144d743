"""`plan(recipe) -> PlannedRun`: what a recipe will train, hold and take, before a weight is loaded.

What is trained is counted from the declarations that attach allocates from; a step is rehearsed on tensors without
values; the data is read and tokenised as training would. Only time is a guess, until a few steps are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from lorakit.core.init import init_of
from lorakit.core.method import Scheduled
from lorakit.core.site import layer_of
from lorakit.core.spec import AdapterSpec
from lorakit.core.targets import Match, parameters_named, resolve
from lorakit.data.packing import example_lengths, row_lengths, tokens_of
from lorakit.data.preview import example
from lorakit.errors import SpecError
from lorakit.inject.sites import sites
from lorakit.inject.skeleton import head_width, shapes_of, size_of, ties_of
from lorakit.planning.advice import Advice, Choice, Facts, advise
from lorakit.planning.counting import count, fused_experts, roles
from lorakit.planning.devices import OVERHEAD, Device
from lorakit.planning.fitting import VERDICTS, Fit, fits
from lorakit.planning.lint import lint
from lorakit.planning.memory import Forecast, Parts
from lorakit.planning.pace import Bill, Duration, bill, from_throughput
from lorakit.planning.sharding import per_device
from lorakit.planning.surprises import surprises
from lorakit.training.arguments import make_plan, share_of
from lorakit.training.base import build_empty, choose_device, choose_dtype, quiet, times_fp32
from lorakit.training.forecast import Load, lower_flops
from lorakit.training.frozen import lower_or_refuse, needed_bytes
from lorakit.training.limits import Limits, limits
from lorakit.training.order import padded_tokens
from lorakit.training.phases import CHOICES, Ways, ways
from lorakit.training.planned import HERE, Pace, PlannedRun, Time, Where
from lorakit.training.quantised import settings_of
from lorakit.training.recipe import QuantSection
from lorakit.training.stage import BATCH_TOKENS, build_stage

if TYPE_CHECKING:
    from lorakit.core.site import Skeleton
    from lorakit.training.recipe import Recipe
    from lorakit.training.stage import Stage

MARKED_SLOWER = 2.0
"""A dtype in which a product takes so many times as long as in fp32 is said to be slow."""
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def calibrated(found: PlannedRun, recipe: Recipe) -> PlannedRun:
    """Return a plan whose time, and whose memory where a device counts it, come from a few steps that were run.

    What was measured beyond the forecast is overhead of the device; the forecast of every other way to run is moved by
    as much. Several devices are taken to be as many times as fast as the one that was measured.
    """
    from lorakit.training.calibration import calibrate

    measured = calibrate(recipe)
    where = found.where
    took = measured.duration.shared(where.count)
    pace = replace(found.pace, times={HERE: Time(took, _bill(where, took))})
    if measured.peak_bytes is None:
        return replace(found, pace=pace)
    beyond = Parts(overhead=max(0, measured.peak_bytes - found.memory.step.total))
    moved = {name: one.map(lambda parts: parts + beyond) for name, one in found.ways.items()}
    depth = max(found.counts.depths.values(), default=0)
    return replace(
        found,
        pace=pace,
        memory=moved[found.own],
        ways=moved,
        fits=_fits(where, moved, depth, found.divided, found.load.dtype),
    )


def plan(recipe: Recipe, where: Where | None = None, *, model: Any = None) -> PlannedRun:
    """Return what a run of this recipe will be.

    Args:
        recipe: from `load_recipe` or `make_recipe`; without training data a batch is as long as it may be.
        where: the devices, by default the common ones, each alone.
        model: a base on the meta device, for one that is only a configuration.

    Raises:
        LorakitError: whatever training would raise before its first step.
    """
    if recipe.train.device == "cpu" and not (where and where.devices):
        _refuse_on_a_cpu(recipe)
    with quiet(data=bool(recipe.data.train)):
        stage = build_stage(recipe, empty=True) if recipe.data.train and model is None else None
        if model is None:
            task: Any = "causal-lm" if recipe.task == "auto" else recipe.task
            model = build_empty(recipe.model, task=task, labels=recipe.data.labels) if stage is None else stage.model
        return _plan(recipe, _shared(recipe, where or Where()), model, stage)


def _shared(recipe: Recipe, where: Where) -> Where:
    """Return where a run is planned, with how its devices share the work: as somebody asked, or as the recipe says."""
    named = where.strategy or ("single" if where.count == 1 else recipe.train.parallel)
    return replace(where, strategy=named)


def _refuse_on_a_cpu(recipe: Recipe) -> None:
    """Raise what training would raise of a step that cannot be gone on the CPU which the recipe names."""
    from lorakit.training.step import refuse_step

    device = choose_device(recipe.train.device)
    choose_dtype(recipe.train.dtype, device)
    refuse_step(recipe.train, device)


def _plan(recipe: Recipe, where: Where, model: Any, stage: Stage | None) -> PlannedRun:
    skeleton = sites(model)
    depth = max(skeleton.depths.values(), default=0)
    heads = tuple(sorted(skeleton.heads)) if recipe.task == "classification" else ()
    spec = recipe.adapter.spec(seed=0, depth=depth, heads=heads) if stage is None else stage.spec
    shapes, ties = shapes_of(model), ties_of(model)
    counts = count(spec, skeleton, shapes, ties)
    quant = recipe.quant or settings_of(model.config)
    _refuse_correction(spec, quant)
    load = replace(_load(recipe, model, stage), quant=quant)
    if stage is not None and where.strategy != "zero3":
        share_of(make_plan(recipe, stage), where.count)  # raises where they cannot share a step
    if stage is not None and spec.method is not None and isinstance(spec.method, Scheduled):
        from lorakit.training.rank_schedule import refuse_schedule  # beside the Trainer, which takes a second

        refuse_schedule(model, spec, make_plan(recipe, stage).steps)
    trained = [key for keys in parameters_named(spec.train, list(shapes), skeleton, spec.targets.layers).values()
               for key in keys]  # fmt: skip
    matches = resolve(spec, skeleton)
    kept = _kept(recipe, model, stage, load, [*(match.site.path for match in matches), *trained])
    found = ways(model, skeleton, spec, load, trained)
    divided = sum(
        prod(shape)
        for name, shape in shapes.items()
        if layer_of(name) is not None and len(shape) > 1 and name not in ties and name not in trained
    )
    return PlannedRun(
        model=recipe.model,
        dtype=DTYPES[load.dtype],
        quant=None if quant is None else quant.kind,
        method=recipe.adapter.method,
        counts=counts,
        load=load,
        why="" if stage is None else stage.why,
        memory=found.forecasts[found.own],
        ways=found.forecasts,
        own=found.own,
        divided=divided,
        fits=_fits(where, found.forecasts, depth, divided, load.dtype),
        pace=replace(_pace(recipe, where, found, stage, model, spec, load), cache_bytes=kept),
        where=where,
        limits=_limits(where, found, model, spec, load, depth),
        data={} if stage is None else {name: part.report for name, part in stage.parts.items()},
        lengths=() if stage is None else tuple(sorted(example_lengths(stage.train.dataset))),
        example=() if stage is None else tuple(example(stage.train, stage.tokenizer)),
        advice=_advice(recipe, spec, matches, model, skeleton, stage),
        findings=lint(spec, matches, tied=bool(ties), heads=skeleton.heads, trained=trained,
                      depths=skeleton.depths),
        warnings=(*map(str, roles(counts, skeleton)), *_unread(recipe, stage), *_sharing(where),
                  *_guessed(found), *fused_experts(shapes, counts.total_parameters, trained),
                  *_narrow(recipe, stage, load.dtype),
                  *surprises(matches, skeleton, load.dtype, head_width(model.config))),
    )  # fmt: skip


def _refuse_correction(spec: AdapterSpec, quant: QuantSection | None) -> None:
    """Raise `SpecError` for a start from what quantisation took, on a base that is not quantised."""
    init = None if spec.method is None else init_of(spec.method)
    if quant is None and init is not None and init.needs == "weight":
        raise SpecError(f"init {init.name} corrects a quantised base, and this one is dense; add quant: nf4, or use "
                        "init: pissa")  # fmt: skip


def _unread(recipe: Recipe, stage: Stage | None) -> list[str]:
    """Say of data beside a base that is only a configuration that nobody can tell their tokens."""
    if stage is not None or not recipe.data.train:
        return []
    return [
        f"{recipe.data.train} was not read, as {recipe.model} is only a configuration and has no tokenizer: tokens, "
        "batches and work are those of rows as long as they may be, not of the data; plan the base itself for them"
    ]


def _sharing(where: Where) -> list[str]:
    """Say what a plan of many devices is of, where the base is divided within each machine or not at all."""
    match where.strategy:
        case "hybrid":
            return ["train.parallel: hybrid divides the base within each machine, and this is the plan of one with "
                    f"{where.count} devices; of machines with fewer, plan with that many (--gpus)"]  # fmt: skip
        case "ddp":
            return [
                "train.parallel: ddp leaves the whole base on each device; fsdp divides it (--strategy fsdp plans it)"
            ]
        case _:
            return []


def _guessed(found: Ways) -> list[str]:
    where = "activations, logits and FLOPs are by the formulas of arXiv 2205.05198, for full fine-tuning"
    lacking = f", but {found.lacking}" if found.lacking else ""
    return [f"{found.guessed}; {where}{lacking}"] if found.guessed else []


def _load(recipe: Recipe, model: Any, stage: Stage | None) -> Load:
    """Return the heaviest micro-batch: as long as the longest row, or as the recipe allows where there is no data."""
    train = recipe.train
    if stage is None:
        length = min(recipe.data.max_length, size_of(model.config, "max_position_embeddings") or recipe.data.max_length)
        rows, packed = train.batch_size or max(1, (train.batch_tokens or BATCH_TOKENS) // length), False
    else:
        length = stage.train.report.row_length or max(row_lengths(stage.train.dataset))
        rows, packed = min(stage.batch_rows, len(stage.train.dataset)), stage.packed
    shared = stage is not None and "branches" in stage.train.dataset.column_names
    classes = recipe.task == "classification" or (stage is not None and stage.task == "classification")
    return Load(rows, length, packed, shared, classes, train.checkpointing, _dtype(recipe), recipe.quant,
                train.optimizer, train.fused and not train.compile, train.offload_activations)  # fmt: skip


def _dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype of the run: what the recipe says; else that of this machine, where `device` names no other.

    A CUDA device that is not here is taken to have bf16, as all since 2020 do.
    """
    named, asked = {name: dtype for dtype, name in DTYPES.items()}, recipe.train.device
    if recipe.train.dtype != "auto":
        return named[recipe.train.dtype]
    if asked == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16
    return choose_dtype("auto", choose_device("auto") if asked == "auto" else torch.device(asked))


def _narrow(recipe: Recipe, stage: Stage | None, dtype: torch.dtype) -> list[str]:
    """Say of 16 bits on a processor that has no arithmetic for them that they save memory and cost time."""
    asked = recipe.train.device
    if stage is None or dtype.itemsize != 2 or asked.startswith("cuda") or choose_device(asked).type != "cpu":
        return []
    if (times := times_fp32(dtype)) < MARKED_SLOWER:
        return []
    return [
        f"this processor has no arithmetic in {DTYPES[dtype]}: a product takes about {times:.0f} times as long as in "
        "fp32; use dtype: fp32, with quant: nf4 where memory is short"
    ]


def undivided(weights: int, divided: int, dtype: torch.dtype, way: str) -> int:
    """Return the bytes of weights that stay on every device under fsdp; of 4 bits the scales of their blocks stay."""
    return max(0, weights - (divided // 2 if "4 bits" in way else divided * dtype.itemsize))


def _held(where: Where, forecast: Forecast, depth: int, divided: int, dtype: torch.dtype, way: str) -> Parts:
    """Return what each device holds at the peak of a run, what the device itself needs counted."""
    peak = forecast.phases[max(("load", "step", "evaluation", "checkpoint"), key=lambda n: forecast.phases[n].total)]
    layer = (peak.weights + peak.adapters) // max(1, depth)
    gradients = peak.gradients // max(1, depth)
    stays = undivided(peak.weights, divided, dtype, way)
    shared = per_device(
        peak, where.count, where.strategy or "single", layer=layer, layer_gradients=gradients, undivided=stays
    )
    return shared + Parts(overhead=OVERHEAD)


def _fits(
    where: Where, forecasts: Mapping[str, Forecast], depth: int, divided: int, dtype: torch.dtype
) -> tuple[Fit, ...]:
    """Return the verdict on each device."""
    held = {name: _held(where, forecast, depth, divided, dtype, name) for name, forecast in forecasts.items()}
    return tuple(fits(one, held) for one in where.chosen)


def _limits(where: Where, found: Ways, model: Any, spec: AdapterSpec, load: Load, depth: int) -> dict[str, Limits]:
    """Return the largest batch and context on each device that was named, in the way its verdict recommends.

    That is the recipe's own where it fits; where no way does, the one that needs least.
    """
    if not where.devices or where.count > 1 or found.guessed:
        return {}
    held = {name: _held(where, forecast, depth, 0, load.dtype, name) for name, forecast in found.forecasts.items()}
    rooms: dict[str, list[Device]] = {}
    for one in where.chosen:
        fitting = [name for name in (found.own, *VERDICTS) if name in held and held[name].total <= one.memory]
        way = fitting[0] if fitting else min(held, key=lambda name: held[name].total)
        rooms.setdefault(way, []).append(one)
    largest: dict[str, Limits] = {}
    for way, devices in rooms.items():
        checkpointing, packed = CHOICES[way]
        quant = (load.quant or QuantSection()) if packed else None
        asked = replace(load, checkpointing=checkpointing and (load.checkpointing or True), quant=quant)
        most = limits(model, spec, asked, [one.memory - OVERHEAD for one in devices])
        largest |= {one.name: replace(limit, way=way) for one, limit in zip(devices, most, strict=True)}
    return {one.name: largest[one.name] for one in where.chosen}


def _pace(
    recipe: Recipe, where: Where, found: Ways, stage: Stage | None, model: Any, spec: AdapterSpec, load: Load
) -> Pace:
    """Return what the run computes; how long it takes only on devices that were named."""
    cached = recipe.train.cache_frozen and not found.guessed
    lower = lower_flops(model, spec, load) if cached else 0
    each, accumulation = found.rehearsal.flops - lower, recipe.train.accumulation
    if stage is None:
        return Pace(each * accumulation)
    numbers, dtype = make_plan(recipe, stage), DTYPES[load.dtype]
    padded = load.rows * load.length
    tokens = round(padded_tokens(recipe, stage) * numbers.steps / numbers.steps_per_epoch)
    once = round(lower / padded * sum(tokens_of(part.dataset) for part in stage.parts.values()))
    times = {}
    for one in where.chosen if where.devices else ():
        if one.knows(dtype):
            took = from_throughput(each / padded * tokens + once, one, dtype, where.count)
            times[one.name] = Time(took, _bill(where, took))
    return Pace(each * accumulation, numbers.steps, tokens, times, cache_flops=once)


def _kept(recipe: Recipe, model: Any, stage: Stage | None, load: Load, trained: list[str]) -> int:
    """Return the bytes that `train.cache_frozen` writes of the rows, or refuse as the run would."""
    if not recipe.train.cache_frozen:
        return 0
    lower_or_refuse(model, trained)
    rows = [] if stage is None else [part.dataset for part in stage.parts.values()]
    return needed_bytes(rows, size_of(model.config, "hidden_size") or 0, load.dtype)


def _bill(where: Where, took: Duration) -> Bill:
    return bill(took, devices=where.count, watts=where.watts, price_per_kwh=where.price_per_kwh,
                price_per_hour=where.price_per_hour)  # fmt: skip


def _advice(
    recipe: Recipe, spec: AdapterSpec, matches: Sequence[Match], model: Any, skeleton: Skeleton, stage: Stage | None
) -> tuple[Advice, ...]:
    """Return the advice for this base and this data, beside what the recipe itself says."""
    config, method = model.config, spec.method
    rank = getattr(method, "rank", None) if method is not None and method.name in ("lora", "lora-fa") else None
    linear = [s for s in skeleton.sites if s.kind in ("linear", "transposed-linear") and s.path not in skeleton.heads]
    report = None if stage is None else stage.train.report
    task = "classification" if stage is not None and stage.task == "classification" else "causal-lm"
    facts = Facts(
        hidden=size_of(config, "hidden_size"),
        family=str(config.model_type),
        blocks=max(skeleton.depths.values(), default=0),
        per_rank=None if rank is None else sum(m.site.out + m.site.in_ for m in matches),
        everywhere=sum(s.out + s.in_ for s in linear),
        rows=None if report is None else report.kept,
        tokens=None if report is None or task == "classification" else report.trained_tokens,
        task=task,  # type: ignore[arg-type]
        classes=len(stage.labels) if stage is not None and stage.labels else None,
    )
    targets = recipe.adapter.targets
    train = recipe.train
    choice = Choice(
        rank=rank,
        alpha=getattr(method, "alpha", None),
        stabilised=bool(getattr(method, "stabilised", False)),
        targets=(targets,) if isinstance(targets, str) else targets,
        lr=None if train.lr == "auto" else train.lr,
        dropout=spec.dropout,
        batch=None if stage is None or stage.packed else stage.batch_rows * train.accumulation,
        epochs=train.epochs,
        steps=train.steps,
        layerwise=recipe.adapter.layerwise,
        full="*" in spec.train,
    )
    return advise(facts, choice)
