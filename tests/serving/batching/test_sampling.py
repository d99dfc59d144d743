"""Tokens are chosen as the field chooses them: equal to transformers' own processors, drawn with the asked shares."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lorakit.errors import RequestError
from lorakit.serving.batching.sampling import Draw, _kept, choose
from lorakit.serving.requests import Sampling, Token
from tests.tolerances import assert_close

LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 0.0, 0.0, 0.0]])


def test_the_likeliest_token_of_each_row_is_taken() -> None:
    assert choose(LOGITS, [Draw(Sampling()), Draw(Sampling())]) == [Token(1), Token(0)]


def test_a_row_of_nan_is_told_apart_from_the_others() -> None:
    broken = LOGITS.clone()
    broken[0, 3] = math.nan
    assert choose(broken, [Draw(Sampling()), Draw(Sampling(temperature=1.0))])[0] is None


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (0.9, 9, 0.8)]
)
def test_what_may_be_drawn_equals_transformers(temperature: float, top_k: int, top_p: float) -> None:
    for seed in range(20):
        logits = torch.randn(30, generator=torch.Generator().manual_seed(seed)) * 3
        wanted = TemperatureLogitsWarper(temperature)(None, logits[None])
        if top_k:
            wanted = TopKLogitsWarper(top_k)(None, wanted)
        if top_p < 1:
            wanted = TopPLogitsWarper(top_p)(None, wanted)
        kept = _kept(logits / temperature, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
        assert_close(kept / kept.sum(), wanted[0].softmax(-1))


def test_draws_have_the_shares_of_their_probabilities() -> None:
    draw = Draw(Sampling(temperature=1.0, seed=3))
    drawn = [choose(LOGITS[:1], [draw])[0] for _ in range(4000)]
    shares = Counter(token.id for token in drawn if token is not None)
    for token, p in enumerate(LOGITS[0].softmax(-1).tolist()):
        assert abs(shares[token] / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)


@pytest.mark.parametrize("temperature", [1e-5, 1e-9, 1e-50, 5e-324])
def test_a_temperature_near_0_takes_the_likeliest(temperature: float) -> None:
    assert choose(LOGITS[:1] * 1e6, [Draw(Sampling(temperature=temperature, seed=1))]) == [Token(1)]


@given(
    temperature=st.floats(0, 2), top_p=st.floats(0, 1, exclude_min=True), top_k=st.integers(0, 9),
    frequency=st.floats(-2, 2), bias=st.dictionaries(st.integers(0, 3), st.floats(-100, 100)),
    logits=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=4, max_size=4),
)  # fmt: skip
def test_whatever_may_be_asked_a_token_comes(
    temperature: float, top_p: float, top_k: int, frequency: float, bias: dict[int, float], logits: list[float]
) -> None:
    draw = Draw(Sampling(temperature=temperature, top_p=top_p, top_k=top_k, frequency_penalty=frequency,
                         logit_bias=bias, logprobs=4))  # fmt: skip
    for _ in range(3):
        (token,) = choose(torch.tensor([logits]), [draw])
        assert token is not None
        assert 0 <= token.id < 4


def test_penalties_by_hand() -> None:
    draw = Draw(Sampling(frequency_penalty=0.6, presence_penalty=0.5))
    tokens = [choose(LOGITS[:1], [draw])[0] for _ in range(5)]
    # token 1: 2.0, then 0.9 after one, 0.3 after two, -0.3 after three; token 2: 1.0, then -0.1; token 0: 0.0
    assert [token.id for token in tokens if token is not None] == [1, 2, 1, 1, 0]


def test_a_bias_forbids_or_forces_a_token() -> None:
    (token,) = choose(LOGITS[:1], [Draw(Sampling(logit_bias={1: -100.0}))])
    assert token == Token(2)
    (token,) = choose(LOGITS[:1], [Draw(Sampling(logit_bias={3: 100.0}))])
    assert token == Token(3)


def test_log_probabilities_are_the_models_own() -> None:
    (token,) = choose(LOGITS[:1], [Draw(Sampling(logprobs=2, logit_bias={2: 100.0}))])
    assert token is not None
    total = math.log(sum(math.exp(x) for x in (0.0, 2.0, 1.0, -1.0)))
    assert token.id == 2
    assert token.logprob == pytest.approx(1.0 - total, abs=1e-6)
    assert [i for i, _ in token.top] == [1, 2]
    assert token.top[0][1] == pytest.approx(2.0 - total, abs=1e-6)


def test_a_request_for_the_impossible_says_what_may_be_asked() -> None:
    for wrong, why in (
        ({"temperature": -0.1}, "temperature is -0.1; give a number from 0 to 2"),
        ({"top_p": 0.0}, "leaves no token"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"top_k": -1}, "top_k is -1"),
    ):
        with pytest.raises(RequestError, match=why):
            Sampling(**wrong)
