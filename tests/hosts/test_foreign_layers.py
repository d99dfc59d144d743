"""Layers that bitsandbytes and torchao quantised: every method with a dW keeps its law on them, by construction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.method import Static
from lorakit.core.registry import host_of
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import AttachError, MergeError
from lorakit.hosts import nf4
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.inject.merge import merge
from tests.law.cases import METHODS, Net, jitter
from tests.tolerances import assert_close


def bnb4() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer: nn.Module = bnb.nn.Linear4bit(12, 8, quant_type="nf4")
    return layer.to("cpu")


def bnb8() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer: nn.Module = bnb.nn.Linear8bitLt(12, 8, has_fp16_weights=False)
    return layer.to("cpu")


def ao() -> nn.Module:
    # Not among our own installs: where it is installed, transformers imports it with everything, which takes seconds.
    quantization = pytest.importorskip(
        "torchao.quantization", reason="pip install torchao to run the law on its tensors"
    )
    model = nn.Sequential(nn.Linear(12, 8))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model[0]


LAYERS: dict[str, Callable[[], nn.Module]] = {"bnb 4-bit": bnb4, "bnb 8-bit": bnb8, "torchao": ao}
STATIC = [name for name, method in METHODS.items() if isinstance(method, Static) and "linear" in method.kinds]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def weight_of(model: Net) -> Tensor:
    host = host_of(model.layer)
    assert host is not None
    return host.store.read(model.layer)


@pytest.mark.parametrize("kind", LAYERS)
def test_its_row_is_its_own(kind: str) -> None:
    host = host_of(LAYERS[kind]())
    assert host is not None
    assert (host.name, host.kind, host.store.lossless) == (f"linear, {kind}", "linear", False)


@pytest.mark.parametrize("method", STATIC)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_law_holds(kind: str, method: str) -> None:
    model, x = Net(LAYERS[kind]()).train(), torch.randn(3, 5, 12)
    before = model(x)
    attach(model, AdapterSpec(METHODS[method], Targets("layer")))
    assert torch.equal(model(x), before)
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    weight = weight_of(model)
    (adapter,) = adapters_named(model, "default")
    delta = adapter.delta(weight)
    assert delta.abs().max() > 0.05
    assert_close(model(x), F.linear(x, weight + delta, model.layer.bias))
    with pytest.raises(MergeError, match=rf"its weight is quantised \({kind}\), and the sum would be rounded again"):
        merge(model)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_adapter_moves_to_the_dense_base_and_back(kind: str) -> None:
    model, x = Net(LAYERS[kind]()).train(), torch.randn(3, 12)
    attach(model, AdapterSpec(METHODS["lora"], Targets("layer")))
    jitter(adapters_named(model, "default")[0])
    dense = Net(nn.Linear(12, 8))
    dense.layer.load_state_dict({"weight": weight_of(model), "bias": model.layer.bias.detach()})
    attach(dense, state(model))
    assert_close(dense(x), model(x))


@pytest.mark.parametrize("kind", ["bnb 4-bit", "bnb 8-bit"])
def test_a_lossy_merge_is_done_when_asked_for(kind: str) -> None:
    model, x = Net(LAYERS[kind]()).train(), torch.randn(3, 12)
    attach(model, AdapterSpec(METHODS["lora"], Targets("layer")))
    jitter(adapters_named(model, "default")[0])
    exact = (weight_of(model) + adapters_named(model, "default")[0].delta(weight_of(model))).detach()
    report = merge(model, lossy=True)
    assert 0 < (weight_of(model) - exact).norm() < 0.15 * exact.norm()
    assert 0 < report.update_lost < 1
    assert_close(model(x), F.linear(x, weight_of(model), model.layer.bias))


def test_torchao_s_tensors_are_not_written_to() -> None:
    model = Net(ao())
    attach(model, AdapterSpec(METHODS["lora"], Targets("layer")))
    jitter(adapters_named(model, "default")[0])
    with pytest.raises(MergeError, match="torchao's .* cannot be written to; merge into the 16-bit base"):
        merge(model, lossy=True)


def test_a_layer_that_was_never_moved_is_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(AttachError, match="holds a weight that is not quantised yet; move the model to its device"):
        weight_of(Net(bnb.nn.Linear4bit(12, 8)))
    with pytest.raises(AttachError, match="holds a weight that is not quantised yet; move the model to its device"):
        weight_of(Net(bnb.nn.Linear8bitLt(12, 8, has_fp16_weights=False)))


def test_a_layer_that_was_rearranged_for_the_processor_is_still_read() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    if not bnb.functional.has_avx512bf16():
        pytest.skip("only a processor with AVX-512 BF16 makes bitsandbytes rearrange its bytes")
    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4").to("cpu")
    before = nf4.dequantize(bnb_value(layer))
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(2, 128))
    assert getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    after = nf4.dequantize(bnb_value(layer))
    assert_close(after, before, dtype=torch.bfloat16)  # bitsandbytes rounds the block maxima to bf16 on the way
    assert getattr(layer.weight.quant_state, "packing_format_for_cpu", False), "reading it changed nothing"


def bnb_value(layer: nn.Module) -> nf4.Quantized:
    from lorakit.hosts.bnb import quantized_of

    return quantized_of(layer)
