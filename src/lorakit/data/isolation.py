"""Whether examples in one row leave each other alone in a given model: measured, not believed."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.core.modes import evaluating
from lorakit.core.reading import window_of
from lorakit.data.branches import BACKENDS, seen
from lorakit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packing_leak(model: PreTrainedModel, **forward: Any) -> float:
    """Measure how far an example's logits move, relative to their size, when its neighbours and its place change.

    The same six tokens stand once after 3 and before 7 tokens, once after 7 and before 3 others; an isolated example
    cannot tell. `forward` is passed on to the model as it will be in training. Measured on random two-layer models:
    0 for Llama, Qwen2, Mistral, GPT-2, GPT-NeoX without a cache; 0.3 to 1.1 with one; 0.7 for OPT and Mamba; infinite
    for a model that takes no positions.
    """
    takes = inspect.signature(model.forward).parameters
    if "position_ids" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return math.inf
    embedding: Any = model.get_input_embeddings()
    rng = torch.Generator().manual_seed(0)

    def some(length: int) -> Tensor:
        return torch.randint(embedding.num_embeddings, (length,), generator=rng)

    def logits(before: Tensor, after: Tensor) -> Tensor:
        parts = (before, watched, after)
        ids = torch.cat(parts)[None].to(model.device)
        positions = torch.cat([torch.arange(len(part)) for part in parts])[None].to(model.device)
        out: Tensor = model(input_ids=ids, position_ids=positions, **forward).logits
        return out[0, len(before) : len(before) + len(watched)].float()

    watched = some(6)
    with evaluating(model), torch.no_grad():
        here, there = logits(some(3), some(7)), logits(some(7), some(3))
    return float((here - there).abs().max() / here.std())


def packing_is_isolated(model: PreTrainedModel, **forward: Any) -> bool:
    """Say whether packed examples leave each other alone in this model, with its attention backend and dtype.

    The bound is sqrt(eps) of the dtype, half way (in digits) between rounding and a difference anyone would see.
    """
    return packing_leak(model, **forward) < math.sqrt(torch.finfo(model.dtype).eps)


def refuse_leaky_packing(model: PreTrainedModel, **forward: Any) -> None:
    """Raise `DataError` with the remedy unless `packing_is_isolated`."""
    if not packing_is_isolated(model, **forward):
        backend = getattr(model.config, "_attn_implementation", "unknown")
        raise DataError(
            f"packing leaks in {type(model).__name__} with attention '{backend}': an example's logits move by "
            f"{packing_leak(model, **forward):.2g} of their spread with its neighbours; set data.packing: never, or "
            "choose another attention backend (the cache must be off too: config.use_cache = False)"
        )


def sharing_leak(model: PreTrainedModel) -> float:
    """Measure how far logits are, relative to their size, from an example's own when its prompt is shared.

    An example, and the two branches of one prompt, in one row; each is held against the same tokens alone. Measured on
    random two-layer models: under 1e-5 for Llama, Mistral, Qwen2, Qwen3, Gemma, Phi, GPT-2 and GPT-NeoX; far more where
    places count instead of positions (Bloom, MPT) or no mask of this form is read; infinite where it is refused.
    """
    embedding: Any = model.get_input_embeddings()
    ids = torch.randint(embedding.num_embeddings, (19,), generator=torch.Generator().manual_seed(0))
    before, prompt, left, right = ids[:3], ids[3:9], ids[9:15], ids[15:]
    trunk, last = prompt[:-1], prompt[-1:]  # each branch begins with the prompt's last token
    batch = {
        "input_ids": torch.cat((before, trunk, last, left, last, right))[None],
        "position_ids": torch.tensor([[*range(3), *range(12), *range(5, 10)]]),
        "branches": torch.tensor([[0] * 8 + [1] * 7 + [2] * 5]),
    }
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    apart = {(before,): [*range(3)], (prompt, left): [*range(3, 15)], (prompt, right): [*range(3, 8), *range(15, 20)]}
    try:
        with evaluating(model), torch.no_grad():
            together = model(**seen(model, batch)).logits[0].float()
            alone = [model(input_ids=torch.cat(one)[None].to(model.device)).logits[0].float() for one in apart]
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError):
        return math.inf  # a model's own code meets a mask that it was not written for
    moved = max(float((together[at] - one).abs().max()) for at, one in zip(apart.values(), alone, strict=True))
    return moved / float(together.std())


def why_not_shared(model: PreTrainedModel, longest: int) -> str:
    """Return why examples of at most `longest` tokens cannot share their prompts in this model; "" where they can."""
    attention = getattr(model.config, "_attn_implementation", "unknown")
    if attention not in BACKENDS:
        return f"attention '{attention}' takes no mask of branches"
    if (window := window_of(model.config)) is not None and window < longest:
        return f"its attention reaches {window} tokens back, and examples may have {longest}"
    if not sharing_leak(model) < math.sqrt(torch.finfo(model.dtype).eps):
        return f"an example's logits would change in this model with attention '{attention}'"
    return ""
