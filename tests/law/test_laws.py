"""The laws every method keeps on every layer kind it fits, generated from the two tables in `cases`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from lorakit.core.adapters import Adapted
from lorakit.core.registry import hosts, methods
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import MergeError, SpecError, TargetError
from lorakit.inject.activate import use
from lorakit.inject.attach import adapters_named, attach, detach, state
from lorakit.inject.merge import merge
from lorakit.methods.lora import LoRA
from tests.law.cases import (
    CONTEXTS,
    FIRST,
    HELD,
    KINDS,
    METHODS,
    MISFITS,
    PAIRS,
    STATIC,
    Net,
    deltas,
    dense,
    inputs,
    jitter,
    net,
    weight_of,
)
from tests.slow import others_slow
from tests.tolerances import assert_close

pairs = pytest.mark.parametrize(("kind", "method"), PAIRS)
static = pytest.mark.parametrize(("kind", "method"), STATIC)


def test_the_matrix_covers_the_registry() -> None:
    assert {m.name for m in (*METHODS.values(), *CONTEXTS.values())} == set(methods())
    elsewhere = {"model", *(f"linear, {store}" for store in ("bnb 4-bit", "bnb 8-bit", "torchao"))}
    assert {k.split(",")[0] for k in KINDS} | {k for k in KINDS if KINDS[k].lossy} | elsewhere == set(hosts())


@pytest.mark.parametrize(("kind", "method"), MISFITS)
def test_a_method_that_does_not_fit_is_refused_with_the_reason(kind: str, method: str) -> None:
    with pytest.raises(
        (SpecError, TargetError), match=f"does not fit a layer of kind {kind.split(',')[0]}|matched only"
    ):
        attach(Net(KINDS[kind].layer()), AdapterSpec(METHODS[method], Targets("layer")))


@pytest.mark.parametrize(("kind", "method"), [pair for pair in PAIRS if pair not in STATIC])
def test_an_update_that_depends_on_the_input_is_not_merged(kind: str, method: str) -> None:
    with pytest.raises(MergeError, match="depends on the input, so no single weight equals it"):
        merge(net(kind, method))


@pairs
def test_a_fresh_adapter_changes_no_bit(kind: str, method: str) -> None:
    model, x = Net(KINDS[kind].layer()), inputs(kind)
    before = model(x)
    attach(model, AdapterSpec(METHODS[method], Targets("layer")))
    assert torch.equal(model(x), before)


@static
def test_branch_equals_delta(kind: str, method: str) -> None:
    model, x = net(kind, method), inputs(kind)
    delta = next(deltas(model, "n0"))
    assert delta.abs().max() > 0.05, "the law would hold trivially"
    assert_close(model(x), dense(model, x, weight_of(model) + delta))


@static
def test_merging_gives_the_adapted_output_and_the_base_class(kind: str, method: str) -> None:
    model, x = net(kind, method), inputs(kind)
    adapted, cls = model(x), type(KINDS[kind].layer())
    exact = weight_of(model) + next(deltas(model, "n0"))
    if KINDS[kind].lossy:
        with pytest.raises(MergeError, match=r"its weight is quantised \(4-bit\), and the sum would be rounded again"):
            merge(model)
        assert torch.equal(model(x), adapted), "a refused merge changes nothing"
    report = merge(model, lossy=KINDS[kind].lossy)
    assert type(model.layer) is cls
    if KINDS[kind].lossy:
        off = (weight_of(model) - exact).detach()
        assert 0 < off.norm() < 0.2 * exact.norm()
        assert report.largest_rounding == pytest.approx(float(off.abs().max()), rel=1e-4)
        assert_close(model(x), dense(model, x, weight_of(model)))
    else:
        assert_close(model(x), adapted)


@static
def test_order_and_weights_of_two_adapters(kind: str, method: str) -> None:
    model, x = net(kind, method, method), inputs(kind)
    use(model, {"n0": 0.7, "n1": -1.3})
    y = model(x)
    use(model, {"n1": -1.3, "n0": 0.7})
    assert_close(model(x), y)
    total = weight_of(model) + 0.7 * next(deltas(model, "n0")) - 1.3 * next(deltas(model, "n1"))
    assert_close(y, dense(model, x, total))
    if not KINDS[kind].lossy:
        merge(model)
        assert_close(model(x), y)


@pairs
def test_each_row_may_choose_its_adapter(kind: str, method: str) -> None:
    other = "lora" if (kind, "lora") in PAIRS else method
    model, x = net(kind, method, other), inputs(kind)
    wanted = []
    for choice in ({}, {"n0": 1.0}, {"n1": 2.0}):
        use(model, choice)
        wanted.append(model(x))
    use(model, {"n0": torch.tensor([0.0, 1.0, 0.0]), "n1": torch.tensor([0.0, 0.0, 2.0])})
    assert_close(model(x), torch.stack([wanted[i][i] for i in range(3)]))


@pairs
def test_detaching_restores_the_bare_layer(kind: str, method: str) -> None:
    model, x = Net(KINDS[kind].layer()), inputs(kind)
    before, keys, flags = model(x), set(model.state_dict()), [p.requires_grad for p in model.parameters()]
    attach(model, AdapterSpec(METHODS[method], Targets("layer")))
    detach(model)
    assert torch.equal(model(x), before)
    assert set(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not isinstance(model.layer, Adapted)
    assert vars(model).keys() == vars(Net(KINDS[kind].layer())).keys(), "the model remembers nothing"


@pairs
def test_a_state_attached_elsewhere_gives_the_same_output(kind: str, method: str) -> None:
    model, x = net(kind, method), inputs(kind)
    twin = Net(KINDS[kind].layer())
    twin.layer.load_state_dict({k: v for k, v in model.layer.state_dict().items() if "adapters" not in k})
    attach(twin, state(model, "n0"), "other")
    assert torch.equal(twin(x), model(x))


@pairs
def test_declared_tensors_are_the_allocated_ones(kind: str, method: str) -> None:
    model = net(kind, method)
    for adapter in adapters_named(model, "n0"):
        declared = adapter.method.tensors(adapter.site)
        assert {k: tuple(t.shape) for k, t in adapter.tensors().items()} == {k: d.shape for k, d in declared.items()}
        learns = {k for k, p in adapter.named_parameters() if p.requires_grad}
        assert learns == {k for k, d in declared.items() if d.trainable}


@pairs
def test_gradients_are_those_of_the_formula(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(kind, method, dtype=torch.float64).double(), inputs(kind, torch.float64)
    for module, function in HELD.get(METHODS[method].name, []):
        monkeypatch.setattr(module, function, at_its_first_value(getattr(module, function)))
    x = x if x.is_floating_point() else x.clamp(min=1)  # token 0 pads: torch gives its row no gradient, by design
    adapter = adapters_named(model, "n0")[0]
    names = [name for name, _ in adapter.named_parameters()]

    def f(*values: torch.Tensor) -> torch.Tensor:
        named = {f"layer.adapters.by_name.n0.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(model, named, (x,))  # type: ignore[no-any-return]

    values = [p.detach().clone().requires_grad_() for p in adapter.parameters()]
    assert gradcheck(f, values, fast_mode=True)


def at_its_first_value(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `function` with its first value for good."""
    values: list[torch.Tensor] = []

    def held(*args: torch.Tensor) -> torch.Tensor:
        if not values:
            values.append(function(*args))
        return values[0]

    return held


