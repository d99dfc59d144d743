"""`lorakit export`: an adapter as other servers read it, and the command that serves it there.

vLLM reads plain LoRA in PEFT's format, so that is written, from whatever method the adapter has: as it is, as the LoRA
it equals, or with --rank as the nearest one, with what is lost. llama.cpp gets the merged model.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorakit.cli.convert import plain, told
from lorakit.cli.screen import screen, size
from lorakit.cli.sources import BASE_HELP, adapter_bytes, adapter_in, refuse_classifier, refuse_full_folder
from lorakit.errors import AdapterFileError, RecipeError, listing

if TYPE_CHECKING:
    from lorakit.core.state import AdapterState


def export(
    source: Annotated[str, typer.Argument(help="The folder of a run, or an adapter (directory or file).")],
    output: Annotated[str, typer.Option(help="The directory to write.")],
    for_: Annotated[
        Literal["vllm", "llama.cpp"], typer.Option("--for", help="Who reads it; llama.cpp gets the merged model.")
    ] = "vllm",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Write the nearest LoRA of this rank, where none equals the adapter.")
    ] = None,
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter as vLLM or llama.cpp reads it."""
    if for_ == "llama.cpp":
        _merged(source, output, rank, base, json)
        return
    with screen(json) as out:
        from lorakit.persist import load

        place = adapter_in(source)
        refuse_full_folder(Path(output))
        state = load(place)
        _refuse(state, source)
        asked = ("lorakit", "export", source), ("--output", output)
        method, said = state.spec.name, None
        if rank is not None or base is not None or not _is_plain(state):
            state, said = plain(state, rank, base, asked)
        highest = _write(state, Path(output), place)
        command = _command(state, output, base, highest)
        written = adapter_bytes(output)
        out.say(
            f"{place}: {method}, {len(state.updates)} layers",
            f"wrote {output} ({size(written)}){'' if said is None else f', {told(said)}'}; nothing in it vLLM refuses"
            f"{_where_listed(state)}",
            f"serve it: {command}",
        )
        out.result(
            {"source": str(place), "for": for_, "output": output, "method": method, "layers": len(state.updates),
             "bytes": written, "as_lora": said, "command": command}
        )  # fmt: skip


def _refuse(state: AdapterState, source: str) -> None:
    """Raise for what no LoRA can hold: heads of classifiers, what reads its input, and tensors trained whole."""
    from lorakit.core.as_lora import refuse_moving

    refuse_classifier(source, state.labels)
    refuse_moving(state)
    if state.trained:
        raise AdapterFileError(
            f"{source} trained {len(state.trained)} of the base's own tensors, which vLLM does not take from an "
            f"adapter:\n{listing(sorted(state.trained))}\nmerge it and serve the result: "
            f"lorakit merge {source} --output DIR"
        )


def _is_plain(state: AdapterState) -> bool:
    """Return whether every update is LoRA, at one scale: older servers read no other than the file's one alpha."""
    from lorakit.core.peft_form import get
    from lorakit.core.registry import method as method_named

    lora = method_named("lora")
    return (
        all(type(update.method) is lora for update in state.updates)
        and len({float(get(update.method, "scale")) for update in state.updates}) == 1
    )


def _where_listed(state: AdapterState) -> str:
    """Return in words which layers vLLM takes of some models alone: embeddings and output layers."""
    tables = ("lm_head", "embed_out", "embed_tokens")
    ends = {u.site.path for u in state.updates if u.site.kind == "embedding" or u.site.path.endswith(tables)}
    if not ends:
        return ""
    return f", where its class of the model lists {', '.join(sorted(ends))} among its embedding_modules"


def _write(state: AdapterState, output: Path, place: Path) -> int:
    """Write an adapter where vLLM would refuse nothing of it, else nothing; return the `--max-lora-rank` it needs."""
    import shutil

    from lorakit.persist import save
    from lorakit.serving.remote.servable import rank_to_serve, refusals

    save(state, output, "peft")
    if refused := refusals(output):
        shutil.rmtree(output)
        raise AdapterFileError(f"nothing was written: of {place} vLLM would refuse\n{listing(refused)}")
    return rank_to_serve(output)


def _command(state: AdapterState, output: str, base: str | None, rank: int) -> str:
    from lorakit.training.base import resolve

    name = base or state.base.name
    words = ["vllm", "serve", resolve(name) if name else "BASE", "--enable-lora", "--max-lora-rank", str(rank)]
    place = Path(output).resolve()
    return shlex.join([*words, "--lora-modules", f"{place.name}={place}"])


def _merged(source: str, output: str, rank: int | None, base: str | None, json: bool) -> None:
    """Merge, as `lorakit merge` does, and say how the result becomes a GGUF file."""
    from lorakit.cli.merge import merge
    from lorakit.persist import load

    if rank is not None:
        raise RecipeError("--rank says how to write a LoRA, and llama.cpp gets the merged model; leave it out")
    refuse_classifier(source, load(adapter_in(source)).labels)
    merge(source, output, base, "auto", untie=False, lossy=False, dequantize=False, stream=False, json=json)
    if not json:
        file = f"{output.rstrip('/')}.gguf"
        print(f"convert it: {shlex.join(['python', 'convert_hf_to_gguf.py', output, '--outfile', file])}")
