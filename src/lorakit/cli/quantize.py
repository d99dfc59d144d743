"""`lorakit quantize`: a base with its linear layers in 4 bits, as a directory that reloads without packing it again."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorakit.cli.screen import bar, screen, size
from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorakit.training.quantizer import Packing


def quantize(
    base: Annotated[str, typer.Argument(help="A base model: a bundled name, a directory, or a Hugging Face id.")],
    output: Annotated[str, typer.Option(help="The directory to write the packed base to.")],
    kind: Annotated[Literal["nf4", "fp4"], typer.Option(help="The 16 values; nf4 suits trained weights.")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64, 128, ... 4096.")] = 64,
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Keep the scales in 8 bits too.")
    ] = True,
    principal: Annotated[
        int, typer.Option(min=0, help="Singular triplets of each weight to keep in 16 bits beside the rest (QPiSSA).")
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Pack a base into 4 bits, in bitsandbytes' format."""
    with screen(json) as out:
        from lorakit.persist.atomic import atomic_directory
        from lorakit.training.base import choose_device, explained, load_tokenizer, quiet
        from lorakit.training.base_files import checkpoint
        from lorakit.training.quantised import BLOCK_SIZES, pack, write_packed
        from lorakit.training.quantizer import Packing
        from lorakit.training.recipe import QuantSection

        if block_size not in BLOCK_SIZES:
            raise LorakitError(f"--block-size {block_size}: must be one of {', '.join(map(str, BLOCK_SIZES))}")
        asked = {"kind": kind, "block_size": block_size, "double_quant": double_quant, "principal": principal}
        settings = QuantSection.model_validate(asked)
        target = Path(output)
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise LorakitError(f"{output} is there already; name another --output")
        tokenizer = load_tokenizer(base)
        began = time.perf_counter()
        with explained(base), quiet(), atomic_directory(output, clean=True) as draft:
            names, before = checkpoint(base)
            with bar(f"packing {base}", len(names)) as step:
                packing = Packing(settings, errors={}, done=lambda name: step())
                model = pack(base, packing, choose_device("auto"))
            write_packed(model, packing, draft)
            tokenizer.save_pretrained(draft)
        result = {
            "source": base,
            "output": output,
            "bytes_before": before,
            "bytes": sum(file.stat().st_size for file in target.glob("*.safetensors")),
            "seconds": time.perf_counter() - began,
            **_lost(packing),
        }
        out.say(
            f"packed {result['layers']} layers of {base} into {kind}, {result['bits_per_weight']:.3f} bits a weight",
            f"{size(before)} -> {size(result['bytes'])} in {result['seconds']:.1f} s; output layers, embeddings and "
            "norms stay as they are",
            f"the weights lost {result['relative_error']:.2%} (relative Frobenius error), most in "
            f"{result['worst']}: {result['worst_error']:.2%}",
            *_narrow(model, block_size),
            f"wrote {output}; train on it with model: {output}, merge into {base}",
        )
        out.result(result)


def _narrow(model: PreTrainedModel, block_size: int) -> list[str]:
    """Say which layers bitsandbytes may misread: on a CPU it counts blocks from the start of each row."""
    from lorakit.training.quantised import narrow_layers

    narrow = [f"{path} ({width})" for path, width in narrow_layers(model, block_size).items()]
    if not narrow:
        return []
    return [
        f"in {len(narrow)} layers a row is no whole number of blocks of {block_size}: {', '.join(narrow[:3])}"
        f"{', ...' if len(narrow) > 3 else ''}. lorakit reads them right, and "
        "bitsandbytes 0.50 on a CPU with AVX-512 does not"
    ]


def _lost(packing: Packing) -> dict[str, Any]:
    """Return what packing cost over all layers, and in the worst one."""
    errors = packing.errors or {}
    worst = max(errors, key=lambda name: errors[name].relative)
    lost, norm = (math.hypot(*(getattr(e, field) for e in errors.values())) for field in ("lost", "norm"))
    return {
        "layers": len(errors),
        "bits_per_weight": 8 * packing.packed_bytes / packing.weights,
        "relative_error": lost / norm,
        "worst": worst,
        "worst_error": errors[worst].relative,
    }
