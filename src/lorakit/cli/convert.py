"""`lorakit convert`: adapters from and to PEFT's format and lorakit's own, and from the original loralib's files."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lorakit.cli.screen import screen, size


def convert(
    source: Annotated[str, typer.Argument(help="An adapter: a directory, a run's folder, or a loralib .bin file.")],
    to: Annotated[Literal["peft", "native"], typer.Option(help="The format to write.")],
    output: Annotated[str, typer.Option(help="The directory to write.")],
    alpha: Annotated[float | None, typer.Option(help="The alpha of a loralib file, which does not store it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter in another format."""
    with screen(json) as out:
        from pathlib import Path

        from lorakit.persist import load, save

        inside = Path(source) / "adapter"
        place = inside if (Path(source) / "recipe.yaml").is_file() and inside.is_dir() else Path(source)
        state = load(place, alpha=alpha)
        save(state, output, to)
        written = sum(file.stat().st_size for file in Path(output).glob("adapter*"))
        method = state.spec.method.name
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
