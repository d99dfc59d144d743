"""One training step of the real model code on tensors without values: what it will hold, before a weight is loaded.

Nothing is estimated that can be run. The model is built from its configuration with fake tensors, which have a shape, a
dtype and a device and no memory; the adapter is attached, the loss computed, the backward and the optimizer run, as in
training. Every piece of memory that comes to life and goes is counted, by what it is for.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from lorakit.core.site import layer_of
from lorakit.planning.memory import Parts, optimizer_bytes


def _grouped_flops(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Return the FLOPs of a product of experts: each row meets one of them, forward and for either gradient."""
    flops: int = 2 * prod(a) * b[-1] if len(a) == len(b) == 2 else 2 * prod(out_shape) * a[-1]
    return flops


def _added_flops(added_to: Any, a: Any, b: Any, **_: Any) -> int:
    """Return the FLOPs of a product that is added to something in place."""
    return 2 * int(prod(a)) * int(b[-1])


def _attention_flops(*shapes: Any, **_: Any) -> Any:
    """Return the FLOPs of `q k^T` and of its product with v, all of them where half are masked too, as torch does."""
    return sdpa_flop_count(*shapes[:3])  # type: ignore[no-untyped-call]


def _attention_backward_flops(*shapes: Any, **_: Any) -> Any:
    """Return the FLOPs of five such products: the scores once more, and the gradients of what they are made of."""
    return sdpa_backward_flop_count(*shapes[:4])  # type: ignore[no-untyped-call]


_DEVICE = torch.ops.prim.device.default
_FORMULAS: dict[str, Any] = {
    "_grouped_mm": _grouped_flops,
    "addmm_": _added_flops,
    "_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward_flops,
}
for _name, _formula in _FORMULAS.items():  # torch has none for these yet
    if (_op := getattr(torch.ops.aten, _name, None)) is not None and _op not in flop_registry:
        register_flop_formula(_op)(_formula)


@dataclass(frozen=True)
class Rehearsal:
    """What a step holds at its fullest moment, between forward and backward, and in an evaluation; and its FLOPs.

    `moments` are the fullest of the forward, of the backward until a first block is through, of the backward from the
    last block on, and of the optimizer's step. In between the backward goes from one to the other in equal steps, a
    block's activations for its gradients, so nothing there is fuller. `rest` is what is there before any of it.
    """

    moments: tuple[Parts, ...]
    between: Parts
    evaluation: Parts
    flops: int
    rest: Parts = field(default_factory=Parts)

    @property
    def step(self) -> Parts:
        """Return the fullest moment."""
        return max(self.moments, key=lambda held: held.total)

    def continued(self, other: Rehearsal, blocks: int) -> Rehearsal:
        """Return this rehearsal with `blocks` more blocks, where `other` has one more than this.

        Each moment goes on in a straight line of its own: which of them is the fullest may change with the depth.
        """

        def line(one: int, two: int) -> int:
            return one + blocks * (two - one)

        held = partial(_part_by_part, line)
        return Rehearsal(
            tuple(held(one, two) for one, two in zip(self.moments, other.moments, strict=True)),
            held(self.between, other.between),
            held(self.evaluation, other.evaluation),
            line(self.flops, other.flops),
            held(self.rest, other.rest),
        )

    def evaluated_as(self, other: Rehearsal) -> Rehearsal:
        """Return this rehearsal with the evaluation of `other`, of another depth: no block leaves anything in one."""
        beside = _part_by_part(int.__sub__, other.evaluation, other.rest)
        return replace(self, evaluation=self.rest + beside)


def _part_by_part(made: Callable[[int, int], int], one: Parts, two: Parts) -> Parts:
    return Parts(**{f.name: made(getattr(one, f.name), getattr(two, f.name)) for f in fields(Parts)})


