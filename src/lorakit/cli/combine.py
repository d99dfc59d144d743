"""`lorakit combine`: several adapters of one base become one, and how far it is from their exact sum."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorakit.cli.screen import in_options, screen, size, span
from lorakit.cli.sources import BASE_HELP, find, load_adapter, named_base, refuse_full_folder
from lorakit.errors import CombineError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lorakit.combining import Combined, How
    from lorakit.core.state import AdapterState

ADVICE = {
    "how=Svd(rank=...) comes": "--how svd --rank N comes",
    "give rank or energy": "give --rank or --energy",
    "; if they are, say so: replace(state, base=other.base)": "; if they are, name it with --base",
    "give it, base={key: weight}": "name the base with --base",
    ", or base={name: value}, or leave it out, replace(state, trained={})": ", or name the base with --base",
}
"""What the user of the command does, for what the caller of the function does."""


def combine(
    sources: Annotated[list[str], typer.Argument(help="Folders of runs, or adapters, of one base.")],
    output: Annotated[str, typer.Option(help="The directory to write.")],
    how: Annotated[
        Literal["linear", "concat", "svd", "ties", "dare", "factorwise"],
        typer.Option(help="linear and concat are the exact weighted sum; factorwise is what PEFT calls linear."),
    ] = "linear",
    weights: Annotated[
        str | None, typer.Option(help="One for each adapter, of any sign: 0.7,0.3 or 1,-1; 1 each by default.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the result, for svd, ties and dare.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="The share of the squared size its rank keeps, for svd, ties and dare.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="The share of entries that ties and dare keep; 0.2 and 0.5 by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of what dare drops.")] = 0,
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the adapter that several of one base make together."""
    with screen(json) as out:
        import torch

        from lorakit.combining import combine as combined
        from lorakit.combining.lineup import checked_weights
        from lorakit.persist import peft_refusal, save

        refuse_full_folder(Path(output))
        way = _way(how, {"rank": rank, "energy": energy, "density": density})
        states = [load_adapter(source, base) for source in sources]
        shares = checked_weights(states, None if weights is None else _numbers(weights))
        rng = torch.Generator().manual_seed(seed)
        with in_options(ADVICE):
            values = _weights(sources, base, states, shares, way.averages)
            made = combined(states, way, shares, base=values, rng=rng)
        form: Literal["peft", "native"] = "peft" if peft_refusal(made.state) is None else "native"
        save(made.state, output, form)
        said = _plain(made, shares)
        out.say(
            " + ".join(f"{share:g} x {source}" for share, source in zip(shares, sources, strict=True)),
            f"{how}: {way.formula}",
            f"{_parts(said['ranks'].values(), made.state)}, {size(said['bytes'])}; "
            f"{made.error:.2%} from the exact weighted sum (relative, Frobenius)",
            *([f"of what {how} made, the rank left out {made.cut:.2%}"] if made.cuts else []),
            f"wrote {output} ({form})",
        )
        out.result({"sources": list(sources), "how": how, "output": output, "format": form, **said})


def _parts(ranks: Collection[int], state: AdapterState) -> str:
    """Return in words what was made."""
    updates = [f"{len(ranks)} updates of rank {span(ranks)}"] * bool(ranks)
    return " and ".join([*updates, *[f"{len(state.trained)} tensors trained whole"] * bool(state.trained)])


def _plain(made: Combined, shares: Sequence[float]) -> dict[str, Any]:
    """Return what was made as plain values."""
    from lorakit.combining.compress import stored_bytes

    return {
        "weights": list(shares),
        "error": made.error,
        "cut": made.cut if made.cuts else None,
        "errors": {key: loss.relative for key, loss in made.losses.items()},
        "ranks": {update.site.key: len(update.tensors["down"]) for update in made.state.updates},
        "bytes": stored_bytes(made.state),
    }


def _way(name: str, asked: Mapping[str, Any]) -> How:
    """Return a way to combine with the numbers that were given, or refuse those it has not."""
    from lorakit.combining import HOWS

    given = {key: value for key, value in asked.items() if value is not None}
    known = {field.name for field in fields(HOWS[name])}
    if extra := [f"--{key}" for key in given if key not in known]:
        takers = [way for way, cls in HOWS.items() if set(given) <= {f.name for f in fields(cls)}]
        who = f"; {' and '.join(takers)} take{'s' if len(takers) == 1 else ''} it" if takers else ""
        raise RecipeError(f"--how {name} has no {' and '.join(extra)}{who}")
    return HOWS[name](**given)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights {text!r} are no numbers; write one for each adapter: 0.7,0.3") from None


def _weights(
    sources: Sequence[str], base: str | None, states: Sequence[AdapterState], shares: Sequence[float], averages: bool
) -> Mapping[str, Tensor]:
    """Return what the sum asks of the base: weights under a change that leans on them, tensors trained whole.

    A head that the base's files have no values for is left out: the one it was given here is random.
    """
    from lorakit.combining.trained import leans_on_base
    from lorakit.core.method import Static
    from lorakit.core.state import check_tensors, leans_on_weights
    from lorakit.inject.attach import fitted, weight_at
    from lorakit.inject.bases import base_of, check_base
    from lorakit.inject.sites import sites

    if not (leans_on_base(states, shares, averages) or any(map(leans_on_weights, states))):
        return {}
    bases = {named_base(source, state) for source, state in zip(sources, states, strict=True)}
    if len(bases) > 1:
        raise CombineError(f"the adapters name several bases, {', '.join(sorted(bases))}; if they are one, give --base")
    loaded, _ = find(sources[0], base).load()
    model = loaded.model
    for state in states:
        check_tensors(fitted(state, sites(model)))
        check_base(state.base, base_of(model))
    values = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in loaded.fresh
    }
    for update in (update for state in states for update in state.updates if isinstance(update.method, Static)):
        values[update.site.key] = weight_at(model.get_submodule(update.site.path), update.site)
    return values
