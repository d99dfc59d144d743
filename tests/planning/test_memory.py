"""Memory: exact bytes against the tensors themselves, formulas against their papers' numbers."""

from __future__ import annotations

import inspect

import pytest
import torch

from lorakit.errors import SpecError
from lorakit.hosts import int8, nf4
from lorakit.planning.memory import (
    Forecast,
    Parts,
    activations_by_formula,
    autocast_bytes,
    logits_by_formula,
    mixed_precision_parts,
    nf4_bytes,
    optimizer_bytes,
    trained_parts,
    weight_bytes,
)


def held(*tensors: torch.Tensor) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_parts_add_scale_and_sum() -> None:
    one = Parts(weights=10, adapters=1, gradients=2, optimizer=4, activations=5, logits=6, temporaries=7, overhead=8)
    assert one.total == 43
    assert one + Parts(weights=1, overhead=2) == Parts(11, 1, 2, 4, 5, 6, 7, 10)
    assert one * 0.5 == Parts(5, 1, 1, 2, 3, 3, 4, 4)  # whole bytes, rounded up
    assert one.to_json() == {
        "weights": 10, "adapters": 1, "gradients": 2, "optimizer": 4, "activations": 5, "logits": 6,
        "temporaries": 7, "overhead": 8, "total": 43,
    }  # fmt: skip


def test_a_forecast_names_its_peak_and_changes_phase_by_phase() -> None:
    forecast = Forecast(load=Parts(weights=5), step=Parts(weights=5, activations=3), merge=Parts(weights=7))
    assert forecast.peak == "step"
    assert list(forecast.phases) == ["load", "step", "evaluation", "checkpoint", "merge"]
    doubled = forecast.map(lambda parts: parts * 2)
    assert doubled.merge == Parts(weights=14)
    assert doubled.checkpoint == Parts()
    assert doubled.to_json()["step"]["total"] == 16


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_dense_weights_are_their_tensors_bytes(dtype: str) -> None:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    norm, linear = torch.zeros(10, dtype=kind), torch.zeros(6, 10, dtype=kind)
    assert weight_bytes(10, [(6, 10)], dtype=dtype) == held(norm, linear)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("shape", "block"), [((96, 64), 64), ((33, 7), 64), ((257, 64), 64), ((130, 100), 32)])
def test_4_bit_weights_are_what_packing_makes(shape: tuple[int, int], block: int, double_quant: bool) -> None:
    packed = nf4.quantize(torch.randn(shape), block, double_quant)
    state = (packed.packed, packed.absmax) + ((packed.nested.absmax, packed.nested.offset) if packed.nested else ())
    assert nf4_bytes(shape[0] * shape[1], double_quant, block) == held(*state)
    beside = weight_bytes(10, [shape], store="nf4", double_quant=double_quant, block=block)
    assert beside == held(*state) + 20  # what is not packed stays in bf16


def test_bits_a_weight_are_4_5_and_4_127() -> None:
    assert nf4_bytes(2**24, double_quant=False) * 8 / 2**24 == 4.5
    assert nf4_bytes(2**24) * 8 / 2**24 == pytest.approx(4.126953, abs=3e-6)


def test_8_bit_weights_are_what_packing_makes() -> None:
    packed = int8.quantize(torch.randn(12, 40))
    assert weight_bytes(5, [(12, 40)], store="int8", dtype="fp16") == held(packed.codes, packed.absmax) + 10


def test_an_unknown_dtype_or_store_is_refused() -> None:
    with pytest.raises(SpecError, match="unknown dtype 'bf61'; did you mean 'bf16'"):
        weight_bytes(1, dtype="bf61")
    with pytest.raises(SpecError, match="unknown store 'nf5'; did you mean 'nf4'"):
        weight_bytes(1, store="nf5")
    with pytest.raises(SpecError, match="unknown optimizer 'adamw8bit'; did you mean 'adamw-8bit'"):
        optimizer_bytes([1], "adamw8bit")


