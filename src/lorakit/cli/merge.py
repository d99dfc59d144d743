"""`lorakit merge`: fold an adapter into its base, prove that the answers stay, and write a Hugging Face directory.

The logits of the adapted and of the merged model are compared before a byte is written. Two sums in another order
differ by rounding, which depends on the dtype; a larger difference is a fault, and nothing is written. With --stream
the model is never built: its files are merged one tensor at a time, and each layer is proved for itself.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorakit.cli.screen import in_options, screen, size
from lorakit.cli.sources import BASE_HELP, Source, find, need_adapter
from lorakit.errors import MergeError, listing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.core.method import Method
    from lorakit.core.state import AdapterState
    from lorakit.training.recipe import Recipe

MARK = "lorakit-merge.json"
"""What a merge was, in the folder it wrote: by it a later merge knows that the folder may be replaced."""
_MERGED = (".json", ".safetensors", ".txt", ".model", ".jinja", ".md")  # ends of what a merge writes
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Allowed difference of a logit, as a share of the largest: a thousand roundings of fp32, ten of fp16, six of bf16.
Measured after 8 layers: 5e-6 in fp32. Roundings add up with depth, and a wrong merge is off by the whole update."""
_ADVICE = {
    "pass untie=True": "give --untie",
    "pass lossy=True": "give --lossy",
    "the 16-bit base instead": "the 16-bit base, named with --base; or give --dequantize, which writes this one dense",
    "write fp32 instead": "use --dtype fp32",
}
"""What the user of the command does, for what the caller of the function does."""
PROMPTS = (
    "Once upon a time there was a king who had three sons.",
    "In 1492, on the 3rd of August, ships left the harbour; nobody knew (or said) where they would land!",
    "def add(a, b):\n    return a + b\n",
)


@dataclass(frozen=True)
class Proof:
    """How far the merged logits are from the adapted ones: the largest difference, and the largest logit."""

    max_abs_diff: float
    largest_logit: float
    changed_from_base: float
    layers: int
    update_lost: float
    """The share of the update that the written weights could not hold (Frobenius)."""


def merge(
    source: Annotated[str, typer.Argument(help="The folder of a run, or an adapter (directory or file).")],
    output: Annotated[str, typer.Option(help="The directory to write the merged model to.")],
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Of the written weights; auto is the base's own.")
    ] = "auto",
    untie: Annotated[bool, typer.Option("--untie", help="Give an adapted tied weight a copy of its own.")] = False,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Merge into the 4-bit base, which rounds the sum again; says what it cost.")
    ] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Merge into what the 4-bit base stands for, and write that dense.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Merge the base's files tensor by tensor, without loading the model.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fold an adapter into its base and write the merged model."""
    with screen(json) as out:
        from lorakit.inject.attach import attach
        from lorakit.persist.atomic import atomic_directory

        found = find(source, base)
        state = need_adapter(found, source)
        _refuse_to_overwrite(Path(output))
        _refuse_both(lossy, dequantize)
        _refuse_a_correction(state, dequantize)
        if stream:
            from lorakit.cli.merge_stream import merge_stream

            _refuse_with_stream({"--untie": untie, "--lossy": lossy, "--dequantize": dequantize})
            merge_stream(found, state, source, output, dtype, out)
            return
        model, tokenizer = _load(found, dtype, packed=lossy or dequantize)
        if lossy or dequantize:
            _refuse_dense(model, found, "--dequantize" if dequantize else "--lossy")
        if dequantize:
            from lorakit.training.quantised import make_dense

            make_dense(model)
        kind = str(model.dtype).removeprefix("torch.")
        ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
        out.note(f"merging {source} into {found.base} in {kind} ...")
        bare = logits_of(model, ids)
        attach(model, state)
        proof = merge_proved(model, ids, bare, untie=untie, lossy=lossy, exact=_trained_of_base(model, state))
        result = {"source": source, "base": found.base, "output": output, "dtype": kind, **asdict(proof)}
        with atomic_directory(output, clean=True) as draft:
            write_model(model, tokenizer, draft)
            (draft / MARK).write_text(jsonlib.dumps(result, indent=2) + "\n", encoding="utf-8")
        written = sum(file.stat().st_size for file in Path(output).iterdir())
        out.say(
            f"merged {parts(proof.layers, state)} into {found.base}, in {f'4 bits and {kind}' if lossy else kind}",
            f"logits: the adapter moved them by up to {proof.changed_from_base:.3g}; "
            f"merged and adapted differ by at most {proof.max_abs_diff:.2g}",
            *(_lost(proof) if lossy else _rounding(kind, proof)),
            *_moved(found, dequantize or lossy),
            f"wrote {output} ({size(written)}); it loads with {loader(found)}.from_pretrained",
        )
        out.result({**result, "bytes": written})