@pairs
def test_copies_and_pickles_stay_adapted(kind: str, method: str) -> None:
    model, x = net(kind, method), inputs(kind)
    y = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), y)
        detach(twin, "n0")
        assert not torch.equal(twin(x), y)
    assert torch.equal(model(x), y), "a copy shares nothing with its original"


@pytest.mark.parametrize(("kind", "method"), others_slow(PAIRS, FIRST))
def test_compiled_whole_equals_eager(kind: str, method: str) -> None:
    model, x = net(kind, method), inputs(kind)
    y = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), y)
    use(model, {"n0": torch.tensor([1.0, 0.0, 1.0])})
    assert_close(compiled(x)[0], y[0])


SLICEABLE = {"linear": -1, "transposed-linear": -1, "conv2d": 1, "conv1d": 1}
"""The kinds with rows to slice, and the axis of the output that counts them."""


@pytest.mark.parametrize(("kind", "method"), [pair for pair in STATIC if pair[0] in SLICEABLE])
def test_a_slice_adapts_its_own_rows_only(kind: str, method: str) -> None:
    base, x = net(kind), inputs(kind)
    before = base(x)
    model = net(kind, method, rows="[2:6]")
    model.load_state_dict(base.state_dict())
    y, axis, kept = model(x), SLICEABLE[kind], torch.tensor([0, 1, 6, 7])
    assert torch.equal(y.index_select(axis, kept), before.index_select(axis, kept))
    assert not torch.allclose(y, before)
    assert_close(y, dense(model, x, weight_of(model) + next(deltas(model, "n0"))))
    merge(model)
    assert_close(model(x), y)


