"""What a run works on, made from its recipe before the first step: model, adapter, data, and the size of a batch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lorakit.core.method import Context, Method, Tokenized
from lorakit.core.reading import room_of
from lorakit.core.spec import AdapterSpec
from lorakit.core.targets import parameters_named, resolve, select
from lorakit.data import (
    PackRule,
    Prepared,
    detect,
    packing_is_isolated,
    prepare,
    prepare_classification,
    read_rows,
    refuse_leaky_packing,
    why_not_shared,
)
from lorakit.data.formats import named
from lorakit.data.packing import row_lengths
from lorakit.errors import LorakitError, RecipeError
from lorakit.inject.context import virtual_positions
from lorakit.inject.sites import sites
from lorakit.inject.skeleton import size_of
from lorakit.training import processes
from lorakit.training.base import Loaded, Task, load_empty, load_model, load_tokenizer, packing_of
from lorakit.training.miniature import miniature
from lorakit.training.recipe import DataSection, Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 4096
"""Tokens a step, where a recipe says nothing: the "batch of about 16 rows" of the field, in the unit that costs."""
BATCH_ROWS = 16
WORTH = 0.1
"""Share of the tokens that sharing prompts has to save to be done by itself: a step then holds fewer prompts."""


@dataclass(frozen=True, eq=False)
class Stage:
    """Everything a run needs; `packed` says whether rows hold several examples, `why` for what reason."""

    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: AdapterSpec
    train: Prepared
    validation: Prepared | None
    batch_rows: int
    packed: bool
    why: str

    @property
    def parts(self) -> dict[str, Prepared]:
        """Return the data there is: `train`, and `validation` where there is some."""
        return {"train": self.train} | ({} if self.validation is None else {"validation": self.validation})

    @property
    def one_shape(self) -> bool:
        """Return whether all training rows are of one length, as packed ones need not be."""
        return len(set(row_lengths(self.train.dataset))) == 1

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the class names of a classifier, else nothing."""
        return self.train.labels or ()


def build_stage(recipe: Recipe, *, empty: bool = False) -> Stage:
    """Load the base, read the data, decide how rows become batches; the adapter is not attached yet.

    With `empty` the base has no weights, on the meta device: enough to plan with.

    Raises:
        RecipeError: no training data named.
        LorakitError, DeviceError, DataError: from the base and the data.
    """
    if recipe.data.train is None:
        raise RecipeError("the recipe names no training data; set data.train to a file, a folder or a dataset's name")
    task = task_of(recipe.data, recipe.task)
    if task == "causal-lm":
        _refuse_labels(recipe.data)
    return (_classifier if task == "classification" else _language_model)(recipe, empty)


def _load(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, task: Task, empty: bool, labels: tuple[str, ...] = ()
) -> Loaded:
    if empty:
        return load_empty(recipe.model, tokenizer, task=task, labels=labels)
    on_host = recipe.train.parallel != "ddp" and processes.count() > 1  # which divides it before it goes to a device
    return load_model(recipe.model, tokenizer, task=task, labels=labels, dtype=recipe.train.dtype,
                      device=recipe.train.device, packing=packing_of(recipe.quant), on_host=on_host)  # fmt: skip


def _refuse_labels(data: DataSection) -> None:
    """Raise `RecipeError` for class names beside rows without a label: nothing would read them."""
    assert data.train is not None
    if data.labels and (form := named(data.format, read_rows(data.train, data.train_split)).name) != "classification":
        raise RecipeError(
            f"data.labels names classes, and the rows have no label (format {form}); leave data.labels out"
        )


def _refuse_text_options(data: DataSection) -> None:
    """Raise `RecipeError` for options of rows that a language model reads, which a classifier's do not have."""
    asked = {
        "packing: always": data.packing == "always",
        "share_prompts: always": data.share_prompts == "always",
        "loss: all": data.loss == "all",
        "separator": data.separator is not None,
    }
    if idle := [f"data.{option}" for option, set_ in asked.items() if set_]:
        raise RecipeError(
            f"{', '.join(idle)}: nothing of a classifier, which reads one text a row and learns its label; leave it out"
        )