@dataclass(frozen=True)
class Scene:
    """What is rehearsed: functions that make the base, prepare it, and make the rest of a step.

    `build` makes the base in the dtype it is loaded in, `prepare` attaches the adapter and puts the model into the
    state training has it in, `extra` names tensors a model keeps that are neither parameters nor buffers, `forward` is
    the context of a forward, such as autocast, and `moments` the bytes of the moments of trained tensors of some sizes,
    where they are not the optimizer's own 8 a number. `uneven` says that the last block is smaller than the others, so
    that the beginning of the backward is that block and one more.
    """

    build: Callable[[], nn.Module]
    prepare: Callable[[nn.Module], None]
    batch: Callable[[], dict[str, Tensor]]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    extra: Callable[[nn.Module], Iterable[Tensor]] = lambda model: ()
    forward: Callable[[], AbstractContextManager[Any]] = nullcontext
    moments: Callable[[Iterable[int]], int] = optimizer_bytes
    uneven: bool = False


def rehearse(scene: Scene, *, evaluate: bool = True) -> Rehearsal:
    """Run one step on fake tensors, an evaluation before it unless nobody asks for one, and return what they held.

    Whatever the model's own code raises is raised: a model may need more than the batch has, or decide by values.
    """
    with FakeTensorMode(), _silent("torch._subclasses.fake_tensor"):
        model = scene.build()
        scene.prepare(model)
        optimizer, rows = scene.optimizer(model), scene.batch()
        live = _Live(_vocabulary(model))
        trained = [p for p in model.parameters() if p.requires_grad]
        with live:
            for tensor in (*model.parameters(), *model.buffers(), *scene.extra(model)):
                live.mark(tensor, "adapters" if tensor.requires_grad else "weights")
            largest = max(trained, key=lambda p: p.nbytes, default=None)
            states = _make_states(trained, largest, optimizer)
            for state in states:
                live.mark(state, "optimizer")
            live.begin()
            rest = live.now()
            model.train(False)
            if evaluate:
                with torch.no_grad(), scene.forward():
                    scene.loss(model, rows)
            evaluation = live.fullest()
            live.forget(rows.values())  # a training step reads them anew, whether there was an evaluation or not
            model.train(True)
            live.begin()
            with scene.forward():
                loss = scene.loss(model, rows)
            live.rename("temporaries", "activations")
            forward, between = live.fullest(), live.now()
            backward = _Backward(model, live, 2 if scene.uneven else 1)
            loss.backward()  # type: ignore[no-untyped-call]
            early, late = backward.moments()
            live.begin(flops=False)
            grads = [p.grad for p in trained]  # they are there during the step, which only the largest one makes
            for parameter in trained:
                if parameter is not largest:
                    parameter.grad = None
            optimizer.step()
            moments = (forward, early, late, live.fullest())
        sizes = [p.numel() for p in trained]
        less = optimizer_bytes(sizes) - scene.moments(sizes)

    def narrow(held: Parts) -> Parts:
        return replace(held, optimizer=held.optimizer - less)

    del grads, states  # which lived until here
    return Rehearsal(tuple(map(narrow, moments)), narrow(between), narrow(evaluation), live.flops, narrow(rest))


class _Backward:
    """Watches a backward: what it held until the first blocks had all their gradients, and from the last but one on."""

    def __init__(self, model: nn.Module, live: _Live, first: int) -> None:
        self._live, self._first = live, first
        self._open: Counter[tuple[str, int] | None] = Counter()
        self._early: Parts | None = None
        live.begin(flops=False)
        self._hooks = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                place = layer_of(name)
                self._open[place] += 1
                self._hooks.append(
                    parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                        partial(self._arrived, place)
                    )
                )
        self._blocks = sum(place is not None for place in self._open)

    def _arrived(self, place: tuple[str, int] | None, parameter: nn.Parameter) -> None:
        self._live.mark(parameter.grad, "gradients")
        self._open[place] -= 1
        if place is None or self._open[place]:
            return
        self._blocks -= 1
        self._first -= 1
        if not self._first:
            self._early = self._live.fullest()
        if self._blocks == 1:
            self._live.begin(flops=False)

    def moments(self) -> tuple[Parts, Parts]:
        """Return the fullest of the beginning and of the end."""
        for hook in self._hooks:
            hook.remove()
        late = self._live.fullest()
        return self._early or late, late


