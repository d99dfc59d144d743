"""A linear layer whose weight is kept in 4 bits, and whose product never holds the dense matrix.

`y = x W^T + b` is computed for some output features at a time: their rows of W are unpacked, multiplied, and dropped.
The backward pass unpacks again, some input features at a time, so a step needs one such block of memory beside the
packed weight, and of the input it keeps nothing: W is frozen, so only `dx = dy W` is ever asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import gcd, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from lorakit.core.hollow import is_hollow
from lorakit.core.init import leading
from lorakit.errors import AdapterFileError, AttachError, SpecError
from lorakit.hosts.bnb_keys import NAMES, from_tensors, to_tensors
from lorakit.hosts.nf4 import Nested, Quantized, dequantize, maxima, quantize, unpack

ITERATIONS = 8
"""Rounds of the randomised SVD that finds a principal part; PiSSA's authors take 4 to 16."""
BLOCK = 2**22
"""Weights that are dense at once: 16 MB in fp32, enough rows for a product at full speed."""
_BUFFER = threading.local()


def refuse_principal(rank: int, shape: Sequence[int]) -> None:
    """Raise `SpecError` for a principal part of a rank that a weight `(out, in)` does not have."""
    if rank > min(shape):
        raise SpecError(f"principal {rank} exceeds min(out, in) = {min(shape)}; lower it (quant.principal)")


