"""Load a base in 4 bits, tensor by tensor: beside the packed model there is one dense tensor at a time.

transformers builds the empty model and knows which tensor of a checkpoint goes where; lorakit puts its own layers in,
and hands over tensors that are read from the file when their turn comes, not mapped into memory. A checkpoint that is
in 4 bits already, by `lorakit quantize` or by bitsandbytes, is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.core.lazy import need
from lorakit.core.sublayers import LINEAR_KINDS
from lorakit.errors import AdapterFileError, LorakitError, RecipeError, SpecError, listing
from lorakit.hosts import nf4
from lorakit.hosts.bnb_keys import NAMES, from_tensors
from lorakit.hosts.linear4bit import BLOCK, Linear4bit
from lorakit.inject.sites import sites
from lorakit.training.base_files import open_tensors, place_of
from lorakit.training.recipe import QuantSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE_AT_ONCE = BLOCK
"""Weights of a packed layer that are unpacked at a time."""
BLOCK_SIZES = nf4.BLOCK_SIZES
METHOD = "lorakit-4bit"
"""What transformers knows the quantisation by."""


@dataclass
class Packing:
    """What became of a model's weights on the way in: bytes, and how far each layer is from what it was."""

    settings: QuantSection
    packed: bool = False
    """Whether the checkpoint is in 4 bits already."""
    skipped: tuple[str, ...] = ()
    """Modules a checkpoint keeps dense, by their names in it; without any, output layers stay dense."""
    weights: int = 0
    packed_bytes: int = 0
    errors: dict[str, nf4.QuantizationError] | None = None
    """By layer, where somebody wants to know: measuring costs as much as packing."""
    dense: list[str] = field(default_factory=list)
    """The linear layers that were left as they are."""
    problems: list[str] = field(default_factory=list)
    done: Callable[[str], None] = lambda name: None
    """Called with each tensor that was read."""


def settings_of(config: Any) -> QuantSection | None:
    """Return how a checkpoint's configuration says it is packed, or None for one that is not in 4 bits."""
    kept = _quantization(config)
    if not kept.get("load_in_4bit", kept.get("_load_in_4bit", False)):
        return None
    return QuantSection(
        kind=kept.get("bnb_4bit_quant_type", "fp4"), double_quant=kept.get("bnb_4bit_use_double_quant", False)
    )


def skipped_by(config: Any) -> tuple[str, ...]:
    """Return the modules a packed checkpoint keeps dense, as its configuration names them."""
    return tuple(_quantization(config).get("llm_int8_skip_modules") or ())


def _quantization(config: Any) -> dict[str, Any]:
    """Return what a configuration says of quantisation; empty for a dense checkpoint."""
    kept: Any = getattr(config, "quantization_config", None) or {}
    said: dict[str, Any] = kept if isinstance(kept, dict) else kept.to_dict()
    return said


