"""Golden prompts: an adapter shows on this engine what it did where it was made, before anybody is answered by it.

Files can be whole and fit the base's shapes, and the answers still be another model's: a base of other weights, another
dtype, a scale that was read differently. A few greedy tokens tell.
"""

from __future__ import annotations

import queue
import time

from lorakit.errors import AdapterFileError, RequestError, ServingError
from lorakit.serving.requests import End, Engine, Event, Request, Sampling, Token
from lorakit.serving.shelf.manifest import Golden, Manifest

SECONDS = 60.0
"""How long one golden prompt may take."""


def check_golden(engine: Engine, manifest: Manifest) -> None:
    """Ask a loaded adapter its golden prompts.

    Raises:
        AdapterFileError: another token than expected; names the prompt and the position.
        BusyError: the engine's queue is full.
        ServingError: the engine did not answer.
    """
    for number, golden in enumerate(manifest.golden, 1):
        where = f"adapter {manifest.digest[:12]}: golden prompt {number} of {len(manifest.golden)}"
        found = _answer(engine, manifest.digest, golden, where)
        pairs = zip(golden.tokens, (*found, *[None] * len(golden.tokens)), strict=False)
        differing = [(at, *pair) for at, pair in enumerate(pairs, 1) if pair[0] != pair[1]]
        if differing:
            at, expected, got = differing[0]
            raise AdapterFileError(
                f"{where}, token {at}: expected {expected}, found {'the end' if got is None else got}; this server "
                "does not answer as the one where the adapter was made: compare base, dtype and lorakit's version"
            )


def _answer(engine: Engine, digest: str, golden: Golden, where: str) -> list[int]:
    # The end of sequence is a token like any other here: what counts is what the model prefers, place by place.
    sampling = Sampling(max_tokens=len(golden.tokens), ignore_eos=True)
    request = Request(golden.prompt, digest, sampling=sampling, deadline=time.monotonic() + SECONDS)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    try:
        engine.submit(request, events.put)
    except RequestError as refused:
        raise AdapterFileError(f"{where}: {refused}") from refused
    tokens = []
    try:
        while isinstance(event := events.get(timeout=SECONDS + 10), Token):
            tokens.append(event.id)
    except queue.Empty:
        engine.cancel(request.id)
        event = End("deadline")
    if event.reason not in ("stop", "length"):
        detail = f" ({event.detail})" if event.detail else ""
        raise ServingError(f"{where}: the engine ended it with {event.reason!r}{detail}; try again")
    return tokens