def task_of(data: DataSection, task: str = "auto") -> Task:
    """Return the task a recipe means: rows with a label are classified, all others are continued."""
    if task == "auto":
        format = data.format
        if format == "auto":
            source, split = (data.train, data.train_split) if data.train else (data.validation, data.validation_split)
            assert source is not None
            return task_named(detect(read_rows(source, split)).name)
        return task_named(format)
    return task_named(task)


def task_named(format: str) -> Task:
    """Return the task of a format (or of a task's own name)."""
    return "classification" if format == "classification" else "causal-lm"


def decided(recipe: Recipe, stage: Stage) -> Recipe:
    """Return the recipe with what the data decided written out, so that evaluation and generation need not guess."""
    separator = stage.train.report.separator_used if stage.task == "causal-lm" else recipe.data.separator
    return fill(recipe, stage.task, separator, stage.labels)


def fill(recipe: Recipe, task: Task, separator: str | None, labels: tuple[str, ...]) -> Recipe:
    """Return the recipe with its open choices filled in; what it says stays."""
    data = recipe.data
    open_ = {"separator": separator if data.separator is None else data.separator, "labels": data.labels or labels}
    task = task if recipe.task == "auto" else recipe.task
    return recipe.model_copy(update={"task": task, "data": data.model_copy(update=open_)})


def target_counts(stage: Stage) -> dict[str, int]:
    """Return how many modules each pattern of the targets caught, in the order of the patterns."""
    caught = Counter(match.pattern for match in resolve(stage.spec, sites(stage.model)))
    patterns = caught if isinstance(stage.spec.method, Context) else stage.spec.targets.include
    return {pattern: caught[pattern] for pattern in patterns}


class Longest(NamedTuple):
    """How many tokens a row may have, and what sets that and can be done about it, in words."""

    tokens: int
    limit: str


def longest_row(
    data: DataSection, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, method: Method | None = None
) -> Longest:
    """Return the longest row: what the recipe and the tokenizer allow, and the model, if it is known, can read.

    The virtual positions of the adapter that the model reads, or of the `method` it will get, are taken off.
    """
    rows = [
        Longest(data.max_length, f"max_length is {data.max_length}: raise it"),
        Longest(tokenizer.model_max_length, f"the tokenizer allows {tokenizer.model_max_length}: shorten the rows"),
    ]
    if model is not None and (positions := size_of(model.config, "max_position_embeddings")):
        taken = sum(method.lengths() if isinstance(method, Context) else virtual_positions(model))
        positions = min(positions, room_of(model.base_model) or positions)
        left = positions - taken
        of = f"leave {max(left, 0) or 'nothing'} of the model's {positions} positions"
        if left < 2:
            raise RecipeError(f"the {taken} virtual positions of the adapter {of} for the rows; use fewer")
        used = f"the {taken} virtual positions of the adapter {of}: use fewer"
        rows.insert(0, Longest(left, used if taken else f"the model has {positions} positions: shorten the rows"))
    return min(rows, key=lambda row: row.tokens)


def prepare_text(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    source: str | Dataset,
    split: str | None,
    *,
    most: Longest,
    separator: str | None,
    packing: PackRule | None = None,
    seed: int = 0,
) -> Prepared:
    """Prepare rows for a language model as the recipe says."""
    return prepare(
        source,
        tokenizer,
        max_length=most.tokens,
        limit=most.limit,
        format=data.format,
        loss=data.loss,
        overlong="drop" if data.overlong == "auto" else data.overlong,
        packing=packing,
        separator=separator,
        seed=seed,
        split=split,
        vocab_size=rows_of(model),
    )


