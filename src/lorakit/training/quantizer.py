"""What transformers is told of lorakit's 4-bit layers: a quantizer that puts them in and packs each tensor on its way.

transformers builds the empty model and knows which tensor of a checkpoint goes where; here are the layers it finds in
the places of the linear ones, and what becomes of a tensor that goes there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from lorakit.core.lazy import need
from lorakit.core.sublayers import LINEAR_KINDS
from lorakit.errors import AdapterFileError, LorakitError, SpecError, grouped, listing
from lorakit.hosts import nf4
from lorakit.hosts.bnb_keys import NAMES, from_tensors
from lorakit.hosts.linear4bit import Linear4bit
from lorakit.inject.sites import sites
from lorakit.training.recipe import QuantSection

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


def empty_layers(model: nn.Module, skipped: tuple[str, ...] = (), principal: int = 0) -> list[str]:
    """Put an empty 4-bit layer in the place of every linear one but the output layers; return those left dense.

    With `principal` there is room for that many singular triplets beside the bytes.
    """
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
        if principal:
            new.make_room(principal, old.get_parameter("weight").dtype)
        model.set_submodule(site.path, new.train(old.training))
    return dense


def _named(path: str, skipped: tuple[str, ...]) -> bool:
    return any(path == name or path.endswith(f".{name}") or path.startswith(f"{name}.") for name in skipped)


def _operations() -> tuple[Any, Any]:
    """Return what transformers does to a tensor on its way into a layer: packing it, and taking what is packed."""
    from transformers.core_model_loading import ConversionOps

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
                with told(self.packing, name):
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
            with told(self.packing):
                layer.take(from_tensors(state, full_layer_name))
            return {"weight": layer.weight}

    return Pack, Unpack


@cache
def config_class() -> Any:
    """Make transformers know the quantisation, and return what carries a `Packing` through it."""
    need("transformers", "train")
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    pack, unpack = _operations()

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
            packing.dense = empty_layers(model, packing.skipped, packing.settings.principal if packing.packed else 0)

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            path, _, name = param_name.rpartition(".")
            return name == "weight" and isinstance(model.get_submodule(path), Linear4bit)

        def get_quantize_ops(self) -> Any:
            return pack(self)

        def get_load_operations(self) -> dict[str, Any]:
            return {"deserialize": unpack}

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    return FourBitConfig


@contextmanager
def told(packing: Packing, where: str = "") -> Iterator[None]:
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
        raise LorakitError(f"the base cannot be read:\n{listing(grouped(packing.problems))}") from error


def _pack(layer: Linear4bit, weight: Tensor, name: str, packing: Packing) -> nn.Parameter:
    made = packing.settings
    rest = layer.split_off(weight, made.principal).to(weight.dtype) if made.principal else weight
    value = nf4.quantize(rest, made.block_size, made.double_quant, made.kind)
    if packing.errors is not None:  # what is kept beside the bytes is not lost
        packing.errors[name.rpartition(".")[0]] = replace(nf4.error(rest, value), norm=float(weight.float().norm()))
    packing.weights += weight.numel()
    packing.packed_bytes += round(value.bits_per_weight * weight.numel() / 8)
    packing.packed_bytes += made.principal * sum(weight.shape) * weight.element_size()
    layer.take(value)
    return layer.weight
