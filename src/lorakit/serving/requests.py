"""What goes into an engine and what comes out of it: the contract every backend keeps.

An engine speaks in token ids and digests. Text, names, aliases, keys and HTTP stand above it, so that one engine can be
exchanged for another (our own, a vLLM server, replicas), and a test can hold one engine against another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from lorakit.errors import RequestError

Reason = Literal["stop", "length", "cancelled", "deadline", "error"]
MOST_LOGPROBS = 20
TOO_LONG = "context_length_exceeded"  # as OpenAI says it, and as its clients look for it
"""Of how many candidates a request may ask the log-probability, as at OpenAI."""
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default takes the likeliest.

    Args:
        max_tokens: the answer ends here at the latest.
        temperature: 0 takes the likeliest token; above, tokens are drawn from `softmax(logits / temperature)`.
        top_p: draw from the fewest tokens whose probabilities reach this sum (Holtzman et al., arXiv 1904.09751).
        top_k: draw from this many of the likeliest tokens; 0 from all.
        seed: of the draws; None draws one from the operating system. The same seed gives the same tokens in any batch.
        frequency_penalty: taken off a token's logit each time it stands in the answer so far.
        presence_penalty: taken off a token's logit once it stands in the answer so far.
        logit_bias: added to the logits of single tokens.
        logprobs: how many of the likeliest tokens are told with each token; None tells no log-probability at all.
        ignore_eos: go on after the model's end of sequence, for measuring.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestError(
                f"max_tokens is {self.max_tokens}; give a whole number of at least 1", param="max_tokens"
            )
        _between("temperature", self.temperature, 0.0, 2.0)
        _between("top_p", self.top_p, 0.0, 1.0)
        _between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _between("logprobs", self.logprobs or 0, 0, MOST_LOGPROBS)
        if self.top_p == 0.0:
            raise RequestError(
                "top_p is 0, which leaves no token to draw; give a value above 0, at most 1", param="top_p"
            )
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; give a whole number, 0 for all tokens", param="top_k")


@dataclass(frozen=True)
class Request:
    """One sequence to go on with.

    Args:
        prompt: token ids, at least one.
        adapter: the digest of a loaded adapter, or None for the base.
        scale: how strongly the adapter acts; 1 is as trained.
        sampling: how tokens are chosen, and when the answer is long enough.
        tenant: whose request it is; engines share their time out between tenants, then between adapters.
        deadline: the `time.monotonic()` after which nobody waits for it any more.
        id: its name, unique in its engine.
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    scale: float = 1.0
    sampling: Sampling = field(default_factory=Sampling)
    tenant: str = ""
    deadline: float | None = None
    id: str = field(default_factory=lambda: f"request-{next(_numbers)}")

    def late(self, now: float) -> bool:
        """Return whether nobody waits for it any more at `time.monotonic()` = `now`."""
        return self.deadline is not None and now >= self.deadline


@dataclass(frozen=True)
class Token:
    """One token of an answer, with the log-probabilities that were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """`(token, log-probability)` of the likeliest, the likeliest first."""


@dataclass(frozen=True)
class End:
    """The last event of every request, however it went.

    `stop`: the model ended its answer, whose end-of-sequence token is not among the tokens; `length`: `max_tokens` or
    the context was reached; `cancelled`, `deadline`: nobody waits any more; `error`: `detail` says what failed.
    """

    reason: Reason
    detail: str = ""


LATE = End("deadline", "the answer took longer than its request allows")
Event = Token | End
Sink = Callable[[Event], None]
"""Takes the events of one request, in order, on the engine's own thread: it must return at once and never raise."""


@dataclass(frozen=True)
class Loaded:
    """An adapter an engine holds: how many layers it binds, and the bytes it takes."""

    digest: str
    modules: int
    bytes: int


@dataclass(frozen=True)
class Limits:
    """What one engine can take."""

    context: int
    """Positions of one sequence, prompt and answer together."""
    vocabulary: int
    slots: int
    """Sequences that are decoded at once; more wait."""
    queue: int
    """Requests that may wait; more are refused."""


@dataclass(frozen=True)
class Stats:
    """What an engine does at this moment, and has done since it started."""

    running: int
    waiting: int
    waiting_by_adapter: Mapping[str | None, int]
    running_by_adapter: Mapping[str | None, int]
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    steps: int
    step_seconds: float
    broken: str = ""
    """What ended the engine for good; nothing where it lives."""


class Engine(Protocol):
    """What serves tokens. Every function may be called on any thread."""

    @property
    def limits(self) -> Limits:
        """Return what one request may ask for."""

    def load(self, digest: str, folder: Path) -> Loaded:
        """Read an adapter's folder and hold it under `digest`; it blocks, others are served meanwhile.

        The folder holds what the digest says: whoever calls has held its files against it.

        Raises:
            AdapterFileError: a folder that does not fit this base; names the module, expected and found.
            SpecError: an adapter this engine cannot serve, with what to do instead.
        """

    def unload(self, digest: str) -> None:
        """Forget an adapter, if it is there. Requests that run with it end as they would have."""

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; its tokens and, in every case, one `End` reach `sink`.

        Raises:
            RequestError: an empty or over-long prompt, a token outside the vocabulary.
            UnknownAdapterError: an adapter that is not loaded.
            BusyError: the queue is full.
        """

    def cancel(self, id: str) -> None:
        """End a request soon with `cancelled`; an unknown or ended one is left alone."""

    def stats(self) -> Stats:
        """Return what it does now."""

    def close(self) -> None:
        """End every request with `cancelled` and stop."""


def nobody(event: Event) -> None:
    """Take the events of a request whose own listener failed."""


def check_request(request: Request, limits: Limits) -> None:
    """Raise `RequestError` where `request` could not be answered by an engine of these limits."""
    if not request.prompt:
        raise RequestError(
            "the prompt is empty, and a model needs something to go on from; write at least one word", param="prompt"
        )
    if len(request.prompt) >= limits.context:
        raise RequestError(
            f"the prompt has {len(request.prompt)} tokens and the context {limits.context} positions, which leaves "
            "none for an answer; shorten the prompt",
            param="prompt",
            code=TOO_LONG,
        )
    if outside := [t for t in request.prompt if not 0 <= t < limits.vocabulary]:
        raise RequestError(f"token {outside[0]} is not one of the model's {limits.vocabulary}", param="prompt")
    if outside := [t for t in request.sampling.logit_bias if not 0 <= t < limits.vocabulary]:
        raise RequestError(
            f"logit_bias: token {outside[0]} is not one of the model's {limits.vocabulary}", param="logit_bias"
        )


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; give a number from {low:g} to {high:g}", param=name)
