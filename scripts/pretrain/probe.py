"""Measure a model: held-out perplexity and bits per byte, exact-copy rate on unseen exercises, and samples."""

import math
from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from .corpus import encode
from .exercises import Exercises


@torch.no_grad()
def held_out(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, documents: list[str], length: int, limit: int = 0
) -> dict[str, float]:
    """Score documents in windows of `length` tokens that overlap by half, each token once, with its longer context.

    Perplexity is per token (EOS included); bits per byte divide the same sum by the UTF-8 bytes of the text.
    """
    total = tokens = size = 0.0
    eos = tokenizer.eos_token_id
    for document in documents:
        ids = torch.tensor([eos, *tokenizer(document, add_special_tokens=False)["input_ids"], eos])
        start = 0
        while start < len(ids) - 1:
            end = min(start + (length // 2 if start else length), len(ids) - 1)
            begin = max(0, end - length)
            logits = model(input_ids=ids[None, begin:end], use_cache=False).logits[0].float()
            loss = cross_entropy(logits, ids[begin + 1 : end + 1], reduction="none")
            total += float(loss[start - begin :].sum())
            tokens += end - start
            start = end
        size += len(document.encode())
        if limit and tokens >= limit:
            break
    return summary(total, tokens, size)


def summary(nats: float, tokens: float, size: float) -> dict[str, float]:
    """Perplexity per token and bits per byte from a sum of losses."""
    bits = nats / math.log(2)
    rates = {"perplexity": math.exp(nats / tokens), "bits_per_byte": bits / size}
    return {**rates, "tokens": tokens, "bytes": size, "nats": nats}


def copying(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, exercises: Exercises, count: int, seed: int = 10**6
) -> dict[str, float]:
    """Share of unseen exercises in which greedy choice gets every copied token right, by kind.

    The completion's own words are given (teacher forcing), so the rate is about the copied values alone.
    """
    kinds = exercises.kinds
    rates = {kind: exact(list(hits(model, tokenizer, exercises, kind, count, seed))) for kind in kinds}
    return {**rates, "mean": sum(rates.values()) / len(rates)}


def exact(tried: list[Tensor]) -> float:
    """Share of exercises whose copied tokens are all right."""
    return sum(bool(hit.all()) for hit in tried) / len(tried)


def hits(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, exercises: Exercises, kind: str, count: int, seed: int = 10**6
) -> Iterator[Tensor]:
    """For each exercise, say of each copied token whether it is the model's first choice; (copied,) bools."""
    for number in range(count):
        made = encode(tokenizer, exercises.draw(Random(f"{seed}/{kind}/{number}"), kind))
        ids, copied = torch.tensor(made.ids[:500]), torch.tensor(made.copied[1:500])
        with torch.no_grad():
            best = model(input_ids=ids[None, :-1], use_cache=False).logits[0].argmax(-1)
        yield (best == ids[1:])[copied]


@torch.no_grad()
def sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    seed: int,
    tokens: int = 120,
    temperature: float = 0.7,
    top_p: float = 0.9,
) -> str:
    """Continue a prompt by nucleus sampling; temperature 0 is greedy."""
    rng = torch.Generator().manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = ids.shape[1]
    for _ in range(tokens):
        logits = model(input_ids=ids[:, -500:], use_cache=False).logits[0, -1].float()
        pick = logits.argmax() if temperature == 0 else nucleus(logits / temperature, top_p, rng)
        if int(pick) == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, pick.view(1, 1)], dim=1)
    return tokenizer.decode(ids[0, start:])


def nucleus(logits: Tensor, top_p: float, rng: torch.Generator) -> Tensor:
    """Draw from the smallest set of tokens whose probability reaches `top_p`."""
    probabilities, order = logits.softmax(-1).sort(descending=True)
    kept = probabilities * (probabilities.cumsum(0) - probabilities < top_p)
    return order[torch.multinomial(kept, 1, generator=rng)]