def test_adamw_keeps_what_torch_keeps() -> None:
    parameters = [torch.nn.Parameter(torch.ones(7, 3)), torch.nn.Parameter(torch.ones(5000))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert optimizer_bytes([21, 5000]) == held(*moments) == 8 * 5021
    trained = trained_parts([21, 5000])
    assert trained == Parts(
        adapters=held(*parameters), gradients=held(*(p.grad for p in parameters if p.grad is not None)), optimizer=40168
    )


@pytest.mark.parametrize("name", ["adamw-8bit", "paged-adamw-8bit"])
def test_8_bit_adamw_keeps_what_bitsandbytes_keeps(name: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    sizes = [21, 4095, 4096, 5000]
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer = bitsandbytes.optim.AdamW(parameters, optim_bits=8)
    for index, parameter in enumerate(parameters):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    states = optimizer.state.values()
    own = [state[key] for state in states for key in ("state1", "state2", "absmax1", "absmax2") if key in state]
    maps = {id(state[key]): state[key] for state in states for key in ("qmap1", "qmap2") if key in state}
    assert optimizer_bytes(sizes, name) == held(*own) + held(*maps.values())


def test_small_tensors_alone_need_no_maps() -> None:
    assert optimizer_bytes([100, 4000], "adamw-8bit") == optimizer_bytes([100, 4000], "adamw") == 32_800
    assert optimizer_bytes([10**6], "paged-adamw") == optimizer_bytes([10**6], "adamw")


def test_what_lorakit_trains_whole_takes_16_bytes_a_number_and_counts_as_weights() -> None:
    assert trained_parts([600, 400], whole=True) == Parts(weights=4000, gradients=4000, optimizer=8000)
    assert trained_parts([600, 400]).total == 16_000
    assert autocast_bytes(1000) == 2000


def test_autocast_keeps_a_16_bit_copy_of_an_fp32_matrix_until_the_backward() -> None:
    linear, seen = torch.nn.Linear(8, 6, bias=False), {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.zeros(3, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        linear(x)
    kept = [tensor for tensor in seen.values() if tensor.numel() == 48]
    assert held(*kept) == autocast_bytes(linear.weight.numel())


def test_the_published_conventions_are_12_and_16_bytes_a_number() -> None:
    assert mixed_precision_parts(1000).total == 16_000
    assert mixed_precision_parts(1000, master=False) == Parts(weights=2000, gradients=2000, optimizer=8000)


SEVEN = {"layers": 32, "hidden": 4096}


@pytest.mark.parametrize(
    ("sequence", "with_scores", "without", "checkpointed"), [(2048, 30.6, 9.1, 0.54), (512, 3.6, 2.3, 0.13)]
)
def test_activations_of_7b_are_korthikantis(
    sequence: int, with_scores: float, without: float, checkpointed: float
) -> None:
    assert activations_by_formula(**SEVEN, sequence=sequence, heads=32) / 1e9 == pytest.approx(with_scores, abs=0.05)
    assert activations_by_formula(**SEVEN, sequence=sequence) / 1e9 == pytest.approx(without, abs=0.05)
    assert activations_by_formula(**SEVEN, sequence=sequence, checkpointing=True) / 1e9 == pytest.approx(
        checkpointed, abs=0.005
    )


def test_activations_of_a_llama_layer_are_12h_4kv_8i() -> None:
    llama = activations_by_formula(**SEVEN, sequence=2048, intermediate=11008)
    assert llama == 2048 * (12 * 4096 + 4 * 4096 + 8 * 11008) * 32
    assert llama / 1e9 == pytest.approx(10.1, abs=0.05)
    grouped = activations_by_formula(**SEVEN, sequence=2048, kv=1024, intermediate=11008)
    assert llama - grouped == 32 * 2048 * 4 * 3072
    assert activations_by_formula(**SEVEN, sequence=1024, batch=2, intermediate=11008) == llama


def test_tensor_parallelism_divides_all_but_ten_sbh() -> None:
    # sbh (10 + 24/t + 5as/(ht)): 2,048 x 4,096 x (10 + 3 + 10) of 34 + 80, in one layer with t = 8
    assert activations_by_formula(layers=1, hidden=4096, sequence=2048, heads=32, tensor_parallel=8) == (
        2048 * 4096 * (10 + 3 + 10)
    )


def test_activations_know_nothing_of_how_weights_are_kept() -> None:
    asked = set(inspect.signature(activations_by_formula).parameters)
    assert not asked & {"store", "dtype", "quant", "double_quant", "bits"}


def test_logits_are_a_quarter_gigabyte_a_copy() -> None:
    one = logits_by_formula(2048, 1, 32_000, copies=1) - logits_by_formula(2048, 1, 32_000, copies=0)
    assert one / 1e9 == pytest.approx(0.26, abs=0.005)
    assert logits_by_formula(2048, 1, 32_000) == 2048 * 32_000 * (2 + 4 + 4)
    assert logits_by_formula(3, 2, 5, copies=0, dtype="fp32") == 120
