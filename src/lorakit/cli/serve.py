"""`lorakit serve`: one base and many adapters behind OpenAI's API, each request with the adapter it names."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorakit.cli.amounts import bytes_of
from lorakit.cli.screen import print_json, screen, size, table
from lorakit.cli.sources import BASE_HELP, SOURCE_HELP, Source, adapter_in, find, refuse_classifier
from lorakit.errors import RecipeError, ServingError, listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.cli.screen import Screen
    from lorakit.serving.keys import Keys
    from lorakit.serving.requests import Engine
    from lorakit.serving.service import Service


def serve(
    source: Annotated[str | None, typer.Argument(help=SOURCE_HELP)] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder of adapters, each served under its own folder's name; may be given more than once."
        ),
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Start without the adapters of --adapters that cannot be served.")
    ] = False,
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at; others than this machine's own ask for --keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at; 0 takes a free one.")] = 8000,
    keys: Annotated[
        str | None, typer.Option(help="A file of API keys; without it everybody who reaches us may ask.")
    ] = None,
    new_key: Annotated[
        str | None, typer.Option(help="Make a key of this name, add it to --keys, print its secret, and end.")
    ] = None,
    scopes: Annotated[str, typer.Option(help="What the new key may do: infer, admin, metrics.")] = "infer",
    store: Annotated[
        str | None, typer.Option(help="Where adapters, names and ratings are kept; by default in ~/.cache/lorakit.")
    ] = None,
    engine: Annotated[
        Literal["slots", "vllm", "ray"],
        typer.Option(help="What computes: lorakit's own, a vLLM server of the same base, or replicas of ours by Ray."),
    ] = "slots",
    engine_url: Annotated[
        str | None, typer.Option(help="Where vLLM listens; its key, if it wants one, is in LORAKIT_ENGINE_KEY.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="With --engine ray: processes with an engine each; 2.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Answers that are written at once; 16, or 64 by vLLM.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt and its answer; the model's own, at most 4096.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait for a slot; more get 429.")] = 256,
    memory: Annotated[str, typer.Option(help="What the adapters in memory may take, as 512MB or 4GB.")] = "1GB",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the engine; all cores but one, which HTTP needs, by default.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds an answer may take, the wait included.")] = 600.0,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16 or auto.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object when it is ready.")] = False,
) -> None:
    """Serve a base and many adapters behind OpenAI's API."""
    if new_key is not None:
        _make_key(new_key, scopes, keys)
        return
    with screen(False) as out:
        if source is None:
            raise RecipeError("name a base, or an adapter of one: lorakit serve lorakit/tales")
        known = _keys(keys)
        _leave_a_core(threads)
        found = find(source, base)
        refuse_classifier(source, found.labels)
        room = bytes_of("--memory", memory)
        if store == "":
            raise RecipeError("--store is empty; name a folder, or leave it out")
        place = Path(store) if store is not None else _home(found.base)
        shape = {"slots": slots or (64 if engine == "vllm" else 16), "context": context, "queue": queue}
        folders = [Path(folder) for folder in adapters or ()]
        _refuse_odd(engine, engine_url, replicas)
        _refuse_early(host, port, known, folders)
        out.note(f"loading {found.base} ...")
        if engine_url is not None:
            begun, tokenizer = _vllm(found, engine_url, shape)
        elif engine == "ray":
            begun, tokenizer = _ray(found, replicas or 2, shape, dtype)
        else:
            begun, tokenizer = slot_engine(found, shape, dtype)
        if context is not None and (most := begun.limits.context) < context:
            out.note(f"--context {context} is more than this model has positions for; {most} it is")
        service = _service(found, source, place, folders, skip_broken, room, timeout, begun, tokenizer)  # fmt: skip
        if lost := service.registry.lost():
            out.note(f"the files of these are gone from {place}; add them anew or delete their names:\n{listing(lost)}")
        try:
            _listen(service, known, host, port, out, json)
        finally:
            service.engine.close()


def _listen(service: Service, known: Keys | None, host: str, port: int, out: Screen, as_json: bool) -> None:
    from lorakit.serving.http import app, run

    def ready(port: int, stop: Any) -> None:
        service.warm = True
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if as_json:
            print_json({"url": url, "models": [model.id for model in service.registry.models()]})
        else:
            _announce(service, url, out, known)

    run(app(service, known), host=host, port=port, keys=known, ready=ready)


def _refuse_odd(engine: str, url: str | None, replicas: int | None) -> None:
    if (engine == "vllm") != (url is not None):
        raise RecipeError("--engine vllm and --engine-url URL go together; give both or neither")
    if replicas is not None and engine != "ray":
        raise RecipeError("--replicas are Ray's; add --engine ray, or leave it out")


def _refuse_early(host: str, port: int, keys: Keys | None, folders: list[Path]) -> None:
    """Raise before a base is loaded what would be raised once it is: of where to listen, and of the folders."""
    import socket

    from lorakit.serving.http import refuse_open
    from lorakit.serving.shelf.registry import adapters_in

    refuse_open(host, keys)
    for folder in folders:
        adapters_in(folder)
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as taken:
        raise ServingError(f"cannot listen at {host}:{port} ({taken}); choose another --port or --host") from None