def test_one_adapter_may_hold_several_slices_of_a_layer() -> None:
    model, x = net("linear"), inputs("linear")
    attach(model, AdapterSpec(LoRA(2), Targets(["layer[0:2]", "layer[4:8]"])))
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    y = model(x)
    assert_close(y, dense(model, x, weight_of(model) + sum(deltas(model, "default"))))
    assert [u.site.key for u in state(model).updates] == ["layer[0:2]", "layer[4:8]"]
    merge(model)
    assert_close(model(x), y)


@given(
    out=st.integers(1, 9),
    in_=st.integers(1, 9),
    part=st.floats(0, 1),
    alpha=st.floats(0.1, 64),
    stabilised=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_the_law_holds_at_any_shape(
    out: int, in_: int, part: float, alpha: float, stabilised: bool, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    rank = 1 + int(part * (min(out, in_) - 1))
    model = Net(nn.Linear(in_, out, bias=bias)).double()
    attach(model, AdapterSpec(LoRA(rank, alpha, stabilised), Targets("layer"), seed=seed))
    with torch.no_grad():
        for values in adapters_named(model, "default")[0].parameters():
            values.normal_()
    x = torch.randn(2, in_, dtype=torch.float64)
    delta = next(deltas(model, "default"))
    assert_close(model(x), dense(model, x, weight_of(model) + delta), scale=float(alpha * 50))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_keeps_its_dtype_and_its_adapter_stays_in_fp32(dtype: torch.dtype) -> None:
    model, x = net("linear", "lora"), inputs("linear")
    exact = model(x)
    model.layer.weight.data = model.layer.weight.data.to(dtype)
    model.layer.bias.data = model.layer.bias.data.to(dtype)
    assert model(x.to(dtype)).dtype == dtype
    assert {p.dtype for p in adapters_named(model, "n0")[0].parameters()} == {torch.float32}
    assert_close(model(x.to(dtype)).float(), exact, dtype=dtype)


def test_under_autocast_the_output_is_the_base_s_dtype() -> None:
    model, x = net("linear", "lora"), inputs("linear")
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), exact, dtype=torch.bfloat16)
    y.float().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in adapters_named(model, "n0")[0].parameters()
    )


def test_torch_export_keeps_the_adapter() -> None:
    model, x = net("linear", "lora").eval(), inputs("linear")
    program: Any = torch.export.export(model, (x,))
    assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = net("linear", "lora"), inputs("linear").requires_grad_()
    wanted = torch.autograd.grad(model(x).square().sum(), adapters_named(model, "n0")[0].parameters())
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for parameter, grad in zip(adapters_named(model, "n0")[0].parameters(), wanted, strict=True):
        assert_close(parameter.grad, grad)
