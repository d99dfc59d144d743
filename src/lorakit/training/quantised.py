"""Load a base in 4 bits, tensor by tensor: beside the packed model there is one dense tensor at a time.

transformers builds the empty model and knows which tensor of a checkpoint goes where; lorakit puts its own layers in,
and hands over tensors that are read from the file when their turn comes, not mapped into memory. A checkpoint that is
in 4 bits already, by `lorakit quantize` or by bitsandbytes, is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.core.lazy import need
from lorakit.core.site import Site
from lorakit.core.sublayers import LINEAR_KINDS
from lorakit.errors import LorakitError, RecipeError, SpecError, grouped, listing
from lorakit.hosts import nf4
from lorakit.hosts.linear4bit import BLOCK, Linear4bit, refuse_principal
from lorakit.inject.sites import sites
from lorakit.training.base_files import Later, open_tensors, place_of
from lorakit.training.quantizer import METHOD, Packing, config_class, empty_layers, told
from lorakit.training.recipe import QuantSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE_AT_ONCE = BLOCK
"""Weights of a packed layer that are unpacked at a time."""
BLOCK_SIZES = nf4.BLOCK_SIZES


def settings_of(config: Any) -> QuantSection | None:
    """Return how a checkpoint's configuration says it is packed, or None for one that is not in 4 bits."""
    kept = _quantization(config)
    if kept.get("quant_method") == METHOD:
        return QuantSection(**{name: kept[name] for name in QuantSection.model_fields if name in kept})
    if not kept.get("load_in_4bit", kept.get("_load_in_4bit", False)):
        return None
    return QuantSection(
        kind=kept.get("bnb_4bit_quant_type", "fp4"), double_quant=kept.get("bnb_4bit_use_double_quant", False)
    )


def holds_packed(config: Any) -> bool:
    """Return whether a checkpoint's configuration says that weights are kept in any form of fewer bits."""
    return bool(_quantization(config))


def skipped_by(config: Any) -> tuple[str, ...]:
    """Return the modules a packed checkpoint keeps dense, as its configuration names them."""
    return tuple(_quantization(config).get("llm_int8_skip_modules") or ())


def _quantization(config: Any) -> dict[str, Any]:
    """Return what a configuration says of quantisation; empty for a dense checkpoint."""
    kept: Any = getattr(config, "quantization_config", None) or {}
    said: dict[str, Any] = kept if isinstance(kept, dict) else kept.to_dict()
    return said


def bnb_config(packing: Packing, compute_dtype: str) -> dict[str, Any]:
    """Return the configuration that makes transformers with bitsandbytes load what lorakit packed.

    bitsandbytes knows no principal part and would leave it out unsaid, so a base with one is lorakit's to load alone.
    """
    settings = packing.settings
    if settings.principal:
        own = settings.model_dump()
        return {"quant_method": METHOD, **own, "llm_int8_skip_modules": packing.dense}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": packing.settings.kind,
        "bnb_4bit_use_double_quant": packing.settings.double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": packing.dense,
    }