def slot_engine(found: Source, shape: dict[str, Any], dtype: str) -> tuple[Engine, PreTrainedTokenizerBase]:
    """Return our own engine on a base, and its tokenizer."""
    from lorakit.serving.batching.engine import SlotEngine
    from lorakit.training.generate import end_tokens

    model, tokenizer = found.load_base(dtype)
    return SlotEngine(model, stops=end_tokens(model, tokenizer), **shape), tokenizer


def replica(found: Source, shape: dict[str, Any], dtype: str) -> Engine:
    """Return the engine of one replica, in its process."""
    return slot_engine(found, shape, dtype)[0]


def _ray(found: Source, count: int, shape: dict[str, Any], dtype: str) -> tuple[Engine, PreTrainedTokenizerBase]:
    from lorakit.serving.remote.ray import RayEngine
    from lorakit.training.base import load_tokenizer

    build = partial(replica, replace(found, state=None), shape, dtype)
    return RayEngine(build, replicas=count, queue=shape["queue"]), load_tokenizer(found.base)


def _vllm(found: Source, url: str, shape: dict[str, Any]) -> tuple[Engine, PreTrainedTokenizerBase]:
    from lorakit.inject.sites import sites
    from lorakit.serving.remote.vllm import VLLMEngine
    from lorakit.training.base import build_empty, load_tokenizer
    from lorakit.training.generate import end_tokens

    empty, tokenizer = build_empty(found.base), load_tokenizer(found.base)
    vocabulary: int = empty.get_input_embeddings().get_parameter("weight").shape[0]
    stops, key = end_tokens(empty, tokenizer), os.environ.get("LORAKIT_ENGINE_KEY")
    made = VLLMEngine(url, skeleton=sites(empty), vocabulary=vocabulary, stops=stops, api_key=key, **shape)
    return made, tokenizer


def _service(
    found: Source, source: str, place: Path, folders: list[Path], skip: bool, memory: int, timeout: float,
    engine: Engine, tokenizer: PreTrainedTokenizerBase,
) -> Service:  # fmt: skip
    from lorakit.serving.feedback import Feedback
    from lorakit.serving.metrics import Metrics
    from lorakit.serving.service import Service
    from lorakit.serving.shelf.names import Names
    from lorakit.serving.shelf.registry import Registry
    from lorakit.serving.shelf.store import Store

    own = [adapter_in(source)] if found.state is not None else []
    try:
        kept, names = Store(place), Names(place / "names.json", _names(found.base))
        registry = Registry(engine, kept, names, memory=memory, roots=[*folders, *own])
        for folder in folders:
            registry.scan(folder, skip=skip)
        for adapter in own:
            registry.add(_name(Path(source)), adapter, replace=True)
        metrics = Metrics()
        metrics.watch(engine, registry.usage)
        return Service(engine, registry, tokenizer, metrics=metrics, feedback=Feedback(place / "feedback.sqlite"),
                       timeout=timeout)  # fmt: skip
    except BaseException:
        engine.close()
        raise


def _announce(service: Service, url: str, out: Screen, known: Keys | None) -> None:
    limits, models = service.engine.limits, service.registry.models()
    rows = [(m.id, "the base" if m.parent is None else (m.digest or "several")[:12]) for m in models]
    authorized = "" if known is None else '-H "authorization: Bearer $LORA_KEY" '
    shown = rows[:20] + [(f"... and {len(rows) - 20} more", "")] * (len(rows) > 20)
    out.show(table("", "model", "adapter", rows=shown))
    out.say(
        f"{limits.slots} answers at once, up to {limits.context:,} tokens each; adapters may take "
        f"{size(service.registry.usage().memory)}",
        f"listening at {url}/v1 (OpenAI's API), {url}/docs (every route); Ctrl-C ends it",
        f"try: curl {url}/v1/completions {authorized}-H 'content-type: application/json' "
        f'-d \'{{"model": "{rows[-1][0]}", "prompt": "Once upon a time", "max_tokens": 40}}\'',
    )


def _make_key(name: str, scopes: str, file: str | None) -> None:
    """Print a new secret once, and add its hash to the file of keys."""
    from lorakit.serving.keys import add_key

    if file is None:
        raise RecipeError("--new-key adds to a file of keys; name it: --keys keys.json")
    secret = add_key(Path(file), name, [scope.strip() for scope in scopes.split(",")])  # type: ignore[misc]
    print(f"added {name} to {file}; its secret, which is kept nowhere else:", file=sys.stderr)
    print(secret)


def _keys(file: str | None) -> Keys | None:
    from lorakit.serving.keys import load_keys

    return None if file is None else load_keys(Path(file))


def _leave_a_core(threads: int | None) -> None:
    """Give the engine its threads: all cores but one, which reads requests and writes answers meanwhile.

    On two cores a small model answered 1.4 times the requests with one thread that it did with two.
    """
    import torch

    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or max(1, torch.get_num_threads() - 1))


def _names(base: str) -> tuple[str, ...]:
    """Return what the base may be called: as it was given where that is a name, and by its last part."""
    last = _name(Path(base))
    return (last,) if Path(base).is_dir() or last == base else (base, last)


def _name(place: Path) -> str:
    """Return a folder's name as a model's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", place.resolve().name).strip("-._") or "base"


def _home(base: str) -> Path:
    """Return where a base's adapters are kept between two runs of the server."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(Path(base).resolve()) if Path(base).is_dir() else base).strip("-")
    return root / "lorakit" / "serve" / name
