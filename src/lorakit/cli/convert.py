"""`lorakit convert`: adapters from and to PEFT's format and lorakit's own, and from the original loralib's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lorakit.cli.screen import screen, size
from lorakit.cli.sources import is_base
from lorakit.errors import AdapterFileError, RecipeError


def convert(
    source: Annotated[str, typer.Argument(help="An adapter: a directory, a run's folder, or a loralib .bin file.")],
    to: Annotated[Literal["peft", "native"], typer.Option(help="The format to write.")],
    output: Annotated[str, typer.Option(help="The directory to write.")],
    alpha: Annotated[float | None, typer.Option(help="The alpha of a loralib file, which does not store it.")] = None,
    enabled: Annotated[
        str | None,
        typer.Option(help="Which projections the merged layers of a loralib file adapt: yes,no,yes for q and v."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter in another format."""
    with screen(json) as out:
        from lorakit.persist import load, save

        inside = Path(source) / "adapter"
        place = inside if (Path(source) / "recipe.yaml").is_file() and inside.is_dir() else Path(source)
        if is_base(place):
            raise AdapterFileError(f"{source} is a base without an adapter; give the folder of a run or an adapter")
        _refuse_to_overwrite(Path(output))
        state = load(place, alpha=alpha, enabled=_switches(enabled))
        save(state, output, to)
        written = sum(file.stat().st_size for file in Path(output).glob("adapter*"))
        method = state.spec.name
        out.say(
            f"{place}: {method}, {len(state.updates)} layers, {state.parameters:,} parameters",
            f"wrote {output} ({to}, {size(written)})",
        )
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
            }
        )


def _refuse_to_overwrite(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise AdapterFileError(f"{output} is not empty; name another --output")


def _switches(enabled: str | None) -> tuple[bool, ...] | None:
    """Return `yes,no,yes` as booleans."""
    if enabled is None:
        return None
    words = [word.strip().lower() for word in enabled.split(",")]
    if wrong := [word for word in words if word not in ("yes", "no")]:
        raise RecipeError(f"--enabled {enabled!r}: {wrong[0]!r} is neither yes nor no; for q and v write yes,no,yes")
    return tuple(word == "yes" for word in words)
