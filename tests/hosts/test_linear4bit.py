"""The 4-bit layer: the dense product on the dequantised weight, its gradient, its state, and bitsandbytes' files."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.core.registry import host_of
from lorakit.errors import AdapterFileError, AttachError, SpecError
from lorakit.hosts import linear4bit, nf4
from lorakit.hosts.bnb_keys import from_tensors, to_tensors
from lorakit.hosts.linear4bit import Linear4bit, product
from tests.tolerances import assert_close

SHAPES = [(48, 128), (64, 64), (30, 129), (1, 7)]


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many blocks":
        monkeypatch.setattr(linear4bit, "BLOCK", 700)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_it_is_the_dense_product_and_its_gradient(out: int, in_: int, dtype: torch.dtype) -> None:
    layer = nn.Linear(in_, out).to(dtype)
    quantised = Linear4bit.of(layer)
    x, dy = torch.randn(3, 5, in_).to(dtype), torch.randn(3, 5, out).to(dtype)
    ours, dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = quantised(ours), F.linear(dense, quantised.dense(), layer.bias)
    assert_close(y, wanted)
    y.backward(dy)
    wanted.backward(dy)
    assert_close(ours.grad, dense.grad)


def test_a_step_holds_a_block_of_the_weight_and_never_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear4bit, "BLOCK", 64 * 128)
    sizes: list[int] = []

    def watched(value: nf4.Quantized, start: int, out: Tensor) -> None:
        sizes.append(out.numel())
        unpack(value, start, out)

    unpack = nf4.unpack
    monkeypatch.setattr(nf4, "unpack", watched)
    monkeypatch.setattr(linear4bit, "unpack", watched)
    layer = Linear4bit.of(nn.Linear(128, 512))
    x = torch.randn(2, 128, requires_grad=True)
    layer(x).sum().backward()
    assert max(sizes) == 64 * 128
    assert sum(sizes) == 2 * 128 * 512, "forward and backward unpack every weight once"


def test_the_buffer_of_a_thread_serves_every_layer_in_and_out_of_inference_mode() -> None:
    wide, narrow = Linear4bit.of(nn.Linear(256, 128)), Linear4bit.of(nn.Linear(64, 32))
    linear4bit._BUFFER.__dict__.clear()
    with torch.inference_mode():
        narrow(torch.randn(2, 64))
    x, y = torch.randn(2, 256, requires_grad=True), torch.randn(2, 64, dtype=torch.bfloat16)
    assert_close(wide(x), x @ wide.dense().T + wide.bias)
    room = linear4bit._BUFFER.room
    assert_close(narrow(y), y @ narrow.dense(torch.bfloat16).T + narrow.bias.bfloat16())
    wide(x).sum().backward()
    assert_close(x.grad, wide.dense().sum(0).expand(2, -1))
    assert linear4bit._BUFFER.room is room, "what fits the room needs no other"
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: (narrow(torch.randn(2, 64)), found.append(linear4bit._BUFFER.room)))
    thread.start()
    thread.join()
    assert found[0] is not room, "two threads at once would write over each other's rows"


def test_the_backward_keeps_the_packed_weight_and_nothing_of_the_input() -> None:
    layer, saved = Linear4bit.of(nn.Linear(64, 64)), []
    x = torch.randn(1000, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        product(x, layer.quantized)
    assert sum(saved) <= 64 * 64 // 2 + 64 + 2


def test_gradcheck() -> None:
    value = nf4.quantize(torch.randn(5, 33))
    x = torch.randn(3, 33, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: product(x, value), x)


def test_compiled_and_exported_it_is_the_same() -> None:
    layer, x = Linear4bit.of(nn.Linear(64, 48)), torch.randn(2, 64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    compiled(leaf).sum().backward()
    wanted = x.clone().requires_grad_()
    layer(wanted).sum().backward()
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(leaf.grad, wanted.grad)  # type: ignore[arg-type]
    program: Any = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), layer(x))


def test_autocast_computes_in_its_dtype() -> None:
    layer, x = Linear4bit.of(nn.Linear(64, 48)), torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), layer(x), dtype=torch.bfloat16)


def test_a_cast_model_keeps_its_maxima_in_fp32() -> None:
    layer, x = Linear4bit.of(nn.Linear(64, 48)), torch.randn(2, 64)
    before = layer.dense()
    assert torch.equal(layer.to(torch.bfloat16).half().float().dense(), before)
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_gpt2_s_layer_keeps_its_meaning() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(8, 12)
    layer, x = Linear4bit.of(conv), torch.randn(3, 12)
    assert (layer.in_features, layer.out_features, layer.transposed) == (12, 8, True)
    assert_close(layer(x), x @ layer.dense().T + conv.bias)
    assert nf4.error(conv.weight.T, layer.quantized).relative < 0.15
    assert type(layer.to_dense()) is Conv1D
    assert_close(layer.to_dense()(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_becomes_dense_again(bias: bool) -> None:
    layer, x = Linear4bit.of(nn.Linear(64, 48, bias=bias).eval()), torch.randn(2, 64)
    dense = layer.to_dense(torch.bfloat16)
    assert type(dense) is nn.Linear
    assert dense.training is False
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    assert_close(layer.to_dense()(x), layer(x))


# ---- its state ----


@pytest.mark.parametrize("double", [False, True])
def test_a_state_dict_goes_into_an_empty_layer_and_a_filled_one(double: bool, tmp_path: Path) -> None:
    layer, x = Linear4bit.of(nn.Linear(64, 48), double_quant=double), torch.randn(2, 64)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    read = load_file(tmp_path / "layer.safetensors")
    filled = Linear4bit.of(nn.Linear(64, 48), block_size=32)
    empty = Linear4bit(64, 48, bias=torch.empty(48))
    for other in (empty, filled):
        other.load_state_dict(read)
        assert torch.equal(other(x), layer(x))


def test_copies_share_nothing() -> None:
    layer, x = Linear4bit.of(nn.Linear(64, 48)), torch.randn(2, 64)
    twin, y = copy.deepcopy(layer), layer(x)
    twin.take(nf4.quantize(torch.randn(48, 64)))
    assert torch.equal(layer(x), y)
    assert not torch.equal(twin(x), y)


def test_an_empty_layer_says_so() -> None:
    with pytest.raises(AttachError, match="this 4-bit layer is empty: it was built without weights"):
        Linear4bit(64, 48)(torch.randn(2, 64))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_files_go_both_ways_with_bitsandbytes(kind: str, double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight, bias = torch.randn(48, 128), torch.randn(48)
    theirs = bnb.nn.Linear4bit(128, 48, quant_type=kind, compress_statistics=double)
    theirs.load_state_dict({"weight": weight, "bias": bias})
    theirs.to("cpu")
    dense = nn.Linear(128, 48)
    dense.load_state_dict({"weight": weight, "bias": bias})
    ours = Linear4bit.of(dense, double_quant=double, kind=kind)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) and mine[key].dtype == other[key].dtype for key in mine)
    ours.load_state_dict(other)
    taken = bnb.nn.Params4bit.from_prequantized(
        mine["weight"], {key.removeprefix("weight."): t for key, t in mine.items() if key.startswith("weight.")},
        device="cpu",
    )  # fmt: skip
    assert torch.equal(bnb.functional.dequantize_4bit(taken.data, taken.quant_state), ours.dense())


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not key.startswith(name)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: without(t, "quant_state"), "w: packed weights without their quant_state, so nobody knows"),
        (lambda t: without(t, "absmax"), "w: weight.absmax missing beside the quant_state"),
        (lambda t: without(t, "nested_absmax"), "w: weight.nested_absmax missing beside the quant_state"),
        (lambda t: {**t, "absmax": t["absmax"][:-1]}, "w: for shape .* in blocks of 64, absmax has 47 values, 48"),
        (lambda t: {**t, "": t[""][2:]}, "weight has 1534 values, 1536 expected"),
        (lambda t: {**t, "quant_map": t["quant_map"] + 1}, "w: its quant_map is not that of nf4"),
        (
            lambda t: {**t, "quant_state.bitsandbytes__nf4": t["quant_state.bitsandbytes__nf4"][:9]},
            "w: its quant_state cannot be read",
        ),
        (
            lambda t: {**t, "quant_state.bitsandbytes__nf4": torch.tensor(list(b"{}"), dtype=torch.uint8)},
            "w: its quant_state cannot be read: it holds only",
        ),
    ],
)
def test_a_state_that_says_too_little_is_refused(damage: Any, message: str) -> None:
    with pytest.raises(AdapterFileError, match=message):
        from_tensors(damage(to_tensors(nf4.quantize(torch.randn(48, 64)))), "w")


def test_loading_says_what_is_missing_or_wrong() -> None:
    layer, other = Linear4bit.of(nn.Linear(64, 48)), Linear4bit.of(nn.Linear(128, 48))
    with pytest.raises(RuntimeError, match="packed weights without their quant_state"):
        layer.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    with pytest.raises(RuntimeError, match=r"weight: shape \(48, 128\), this layer is \(48, 64\)"):
        layer.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match='Missing key.* "weight"'):
        layer.load_state_dict({"bias": torch.zeros(48)})


def test_a_principal_part_is_kept_beside_the_bytes_of_the_rest() -> None:
    # W = 10 e1 f1^T + N / 10: its first triplet beside it, the rest has blocks of maximum 0.3 and not of 10
    torch.manual_seed(0)
    weight = torch.randn(48, 64) / 10
    weight[0, 0] = 10.0
    plain, layer = Linear4bit.of(dense_layer(weight)), Linear4bit.of(dense_layer(weight))
    rest = layer.split_off(weight, 1)
    layer.take(nf4.quantize(rest))
    assert torch.linalg.svdvals(rest)[0] == pytest.approx(float(torch.linalg.svdvals(weight)[1]), rel=1e-3)
    assert (layer.dense() - weight).norm() < 0.9 * (plain.dense() - weight).norm()
    x = torch.randn(3, 64)
    assert_close(layer(x), x @ layer.dense().T, scale=10.0)
    with pytest.raises(SpecError, match=r"principal 49 exceeds min\(out, in\) = 48"):
        layer.split_off(weight, 49)


def test_a_principal_part_comes_back_into_an_empty_layer() -> None:
    weight = torch.randn(48, 64)
    layer = Linear4bit.of(dense_layer(weight))
    layer.take(nf4.quantize(layer.split_off(weight, 4)))
    for room in (False, True):
        empty = Linear4bit(64, 48)
        if room:
            empty.make_room(4, torch.float32)
        empty.load_state_dict(layer.state_dict())
        assert torch.equal(empty.dense(), layer.dense())


def test_a_lossy_merge_leaves_the_principal_part_as_it_is() -> None:
    weight = torch.randn(48, 64)
    layer = Linear4bit.of(dense_layer(weight))
    layer.take(nf4.quantize(layer.split_off(weight, 4)))
    store, before = host_of(layer).store, layer.principal()
    store.write(layer, weight + 0.5)
    assert torch.equal(layer.principal(), before)
    assert (store.read(layer) - weight - 0.5).norm() < 0.12 * weight.norm()


def dense_layer(weight: Tensor) -> nn.Linear:
    """Return a linear layer with this weight and no bias."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data.copy_(weight)
    return made