def merge_proved(
    model: PreTrainedModel,
    ids: Sequence[Sequence[int]],
    bare: list[torch.Tensor],
    *,
    untie: bool = False,
    lossy: bool = False,
    exact: Mapping[str, torch.Tensor] | None = None,
) -> Proof:
    """Merge the active adapters in place and compare the logits on `ids` before and after.

    `bare` are the base's own logits, to know a merge that changed nothing from one that worked. A lossy merge is only
    measured: no bound is right for weights that are rounded to 4 bits twice. `exact` are values trained whole, as
    `lorakit.merge` takes them.

    Raises:
        MergeError: the logits differ by more than rounding, or the merge is refused.
    """
    from lorakit.inject.merge import merge as fold
    from lorakit.inject.merge import refuse_lost

    adapted = logits_of(model, ids)
    with in_options(_ADVICE):
        report = fold(model, untie=untie, lossy=lossy, exact=exact)
        if not lossy:
            refuse_lost(report.update_lost)
    merged = logits_of(model, ids)
    largest = max(float(t.abs().max()) for t in adapted)
    proof = Proof(gap(adapted, merged), largest, gap(adapted, bare), report.layers, report.update_lost)
    if lossy:
        return proof
    kind = str(model.dtype).removeprefix("torch.")
    allowed = TOLERANCES.get(kind, 0.0) * proof.largest_logit
    if not proof.max_abs_diff <= allowed:
        raise MergeError(
            f"nothing was written: the merged model's logits differ from the adapted model's by up to "
            f"{proof.max_abs_diff:.3g}, where rounding in {kind} explains {allowed:.3g}; try --dtype fp32, "
            "and if it differs there too, please report it"
        )
    if proof.max_abs_diff > proof.changed_from_base / 2:
        raise MergeError(
            f"nothing was written: the adapter moves the logits by {proof.changed_from_base:.3g}, and rounding the "
            f"merged weights to {kind} by {proof.max_abs_diff:.3g}, so most of it would be lost; use --dtype fp32"
        )
    return proof


def parts(layers: int, state: AdapterState) -> str:
    """Return what a merge put into the base, in words."""
    whole = f"{len(state.trained)} tensors that were trained whole"
    return " and ".join([f"{layers} layers"] * (layers > 0 or not state.trained) + [whole] * bool(state.trained))


def _trained_of_base(model: PreTrainedModel, state: AdapterState) -> dict[str, torch.Tensor]:
    """Return what the adapter trained whole of the base; a new classifier's head is no change of anything."""
    from lorakit.inject.sites import sites

    heads = sites(model).heads if state.labels else frozenset()
    return {name: value for name, value in state.trained.items() if name.rpartition(".")[0] not in heads}


