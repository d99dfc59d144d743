"""`lorakit extract`: a LoRA out of a model that was tuned whole, and how much of the change it holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorakit.cli.screen import bar, few, screen, size, span
from lorakit.cli.sources import adapter_bytes, classifier_in, find, refuse_full_folder
from lorakit.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorakit.training.extraction import Extracted


def extract(
    tuned: Annotated[str, typer.Argument(help="The tuned model, or a run that trained tensors of its base whole.")],
    output: Annotated[str, typer.Option(help="The directory to write.")],
    base: Annotated[str | None, typer.Option(help="What it was tuned from; a run remembers it.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The most directions of each weight.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="The share of each change's squared size to keep, 0.9 for one.")
    ] = None,
    targets: Annotated[str, typer.Option(help="Which layers: words and patterns, with commas between.")] = "all-linear",
    whole: Annotated[
        bool, typer.Option("--whole", help="Keep what else changed as it is: norms, embeddings, a head.")
    ] = False,
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="What its numbers are kept in.")] = "fp32",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a LoRA of a model that was tuned whole.

    It is the one nearest to what full fine-tuning did; what it leaves out is said.
    """
    with screen(json) as out:
        from lorakit.combining.compress import STORED
        from lorakit.core.spec import Targets
        from lorakit.persist import save
        from lorakit.training.base_files import checkpoint, place_of
        from lorakit.training.extraction import extract as extracted

        refuse_full_folder(Path(output))
        if (rank is None) == (energy is None):
            raise RecipeError("extract how much? give one of --rank 16 and --energy 0.9")
        found = find(tuned)
        purpose = found.purpose
        if found.state is None:
            purpose = classifier_in(place_of(tuned))
        elif found.state.updates:
            raise RecipeError(
                f"{tuned} is an adapter with updates already, and no model that was tuned whole; lorakit compress "
                "makes it smaller, lorakit convert --as-lora writes other methods as LoRA"
            )
        start = base or (found.base if found.state is not None else None)
        if start is None:
            raise RecipeError(f"{tuned} does not say what it was tuned from; name it with --base")
        total = len(checkpoint(tuned)[0]) if found.state is None else len(found.state.trained)
        with bar(f"comparing with {start}", total) as step:
            made = extracted(
                found.state or tuned,
                start,
                rank=rank,
                energy=energy,
                targets=Targets(tuple(word.strip() for word in targets.split(","))),
                whole=whole,
                dtype=STORED[dtype],
                purpose=purpose,
                done=lambda name: step(),
            )
        save(made.state, output)
        written = adapter_bytes(output)
        out.say(*_lines(made, whole), f"wrote {output} (peft, {size(written)})")
        out.result({"tuned": tuned, "base": start, "output": output, "bytes": written, **_plain(made)})


def _plain(made: Extracted) -> dict[str, object]:
    """Return what was made as plain values."""
    return {
        "error": made.error,
        "missing": made.missing,
        "errors": {key: loss.relative for key, loss in made.losses.items()},
        "ranks": {update.site.key: len(update.tensors["down"]) for update in made.state.updates},
        "kept_whole": sorted(made.state.trained),
        "left_out": dict(made.left),
    }


def _lines(made: Extracted, whole: bool) -> Iterator[str]:
    """Yield what is in the adapter, what is lost, and what is left out."""
    ranks = [len(update.tensors["down"]) for update in made.state.updates]
    worst = max(made.losses, key=lambda key: made.losses[key].relative)
    yield (
        f"{len(ranks)} updates of rank {span(ranks)}: {made.error:.2%} from the change of their weights together "
        f"(relative, Frobenius), so {1 - made.error**2:.1%} of its squared size is kept; most lost in {worst}, "
        f"{made.losses[worst].relative:.2%}"
    )
    if made.state.trained:
        yield f"{len(made.state.trained)} tensors kept whole: {few(sorted(made.state.trained))}"
    if made.left:
        largest = sorted(made.left, key=lambda name: -made.left[name])
        way = "no adapter can hold these" if whole else "--whole keeps those that an adapter can hold"
        yield (
            f"{len(largest)} other tensors changed and are left out: {few(largest)}; with them "
            f"{made.missing:.2%} of the whole change is missing ({way})"
        )