def prepare_labelled(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    source: str | Dataset,
    split: str | None,
    *,
    most: Longest,
    labels: tuple[str, ...] | None,
    vocab_size: int | None = None,
) -> Prepared:
    """Prepare rows for a classifier as the recipe says; a long text is cut unless it says otherwise."""
    if data.overlong == "split":
        raise RecipeError("data.overlong: split is for plain text; a labelled row can be cut or dropped")
    overlong = "cut" if data.overlong == "auto" else data.overlong
    return prepare_classification(
        source,
        tokenizer,
        max_length=most.tokens,
        limit=most.limit,
        labels=labels,
        overlong=overlong,
        split=split,
        vocab_size=vocab_size,
    )


def rows_of(model: PreTrainedModel) -> int:
    """Return how many token ids a model has rows for."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _language_model(recipe: Recipe, empty: bool) -> Stage:
    data, train = recipe.data, recipe.train
    tokenizer = load_tokenizer(recipe.model)
    loaded = _load(recipe, tokenizer, "causal-lm", empty)
    loaded.model.config.use_cache = False
    packed, why = _packing(recipe, loaded.model)
    spec = _spec(recipe, loaded.model, tokenizer)
    most = longest_row(data, loaded.model, tokenizer, spec.method)
    if data.share_prompts == "always" and not packed:
        raise RecipeError(f"data.share_prompts: always needs packed rows, and there are none: {why}; set it to auto")
    tokens = train.batch_tokens or BATCH_TOKENS
    if packed and train.batch_size is None and tokens < most.tokens:
        most = Longest(tokens, f"a step has {tokens} tokens (train.batch_tokens): raise it")
    rule, alone = _rule(recipe, loaded.model, most.tokens, tokens) if packed else (None, "")
    assert data.train is not None
    read = partial(prepare_text, data, tokenizer, loaded.model, most=most)
    rows = read(data.train, data.train_split, separator=data.separator, packing=rule, seed=train.seed)
    validation = None
    if data.validation is not None:
        if rule is not None:  # rows as long as the training's, unless an example of its own is longer
            rule = replace(rule, room=rows.report.row_length or most.tokens, balance=None)
        validation = read(data.validation, data.validation_split, separator=rows.report.separator_used, packing=rule)
    size = train.batch_size or (rows.together if packed else max(1, tokens // min(most.tokens, rows.report.longest)))
    if packed and not alone:
        gain = rows.report.tokens_shared / rows.report.tokens
        found = f"shared prompts save {gain:.0%}" if gain else f"shared prompts would not save {WORTH:.0%}"
        why = f"{why}; {found} of the tokens"
    elif packed:
        why = f"{why}; prompts are not shared: {alone}"
    return Stage("causal-lm", loaded.model, tokenizer, spec, rows, validation, size, packed, why)


def _classifier(recipe: Recipe, empty: bool) -> Stage:
    data, train = recipe.data, recipe.train
    _refuse_text_options(data)
    tokenizer = load_tokenizer(recipe.model)
    assert data.train is not None
    most = longest_row(data, None, tokenizer)
    rows = prepare_labelled(data, tokenizer, data.train, data.train_split, most=most, labels=data.labels or None)
    labels = rows.labels or ()
    loaded = _load(recipe, tokenizer, "classification", empty, labels)
    most = longest_row(data, loaded.model, tokenizer, recipe.adapter.build_method())
    if rows.report.longest > most.tokens or rows_of(loaded.model) < len(tokenizer):
        rows = prepare_labelled(data, tokenizer, data.train, data.train_split, most=most, labels=labels,
                                vocab_size=rows_of(loaded.model))  # fmt: skip
    validation = None
    if data.validation is not None:
        validation = prepare_labelled(data, tokenizer, data.validation, data.validation_split, most=most,
                                      labels=labels, vocab_size=rows_of(loaded.model))  # fmt: skip
    by_tokens = (
        max(1, train.batch_tokens // min(most.tokens, rows.report.longest)) if train.batch_tokens else BATCH_ROWS
    )
    heads = tuple(dict.fromkeys((*sorted(sites(loaded.model).heads), *loaded.fresh)))
    spec = _spec(recipe, loaded.model, tokenizer, heads)
    why = "a classifier reads one text a row"
    return Stage("classification", loaded.model, tokenizer, spec, rows, validation, train.batch_size or by_tokens,
                 False, why)  # fmt: skip


def _spec(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heads: tuple[str, ...] = ()
) -> AdapterSpec:
    """Return the recipe's spec; what is trained whole without the user's word for it is left out of the targets."""
    skeleton = sites(model)
    spec = recipe.adapter.spec(seed=recipe.train.seed, heads=heads, depth=max(skeleton.depths.values(), default=0))
    method = spec.method
    if method is not None and isinstance(method, Tokenized):
        spec = replace(spec, method=method.tokenized(partial(tokenizer.encode, add_special_tokens=False)))
    if method is None or isinstance(method, Context):
        return spec
    own = (recipe.adapter.train,) if isinstance(recipe.adapter.train, str) else recipe.adapter.train
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    named = {key.rpartition(".")[0] for keys in parameters_named(own, parameters, skeleton).values() for key in keys}
    added = tuple(f"{head}." for head in heads if head not in named)
    found = select(spec.targets, skeleton, blocks="module" in method.kinds)
    both = dict.fromkeys(site.path for site, _ in found if f"{site.path}.".startswith(added))
    return replace(spec, targets=replace(spec.targets, exclude=(*spec.targets.exclude, *both)))


def _packing(recipe: Recipe, model: PreTrainedModel) -> tuple[bool, str]:
    """Return whether to pack, and why; `always` is refused where examples would see each other."""
    if recipe.data.packing == "never":
        return False, "data.packing is never"
    if isinstance(method := recipe.adapter.build_method(), Context):
        if recipe.data.packing == "always":
            raise RecipeError(f"{method.name} puts virtual positions at the start of a row; set data.packing: never")
        return False, f"{method.name} puts virtual positions at the start of a row, so each example has its own"
    if recipe.data.packing == "always":
        refuse_leaky_packing(model)
        return True, "data.packing is always"
    if recipe.train.batch_size is not None:
        return False, "train.batch_size counts examples, so each has its own row"
    try:
        measured = _with_values(model)
    except LorakitError as error:
        return False, f"whether packed examples would see each other is measured when the run starts: {error}"
    if not packing_is_isolated(measured):
        attention = getattr(model.config, "_attn_implementation", "unknown")
        return False, f"packed examples would see each other in this model with attention '{attention}'"
    return True, "packed examples do not see each other in this model (measured)"


def _with_values(model: PreTrainedModel) -> PreTrainedModel:
    return miniature(model) if next(model.parameters()).is_meta else model


def _rule(recipe: Recipe, model: PreTrainedModel, longest: int, tokens: int) -> tuple[PackRule, str]:
    """Return how to pack examples of at most `longest` tokens, and why they cannot share prompts ("" if they can).

    Attention costs 2 * width multiply-adds a block for each place of a row, the rest of a token one for each weight
    (arXiv 2001.08361, table 1); measured on the bundled base, a row length of 1,400 doubles a step, and so it says.
    """
    share, text = recipe.data.share_prompts, model.config.get_text_config()
    if share == "never" or recipe.data.loss == "all":
        alone = "data.share_prompts is never" if share == "never" else "data.loss: all trains them, each as often"
    else:
        alone = why_not_shared(_with_values(model), longest)
    if share == "always" and alone:
        raise RecipeError(f"data.share_prompts: always is not possible here: {alone}; set it to auto")
    least = None if alone else WORTH if share == "auto" else -math.inf
    if recipe.train.batch_size is not None:  # it counts rows, as long as they may be
        return PackRule(longest, share=least), alone
    matrices = sum(site.out * site.fan_in for site in sites(model).sites if site.kind != "embedding")
    width = 2 * getattr(text, "num_hidden_layers", 0) * getattr(text, "hidden_size", 0)
    positions = getattr(text, "max_position_embeddings", None) or longest
    return PackRule(tokens, matrices / width if width else math.inf, max(longest, positions), least), alone
