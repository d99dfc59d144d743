"""One forward of many sequences on one base: tokens in, the logits of those that end something out.

Any decoder of transformers whose attention goes through its interface: the model's own code runs, with the engine's
attention over slots (slots.py) and the adapters of the bank (bank.py). Whether that is this model's whole state is not
guessed: `Decoder` runs one prompt both ways at once when it is made, and refuses a model whose logits differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.core.lazy import need
from lorakit.core.state import AdapterState
from lorakit.errors import AttachError
from lorakit.inject.bases import base_of
from lorakit.inject.sites import sites
from lorakit.inject.skeleton import size_of
from lorakit.serving.batching.bank import Bank
from lorakit.serving.batching.place import Choice, Prepared
from lorakit.serving.batching.preparation import prepare
from lorakit.serving.batching.slots import Slots, Step

PROBE = 24
"""Tokens of the prompt a model is proved on: a first piece, a second one, and the rest one by one."""
NEAR = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far logits may lie apart, of the largest: other orders of the same sums; 16 bits round at every layer."""


class Piece(NamedTuple):
    """A piece of a prompt for the coming step: `tokens` from position `offset` on; `ends` if its last one is read."""

    slot: int
    offset: int
    tokens: list[int]
    choice: Choice | None
    ends: bool


class Decoder:
    """A model with slots and adapters. One thread calls it; `prepare` alone may run beside it."""

    def __init__(self, model: Any, slots: int = 16, context: int | None = None, packed: bool = True) -> None:
        """Take over `model` (until `close`): its attention, its layers' classes and, where packed, its weights.

        Raises:
            AttachError: a model that keeps more state than keys and values, or does not call its attention by name.
        """
        config = model.config.get_text_config()
        room = size_of(config, "max_position_embeddings")
        self.context = min(x for x in (context, room, 4096) if x is not None)
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.model, self.count = model.eval(), slots
        self.base, self.skeleton = base_of(model), sites(model)
        self.slots = Slots(slots, self.context)
        self._name, self._own = f"lorakit-{id(self):x}", config._attn_implementation
        probe = [(7 * i * i + 3 * i + 1) % self.vocabulary for i in range(min(PROBE, self.context - 1))]
        wanted = self._plainly(probe)
        need("transformers.modeling_utils", "serve").AttentionInterface.register(self._name, self.slots.attend)
        self.bank = Bank(model, self.skeleton.sites, slots)
        try:
            model.set_attn_implementation(self._name)
            if packed:
                self.bank.pack()
            self._prove(probe, wanted)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the model back as it was, and the memory of the slots."""
        self.bank.close()
        self.slots.free()
        self.model.set_attn_implementation(self._own)

    def prepare(self, digest: str, state: AdapterState) -> Prepared:
        """Return an adapter as this decoder serves it; any thread may ask."""
        return prepare(digest, state, self.skeleton, self.base, self.bank.places)

    @torch.inference_mode()
    def step(self, decoded: Sequence[tuple[int, int, Choice | None]], pieces: Sequence[Piece] = ()) -> Tensor:
        """Return the logits `(k, vocabulary)` of each decoded token, then of each piece that ends its prompt.

        Args:
            decoded: `(token, position, choice)` of the sequences in slots 0, 1, 2 ...
            pieces: pieces of prompts, in other slots.
        """
        step = Step.of(
            [(t, p) for t, p, _ in decoded], [(p.slot, p.offset, p.tokens) for p in pieces], self.model.device
        )
        n = len(decoded)
        kept = list(range(n)) + [cut.stop - 1 for cut, piece in zip(step.cuts, pieces, strict=True) if piece.ends]
        self.slots.begin(step)
        self.bank.begin([c for _, _, c in decoded], [(len(p.tokens), p.choice, p.ends) for p in pieces])
        out = self.model(
            input_ids=step.tokens[None],
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor(kept, dtype=torch.long, device=self.model.device),  # maybe of none
        )
        return _wide(out.logits[0])

    def _plainly(self, probe: list[int]) -> Tensor:
        with torch.inference_mode():
            ids = torch.tensor([probe], device=self.model.device)
            return _wide(self.model(input_ids=ids, use_cache=False).logits[0])

    def _prove(self, probe: list[int], wanted: Tensor) -> None:
        """Raise `AttachError` unless the prompt gives the plain logits, in pieces and token by token."""
        third = max(1, len(probe) // 3)
        watching = self._watch()
        try:
            found = [self._one(Piece(1 % self.count, 0, probe[:third], None, True))]
            found.append(self._one(Piece(1 % self.count, third, probe[third : 2 * third], None, True)))
            self.slots.move(1 % self.count, 0, 2 * third)
            found += [self.step([(token, 2 * third + i, None)]) for i, token in enumerate(probe[2 * third :])]
        except (TypeError, AttributeError, KeyError, IndexError, RuntimeError, ValueError) as fault:
            raise AttachError(f"{type(self.model).__name__} cannot be served by this engine: {fault}") from fault
        finally:
            for hook in watching:
                hook.remove()
        config = self.model.config.get_text_config()
        sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
        if sliding and getattr(config, "sliding_window", None) and not self.slots.windows:
            raise AttachError(f"{type(self.model).__name__} has a window of its own, which its attention does not tell")
        at = [third - 1, 2 * third - 1, *range(2 * third, len(probe))]
        apart = (torch.cat(found) - wanted[at]).abs().max().item() / wanted.abs().max().item()
        if not apart <= NEAR.get(self.model.dtype, 5e-2):
            raise AttachError(
                f"{type(self.model).__name__} gives other logits in this engine than alone ({apart:.1g} of the "
                "largest): it keeps more than keys and values of its tokens. Serve it with an engine that knows it"
            )

    def _one(self, piece: Piece) -> Tensor:
        return self.step([], [piece])

    def _watch(self) -> list[Any]:
        """Note, until the hooks that are returned go, which layers see other than all tokens."""
        hooks: list[Any] = []
        for place in self.bank.places.values():
            if place.head:
                continue

            def look(module: Any, args: Any, place: Any = place) -> None:
                assert self.slots.step is not None
                rows = args[0].numel() if place.site.kind == "embedding" else args[0].numel() // args[0].shape[-1]
                place.whole &= rows == self.slots.step.tokens.numel()

            hooks.append(place.module.register_forward_pre_hook(look))
        return hooks


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
