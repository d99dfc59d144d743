"""The model and tokenizer a run starts from: a bundled one by name, a local directory, or a Hugging Face id.

What would fail an hour later is refused here: a device that is not there, a tokenizer with more tokens than the model
has rows. Padding never touches the end-of-sequence token's training, because labels are masked by position.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lorakit.core.hub import hub_at_hand
from lorakit.core.lazy import need
from lorakit.errors import DataError, DeviceError, LorakitError, RecipeError, did_you_mean, few, looked_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.training.quantizer import Packing
    from lorakit.training.recipe import QuantSection


class AbsentBaseError(LorakitError):
    """A name under which there is no model, here or on the hub."""


Task = Literal["causal-lm", "classification"]

ASSETS = Path(__file__).parents[1] / "assets"
_AUTO = {"causal-lm": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification"}
_TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "sentencepiece*")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_base(
    name: str,
    *,
    task: Task = "causal-lm",
    labels: Sequence[str] = (),
    dtype: str = "auto",
    device: str = "auto",
    quant: QuantSection | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer of `name`, on the device, in evaluation mode.

    Args:
        name: `lorakit/tales` (the bundled base), a local directory, or a Hugging Face id.
        task: `classification` puts a fresh head for `labels` on top, unless the checkpoint has one.
        dtype: `fp32`, `bf16`, `fp16`; `auto` is bf16 on a CUDA device that has it, else fp32.
        device: `cpu`, `cuda`, `mps`; `auto` is the best one there is.
        quant: pack the linear layers into 4 bits on the way in. A base that is packed already stays so.

    Raises:
        LorakitError: no such model; both readings of the name and the near ones are in the message.
        DeviceError: a device that is not there.
        DataError: the tokenizer has ids the model has no rows for.
    """
    tokenizer = load_tokenizer(name)
    loaded = load_model(
        name, tokenizer, task=task, labels=labels, dtype=dtype, device=device, packing=packing_of(quant)
    )
    return loaded.model, tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model, and the modules its checkpoint had no weights for (a classification head): those start random."""

    model: PreTrainedModel
    fresh: tuple[str, ...]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `name`; one without a padding token pads with its end-of-sequence token.

    Nothing is lost by that: labels are masked by position, never by looking for the padding id.
    """
    transformers = need("transformers", "train")
    check_place(name, "tokenizer*")
    _check_tokenizer(name)
    with quiet(data=False), explained(name):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(resolve(name))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: Task = "causal-lm",
    labels: Sequence[str] = (),
    dtype: str = "auto",
    device: str = "auto",
    packing: Packing | None = None,
    on_host: bool = False,
) -> Loaded:
    """Return the model of `name` for a task, checked against its tokenizer; a base in 4 bits stays in them.

    With `on_host` it lies in the memory of the CPU, in the dtype that `device` will want.
    """
    transformers = need("transformers", "train")
    check_place(name, "config.json")
    wanted = choose_dtype(dtype, choose_device(device))
    place = torch.device("cpu") if on_host else choose_device(device)
    options = _labels(task, labels)
    with quiet(data=False), explained(name):
        config = transformers.AutoConfig.from_pretrained(resolve(name), **options)
        model, info = _read(name, config, task, wanted, place, packing)
    _check_complete(name, task, info)
    _check_vocabulary(model, tokenizer)
    model.config._name_or_path = name  # adapters carry it: the name that was given, not where it lies here
    if task == "classification":  # decoders look for the last token that is not padding
        model.config.pad_token_id = tokenizer.pad_token_id
    fresh = dict.fromkeys(key.rpartition(".")[0] for key in sorted(info["missing_keys"]))
    return Loaded(model.to(place).eval(), tuple(fresh))


def load_empty(
    name: str, tokenizer: PreTrainedTokenizerBase, *, task: Task = "causal-lm", labels: Sequence[str] = ()
) -> Loaded:
    """Return the model of `name` for a task as `load_model` does, without weights: on the meta device."""
    model = build_empty(name, task=task, labels=labels)
    _check_vocabulary(model, tokenizer)
    if task == "classification":
        model.config.pad_token_id = tokenizer.pad_token_id
    return Loaded(model, ())