class Linear4bit(nn.Module):
    """`y (..., out) = x (..., in) W^T + b` on a weight in 4 bits, with bitsandbytes' keys in its state dict.

    `weight` holds the packed bytes; `quantized` gives them their meaning. `transposed` says that the weight came from
    GPT-2's Conv1D, which keeps its own the other way round, so that adapters know the layer as what it was.

    A layer may keep the largest singular triplets of its weight beside the bytes, as `principal_up @ principal_down`;
    the bytes are then those of the rest, which loses less (QPiSSA, arXiv 2404.02948, section 4).
    """

    principal_down: Tensor | None
    principal_up: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quantized: Quantized | None = None,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
    ) -> None:
        """Take a quantised weight; without one the layer is empty until a state dict fills it."""
        super().__init__()
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        empty = torch.empty(-(-in_features * out_features // 2), 1, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(empty if quantized is None else quantized.packed, requires_grad=False)
        self._state = quantized
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("principal_down", None)
        self.register_buffer("principal_up", None)

    @classmethod
    def of(
        cls, layer: nn.Module, block_size: int = 64, double_quant: bool = True, kind: str = "nf4", principal: int = 0
    ) -> Linear4bit:
        """Return the 4-bit layer of a dense `nn.Linear`, or of GPT-2's Conv1D."""
        transposed = not isinstance(layer, nn.Linear)
        weight = layer.get_parameter("weight").detach()
        canonical = weight.T.contiguous() if transposed else weight
        out, in_ = canonical.shape
        bias = None if getattr(layer, "bias", None) is None else layer.get_parameter("bias").detach()
        made = cls(in_, out, None, bias, transposed=transposed)
        rest = made.split_off(canonical, principal).to(canonical.dtype) if principal else canonical
        made.take(quantize(rest, block_size, double_quant, kind))
        return made.train(layer.training)

    @property
    def quantized(self) -> Quantized:
        """Return the weight as a value; its bytes are the layer's own."""
        if self._state is None:
            raise AttachError("this 4-bit layer is empty: it was built without weights and none were loaded")
        return replace(self._state, packed=self.weight)

    def make_room(self, rank: int, dtype: torch.dtype) -> None:
        """Make room for a principal part that a state dict will fill."""
        place = self.weight.device
        self.principal_down = torch.empty(rank, self.in_features, dtype=dtype, device=place)
        self.principal_up = torch.empty(self.out_features, rank, dtype=dtype, device=place)

    @torch.no_grad()
    def split_off(self, weight: Tensor, rank: int) -> Tensor:
        """Keep the `rank` largest singular triplets of a dense weight, in its dtype, and return the rest in fp32.

        Raises:
            SpecError: a rank the weight does not have.
        """
        refuse_principal(rank, weight.shape)
        rng = torch.Generator().manual_seed(0)
        u, s, vh = (part[0] for part in leading(weight[None], rank, ITERATIONS, rng))
        root = s.sqrt()
        self.principal_up = (u * root).to(weight.dtype).contiguous()
        self.principal_down = (root.unsqueeze(1) * vh).to(weight.dtype).contiguous()
        return weight.float() - self.principal()

    def principal(self) -> Tensor | float:
        """Return what is kept beside the bytes `(out, in)` in fp32; 0 where nothing is."""
        if self.principal_up is None or self.principal_down is None:
            return 0.0
        return self.principal_up.float() @ self.principal_down.float()

    @torch.no_grad()
    def take(self, value: Quantized) -> None:
        """Replace the weight, in place where there is one of the same size."""
        if self.weight.shape == value.packed.shape and not self.weight.is_meta:
            self.weight.copy_(value.packed)
        else:
            self.weight = nn.Parameter(value.packed, requires_grad=False)
        self._state = replace(value, packed=self.weight.data)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight `(out, in)`, as the product sees it, in `dtype` (its own if None)."""
        value = self.quantized
        value = value if dtype is None else replace(value, dtype=dtype)
        inner = torch.float32 if self.principal_up is not None else value.dtype
        if torch.compiler.is_compiling() or is_hollow(value.packed):
            found: Tensor = _traced_dense(torch.empty(0, dtype=inner, device=value.packed.device), *_parts(value))
        else:
            found = dequantize(replace(value, dtype=inner))
        return found if self.principal_up is None else (found + self.principal()).to(value.dtype)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the dense layer of the same product, of the class it was made of: the inverse of `of`."""
        weight, bias = self.dense(dtype), None if self.bias is None else self.bias.detach()
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            made: nn.Module = Conv1D(self.out_features, self.in_features)  # type: ignore[no-untyped-call]
            weight, bias = weight.T.contiguous(), weight.new_zeros(self.out_features) if bias is None else bias
        else:
            made = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        made.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
        return made.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b` in the dtype of `x`, or autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = product(x, self.quantized)
        if self.principal_up is not None and self.principal_down is not None:
            y = y + F.linear(F.linear(x, self.principal_down.to(x.dtype)), self.principal_up.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Return the sizes and the kind of the weight."""
        kind = "empty" if self._state is None else f"{self._state.kind}, blocks of {self._state.block_size}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"

    # ---- state ----

    def _apply(self, fn: Any, recurse: bool = True) -> Linear4bit:
        """Move the block maxima along with the bytes; a change of dtype leaves both as they are."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._state is not None:
            self._state = replace(self._state.to(self.weight.device), packed=self.weight.data)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._state is not None:
            for name, tensor in to_tensors(self.quantized).items():
                if name:
                    destination[f"{prefix}weight.{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the packed bytes with their state; bytes alone mean nothing and are refused."""
        start = f"{prefix}weight"
        found = {name: state_dict[f"{start}.{name}"] for name in NAMES if f"{start}.{name}" in state_dict}
        if start in state_dict:
            try:
                value = from_tensors({"": state_dict[start], **found}, start)
                if value.shape != (self.out_features, self.in_features):
                    raise AdapterFileError(
                        f"{start}: shape {value.shape}, this layer is {(self.out_features, self.in_features)}"
                    )
                self.take(value.to(state_dict[start].device if self.weight.is_meta else self.weight.device))
            except AdapterFileError as error:
                error_msgs.append(str(error))
        for name in ("principal_down", "principal_up"):  # where there was no room yet, or one without a place
            given, own_part = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            if given is not None and (own_part is None or own_part.is_meta):
                setattr(self, name, given.clone())
        rest = {key: value for key, value in state_dict.items() if not key.startswith(f"{start}.")}
        own = {key: value for key, value in rest.items() if key != start}
        before = self._parameters.pop("weight")
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._parameters = {"weight": before, **self._parameters}
        if start not in state_dict and strict:
            missing_keys.append(start)


def product(x: Tensor, value: Quantized) -> Tensor:
    """Return `x W^T (..., out)` for `x (..., in)`, differentiable in x, with no more than a block of W dense."""
    parts = _parts(value)
    traced = torch.compiler.is_compiling() or is_hollow(x)
    found: Tensor = _traced(x, *parts) if traced else _Product.apply(x, *parts)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """The product as plain Python calls it: a third of the cost of an operator of the library below."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Any) -> Tensor:
        _keep(ctx, (x, *parts), x)
        return _forward(x, *parts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _grads(ctx, _backward, dy)


def _forward(
    x: Tensor, packed: Tensor, absmax: Tensor, groups: Tensor | None, offset: Tensor | None, out: int, in_: int,
    block_size: int, kind: str,
) -> Tensor:  # fmt: skip
    value = _value(packed, absmax, groups, offset, out, in_, block_size, kind, x.dtype)
    flat = x.reshape(-1, in_)
    spans = list(_spans(out, in_, block_size))
    if len(spans) == 1:
        return F.linear(flat, _unpacked(value, 0, out)).view(*x.shape[:-1], out)
    y = x.new_empty(flat.shape[0], out)
    for start, stop in spans:
        torch.mm(flat, _unpacked(value, start, stop).T, out=y[:, start:stop])
    return y.view(*x.shape[:-1], out)


def _backward(
    dy: Tensor, packed: Tensor, absmax: Tensor, groups: Tensor | None, offset: Tensor | None, out: int, in_: int,
    block_size: int, kind: str,
) -> Tensor:  # fmt: skip
    value = _value(packed, absmax, groups, offset, out, in_, block_size, kind, dy.dtype)
    flat = dy.reshape(-1, out)
    if out * in_ <= BLOCK:
        dx = flat @ _unpacked(value, 0, out)
    elif in_ % block_size or out * block_size > BLOCK:
        dx = _by_rows(flat, value)
    else:
        dx = dy.new_empty(flat.shape[0], in_)
        width = BLOCK // out // block_size * block_size
        value = replace(value, absmax=maxima(value), nested=None)
        for start in range(0, in_, width):
            part = _columns(value, start, min(start + width, in_))
            torch.mm(flat, _unpacked(part, 0, out), out=dx[:, start : start + width])
    return dx.view(*dy.shape[:-1], in_)


def _dense(
    like: Tensor, packed: Tensor, absmax: Tensor, groups: Tensor | None, offset: Tensor | None, out: int, in_: int,
    block_size: int, kind: str,
) -> Tensor:  # fmt: skip
    """Return the whole weight in the dtype of `like`."""
    return dequantize(_value(packed, absmax, groups, offset, out, in_, block_size, kind, like.dtype))


def _parts(value: Quantized) -> tuple[Any, ...]:
    """Return a value as the arguments of an operator; `_value` is the inverse."""
    nested = value.nested
    return (
        value.packed, value.absmax, nested and nested.absmax, nested and nested.offset, *value.shape, value.block_size,
        value.kind,
    )  # fmt: skip


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.rest = inputs[5:]


def _grads(ctx: Any, backward: Callable[..., Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = backward(dy, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
    return dx, *[None] * 8


# ---- for torch.compile and torch.export, which do not look inside ----

_SCHEMA = (
    "(Tensor x, Tensor packed, Tensor absmax, Tensor? groups, Tensor? offset, int out, int in_, int block_size, "
    "str kind) -> Tensor"
)
_traced = torch.library.custom_op("lorakit::product_4bit", _forward, mutates_args=(), schema=_SCHEMA)
_traced_back = torch.library.custom_op("lorakit::product_4bit_back", _backward, mutates_args=(), schema=_SCHEMA)
_traced.register_fake(lambda x, *parts: x.new_empty(*x.shape[:-1], parts[4]))
_traced_dense = torch.library.custom_op("lorakit::dense_4bit", _dense, mutates_args=(), schema=_SCHEMA)
_traced_dense.register_fake(lambda like, *parts: like.new_empty(parts[4], parts[5]))
_traced_back.register_fake(lambda dy, *parts: dy.new_empty(*dy.shape[:-1], parts[5]))
_traced.register_autograd(lambda ctx, dy: _grads(ctx, _traced_back, dy), setup_context=_keep)
register_flop_formula([torch.ops.lorakit.product_4bit, torch.ops.lorakit.product_4bit_back])(
    lambda x, packed, absmax, groups, offset, out, in_, *_, **__: 2 * prod(x) // x[-1] * out * in_
)


def _value(
    packed: Tensor, absmax: Tensor, groups: Tensor | None, offset: Tensor | None, out: int, in_: int, block_size: int,
    kind: str, dtype: torch.dtype,
) -> Quantized:  # fmt: skip
    nested = None if groups is None or offset is None else Nested(groups, offset)
    return Quantized(packed, absmax, nested, (out, in_), dtype, block_size, kind)


def _spans(out: int, in_: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of about `BLOCK` weights, each beginning with a quantisation block."""
    unit = block_size // gcd(in_, block_size)
    rows = max(unit, BLOCK // in_ // unit * unit)
    for start in range(0, out, rows):
        yield start, min(start + rows, out)


def _by_rows(dy: Tensor, value: Quantized) -> Tensor:
    """Return `dy W` summed over blocks of rows in fp32, where no block of columns would begin with one of weights."""
    out, in_ = value.shape
    dx = torch.zeros(dy.shape[0], in_, device=dy.device, dtype=torch.promote_types(dy.dtype, torch.float32))
    for start, stop in _spans(out, in_, value.block_size):
        dx += dy[:, start:stop] @ _unpacked(value, start, stop)
    return dx.to(dy.dtype)


def _unpacked(value: Quantized, start: int, stop: int) -> Tensor:
    """Return rows `start` to `stop` dense in the value's dtype, to be used before the next call on this thread.

    On a CPU they lie in one buffer a thread: a new one for each product costs the pages' first touch every time, and
    leaves the heap in pieces that are never given back. Elsewhere torch's allocator reuses memory itself.
    """
    in_, device = value.shape[1], value.packed.device
    count = (stop - start) * in_
    if device.type == "cpu":
        room = getattr(_BUFFER, "room", None)
        if room is None or room.numel() < count * value.dtype.itemsize:
            with torch.inference_mode(False):  # a tensor of that mode could not be written outside of it
                room = _BUFFER.room = torch.empty(count * value.dtype.itemsize, dtype=torch.uint8, device="cpu")
        rows = room[: count * value.dtype.itemsize].view(value.dtype)
    else:
        rows = torch.empty(count, dtype=value.dtype, device=device)
    unpack(value, start * in_, rows)
    return rows.view(stop - start, in_)


def _columns(value: Quantized, start: int, stop: int) -> Quantized:
    """Return columns `start` to `stop` of a matrix whose rows are whole blocks, as a value of its own."""
    out, in_ = value.shape
    size = value.block_size
    packed = value.packed.view(out, in_ // 2)[:, start // 2 : stop // 2].reshape(-1, 1)
    absmax = maxima(value).view(out, in_ // size)[:, start // size : stop // size].reshape(-1)
    return Quantized(packed, absmax, None, (out, stop - start), value.dtype, size, value.kind)
