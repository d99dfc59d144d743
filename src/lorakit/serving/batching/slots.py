"""Keys and values of every running sequence, each in a slot of its own, and the attention that reads them.

A step is one row of tokens of several sequences: first one token of each sequence that is being decoded, in slots 0, 1,
2 ..., then pieces of prompts. No token is padding. transformers calls the attention by name, so one function serves
every model that goes through its interface; each layer passes its own window and its own softcap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import AttachError

KNOWN = frozenset({"sliding_window", "softcap", "position_ids", "use_cache", "output_attentions", "is_causal"})
"""What a layer may pass beside queries, keys and values: read here, or without bearing on a step."""


class Cut(NamedTuple):
    """Where a piece of a prompt stands: tokens `start:stop` of a step belong at `offset` and after in `slot`."""

    slot: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Step:
    """The tokens of one forward: `decoding` sequences with one token each, then pieces of prompts.

    `positions (n,)` says where in its sequence each token stands, `slots (n,)` in which slot.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    decoding: int
    cuts: tuple[Cut, ...]

    @classmethod
    def of(cls, decoded: list[tuple[int, int]], pieces: list[tuple[int, int, list[int]]], device: Any = None) -> Step:
        """Return the step of `(token, position)` of slots 0, 1, ... and of `(slot, offset, tokens)` of prompts."""
        tokens, positions = [t for t, _ in decoded], [p for _, p in decoded]
        slots, cuts = list(range(len(decoded))), list[Cut]()
        for slot, offset, piece in pieces:
            cuts.append(Cut(slot, len(tokens), len(tokens) + len(piece), offset))
            tokens += piece
            positions += range(offset, offset + len(piece))
            slots += [slot] * len(piece)
        made = torch.tensor([tokens, positions, slots], device=device)
        return cls(made[0], made[1], made[2], len(decoded), tuple(cuts))


class Slots:
    """The keys and values of `count` sequences of up to `context` positions.

    A position's heads lie side by side, so that a step writes one run of memory and reads neighbouring ones. Memory is
    asked for when a layer is first called, and a CPU gives it page by page as positions are written.
    """

    def __init__(self, count: int, context: int) -> None:
        self.count, self.context = count, context
        self.step: Step | None = None
        self.windows: set[int] = set()
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen: dict[int | None, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Return what the slots take when every position is written."""
        return sum(t.numel() * t.element_size() for pair in self._held.values() for t in pair)

    def begin(self, step: Step) -> None:
        """Take a step, which the layers then read."""
        self.step, self._seen = step, {}

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot into another."""
        for pair in self._held.values() if length else ():
            for held in pair:
                held[target, :length] = held[source, :length]

    @torch.inference_mode()
    def wipe(self, slot: int, start: int = 0, stop: int | None = None) -> None:
        """Write zeros where nobody's positions are left: a hidden one counts 0 times what stands there, also NaN."""
        for pair in self._held.values():
            for held in pair:
                held[slot, start:stop].zero_()

    def free(self) -> None:
        """Let go of the memory; transformers' register of attentions keeps this object for ever."""
        self.step = None
        self._held.clear()
        self._seen.clear()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None,
        dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None, **rest: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Return the attention of the step's tokens `(1, n, heads, width)`; the signature is transformers' own."""
        step = self.step
        assert step is not None
        if unknown := {name for name, given in rest.items() if given is not None} - KNOWN:
            raise AttachError(f"{type(module).__name__} asks its attention for {', '.join(sorted(unknown))}")
        keys, values = self._of(module, key, value)
        keys[step.slots, step.positions] = key[0].transpose(0, 1)
        values[step.slots, step.positions] = value[0].transpose(0, 1)
        if sliding_window is not None:
            self.windows.add(sliding_window)
        n, found = step.decoding, []
        if n:
            longest, seen = self._visible(sliding_window, query.dtype)
            found.append(_decoded(query[0, :, :n], keys[:n, :longest], values[:n, :longest], seen, scaling, softcap))
        for slot, start, stop, offset in step.cuts:
            end = offset + stop - start
            found.append(
                _read(query[:, :, start:stop], keys[slot, :end], values[slot, :end], scaling, sliding_window, softcap)
            )
        return (found[0] if len(found) == 1 else torch.cat(found)).unsqueeze(0), None

    def _visible(self, window: int | None, dtype: torch.dtype) -> tuple[int, Tensor]:
        """Return the longest sequence's length, and 0 where a decoded token sees a position and -inf elsewhere."""
        assert self.step is not None
        if window not in self._seen:
            own = self.step.positions[: self.step.decoding, None]
            other = torch.arange(int(own.max()) + 1, device=own.device)
            seen = other <= own if window is None else (other <= own) & (other > own - window)
            hidden = torch.zeros(seen.shape, dtype=dtype, device=own.device).masked_fill_(~seen, -torch.inf)
            self._seen[window] = hidden[:, None, None]
        found = self._seen[window]
        return found.shape[-1], found

    def _of(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise AttachError(f"{type(module).__name__} does not say which layer it is")
        if layer not in self._held:
            self._held[layer] = (
                key.new_zeros(self.count, self.context, key.shape[1], key.shape[3]),
                value.new_zeros(self.count, self.context, value.shape[1], value.shape[3]),
            )
        return self._held[layer]


def _decoded(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """Return the attention of one token a sequence: `query (heads, n, d)`, `keys (n, length, kv heads, d)`.

    Heads that share a key stand where the positions of a query stand, so nothing is repeated.
    """
    n, shared = keys.shape[0], keys.shape[2]
    grouped = query.transpose(0, 1).reshape(n, shared, -1, query.shape[-1])
    found = _attention(grouped, keys.transpose(1, 2), values.transpose(1, 2), seen, scaling, softcap)
    return found.reshape(n, -1, values.shape[-1])


def _read(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Return the attention of a piece of a prompt: `query (1, heads, n, d)`, `keys (length, kv heads, d)`."""
    n, length = query.shape[2], keys.shape[0]
    keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    if (repeats := query.shape[1] // keys.shape[1]) > 1:
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    if n == length and softcap is None and (window is None or window >= length):
        made = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
    else:
        own = torch.arange(length - n, length, device=query.device)[:, None]
        other = torch.arange(length, device=query.device)
        seen = other <= own if window is None else (other <= own) & (other > own - window)
        made = _attention(query, keys, values, seen, scaling, softcap)
    return made[0].transpose(0, 1)


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """Return the attention; `seen` is a bias, 0 or -inf, or says what is seen."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = softcap * torch.tanh(query @ keys.mT * scale / softcap)
    hidden = logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen
    return hidden.softmax(-1, dtype=_wide(query.dtype)).to(query.dtype) @ values


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