def build_empty(name: str, *, task: Task = "causal-lm", labels: Sequence[str] = ()) -> PreTrainedModel:
    """Return the model of `name` for a task without its weights: layers and names, on the meta device.

    Raises:
        LorakitError: no such model.
        DataError: a classifier with fewer than two labels.
    """
    transformers = need("transformers", "train")
    check_place(name, "config.json")
    options = _labels(task, labels)
    with quiet(data=False), explained(name), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(resolve(name), **options)
        model: PreTrainedModel = getattr(transformers, _AUTO[task]).from_config(config, dtype=torch.float32)
    model.config._name_or_path = name
    model.train(False)
    return model


def task_of(labels: Sequence[str]) -> Task:
    """Return what a model with these classes is for: without any it writes."""
    return "classification" if labels else "causal-lm"


def _labels(task: Task, labels: Sequence[str]) -> dict[str, Any]:
    """Return what a configuration has to know of a classifier's labels."""
    if task != "classification":
        return {}
    if len(labels) < 2:
        raise DataError(f"a classifier needs two labels or more, got {list(labels)}; set data.labels")
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _read(
    name: str, config: Any, task: Task, dtype: torch.dtype, device: torch.device, packing: Packing | None
) -> tuple[Any, dict[str, Any]]:
    """Return the model and transformers' report: packed into 4 bits if asked for or if its files are, else as it is."""
    transformers = need("transformers", "train")
    from lorakit.training import quantised
    from lorakit.training.base_files import place_of
    from lorakit.training.quantizer import Packing

    packed = quantised.settings_of(config)
    if packing is None and packed is None:
        return getattr(transformers, _AUTO[task]).from_pretrained(  # type: ignore[no-any-return]
            resolve(name), config=config, dtype=dtype, output_loading_info=True
        )
    asked = packing.settings if packing else None
    if packed and asked and asked != packed.model_copy(update={"block_size": asked.block_size}):
        raise RecipeError(f"{name} is packed already, as {packed}; leave `quant` out, or give the base it was made of")
    place = place_of(name)
    packing = Packing(packed, skipped=quantised.skipped_by(config)) if packed else packing
    assert packing is not None
    model, info = quantised.load_packed(
        quantised.model_class(config, task), place, config, packing, dtype=dtype, device=device
    )
    return model, info


def packing_of(quant: QuantSection | None) -> Packing | None:
    """Return how to pack a base as a recipe says, or None for one that stays as it is."""
    from lorakit.training.quantizer import Packing

    return Packing(quant) if quant is not None else None


def resolve(name: str) -> str:
    """Return the directory of a bundled base, or the name as it is, with `~` as the home directory."""
    if name in bundled():
        return str(ASSETS / name.removeprefix("lorakit/"))
    return str(Path(name).expanduser()) if name.startswith("~") else name


def bundled() -> list[str]:
    """Return the names of the bases that came with the package."""
    return sorted(f"lorakit/{file.parent.name}" for file in ASSETS.glob("*/config.json"))


def choose_device(device: str) -> torch.device:
    """Return the device asked for, or the best there is for `auto`; raises `DeviceError` for one that is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, found in there.items() if found))
    if not there.get(device.partition(":")[0], False):
        found = ", ".join(name for name, is_there in there.items() if is_there)
        built = (
            "" if torch.version.cuda or device != "cuda" else f"; this torch ({torch.__version__}) has no CUDA in it"
        )
        raise DeviceError(
            f"device {device!r} was asked for and is not there; there is: {found}{built}; use device: auto"
        )
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype asked for; `auto` is bf16 on a CUDA device that has it, else fp32."""
    if dtype == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    if dtype not in _DTYPES:
        raise RecipeError(f"unknown dtype {dtype!r}{did_you_mean(dtype, _DTYPES)}; one of auto, {', '.join(_DTYPES)}")
    if dtype == "fp16" and device.type != "cuda":
        raise DeviceError(f"fp16 training needs a CUDA device, this is {device.type}; use dtype: fp32")
    return _DTYPES[dtype]