def load_packed(cls: Any, place: Path, config: Any, packing: Packing, *, dtype: Any, device: Any) -> tuple[Any, Any]:
    """Return a model of `cls` with its linear layers in 4 bits, and transformers' report of the loading.

    Args:
        cls: a class of transformers.
        place: the directory of the checkpoint, in safetensors.
        config: its configuration; one that says 4 bits has packed tensors.
        packing: how to pack, and where to write what came of it.
        dtype: of everything that stays dense.
        device: where each tensor goes before it is packed.
    """
    packing.packed = settings_of(config) is not None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with open_tensors(place, packing.done) as tensors, told(packing):
        _refuse_other_principal(place, tensors, packing)
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            quantization_config=config_class()(packing),
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
        )
    _forget(model)
    if (place / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = need("transformers", "train").GenerationConfig.from_pretrained(place)
    return model, info


def refuse_packing(settings: QuantSection, layers: Iterable[Site]) -> None:
    """Raise `LorakitError` where loading would refuse to pack one of the layers."""
    problems = []
    for site in layers:
        try:
            refuse_principal(settings.principal, (site.out, site.in_))
        except SpecError as error:
            problems.append(f"{site.path}.weight: {error}")
    if problems:
        raise LorakitError(f"the base cannot be packed:\n{listing(grouped(problems))}")


def _refuse_other_principal(place: Path, tensors: Mapping[str, Later], packing: Packing) -> None:
    """Raise `LorakitError` for principal parts of another rank than the configuration says."""
    rank = packing.settings.principal if packing.packed else 0
    ranks = {n: t.get_shape() for n, t in tensors.items() if n.endswith(("principal_up", "principal_down"))}
    odd = {n: shape for n, shape in ranks.items() if shape[n.endswith("principal_up")] != rank}
    if odd:
        name, shape = next(iter(odd.items()))
        raise LorakitError(
            f"{place}: {name} and {len(odd) - 1} more are of another rank, {tuple(shape)}, config.json says principal "
            f"{rank}; copy the whole directory again, or write it anew with lorakit quantize"
        )


def pack(name: str, packing: Packing, device: Any) -> PreTrainedModel:
    """Return a base with its linear layers in 4 bits, of the class and the dtype its configuration says.

    Raises:
        RecipeError: a base that is packed already, or of a class transformers does not have.
    """
    transformers = need("transformers", "train")
    place = place_of(name)
    config = transformers.AutoConfig.from_pretrained(place)
    if settings_of(config) is not None:
        raise RecipeError(f"{name} is packed into 4 bits already; give the base it was made of")
    kind = next(iter(config.architectures or ()), None)
    cls = getattr(transformers, str(kind), None) or model_class(config, "causal-lm")
    dtype = getattr(config, "dtype", None) or torch.float32
    model, info = load_packed(cls, place, config, packing, dtype=dtype, device=device)
    if missing := sorted(info["missing_keys"]):
        raise LorakitError(f"{place} has no values for {len(missing)} weights of {kind} ({', '.join(missing[:6])})")
    return model  # type: ignore[no-any-return]


def is_packed(model: nn.Module) -> bool:
    """Return whether any layer of a model is packed."""
    return any(isinstance(module, Linear4bit) for module in model.modules())


def packing_in(model: nn.Module) -> Packing | None:
    """Return how a model's layers are packed, or None where none of them is."""
    first = next((module for module in model.modules() if isinstance(module, Linear4bit)), None)
    if first is None:
        return None
    value = first.quantized
    rank = 0 if first.principal_up is None else first.principal_up.shape[1]
    kept = {"kind": value.kind, "block_size": value.block_size, "double_quant": value.nested is not None,
            "principal": rank}  # fmt: skip
    settings = QuantSection.model_validate(kept)
    dense = [
        s.path for s in sites(model).sites if s.kind in LINEAR_KINDS and not is_packed(model.get_submodule(s.path))
    ]
    return Packing(settings, packed=True, dense=dense)


@torch.no_grad()
def make_dense(model: PreTrainedModel) -> None:
    """Put dense layers, in the model's dtype, in the place of packed ones: the inverse of packing but for its loss."""
    for path, layer in [(path, m) for path, m in model.named_modules() if isinstance(m, Linear4bit)]:
        model.set_submodule(path, layer.to_dense(model.dtype))


def pack_layers(model: nn.Module, settings: QuantSection) -> None:
    """Put packed layers in the place of a model's linear ones but the output layers."""
    skeleton = sites(model)
    for site in skeleton.sites:
        if site.kind in LINEAR_KINDS and site.path not in skeleton.heads:
            layer = model.get_submodule(site.path)
            made = settings.block_size, settings.double_quant, settings.kind, settings.principal
            model.set_submodule(site.path, Linear4bit.of(layer, *made))


def narrow_layers(model: nn.Module, block_size: int) -> dict[str, int]:
    """Return the packed layers whose rows are no whole number of blocks, with the width of a row."""
    layers = {path: m.in_features for path, m in model.named_modules() if isinstance(m, Linear4bit)}
    return {path: width for path, width in layers.items() if width % block_size}


def pack_hollow(model: nn.Module, settings: QuantSection) -> None:
    """Put 4-bit layers without values in the place of a model's linear ones, as packing does with values."""
    dtypes = {path: m.get_parameter("weight").dtype for path, m in model.named_modules() if hasattr(m, "weight")}
    empty_layers(model)
    for path, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            shape = (layer.out_features, layer.in_features)
            made = settings.block_size, settings.double_quant, settings.kind
            layer.take(nf4.hollow(shape, dtypes[path], *made))
            if settings.principal:
                layer.make_room(settings.principal, dtypes[path])


def state_tensors(model: nn.Module) -> list[Tensor]:
    """Return what a model's packed layers keep beside their bytes: the scales of the blocks."""
    values = [module.quantized for module in model.modules() if isinstance(module, Linear4bit)]
    nested = [t for v in values if v.nested is not None for t in (v.nested.absmax, v.nested.offset)]
    return [*(v.absmax for v in values), *nested]


def write_packed(model: PreTrainedModel, packing: Packing, folder: Path) -> None:
    """Write a packed model as Hugging Face and bitsandbytes keep one; the tokenizer is the caller's to add."""
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    compute = str(model.dtype).removeprefix("torch.")
    config["quantization_config"] = bnb_config(packing, compute)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _forget(model: PreTrainedModel) -> None:
    """Take off what transformers remembers of a quantisation: it would refuse to train the model, adapter or not."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    conversions: Any = getattr(model, "_weight_conversions", None) or ()
    kept = [one for one in conversions if "weight.absmax" not in one.source_patterns]
    vars(model)["_weight_conversions"] = kept  # the layers' tensors are written by the names they were read by


def model_class(config: Any, task: str) -> Any:
    """Return transformers' class for a configuration and a task."""
    transformers = need("transformers", "train")
    auto = (
        transformers.AutoModelForSequenceClassification
        if task == "classification"
        else transformers.AutoModelForCausalLM
    )
    try:
        return auto._model_mapping[type(config)]
    except KeyError:
        raise RecipeError(f"transformers has no {task} model of type {config.model_type}") from None
