"""DoRA: one case by hand, the paper's gradients, row norms without the dense product, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.method import Static, Tensors
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Targets, method_from_json, method_to_json
from lorakit.errors import SpecError
from lorakit.inits.loftq import LoftQ
from lorakit.inject.attach import adapters_named, attach, detach
from lorakit.inject.merge import merge
from lorakit.methods.dora import DoRA, row_norms, row_norms_of_sum
from lorakit.methods.ia3 import IA3
from lorakit.methods.loha import LoHa
from lorakit.methods.lora import LoRA
from lorakit.methods.lora_fa import LoRAFA
from lorakit.training.recipe import Recipe
from tests.law.cases import KINDS, METHODS, Net, deltas, dense, inputs, jitter, net, weight_of
from tests.tolerances import assert_close

LAYERS = ["linear", "transposed-linear", "embedding", "conv2d", "conv2d, grouped, reflected", "conv3d"]


def adapted(
    weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor, alpha: float, bias: Tensor | None = None
) -> Net:
    """Return a linear layer with the given weight and DoRA tensors."""
    model = Net(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)).to(weight.dtype)
    attach(model, AdapterSpec(DoRA(LoRA(down.shape[0], alpha)), Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    with torch.no_grad():
        model.layer.get_parameter("weight").copy_(weight)
        if bias is not None:
            model.layer.get_parameter("bias").copy_(bias)
        for name, values in (("down", down), ("up", up), ("magnitude", magnitude)):
            adapter.get_parameter(name).copy_(values)
    return model


def test_one_case_by_hand() -> None:
    # W = [[3, 4], [3, 5]], s = 3 / 1, B = [[0], [3]], A = [[1, 0]]: s B A = [[0, 0], [9, 0]], V = [[3, 4], [12, 5]],
    # row norms 5 and 13 (of columns: sqrt(153), sqrt(41)), m = (10, 39): g = (2, 3), W' = [[6, 8], [36, 15]]
    model = adapted(
        torch.tensor([[3.0, 4.0], [3.0, 5.0]]),
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[0.0], [3.0]]),
        torch.tensor([10.0, 39.0]),
        alpha=3.0,
        bias=torch.tensor([100.0, 200.0]),
    )
    # x = (1, -1): W' x = (-2, 21); the bias is not stretched
    assert_close(model(torch.tensor([1.0, -1.0])), torch.tensor([98.0, 221.0]))
    merge(model)
    assert_close(model.layer.get_parameter("weight").detach(), torch.tensor([[6.0, 8.0], [36.0, 15.0]]))


def test_gradients_are_the_paper_s_with_the_norm_held() -> None:
    # c = m / ||V||, G = dL/dh^T x: dB = s (c G) A^T, dA = s B^T (c G), dm = rows of <G, V> / ||V||
    down, up, weight = torch.randn(3, 5).double(), torch.randn(4, 3).double(), torch.randn(4, 5).double()
    m, x, g = torch.rand(4).double() + 1, torch.randn(6, 5).double(), torch.randn(6, 4).double()
    model = adapted(weight, down, up, m, alpha=7.0)
    model(x).backward(g)
    adapter, big_g, s, v = adapters_named(model, "default")[0], g.T @ x, 7 / 3, weight + 7 / 3 * up @ down
    c = (m / v.norm(dim=1))[:, None]
    wanted = {
        "up": s * (c * big_g) @ down.T,
        "down": s * up.T @ (c * big_g),
        "magnitude": (big_g * v).sum(1) / v.norm(dim=1),
    }
    for name, grad in wanted.items():
        torch.testing.assert_close(adapter.get_parameter(name).grad, grad, rtol=1e-12, atol=1e-12)


def test_m_equal_to_the_norm_of_v_gives_the_inner_method() -> None:
    down, up, weight = torch.randn(3, 5), torch.randn(4, 3), torch.randn(4, 5)
    model, x = adapted(weight, down, up, (weight + 2.0 * up @ down).norm(dim=1), alpha=6.0), torch.randn(2, 5)
    assert_close(model(x), x @ (weight + 2.0 * up @ down).T)


@pytest.mark.parametrize("name", ["dora", "dora of ia3"])
@pytest.mark.parametrize("kind", LAYERS)
def test_merged_rows_have_the_trained_lengths(kind: str, name: str) -> None:
    model = net(kind, name)
    magnitude = adapters_named(model, "n0")[0].get_parameter("magnitude").detach().abs()
    merge(model)
    assert_close(weight_of(model).flatten(1).norm(dim=1), magnitude)


@pytest.mark.parametrize("kind", LAYERS)
def test_m_starts_at_the_row_norms_of_the_weight(kind: str) -> None:
    model = Net(KINDS[kind].layer())
    attach(model, AdapterSpec(METHODS["dora"], Targets("layer")))
    magnitude = adapters_named(model, "default")[0].get_parameter("magnitude")
    assert_close(magnitude, weight_of(model).double().square().flatten(1).sum(1).sqrt().float())


@pytest.mark.parametrize("kind", ["linear", "conv2d, grouped, reflected"])
def test_on_a_start_that_corrects_a_quantised_weight_it_begins_with_the_correction(kind: str) -> None:
    model, x = Net(KINDS[kind].layer()), inputs(kind)
    exact = {"layer": weight_of(model).clone()}
    with torch.no_grad():
        model.layer.get_parameter("weight").copy_((exact["layer"] * 4).round() / 4)
    found = []
    for method in (LoRA(2, init_=LoftQ()), DoRA(LoRA(2, init_=LoftQ()))):
        attach(model, AdapterSpec(method, Targets("layer")), evidence=exact)
        found.append(model(x))
        detach(model)
    assert not torch.allclose(found[0], model(x), atol=1e-3), "the correction does something"
    assert_close(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("weight", "rank", "groups"),
    [((8, 12), 4, 1), ((64, 700), 16, 1), ((8, 12, 3, 3), 4, 1), ((8, 6, 3, 3), 4, 2), ((8, 3, 2), 4, 4)],
    ids=str,
)
def test_norms_without_the_product_equal_the_plain_ones(
    weight: tuple[int, ...], rank: int, groups: int, dtype: torch.dtype
) -> None:
    w, down = torch.randn(weight, dtype=dtype), torch.randn(rank, *weight[1:], dtype=dtype)
    up = torch.randn(weight[0], rank // groups, dtype=dtype)
    dw = LoRA(rank, float(rank)).delta({"down": down, "up": up}, w)
    assert_close(row_norms_of_sum(w, down, up), row_norms(w + dw))


def test_norms_of_an_embedding_table_read_its_transposed_view() -> None:
    table, down, up = torch.randn(1000, 16), torch.randn(4, 1000), torch.randn(16, 4)
    assert_close(row_norms_of_sum(table.T, down, up), (table.T + up @ down).norm(dim=1))


def test_norms_of_a_16_bit_weight_are_summed_in_fp32() -> None:
    w, down, up = torch.randn(4, 5000).bfloat16(), torch.randn(2, 5000) / 70, torch.randn(4, 2) / 2
    norms = row_norms_of_sum(w, down, up)
    assert norms.dtype == torch.float32
    assert_close(row_norms(w), w.double().norm(dim=1).float())
    dw = (up @ down).double()  # only <W, dW> / ||W||, at most ||dW||, passes through bf16
    assert_close(norms, (w.double() + dw).norm(dim=1).float(), scale=dw.norm(dim=1).max().item(), dtype=torch.bfloat16)


def test_norms_never_form_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Tensor:
        raise AssertionError("dW was formed")

    model, x = net("linear", "dora"), inputs("linear")
    wanted = model(x)
    monkeypatch.setattr(LoRA, "delta", refuse)
    assert torch.equal(model(x), wanted)
    weight, down, up = torch.randn(300, 400), torch.randn(2, 400), torch.randn(300, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        row_norms_of_sum(weight, down, up)
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert 0 < largest < weight.numel() * 4 / 10, "no temporary comes near the size of W"


def test_an_update_that_cancels_its_row_gives_no_nan() -> None:
    weight = torch.randn(4, 5) * 100
    norms = row_norms_of_sum(weight, -torch.eye(5)[:, :], weight.clone())
    assert norms.isfinite().all()
    assert norms.max() < 1e-2 * row_norms(weight).min()


def test_a_row_of_zeros_stays_zero_and_poisons_nothing() -> None:
    model = Net(nn.Linear(5, 4))
    with torch.no_grad():
        model.layer.get_parameter("weight")[2] = 0.0
    x = torch.randn(3, 5)
    before = model(x)
    attach(model, AdapterSpec(DoRA(LoRA(2)), Targets("layer")))
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    for parameter in adapters_named(model, "default")[0].parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("inner", [LoRA(4, 8.0, True), LoHa(4, 8.0), IA3("input")], ids=lambda m: m.name)
@pytest.mark.parametrize("kind", LAYERS)
def test_any_static_method_fits_inside(kind: str, inner: Static) -> None:
    model, x = Net(KINDS[kind].layer()), inputs(kind)
    before = model(x)
    attach(model, AdapterSpec(DoRA(inner), Targets("layer")))
    assert torch.equal(model(x), before)
    jitter(adapters_named(model, "default")[0])
    assert_close(model(x), dense(model, x, weight_of(model) + next(deltas(model, "default"))))


def test_dropout_reaches_the_inner_branch_alone() -> None:
    # g y0 + g s B A dropout(x) + b; PEFT also drops the input of (g - 1) y0. Both have this mean:
    model, x = Net(nn.Linear(12, 8)), torch.randn(2, 12)
    attach(model, AdapterSpec(DoRA(LoRA(4, 8.0)), Targets("layer"), dropout=0.5))
    adapter = adapters_named(model, "default")[0]
    jitter(adapter)
    exact = model.eval()(x)
    model.train()
    p = {name: t.detach() for name, t in adapter.tensors().items()}
    weight, bias = model.layer.get_parameter("weight"), model.layer.get_parameter("bias")
    g = p["magnitude"] / (weight + 2.0 * p["up"] @ p["down"]).norm(dim=1)
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    assert not torch.equal(dropped, x)
    assert_close(y, g * (x @ weight.T) + g * 2.0 * (dropped @ p["down"].T @ p["up"].T) + bias)
    spread = model(x.repeat(4000, 1)).detach().view(4000, 2, 8)
    assert ((spread.mean(0) - exact).abs() < 5 * spread.std(0) / math.sqrt(4000) + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_keeps_its_dtype_and_does_not_round_the_gain(dtype: torch.dtype) -> None:
    model, x = Net(nn.Linear(256, 64, bias=False)).to(dtype), torch.randn(4, 256).to(dtype)
    before = model(x)
    attach(model, AdapterSpec(DoRA(LoRA(4)), Targets("layer")))
    assert torch.equal(model(x), before), "m is not rounded, so g is 1"
    adapter, weight = adapters_named(model, "default")[0], model.layer.get_parameter("weight")
    with torch.no_grad():
        adapter.get_parameter("magnitude").mul_(1 + 2**-10)  # less than one step of bf16 above 1, 2^-7
    call_y = adapter(model.layer, x, before)
    assert call_y.dtype == dtype
    assert_close(call_y.float(), 2**-10 * (x.float() @ weight.float().T), dtype=dtype)


def test_under_autocast_the_output_is_the_base_s_dtype() -> None:
    model, x = net("linear", "dora"), inputs("linear")
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), exact, dtype=torch.bfloat16)
    y.float().sum().backward()


def test_torch_export_keeps_it() -> None:
    model, x = net("linear", "dora").eval(), inputs("linear")
    assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_a_recipe_gives_the_inner_method_its_fields() -> None:
    recipe = Recipe.model_validate(
        {
            "model": "m",
            "data": {"train": "t.jsonl"},
            "adapter": {"method": "dora", "rank": 8, "alpha": 16},
            "output": "o",
        }
    )
    assert recipe.adapter.build_method() == DoRA(LoRA(8, 16.0))
    assert method_from_json({"name": "dora", "inner": "loha", "rank": 2}) == DoRA(LoHa(2))
    assert method_from_json({"name": "dora", "inner": {"name": "ia3", "side": "input"}}) == DoRA(IA3("input"))
    for method in (DoRA(), DoRA(LoHa(3, 1.5)), DoRA(IA3("input"))):
        assert method_from_json(json.loads(json.dumps(method_to_json(method)))) == method
    spec = AdapterSpec(DoRA(LoRA(4)), Targets("layer"), dropout=0.1)
    assert AdapterSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_field_neither_knows_is_refused_by_the_inner_one() -> None:
    with pytest.raises(SpecError, match="method lora has no field 'rnk'; did you mean 'rank'"):
        method_from_json({"name": "dora", "rnk": 8})


@dataclass(frozen=True)
class Pruned(LoRA):
    """A LoRA that wants a penalty."""

    name: ClassVar[str] = "pruned"

    def penalty(self, p: Tensors, notes: Tensors) -> Tensor:
        """Never called."""
        raise AssertionError


@dataclass(frozen=True)
class Widest(LoRA):
    """A LoRA that wants to know the widest of its sites."""

    name: ClassVar[str] = "widest"
    width: int = 0

    def settled(self, sites: Sequence[Site]) -> Widest:
        """Return this with the width of the widest site."""
        return replace(self, width=max(site.in_ for site in sites))


def test_an_inner_method_is_told_of_all_the_sites() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6))
    attach(model, AdapterSpec(DoRA(Widest(2)), Targets(["0", "1"])))
    for adapter in adapters_named(model, "default"):
        assert isinstance(adapter.method, DoRA)
        assert adapter.method.inner == Widest(2, width=12)
    assert DoRA(LoRA(2)).settled([]) == DoRA(LoRA(2))


def test_an_inner_method_it_cannot_wrap_is_refused() -> None:
    with pytest.raises(SpecError, match="dora of dora would norm the inner lengths away; give it the method inside"):
        DoRA(DoRA())
    for inner in (Pruned(), LoRAFA(4)):
        with pytest.raises(SpecError, match=f"corrected gradient that {inner.name} needs; use {inner.name} alone"):
            DoRA(inner)
    with pytest.raises(SpecError, match="dora would norm away the scales of ia3 at the outputs"):
        DoRA(IA3())


def test_an_inner_method_that_changes_no_weight_is_refused_where_no_type_checker_runs() -> None:
    script = (
        "from lorakit import LorakitError\n"
        "from lorakit.core.method import Method\n"
        "from lorakit.methods.dora import DoRA\n"
        "class Routed(Method):\n"
        "    name = 'routed'\n"
        "    tensors = init = branch = None\n"
        "for inner in (Routed(), 'lora'):\n"
        "    try: DoRA(inner); print('taken')\n"
        "    except LorakitError as e: print(e)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == [
        f"dora gives lengths to a changed weight, and {it} is no change of a weight; use lora"
        for it in ("routed", "'lora'")
    ]


def test_the_inner_method_s_refusal_has_the_path() -> None:
    with pytest.raises(SpecError, match=r"layer: rank 64 exceeds min\(out, in\) = 8"):
        attach(Net(nn.Linear(12, 8)), AdapterSpec(DoRA(LoRA(64)), Targets("layer")))