def times_fp32(dtype: torch.dtype) -> float:
    """Return how many times as long as in fp32 a product takes in `dtype` on this processor, as a few of them show."""

    def fastest(kind: torch.dtype) -> float:
        x, weight = torch.ones(16, 256, dtype=kind), torch.ones(256, 256, dtype=kind)
        took = []
        for _ in range(20):  # the fastest, as others may be using the processor
            began = time.perf_counter()
            x @ weight  # as in a backward: of the two orders, the slower one where there is no arithmetic for it
            took.append(time.perf_counter() - began)
        return min(took)

    return fastest(dtype) / fastest(torch.float32)


@contextmanager
def quiet(*, data: bool = True) -> Iterator[None]:
    """Silence what transformers and datasets say and draw by the way, and put their settings back.

    Without `data`, datasets, which nobody will need then, is not imported for it: that takes a second and 100 MB.
    """
    logging = need("transformers", "train").utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets = need("datasets", "train") if data else None
    maps = datasets is None or datasets.are_progress_bars_disabled()
    if datasets is not None:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if datasets is not None and not maps:
            datasets.enable_progress_bars()


def check_place(name: str, needed: str) -> None:
    """Raise `LorakitError` for a name that is plainly local and plainly no model, before anybody asks a hub for it."""
    place = Path(resolve(name))
    near = did_you_mean(place.name, [p.name for p in place.parent.glob("*/")] if place.parent.is_dir() else [])
    if place.is_file():
        raise LorakitError(f"{name} is a file; a base is a directory in the Hugging Face layout, or the name of one")
    if not place.exists() and (place.is_absolute() or name.startswith(".")):
        raise AbsentBaseError(f"there is no directory {place}{near}{looked_in(place)}")
    if place.is_dir() and not any(place.glob(needed)) and not (place / "config.json").is_file():
        found = sorted(p.name for p in place.iterdir())
        holds = few(found, 6)
        adapter = "; it is an adapter, which `lorakit generate` and `evaluate` take as it is"
        is_adapter = any(file in found for file in ("adapter_config.json", "adapter.lorakit.safetensors"))
        raise LorakitError(
            f"the directory {place} is no model: it has no config.json, it "
            f"{f'holds {holds}' if found else 'is empty'}{adapter if is_adapter else ''}"
        )


def _check_tokenizer(name: str) -> None:
    """Raise `LorakitError` for a directory without a file of any tokenizer."""
    place = Path(resolve(name))
    if place.is_dir() and not any(found for pattern in _TOKENIZERS for found in place.glob(pattern)):
        raise LorakitError(
            f"the directory {place} has no tokenizer, so no text can be read; copy tokenizer.json and "
            "tokenizer_config.json into it from where the model came from (tokenizer.save_pretrained writes them)"
        )


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence that names both readings of the name."""
    try:
        with nullcontext() if Path(resolve(name)).is_dir() else hub_at_hand():
            yield
    except LorakitError:  # says already what is wrong
        raise
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: weights of other shapes
        near = did_you_mean(name, [*bundled(), *(str(p) for p in Path(name).parent.glob("*/") if p.is_dir())])
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if Path(resolve(name)).is_dir():
            raise LorakitError(f"the directory {resolve(name)} holds no model that can be loaded: {reason}") from error
        raise AbsentBaseError(
            f"{name!r} is neither a local directory (looked in {Path.cwd()}) nor a model the Hugging Face hub or its "
            f"cache could give{near}; bundled: {', '.join(bundled()) or 'none'}\n  {reason}"
        ) from error


def _check_complete(name: str, task: Task, info: dict[str, Any]) -> None:
    """A base for text must have every weight: a missing one would be random, silently."""
    missing = sorted(info["missing_keys"]) if task == "causal-lm" else []
    mismatched = [str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in info["mismatched_keys"]]
    if missing or mismatched:
        shown = ", ".join([*missing, *mismatched][:6])
        raise LorakitError(
            f"{name!r} has no fitting values for {len(missing) + len(mismatched)} of its weights ({shown}); "
            "it is not a complete model of this kind"
        )


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embedding: Any = model.get_input_embeddings()
    rows = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else embedding.weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise DataError(
            f"the tokenizer's ids go up to {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), the model has "
            f"only {rows} rows; use the tokenizer the model came with, or resize its embedding"
        )
