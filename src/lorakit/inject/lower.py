"""The frozen lower part of a model: the blocks below the lowest trained one, and what is computed before them.

Where nothing there is trained and nothing random, the hidden states in front of the lowest trained block are the same
each time a row is read. So they may be computed once, and given to the model afterwards: then its own forward runs as
ever, with its masks, positions and hooks, but the blocks below answer at once with what was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook

from lorakit.core.fronts import Front, put_in_front, take_from_front
from lorakit.core.reading import blocks_of
from lorakit.inject.context import acting

GIVEN = "frozen"
"""The argument of a model's call that holds the hidden states `(batch, length, d)` of its lower part."""
_PART = "_lorakit_lower"


@dataclass(eq=False)
class Lower:
    """The first `count` blocks of the stack at `path`; `given` is what they answer in this call, None as ever."""

    path: str
    blocks: list[nn.Module]
    of: int
    given: Tensor | None = None
    in_tuple: int = 0
    """The length of the tuple in which a block returns its hidden states, 0 without one."""

    @property
    def count(self) -> int:
        """Return how many blocks are frozen."""
        return len(self.blocks)

    def answer(self) -> Any:
        """Return what was given, in the form in which a block returns it."""
        return (self.given, *(None,) * (self.in_tuple - 1)) if self.in_tuple else self.given


@dataclass(eq=False)
class Passed:
    """What a call computed up to the lowest trained block: its hidden states, and the modules it went through."""

    hidden: Tensor
    below: dict[str, nn.Module] = field(default_factory=dict)


def lower_of(model: nn.Module, trained: Iterable[str]) -> Lower | str:
    """Return the blocks below the lowest of the `trained` modules or parameters (their paths), or why there are none.

    Of what is outside the stack only the embeddings are known to come first; `why_not_frozen` sees all of it.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "the model has an encoder and a decoder, not one stack of blocks"
    if context := next(iter(acting(model).values()), None):
        return f"{context.name} trains what the model reads, below every block"
    blocks = blocks_of(model)
    if not blocks:
        return "the model has no stack with a block of its own for each layer (blocks may be shared)"
    if len({id(p) for block in blocks for p in block.parameters()}) < sum(len(list(b.parameters())) for b in blocks):
        return "its blocks share parameters"
    paths = {id(module): path for path, module in model.named_modules()}
    stack = paths[id(blocks[0])].rpartition(".")[0]
    embedding = paths.get(id(cast(Any, model).get_input_embeddings()), "")
    lowest, name_of = len(blocks), ""
    for name in trained:
        if embedding and f"{name}.".startswith(f"{embedding}."):
            return f"{name}, the model's embedding, is trained"
        if stack.startswith(f"{name}." if name else ""):
            return "the adapter trains what the model reads, below every block"
        if name.startswith(f"{stack}."):
            place = int(name.removeprefix(f"{stack}.").partition(".")[0])
            lowest, name_of = (place, name) if place < lowest else (lowest, name_of)
    if lowest == 0:
        return f"{name_of} is trained, and it lies in the lowest block"
    return Lower(stack, blocks[:lowest], len(blocks))


def run_lower(model: nn.Module, lower: Lower, inputs: Mapping[str, Tensor]) -> Passed:
    """Run a model no further than its lower part goes."""
    paths = {id(module): path for path, module in model.named_modules()}
    passed: dict[str, nn.Module] = {}

    def entered(module: nn.Module, _: Any) -> None:
        if (path := paths.get(id(module))) is not None:
            passed[path] = module

    def left(_: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(output)

    hooks = [register_module_forward_pre_hook(entered), lower.blocks[-1].register_forward_hook(left)]
    try:
        model(**inputs)
    except _Reached as reached:
        output = reached.output
    else:
        raise AssertionError("a model calls its blocks")
    finally:
        for hook in hooks:
            hook.remove()
    lower.in_tuple = len(output) if isinstance(output, tuple) else 0
    hidden, rest = (output[0], output[1:]) if lower.in_tuple else (output, ())
    if any(part is not None for part in rest) or not isinstance(hidden, Tensor) or hidden.dim() != 3:
        return Passed(torch.empty(0), passed)
    return Passed(hidden, passed)


def why_not_frozen(model: nn.Module, lower: Lower, passed: Passed) -> str:
    """Return what of a lower part is trained, random or more than hidden states, or nothing."""
    if passed.hidden.dim() != 3:
        return f"the blocks of {lower.path} pass more on than hidden states"
    for path, module in passed.below.items():
        around = f"{lower.path}.".startswith(f"{path}." if path else "")
        inside = {"": module} if around else dict(module.named_modules())
        own = module.named_parameters(recurse=not around)
        if name := next((name for name, parameter in own if parameter.requires_grad), None):
            return f"{path}.{name} is trained, and computed before the blocks".removeprefix(".")
        for name, part in inside.items():
            if why := _changes(part):
                return f"{'.'.join(filter(None, (path, name))) or type(model).__name__} {why}"
    for number, block in enumerate(lower.blocks):
        for name, part in block.named_modules():
            if why := _changes(part):
                return f"{lower.path}.{number}.{name} {why}"
    return ""


@contextmanager
def answering(model: nn.Module, lower: Lower) -> Iterator[None]:
    """Let the lower part answer calls with what they give it; calls that give nothing run as ever."""

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        lower.given = kwargs.get(GIVEN)
        return args, {name: value for name, value in kwargs.items() if name != GIVEN}

    def forget(*_: Any) -> None:
        lower.given = None

    hooks = [
        model.register_forward_pre_hook(take, with_kwargs=True),
        model.register_forward_hook(forget, always_call=True),
    ]
    for block in lower.blocks:
        setattr(block, _PART, lower)
        put_in_front(block, _Answering)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for block in lower.blocks:
            take_from_front(block, _Answering)
            delattr(block, _PART)


def values_of(lower: Lower, passed: Passed) -> Iterator[Tensor]:
    """Yield the tensors a lower part computes with, wherever their bytes can be read."""
    outside = [m for path, m in passed.below.items() if not f"{lower.path}.".startswith(f"{path}." if path else "")]
    for module in dict.fromkeys((*outside, *lower.blocks)):
        for tensor in chain(module.parameters(), module.buffers()):
            if type(tensor.data) is Tensor:
                yield tensor.data


class _Answering(Front):
    """Mixin in front of a block of the lower part: it answers with what was given, where something was."""

    outer, renames = True, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        lower: Lower = getattr(self, _PART)
        return super().forward(*args, **kwargs) if lower.given is None else lower.answer()  # type: ignore[misc]


class _Reached(Exception):
    """The lower part is through."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _changes(module: nn.Module) -> str:
    """Return why a module's output differs from one training step to the next, or nothing."""
    if isinstance(module, _DropoutNd):
        return f"drops {module.p:.0%} of what it reads" if module.p > 0 else ""
    if isinstance(module, _NormBase) and module.track_running_stats:
        return "keeps statistics of what it reads"
    rates = ((name, value) for name, value in vars(module).items() if "drop" in name and isinstance(value, float))
    return next((f"has {name} {value:g}" for name, value in rates if value > 0), "")
