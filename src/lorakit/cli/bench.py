"""`lorakit bench serve URL`: a load on a running server, and what its clients see."""

from __future__ import annotations

import os
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.screen import screen, table
from lorakit.errors import RecipeError

if TYPE_CHECKING:
    from lorakit.cli.screen import Screen


class What(str, Enum):
    """What is measured."""

    serve = "serve"


def bench(
    what: Annotated[What, typer.Argument(help="What is measured: serve, a running server.")],
    url: Annotated[str, typer.Argument(help="The server's address; any that speaks OpenAI's completions.")],
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 100,
    clients: Annotated[int, typer.Option(min=1, help="Clients that ask at once, each again once it is answered.")] = 16,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests a second at random times, instead of --clients.")
    ] = None,
    adapters: Annotated[
        int | None, typer.Option(min=0, help="Ask this many of the server's adapters; 0 the base; all by default.")
    ] = None,
    zipf: Annotated[float, typer.Option(min=0.0, help="Ask the k-th adapter 1/k^ZIPF as often; 0 asks all alike.")] = 0,
    prompt: Annotated[str, typer.Option(help="The fewest and the most words of a prompt.")] = "8-64",
    answer: Annotated[str, typer.Option(help="The fewest and the most tokens of an answer.")] = "16-64",
    key: Annotated[str | None, typer.Option(help="An API key; LORA_KEY of the environment by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of all draws.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put a load on a running server and time its answers."""
    with screen(json) as out:
        from lorakit.serving.load import Load, drive, served

        secret = key or os.environ.get("LORA_KEY")
        if secret is not None and not (secret.isascii() and secret.isprintable()):
            raise RecipeError("the key has characters that no header can carry; give the key as the server printed it")
        models = _asked(served(url, secret), adapters)
        load = Load(url, models, requests, clients, rate, zipf, _span("--prompt", prompt), _span("--answer", answer),
                    secret, seed)  # fmt: skip
        how = f"{rate:g} requests a second" if rate is not None else f"{clients} clients"
        out.note(f"{requests} requests of {how} to {len(models)} model(s) of {url} ...")
        found = drive(load).summary()
        _say(found, out)
        out.result({"url": url, "models": list(models), "load": {"requests": requests, "clients": clients, "rate": rate,
                    "zipf": zipf, "prompt": prompt, "answer": answer, "seed": seed}, **found})  # fmt: skip
    if 2 * found["answered"] <= requests:
        raise typer.Exit(1)


def _asked(served: list[tuple[str, bool]], adapters: int | None) -> tuple[str, ...]:
    """Return the models to ask: so many adapters, or the base."""
    own, base = [name for name, adapter in served if adapter], [name for name, adapter in served if not adapter]
    if adapters == 0 or (adapters is None and not own):
        return tuple(base[:1])
    if adapters is not None and adapters > len(own):
        raise RecipeError(f"the server has {len(own)} adapters, not {adapters}; lower --adapters or add some")
    return tuple(own[:adapters])


def _span(option: str, text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    ends = (low, high if dash else low)
    if not all(end.strip().isdigit() for end in ends) or not 0 < int(ends[0]) <= int(ends[1]):
        raise RecipeError(f"{option} is {text!r}; give a number such as 32, or two such as 8-64")
    return int(ends[0]), int(ends[1])


def _say(found: dict[str, Any], out: Screen) -> None:
    rows = [
        (name, f"{ms['p50']:,.1f} ms", f"{ms['p95']:,.1f} ms")
        for name, ms in (("first token", found["first_token_ms"]), ("between tokens", found["between_tokens_ms"]),
                         ("whole answer", found["answer_ms"]))
        if ms is not None
    ]  # fmt: skip
    out.show(table("", "", "p50", "p95", rows=rows, numbers=(1, 2)))
    fairness = "" if found["fairness"] is None else f"; fairness between models {found['fairness']:.3f} (1: all alike)"
    out.say(
        f"{found['answered']} answered in {found['seconds']:.1f} s: {found['requests_per_second']:.1f} requests and "
        f"{found['tokens_per_second']:.0f} tokens a second{fairness}"
    )
    for said, count in sorted(found["failed"].items(), key=lambda item: -item[1])[:5]:
        out.say(f"{count} failed: {said}")