def bnb_config(packing: Packing, compute_dtype: str) -> dict[str, Any]:
    """Return the configuration that makes transformers with bitsandbytes load what lorakit packed."""
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
    with open_tensors(place, packing.done) as tensors, _told(packing):
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            quantization_config=_config_class()(packing),
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
        )
    _forget(model)
    if (place / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = need("transformers", "train").GenerationConfig.from_pretrained(place)
    return model, info


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
    kept = {"kind": value.kind, "block_size": value.block_size, "double_quant": value.nested is not None}
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
            made = settings.block_size, settings.double_quant, settings.kind
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


def empty_layers(model: nn.Module, skipped: tuple[str, ...] = ()) -> list[str]:
    """Put an empty 4-bit layer in the place of every linear one but the output layers; return those left dense."""
    skeleton = sites(model)
    dense = []
    for site in skeleton.sites:
        if site.kind not in LINEAR_KINDS:
            continue
        if site.path in skeleton.heads or _named(site.path, skipped):
            dense.append(site.path)
            continue
        old = model.get_submodule(site.path)
        bias = None if getattr(old, "bias", None) is None else old.get_parameter("bias").detach()
        new = Linear4bit(site.in_, site.out, bias=bias, transposed=site.kind == "transposed-linear")
        model.set_submodule(site.path, new.train(old.training))
    return dense


def _named(path: str, skipped: tuple[str, ...]) -> bool:
    return any(path == name or path.endswith(f".{name}") or path.startswith(f"{name}.") for name in skipped)


@cache
def _config_class() -> Any:
    """Make transformers know the quantisation, and return what carries a `Packing` through it."""
    need("transformers", "train")
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Pack(ConversionOps):
        """A dense tensor becomes packed bytes."""

        def __init__(self, quantizer: Any) -> None:
            self.hf_quantizer = quantizer  # by this name transformers knows that it may not cast what goes in
            self.packing: Packing = quantizer.quantization_config.packing

        def convert(self, input_dict: dict[str, Any], *_: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
            made = {}
            for name, value in input_dict.items():
                layer = model.get_submodule(name.rpartition(".")[0])
                weight = value[0] if isinstance(value, list) else value
                with _told(self.packing, name):
                    made[name] = _pack(layer, weight.T.contiguous() if layer.transposed else weight, name, self.packing)
            return made

    class Unpack(ConversionOps):
        """Packed bytes and their state become a layer's weight."""

        def __init__(self, quantizer: Any) -> None:
            self.hf_quantizer = quantizer  # by this name transformers knows that it may not cast what goes in
            self.packing: Packing = quantizer.quantization_config.packing

        def __deepcopy__(self, memo: Any) -> Unpack:
            return self  # transformers copies it for each tensor, and all of them report to one place

        def convert(
            self, input_dict: dict[str, Any], *_: Any, model: Any = None, full_layer_name: str = "", **kwargs: Any
        ) -> dict[str, Any]:
            tensors = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
            layer = model.get_submodule(full_layer_name.rpartition(".")[0])
            if not isinstance(layer, Linear4bit):
                return {"weight": tensors["weight"].to(model.get_parameter(full_layer_name).dtype)}
            state = {key.removeprefix("weight").removeprefix("."): tensor for key, tensor in tensors.items()}
            with _told(self.packing):
                layer.take(from_tensors(state, full_layer_name))
            return {"weight": layer.weight}

    @register_quantization_config(METHOD)
    class FourBitConfig(QuantizationConfigMixin):
        """What transformers carries from the call to the quantizer."""

        def __init__(self, packing: Packing) -> None:
            self.quant_method = METHOD  # type: ignore[assignment]  # of the methods transformers knows by itself
            self.packing = packing

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD}

    @register_quantizer(METHOD)
    class FourBitQuantizer(HfQuantizer):
        """Empty 4-bit layers before the loading, packed ones after it."""

        requires_calibration = False

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            self.pre_quantized = quantization_config.packing.packed
            self.serialized_names = {"weight": ["weight", *(f"weight.{name}" for name in sorted(NAMES))]}

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            packing: Packing = self.quantization_config.packing  # type: ignore[attr-defined]
            packing.dense = empty_layers(model, packing.skipped)

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            path, _, name = param_name.rpartition(".")
            return name == "weight" and isinstance(model.get_submodule(path), Linear4bit)

        def get_quantize_ops(self) -> Any:
            return Pack(self)

        def get_load_operations(self) -> dict[str, Any]:
            return {"deserialize": Unpack}

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    return FourBitConfig


@contextmanager
def _told(packing: Packing, where: str = "") -> Iterator[None]:
    """Keep what was wrong with a tensor, and say it in the end: transformers reports only that something was."""
    try:
        yield
    except SpecError as error:
        packing.problems.append(f"{where}: {error}")
        raise
    except AdapterFileError as error:
        packing.problems.append(str(error))
        raise
    except RuntimeError as error:
        if not packing.problems:
            raise
        raise LorakitError(f"the base cannot be read:\n{listing(packing.problems)}") from error


def _pack(layer: Linear4bit, weight: Tensor, name: str, packing: Packing) -> nn.Parameter:
    made = packing.settings
    value = nf4.quantize(weight, made.block_size, made.double_quant, made.kind)
    if packing.errors is not None:
        packing.errors[name.rpartition(".")[0]] = nf4.error(weight, value)
    packing.weights += weight.numel()
    packing.packed_bytes += round(value.bits_per_weight * weight.numel() / 8)
    layer.take(value)
    return layer.weight


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
