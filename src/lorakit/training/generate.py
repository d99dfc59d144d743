"""Text from a model: batches padded on the left, so that every prompt ends where its answer begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.core.lazy import need
from lorakit.core.modes import evaluating
from lorakit.errors import DataError, LorakitError
from lorakit.inject.context import virtual_positions, wants_even_rows
from lorakit.inject.skeleton import size_of
from lorakit.training.base import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[str]:
    """Return one answer a prompt, without prompt and special tokens, in the order of the prompts.

    Args:
        model: with the adapters that are active on it; comes back as it was.
        tokenizer: of the model; it is only read.
        prompts: token ids, from `render_prompt`.
        max_new_tokens: an answer ends here, or earlier at an end-of-sequence token.
        temperature: 0 takes the likeliest token; above, tokens are drawn from `softmax(logits / temperature)`.
        seed: of the draws; the global random state is left alone.
        batch_size: prompts at once; the likeliest tokens do not depend on it.

    Raises:
        DataError: an empty prompt, or one that leaves no position for an answer.
        LorakitError: logits that are NaN.
    """
    _check(model, prompts, max_new_tokens)
    settings = _settings(model, tokenizer, max_new_tokens, temperature)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # neighbours of one length need no padding
    answers = [""] * len(prompts)
    devices = [model.device] if model.device.type == "cuda" else []
    with quiet(), evaluating(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for chosen in _batches(model, prompts, order, batch_size, max_new_tokens):
            made = _answer(model, [prompts[i] for i in chosen], settings)
            texts = tokenizer.batch_decode(made, skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
    return answers


def _batches(
    model: Any, prompts: Sequence[Sequence[int]], order: list[int], batch_size: int, max_new_tokens: int
) -> Iterator[list[int]]:
    """Yield the prompts in order, a batch at a time; of one length where padding would change an answer."""
    longest = max(map(len, prompts), default=0) + max_new_tokens
    runs = [order]
    if wants_even_rows(model, longest):
        runs = [list(run) for _, run in groupby(order, lambda i: len(prompts[i]))]
    for run in runs:
        for start in range(0, len(run), batch_size):
            yield run[start : start + batch_size]


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, and those the checkpoint names."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def _answer(model: Any, prompts: list[Sequence[int]], settings: Any) -> list[list[int]]:
    width = max(map(len, prompts))
    pad = settings.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=[_numbers])
    answers: list[list[int]] = made[:, width:].tolist()
    return answers


def _numbers(_: Tensor, logits: Tensor) -> Tensor:
    """Return the logits of a next token, which transformers would read as "end the answer" where they are NaN."""
    refuse_nan(bool(logits.isnan().any()))
    return logits


def refuse_nan(found: bool) -> None:
    """Raise `LorakitError` where NaN was found in what a model computed."""
    if found:
        raise LorakitError(
            "the model's logits are NaN: its weights or its adapter's hold NaN or numbers far too large, or 16 bits "
            "are too few for it. Ask the base without the adapter; if its logits are NaN too, its checkpoint is damaged"
        )


def _settings(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> Any:
    """Return settings that name everything, so that no default of the checkpoint (sampling, penalties) slips in."""
    stops = end_tokens(model, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    pad = tokenizer.pad_token_id
    return need("transformers", "train").GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad if pad is not None else (stops or [0])[0],
        use_cache=True,
        **({"do_sample": False} | sampling),
    )


def _check(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    empty = [str(i) for i, prompt in enumerate(prompts, 1) if not prompt]
    if empty:
        more = f" and {len(empty) - 12} more" if len(empty) > 12 else ""
        which = f"prompt {empty[0]} is" if len(empty) == 1 else f"prompts {', '.join(empty[:12])}{more} are"
        raise DataError(f"{which} empty, and a model needs something to go on from; write at least one word")
    room, read = size_of(model.config, "max_position_embeddings"), sum(virtual_positions(model))
    longest, number = max(((len(prompt), i) for i, prompt in enumerate(prompts, 1)), default=(0, 0))
    if room is not None and longest + max_new_tokens + read > room:
        taken = f"{room} positions, of which the adapter takes {read}" if read else f"{room} positions"
        raise DataError(
            f"prompt {number}, of {longest} tokens, and an answer of {max_new_tokens} exceed the model's {taken}; "
            "shorten the prompt or lower max_new_tokens"
        )
