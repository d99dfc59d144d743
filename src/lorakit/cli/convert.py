"""`lorakit convert`: adapters from and to PEFT's format and lorakit's own, and from the original loralib's files."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorakit.cli.screen import screen, size
from lorakit.cli.sources import (
    ALPHA_HELP,
    BASE_HELP,
    ENABLED_HELP,
    adapter_bytes,
    adapter_in,
    refuse_full_folder,
    switches,
)
from lorakit.errors import AdapterFileError, RecipeError, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.core.state import AdapterState

Asked = tuple[tuple[str, ...], tuple[str, ...]]
"""The command to give again with other options between its two parts."""


def convert(
    source: Annotated[str, typer.Argument(help="An adapter: a directory, a run's folder, or a loralib .bin file.")],
    output: Annotated[str, typer.Option(help="The directory to write.")],
    to: Annotated[
        Literal["peft", "native"] | None, typer.Option(help="The format to write; peft, if it is with --as-lora.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help=ALPHA_HELP)] = None,
    enabled: Annotated[str | None, typer.Option(help=ENABLED_HELP)] = None,
    as_lora: Annotated[
        bool,
        typer.Option(
            "--as-lora", help="Write the plain LoRA that a low-rank method equals; with --rank, of others too."
        ),
    ] = False,
    rank: Annotated[
        int | None, typer.Option(help="With --as-lora: of the LoRA nearest to each change of a weight.")
    ] = None,
    base: Annotated[str | None, typer.Option(help=f"With --as-lora: {BASE_HELP[0].lower()}{BASE_HELP[1:]}")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter in another format."""
    with screen(json) as out:
        from lorakit.persist import load, peft_refusal, save

        if to is None and not as_lora:
            raise RecipeError("name the format to write: --to peft, or --to native")
        to = to or "peft"
        place = adapter_in(source)
        refuse_full_folder(Path(output))
        state = load(place, alpha=alpha, enabled=switches(enabled))
        said: dict[str, Any] = {}
        method = state.spec.name
        asked = ("lorakit", "convert", source, "--as-lora"), ("--output", output)
        if as_lora:
            state, said = plain(state, rank, base, asked)
        elif rank is not None or base is not None:
            raise RecipeError("--rank and --base say how to write a plain LoRA; add --as-lora, or leave them out")
        if to == "peft" and (why := peft_refusal(state)) is not None:
            raise AdapterFileError(f"{why}\nlorakit's own format holds it: --to native{_way(state, asked)}")
        save(state, output, to)
        written = adapter_bytes(output)
        out.say(
            f"{place}: {method}, {len(state.updates)} layers, {state.parameters:,} parameters",
            f"wrote {output} ({to}, {size(written)})",
        )
        if as_lora:
            out.say(told(said))
        out.result(
            {
                "source": str(place),
                "format": to,
                "output": output,
                "method": method,
                "layers": len(state.updates),
                "parameters": state.parameters,
                "base": state.base.name,
                "bytes": written,
                **({"as_lora": said} if as_lora else {}),
            }
        )


def plain(state: AdapterState, rank: int | None, base: str | None, asked: Asked) -> tuple[AdapterState, dict[str, Any]]:
    """Return the adapter as plain LoRA, and how far from it that is: exactly it without a rank."""
    from lorakit.combining import truncate
    from lorakit.core.as_lora import as_lora, refuse_moving

    weights: dict[str, Tensor] = {}
    if base is None and rank is not None and _leans_on_base(state):
        base = state.base.name
        if base is None:
            given = "the change of these weights depends on the weights, and the adapter does not say of which base"
            raise RecipeError(f"{given}; name it:\n  {_command(asked, '--rank', str(rank))} --base BASE")
    if base is not None:
        state, weights = _on_base(state, base)
    if rank is None:
        try:
            return as_lora(state), {"rank": None, "total_error": 0.0, "max_error": 0.0, "errors": {}}
        except SpecError as unequal:
            raise SpecError(f"{unequal}{_way(state, asked)}") from unequal
    refuse_moving(state)
    near = truncate(state, rank, base=weights)
    errors = {key: loss.relative for key, loss in near.losses.items()}
    return near.state, {
        "rank": rank,
        "total_error": near.error,
        "max_error": max(errors.values(), default=0.0),
        "errors": errors,
    }


def _leans_on_base(state: AdapterState) -> bool:
    """Return whether the base is asked for: by a change that leans on its weight, or by a layer of unknown width."""
    from lorakit.core.method import Static
    from lorakit.core.state import leans_on_weights

    open_ = any(not u.site.in_ for u in state.updates if isinstance(u.method, Static))
    return open_ or leans_on_weights(state)


def _way(state: AdapterState, asked: Asked) -> str:
    """Return a line with the command that writes an adapter as plain LoRA, where one equals it or comes near."""
    from lorakit.core.method import LowRank, Static

    methods = {type(update.method) for update in state.updates}
    if not methods or not all(issubclass(method, Static) for method in methods):
        return ""
    if all(issubclass(method, LowRank) for method in methods):
        return f"\nthe plain LoRA that it equals: {_command(asked)}"
    return f"\nthe nearest plain LoRA, here of rank 16, with what is lost: {_command(asked, '--rank', '16')}"


def _command(asked: Asked, *options: str) -> str:
    verb, rest = asked
    return shlex.join((*verb, *options, *rest))


def _on_base(state: AdapterState, base: str) -> tuple[AdapterState, dict[str, Tensor]]:
    """Return the adapter as it sits on its base, and the weights of its layers in canonical layout."""
    from dataclasses import replace

    from lorakit.core.registry import host_of
    from lorakit.inject.attach import attach, weight_at
    from lorakit.inject.attach import state as state_of
    from lorakit.training.base import load_base, task_of

    model, _ = load_base(base, task=task_of(state.labels), labels=state.labels)
    weights = {}
    for update in state.updates:
        module = model.get_submodule(update.site.path)
        if host_of(module) is not None:
            weights[update.site.key] = weight_at(module, update.site).cpu()
    attach(model, state)
    here = state_of(model)
    on_cpu = [replace(u, tensors={name: t.cpu() for name, t in u.tensors.items()}) for u in here.updates]
    return replace(state, updates=tuple(on_cpu)), weights


def told(said: dict[str, Any]) -> str:
    """Return in words how far a plain LoRA that `plain` made is from the adapter."""
    if said["rank"] is None:
        return "as the plain LoRA it equals"
    if not said["errors"]:
        return f"as plain LoRA of rank {said['rank']}"
    worst = max(said["errors"], key=said["errors"].get)
    return (
        f"as the nearest plain LoRA of rank {said['rank']}: {said['total_error']:.2%} of the change of the weights is "
        f"lost (relative Frobenius error), most in {worst}: {said['max_error']:.2%}"
    )
