"""`lorakit compress`: fewer directions and fewer bits for an adapter, with what that costs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorakit.cli.amounts import bytes_of
from lorakit.cli.screen import Screen, screen, size, span, table
from lorakit.cli.sources import (
    BASE_HELP,
    Source,
    adapter_bytes,
    adapter_in,
    find,
    load_adapter,
    refuse_full_folder,
    weights_if_asked,
)
from lorakit.errors import CombineError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lorakit.combining import Compressed
    from lorakit.core.state import AdapterState
    from lorakit.training.smallest import Smallest


def compress(
    source: Annotated[str, typer.Argument(help="The folder of a run, or an adapter (directory or file).")],
    output: Annotated[str, typer.Option(help="The directory to write.")],
    rank: Annotated[int | None, typer.Option(min=1, help="The most directions of each weight.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="The share of each update's squared size to keep, 0.99 for one.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--size", help="The most bytes its tensors may take in all: 50%, 800kB, 1.5MB."),
    ] = None,
    within: Annotated[
        float | None, typer.Option(help="The share of the score on --data that may be lost, 0.01 for one.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows to score on with --within; a run's validation data by default.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which split of a folder or a dataset.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16", "fp8", "int8"] | None, typer.Option(help="What its numbers are kept in.")
    ] = None,
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a smaller adapter, and say what it lost. One of --rank, --energy, --size and --within says how small."""
    with screen(json) as out:
        from lorakit.combining import compress as compressed
        from lorakit.combining.compress import STORED, stored_bytes
        from lorakit.persist import kept_in_8_bits, save

        refuse_full_folder(Path(output))
        if within is None and (data, split, limit) != (None, None, None):
            raise RecipeError("--data, --split and --limit say what to score on; give --within too, or leave them out")
        _refuse_unclear(rank, energy, budget, within, dtype)
        state, eight = load_adapter(source, base), kept_in_8_bits(adapter_in(source))
        dtype = dtype or eight
        before = stored_bytes(state, None if eight is None else STORED[eight])
        weights = weights_if_asked(source, state, "compress")
        searched = None
        if within is not None:
            searched = _search(out, find(source, base), state, within, data, split, limit, dtype, weights)
            made = searched.made
        else:
            most = None if budget is None else bytes_of("--size", budget, before)
            made = compressed(state, rank=rank, energy=energy, size=most, dtype=dtype, base=weights)
        if made.bytes > before or (made.bytes == before and made.error > 1e-6):
            raise CombineError(
                f"nothing was written: as a LoRA of that rank it would take {size(made.bytes)}, no less than the "
                f"{size(before)} that {state.spec.name} takes; ask for less, as --size 50% does, or keep it"
            )
        save(made.state, output, dtype=made.dtype)
        written = adapter_bytes(output)
        _show(out, made, before, searched)
        out.say(f"wrote {output} (peft, {size(written)})")
        out.result({"source": source, "output": output, "bytes_before": before, **_plain(made, searched)})


def _refuse_unclear(
    rank: int | None, energy: float | None, budget: str | None, within: float | None, dtype: str | None
) -> None:
    """Raise `RecipeError` unless exactly one option says how much to keep, or only --dtype is given."""
    said = {"--rank": rank, "--energy": energy, "--size": budget, "--within": within}
    given = [name for name, value in said.items() if value is not None]
    if len(given) > 1:
        raise RecipeError(f"{' and '.join(given)} each say how much to keep; give one of them")
    if not given and dtype is None:
        raise RecipeError(f"compress to what? give one of {', '.join(said)}, or --dtype")


def _plain(made: Compressed, searched: Smallest | None) -> dict[str, object]:
    return {
        "bytes": made.bytes,
        "error": made.error,
        "ranks": dict(made.ranks),
        "errors": {key: loss.relative for key, loss in made.losses.items()},
        "bounds": {key: bound.error for key, bound in made.bounds.items()},
        "score": None if searched is None else searched.score,
        "measure": None if searched is None else searched.measure,
        "tried": [] if searched is None else [asdict(one) for one in searched.tried],
    }


def _search(
    out: Screen,
    found: Source,
    state: AdapterState,
    within: float,
    data: str | None,
    split: str | None,
    limit: int | None,
    dtype: str | None,
    weights: Mapping[str, Tensor] | None,
) -> Smallest:
    from lorakit.data.readers import check_there
    from lorakit.training.smallest import smallest

    rows, part = (data, split) if data else (found.data.validation, split or found.data.validation_split)
    if rows is None:
        raise RecipeError("--within scores on rows, and nothing says which; give --data FILE")
    check_there(rows, part)
    model, tokenizer = found.load_base()
    return smallest(
        model, tokenizer, state, rows, found.data, within, split=part, limit=limit, dtype=dtype, base=weights,
        note=lambda one: out.note(f"tried {size(one.bytes)}: {one.score:.4g}, {'within' if one.within else 'beyond'}"),
    )  # fmt: skip


def _show(out: Screen, made: Compressed, before: int, searched: Smallest | None) -> None:
    ranks = [rank for rank in made.ranks.values() if rank]
    gone = len(made.ranks) - len(ranks)
    worst = max(made.losses, key=lambda key: made.losses[key].relative)
    moved = max(made.bounds, key=lambda key: made.bounds[key].error)
    out.say(
        f"{size(before)} became {size(made.bytes)} ({made.bytes / before:.0%}): {len(ranks)} updates of rank "
        f"{span(ranks)}" + (f", {gone} left out" if gone else ""),
        f"error {made.error:.2%} of all weights together (relative, Frobenius), most in {worst}: "
        f"{made.losses[worst].relative:.2%}",
        f"on any input x the output of a layer moves by at most {made.bounds[moved].error:.3g} |x| ({moved}, where the "
        f"update moves it by up to {made.bounds[moved].size:.3g} |x|)",
    )
    if searched is not None:
        rows = [
            (size(one.bytes), f"{one.error:.2%}", f"{one.score:.4g}", "yes" if one.within else "no")
            for one in sorted(searched.tried, key=lambda one: -one.bytes)
        ]
        title = f"{searched.measure} of the whole adapter: {searched.score:.4g}"
        out.show(table(title, "bytes", "error", searched.measure, "within", rows=rows, numbers=(0, 1, 2)))
