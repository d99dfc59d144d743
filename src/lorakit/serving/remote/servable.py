"""Whether a vLLM server takes the adapter in a folder, told before it is asked: its answer comes late, or never.

vLLM reads pairs of LoRA in PEFT's format. What it knows to refuse it refuses when the adapter is loaded
(vllm/lora/peft_helper.py and utils.py, read in 0.32); tensors it does not look for would otherwise be missed unsaid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorakit.errors import AdapterFileError
from lorakit.persist import files
from lorakit.persist.native import NATIVE
from lorakit.persist.peft import CONFIG, PICKLE, WEIGHTS

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes."""
INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Starts that leave the base as it is; others change it when PEFT loads the adapter, and vLLM's base lacks that."""
HEADS = ("classifier", "score")

_PAIR = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])")
_BASE_TABLE = re.compile(r".*\.(embed_tokens|lm_head)\.base_layer\.weight")

_Why = Callable[[Any], str | None]
_WRITE = "write it as a plain LoRA"
_MERGED = "merge the adapter and serve the result (lorakit merge)"


def refusals(folder: Path) -> list[str]:
    """Return why vLLM would not serve the adapter in a folder, each with what to do; nothing where it serves it."""
    export = f"lorakit export {folder} --output DIR"
    if not (folder / CONFIG).exists():
        if (folder / NATIVE).exists():
            return [f"{NATIVE}: lorakit's own format, which vLLM does not read; {_WRITE}: {export}"]
        return [f"{folder}: no {CONFIG} in it; give an adapter's folder"]
    if not (folder / WEIGHTS).exists():
        pickle = f"{PICKLE} alone, a pickle, which can hold code; write it as safetensors: {export}"
        return [pickle if (folder / PICKLE).exists() else f"{WEIGHTS}: missing; get the adapter again"]
    try:
        config = files.read_json(folder / CONFIG)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = sorted(file.keys())
    except AdapterFileError as broken:
        return [str(broken)]
    except (SafetensorError, OSError) as broken:
        return [f"{WEIGHTS}: cannot be read ({broken}); get the adapter again"]
    return [*_in_config(config, export), *_in_tensors(config, names)]


def rank_to_serve(folder: Path) -> int:
    """Return the `--max-lora-rank` that an adapter without refusals needs."""
    highest = _ranks(files.read_json(folder / CONFIG))[-1]
    return next(choice for choice in MAX_RANKS if choice >= highest)


def _in_config(config: Mapping[str, Any], export: str) -> Iterator[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {kind!r}, and vLLM reads LORA alone; {_WRITE}: {export} (or --rank R, with what is lost)"
        return
    wrong = [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    if wrong:
        yield f"{', '.join(wrong)}: missing in {CONFIG}; get the adapter again"
        return
    for key, (why, remedy) in _FIELDS.items():
        if (told := why(config.get(key))) is not None:
            yield f"{key}: {told}; {remedy.format(export=export)}"
    ranks = _ranks(config)
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        yield f"rank {ranks[0]!r}: expected whole numbers above 0; get the adapter again"
    elif ranks[-1] > MAX_RANKS[-1]:
        yield f"rank {ranks[-1]}: vLLM ends at {MAX_RANKS[-1]}; write the nearest of a lower one: {export} --rank R"


def _in_tensors(config: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        return
    kept = tuple(f".{name}." for name in config.get("modules_to_save") or ())
    ends: dict[str, set[str]] = {}
    for name in names:
        if (pair := _PAIR.fullmatch(name)) is not None:
            ends.setdefault(pair[1], set()).add(pair[2])
        elif not _BASE_TABLE.fullmatch(name) and not any(part in name for part in kept):
            yield f"{name}: no tensor of a pair of LoRA, which vLLM does not read; {_MERGED}"
    for module, found in ends.items():
        if len(found) != 2:
            yield f"{module}: half of a pair of LoRA; get the adapter again"
    if not ends:
        yield f"{WEIGHTS}: no pair of LoRA in it; get the adapter again"


def _ranks(config: Mapping[str, Any]) -> list[Any]:
    """Return the ranks an adapter has, the highest last; one that is no number alone."""
    found = [config["r"], *(config.get("rank_pattern") or {}).values()]
    odd = [rank for rank in found if not isinstance(rank, int)]
    return odd[:1] or sorted(found)


def _given(what: str) -> _Why:
    return lambda value: what if value else None


def _trained_whole(value: Any) -> str | None:
    other = [name for name in value or () if name not in HEADS]
    return f"it trains {', '.join(other)} whole, and vLLM takes heads of classifiers alone" if other else None


def _start(value: Any) -> str | None:
    if not isinstance(value, str) or value.lower() in INITS:
        return None
    return f"{value!r} moved a part of the base into the adapter when it began, and vLLM's base still has it"


def _bias(value: Any) -> str | None:
    return f"{value!r}: it trains biases of the base" if value not in (None, "none") else None


_FIELDS: Mapping[str, tuple[_Why, str]] = {
    "use_dora": (_given("DoRA, which vLLM does not serve"), "write the nearest LoRA: {export} --rank R, or "
                 + _MERGED),
    "init_lora_weights": (_start, "write the LoRA of twice its rank that it equals, with PEFT's "
                          "path_initial_model_for_weight_conversion, or " + _MERGED),
    "modules_to_save": (_trained_whole, _MERGED),
    "trainable_token_indices": (_given("it trains rows of the embedding"), _MERGED),
    "bias": (_bias, _MERGED),
    "lora_bias": (_given("the pairs have biases"), _MERGED),
    "alora_invocation_tokens": (_given("an activated LoRA, which vLLM does not serve"), "serve it with PEFT"),
    "layer_replication": (_given("it repeats layers of the base"), _MERGED),
    "use_bdlora": (_given("block-diagonal factors, which vLLM does not serve"), _WRITE + ": {export}"),
    "use_qalora": (_given("QALoRA, which vLLM does not serve"), _MERGED),
}  # fmt: skip
"""Key of the configuration: what is wrong with its value, and what to do instead."""
