"""Adapters that act on what a model reads (`Context`): which model part they sit on, and what a model can hold of them.

One at a time reads the input, switched on or off for the whole batch: two would have to agree who stands first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lorakit.core.adapters import attached
from lorakit.core.fronts import base_class
from lorakit.core.method import Context, Method, Tokenized
from lorakit.core.reading import Reading, blocks_of, counts_columns, room_of
from lorakit.core.site import Site
from lorakit.errors import AttachError
from lorakit.inject.ledger import ledger_of
from lorakit.inject.skeleton import head_width


def reader(model: nn.Module) -> Site | None:
    """Return the site of the part of a transformers decoder or encoder that reads embeddings, or None without one."""
    inner: Any = _reads(getattr(model, "base_model", None))
    config = getattr(inner, "config", None)
    path = next((path for path, module in model.named_modules() if module is inner), None)
    if path is None or config is None or getattr(config, "is_encoder_decoder", False):
        return None
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    blocks = len(blocks_of(inner))
    if not (isinstance(width, int) and isinstance(heads, int) and blocks):
        return None
    if "inputs_embeds" not in _taken(inner):
        return None
    if getattr(inner.get_input_embeddings(), "embedding_dim", None) != width:
        return None
    keys = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):  # Falcon 7B
        keys = 1
    habits = frozenset() if "past_key_values" in _taken(inner) else frozenset({"no cache"})
    return Site(path, width, blocks, (keys, head_width(config) or width // heads), kind="model", habits=habits)


def _reads(inner: Any) -> Any:
    """Return the part that holds the blocks: the head of an OPT calls its `decoder` past the module around it."""
    inside = getattr(inner, "decoder", None)
    return inside if isinstance(inside, nn.Module) and {"input_ids", "inputs_embeds"} <= _taken(inside) else inner


def _taken(part: nn.Module) -> Set[str]:
    """Return the names of the arguments that a part's own forward takes."""
    return inspect.signature(base_class(part).forward).parameters.keys()


def refuse_context(model: nn.Module, placed: Iterable[tuple[Site, Method]]) -> None:
    """Raise `AttachError` for virtual positions a model has no room or no token for, or that others stand at."""
    for site, method in placed:
        if isinstance(method, Context):
            reads: Any = model.get_submodule(site.path)
            method.check(site)
            taken, room = sum(method.lengths()), room_of(reads)
            if room is not None and taken >= room:
                raise AttachError(
                    f"the {taken} virtual positions of {method.name} leave nothing of the model's {room} positions for "
                    "the input; use fewer"
                )
            rows = len(reads.get_input_embeddings().weight)
            ids = method.ids if isinstance(method, Tokenized) else ()
            if unknown := [i for i in ids if not 0 <= i < rows]:
                raise AttachError(
                    f"token id {unknown[0]} of {method.name} lies outside the model's {rows} embeddings; "
                    "use the tokenizer the model came with"
                )
            refuse_two([*acting(model), "the new one"])


def refuse_weight(name: str, weight: float | Tensor) -> None:
    """Raise `AttachError` for a weight other than 1 of an adapter that is read: there are no half positions."""
    if (isinstance(weight, Tensor) and weight.dim() > 0) or float(weight) != 1.0:
        raise AttachError(
            f"{name!r} stands at virtual positions, which are there or not for the whole batch; "
            "use it with weight 1.0, or leave it out"
        )


def refuse_two(names: list[str]) -> None:
    """Raise `AttachError` where two adapters would stand at virtual positions at once."""
    if len(names) > 1:
        raise AttachError(
            f"{names[0]!r} and {names[1]!r} both put virtual positions into the input, and their order would matter; "
            f"switch one off with use(), or detach it"
        )


def contexts(model: nn.Module) -> dict[str, Context]:
    """Return the attached methods that act on what the model reads, by the name of their adapter."""
    return _contexts(model, acting=False)


def acting(model: nn.Module) -> Mapping[str, Context]:
    """Return those of `contexts` that act now: none or one."""
    return _contexts(model, acting=True)


def virtual_positions(model: nn.Module) -> tuple[int, int]:
    """Return how many virtual positions the model reads before a row, and after its prompt."""
    return next((method.lengths() for method in acting(model).values()), (0, 0))


@contextmanager
def telling_ends(model: nn.Module, ends: Tensor) -> Iterator[None]:
    """Tell the model that reads virtual positions where each row's prompt ends, `(batch,)` columns, inside the block.

    The argument `prompt_ends` of a call says the same, but Bloom's head and others do not pass it on.
    """
    readers = [module for module in model.modules() if isinstance(module, Reading)]
    for one in readers:
        one.told_ends = ends
    try:
        yield
    finally:
        for one in readers:
            one.told_ends = None


def wants_even_rows(model: Any, columns: int) -> bool:
    """Return whether rows padded on the left, so many columns long, would be read otherwise than alone."""
    cached = any(method.where == "cache" for method in acting(model).values())
    return cached and counts_columns(model.config, columns + sum(virtual_positions(model)))


def _contexts(model: nn.Module, *, acting: bool) -> dict[str, Context]:
    """Return the contexts, without a walk through the model where no spec has one: every batch asks."""
    if not any(isinstance(spec.method, Context) for spec in ledger_of(model).specs.values()):
        return {}
    found = attached(model, acting=acting)
    return {name: adapter.method for name, adapter in found if isinstance(adapter.method, Context)}