def logits_of(model: PreTrainedModel, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return the logits of each prompt, `(tokens, vocabulary)` or `(classes,)`, in fp32 on the CPU."""
    import torch

    with torch.no_grad():
        return [model(input_ids=torch.tensor([list(one)], device=model.device)).logits[0].float().cpu() for one in ids]


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model, tokenizer and generation settings as Hugging Face keeps them; packed layers stay packed."""
    from lorakit.training.base import quiet
    from lorakit.training.quantised import packing_in, write_packed

    with quiet():
        if (packing := packing_in(model)) is not None:
            write_packed(model, packing, folder)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _rounding(kind: str, proof: Proof) -> list[str]:
    """Say of a 16-bit merge how much of the difference its rounding explains, and what would be closer."""
    if kind == "float32":
        return []
    short, allowed = {"bfloat16": "bf16", "float16": "fp16"}.get(kind, kind), TOLERANCES[kind] * proof.largest_logit
    lost = f"; rounding took {proof.update_lost:.2%} of the update (Frobenius)" if proof.update_lost else ""
    return [
        f"that is within the rounding of {short} (up to {allowed:.2g} for logits up to {proof.largest_logit:.2g}); "
        f"--dtype fp32 is closer, and twice the size{lost}"
    ]


def _moved(found: Source, packed: bool) -> list[str]:
    """Say of a run on 4 bits that its adapter now sits on other weights than it was trained on."""
    quant = None if found.recipe is None else found.recipe.quant
    if quant is None or packed:
        return []
    return [
        f"the run trained on {quant.kind}, and these weights are those from before packing: its answers are near the "
        "trained ones and not the same; lorakit evaluate tells how near, and --dequantize keeps them"
    ]


def _lost(proof: Proof) -> list[str]:
    """Say what a lossy merge cost."""
    share = proof.max_abs_diff / proof.changed_from_base if proof.changed_from_base else 0.0
    mostly = ["4 bits lost most of what the adapter learned; --dequantize keeps it"] if share > 0.5 else []
    return [
        *mostly,
        f"rounding to 4 bits moved the weights by {proof.update_lost:.0%} of the update itself (Frobenius), and the "
        f"logits by {share:.0%} of what the adapter moved them by",
    ]


def _load(found: Source, dtype: str, *, packed: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base in the dtype to write; fp16 is loaded wide first, because few CPUs compute in it."""
    if dtype == "auto":
        dtype = _own_dtype(found.base)
    model, tokenizer = found.load_base("fp32" if dtype == "fp16" else dtype, packed=packed)
    if dtype == "fp16":
        model.half()  # type: ignore[no-untyped-call]
    return model, tokenizer


def _own_dtype(base: str) -> str:
    """Return the dtype a base's files are kept in; fp32 where its configuration says nothing."""
    kept = str(_config_of(base, "dtype")).removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16"}.get(kept, "fp32")


def _config_of(base: str, key: str) -> Any:
    """Return what a base's configuration says of a key; None where it says nothing or cannot be read."""
    from lorakit.core.hub import hub_at_hand
    from lorakit.core.lazy import need
    from lorakit.training.base import resolve

    try:
        with hub_at_hand():
            return getattr(need("transformers", "train").AutoConfig.from_pretrained(resolve(base)), key, None)
    except (OSError, ValueError):
        return None  # loading the model is about to fail too, and says why


def loader(found: Source) -> str:
    """Return the class of transformers that loads what was merged."""
    return "AutoModelForSequenceClassification" if found.labels else "AutoModelForCausalLM"


def gap(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def _refuse_dense(model: PreTrainedModel, found: Source, option: str) -> None:
    from lorakit.training.quantised import is_packed

    if not is_packed(model):
        raise MergeError(f"{found.base} is not in 4 bits, so {option} means nothing here; leave it out")


def _refuse_both(lossy: bool, dequantize: bool) -> None:
    if lossy and dequantize:
        raise MergeError("--lossy writes 4 bits and --dequantize writes none; give one of them")


def flags_for(recipe: Recipe) -> list[str]:
    """Return the options a merge of this recipe's adapter needs: where the base is in 4 bits, into what."""
    method = recipe.adapter.build_method()
    if method is not None and _corrects(method):
        return ["--dequantize"]
    return ["--base THE_16_BIT_BASE"] if _config_of(recipe.model, "quantization_config") else []


def _corrects(method: Method) -> bool:
    """Return whether an update starts as the correction of a 4-bit base."""
    from lorakit.core.init import init_of

    init = init_of(method)
    return init is not None and init.name == "loftq"


def _refuse_a_correction(state: AdapterState, dequantize: bool) -> None:
    """Raise `MergeError` for a start that corrects a 4-bit base, on the way into one that needs no correction."""
    if not dequantize and any(_corrects(update.method) for update in state.updates):
        raise MergeError(
            "the adapter started by LoftQ, so part of it corrects what 4 bits lost, and it fits no base that is "
            "rounded anew; give --dequantize, which merges into what the 4-bit base stands for"
        )


def _refuse_with_stream(given: dict[str, bool]) -> None:
    if both := [name for name, there in given.items() if there]:
        raise MergeError(f"{' and '.join(both)} changes the model as a whole; leave --stream out, or {both[0]}")


def _refuse_to_overwrite(output: Path) -> None:
    """A merged model may replace one that lorakit merged; a base, a run, an adapter or anything else stays."""
    if output.exists() and not (output.is_dir() and ((output / MARK).is_file() or not any(output.iterdir()))):
        raise MergeError(f"{output} holds something that no merge of lorakit wrote; name another --output")
    if output.is_dir() and (foreign := sorted(f.name for f in output.iterdir() if f.suffix not in _MERGED)):
        raise MergeError(
            f"{output} would be replaced, and holds what no merge wrote; move it away:\n{listing(foreign)}"
        )