@dataclass(eq=False)
class _Piece:
    """A piece of memory: what it is for, and from when to when it lives."""

    bytes: int
    kind: str
    born: int
    died: int | None = None
    ref: weakref.ReferenceType[Any] | None = None


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows every piece of memory that lives, and when there was the most of it; counts FLOPs as torch does."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocabulary = vocabulary
        self._pieces: dict[int, _Piece] = {}
        self._ever: list[_Piece] = []
        self._clock = self._held = self._most = self._most_at = 0
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say that torch need not wrap `__torch_dispatch__`, a tenth of its time: nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # a third of the calls
            return args[0].fake_device
        # a number that is counted on, such as an optimizer's step, has its value
        out = args[0] if _writes(func) and args[0].dim() else func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                wide = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
                self._see(tensor, "logits" if wide else "temporaries")
        return out

    def _see(self, tensor: Tensor, kind: str) -> _Piece:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._pieces:
            return self._pieces[key]
        self._clock += 1
        made = self._pieces[key] = _Piece(storage.nbytes(), kind, self._clock)
        self._ever.append(made)

        def gone(_: Any) -> None:
            self._clock += 1
            made.died = self._clock
            self._held -= made.bytes
            if self._pieces.get(key) is made:
                del self._pieces[key]

        made.ref = weakref.ref(storage, gone)
        self._held += made.bytes
        if self._held > self._most:
            self._most, self._most_at = self._held, self._clock
        return made

    def mark(self, tensor: Tensor | None, kind: str) -> None:
        """Say what a tensor is for."""
        if tensor is not None:
            self._see(tensor, kind).kind = kind

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors no more until they are seen again."""
        for tensor in tensors:
            if (piece := self._pieces.pop(tensor.untyped_storage()._cdata, None)) is not None:
                self._held -= piece.bytes
                piece.ref = None

    def rename(self, old: str, new: str) -> None:
        """Say that all that lives as `old` is for `new`."""
        for piece in self._pieces.values():
            piece.kind = new if piece.kind == old else piece.kind

    def begin(self, *, flops: bool = True) -> None:
        """Forget earlier moments."""
        self.flops = 0 if flops else self.flops
        self._most, self._most_at = self._held, self._clock
        self._ever = list(self._pieces.values())

    def now(self) -> Parts:
        """Return what is held."""
        return self._at(self._clock)

    def fullest(self) -> Parts:
        """Return what was held when there was the most since `begin`."""
        return self._at(self._most_at)

    def _at(self, moment: int) -> Parts:
        held = dict.fromkeys((f.name for f in fields(Parts)), 0)
        for piece in self._ever:
            if piece.born <= moment and (piece.died is None or piece.died > moment):
                held[piece.kind] += piece.bytes
        return Parts(**held)


@cache
def _writes(func: Any) -> bool:
    """Return whether all an operator does is to write values into its first argument, which has none here."""
    name = func._schema.name
    values_alone = torch.Tag.pointwise in func.tags or name in ("aten::copy_", "aten::addmm_", "aten::scatter_add_")
    return bool(name.endswith("_") and not name.endswith("__") and values_alone)


def _make_states(
    trained: list[nn.Parameter], largest: nn.Parameter | None, optimizer: torch.optim.Optimizer
) -> list[Tensor]:
    """Return AdamW's states, which from the second step on are there all the time.

    Its step goes parameter by parameter and is fullest at the largest. Only that one makes a step, and has states as
    AdamW's first step makes them; those of all others are one tensor.
    """
    if largest is None:
        return []
    state = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(largest), "exp_avg_sq": torch.zeros_like(largest)}
    optimizer.state[largest] = state
    others = sum(2 * p.nbytes + state["step"].nbytes for p in trained if p is not largest)
    return [*state.values(), torch.empty(others, dtype=torch.uint8)]


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep a logger still: it tells at length of what is raised as well."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _vocabulary(model: nn.Module) -> int:
    """Return the width of the output layer of a language model, or one that no tensor has."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return -1 if head is None else int(head.weight.shape[0])
