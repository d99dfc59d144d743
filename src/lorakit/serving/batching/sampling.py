"""The next token of each sequence, as its request wants it: the likeliest, or drawn from what is left of the tail.

Each sequence draws from a generator of its own, so its tokens depend on its seed and not on who shares the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from secrets import randbits

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.serving.requests import Sampling, Token

COLDEST = 1e-5
"""Temperatures below draw the likeliest token; divided by one of them, logits leave the range of fp32."""


@dataclass(eq=False)
class Draw:
    """How one sequence's tokens are chosen, and what it has written so far."""

    sampling: Sampling
    counts: dict[int, int] = field(default_factory=dict)
    rng: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.sampling.temperature >= COLDEST:
            seed = randbits(63) if self.sampling.seed is None else self.sampling.seed
            self.rng = torch.Generator().manual_seed(seed % (1 << 63))

    @property
    def plain(self) -> bool:
        """Return whether the likeliest token of the model's own logits is all that is asked for."""
        s = self.sampling
        adjusts = s.frequency_penalty or s.presence_penalty or s.logit_bias
        return not (s.temperature or adjusts or s.logprobs is not None)


def choose(logits: Float[Tensor, "n vocabulary"], draws: Sequence[Draw]) -> list[Token | None]:
    """Return the next token of each row, or None where its logits are NaN.

    A `logprob` is the model's own, before temperature and penalties, as at OpenAI.
    """
    best = logits.argmax(-1)
    numbers = logits.gather(-1, best[:, None])[:, 0].isfinite().tolist()  # argmax of a row with NaN is the NaN
    chosen: list[Token | None] = [
        Token(token) if finite else None for token, finite in zip(best.tolist(), numbers, strict=True)
    ]
    for row, draw in enumerate(draws):
        if not draw.plain and chosen[row] is not None:
            chosen[row] = _one(logits[row].cpu(), draw)
        token = chosen[row]
        if token is not None and (draw.sampling.frequency_penalty or draw.sampling.presence_penalty):
            draw.counts[token.id] = draw.counts.get(token.id, 0) + 1
    return chosen


def _one(logits: Float[Tensor, " vocabulary"], draw: Draw) -> Token:
    sampling = draw.sampling
    adjusted = _adjusted(logits, sampling, draw.counts)
    if draw.rng is None:
        token = int(adjusted.argmax())
    else:
        kept = _kept((adjusted - adjusted.max()) / sampling.temperature, sampling)
        token = int(torch.multinomial(kept, 1, generator=draw.rng))
    if sampling.logprobs is None:
        return Token(token)
    told = logits.log_softmax(-1)
    values, ids = told.topk(min(sampling.logprobs, told.numel()))
    return Token(token, told[token].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _adjusted(logits: Tensor, sampling: Sampling, counts: Mapping[int, int]) -> Tensor:
    """Return `logits + bias - frequency c - presence [c > 0]`, c the times a token stands in the answer."""
    if not (sampling.logit_bias or counts):
        return logits
    adjusted = logits.clone()
    if bias := sampling.logit_bias:
        adjusted[list(bias)] += adjusted.new_tensor(list(bias.values()))
    if counts:
        times = adjusted.new_tensor(list(counts.values()))
        adjusted[list(counts)] -= sampling.frequency_penalty * times + sampling.presence_penalty
    return adjusted


def _kept(logits: Tensor, sampling: Sampling) -> Float[Tensor, " vocabulary"]:
    """Return probabilities, 0 outside of the `top_k` likeliest and of the fewest that reach `top_p`."""
    p = logits.softmax(-1)
    if sampling.top_k and sampling.top_k < p.numel():
        p = p * (p >= p.topk(sampling.top_k).values[-1])
    if sampling.top_p < 1.0:
        values, order = p.sort(descending=True, stable=True)
        before = values.cumsum(-1) - values
        beyond = order[before >= sampling.top_p * float(values.sum())]
        p = p.index_fill(0, beyond[beyond != order[0]], 0.0)
    return p
