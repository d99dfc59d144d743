"""The bottleneck adapters: the published counts, their places, one case by hand each, and what they refuse."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorakit.core.adapters import Adapted
from lorakit.core.method import Method
from lorakit.core.registry import methods
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import MergeError, SpecError
from lorakit.inject.attach import adapters_named, attach, detach
from lorakit.inject.merge import merge
from lorakit.methods.bottleneck import Bottleneck
from lorakit.methods.houlsby import Houlsby
from lorakit.methods.lin import Lin
from lorakit.methods.parallel import Parallel
from lorakit.methods.pfeiffer import Pfeiffer
from tests.conftest import ROOT
from tests.law.cases import MLP, Net, jitter, net
from tests.tolerances import assert_close

IDS = torch.arange(14).reshape(2, 7)


def gpt2(layers: int = 12) -> GPT2LMHeadModel:
    """Return a tiny GPT-2 without dropout."""
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=layers, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(config)


def moved(model: nn.Module, method: Method, layers: str | None = None, train: Any = ()) -> nn.Module:
    """Attach a method where its authors put it and move it off its start."""
    attach(model, AdapterSpec(method, Targets(method.targets, (), layers), train))
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    return model


def by_hand(method: Method, **values: Any) -> Net:
    """Return an adapted 2 x 2 identity layer with the given tensors."""
    model = Net(nn.Linear(2, 2, bias=False))
    attach(model, AdapterSpec(method, Targets("layer")))
    with torch.no_grad():
        model.layer.weight.copy_(torch.eye(2))  # type: ignore[operator]
        for name, value in values.items():
            adapters_named(model, "default")[0].get_parameter(name).copy_(torch.tensor(value))
    return model


HAND = {"down": [[1.0, 1.0]], "down_bias": [3.0], "up": [[3.0], [4.0]], "up_bias": [1.0, -1.0]}


@pytest.mark.parametrize("method", [Houlsby(2, "relu"), Pfeiffer(2)])
def test_a_serial_one_by_hand(method: Method) -> None:
    # h = (1, -2): W_down h + b1 = -1 + 3 = 2, relu 2, W_up 2 + b2 = (7, 7), h + that = (8, 5)
    # h = (-4, 0): -4 + 3 = -1, relu 0, b2 alone: (-3, -1)
    assert by_hand(method, **HAND)(torch.tensor([[1.0, -2.0], [-4.0, 0.0]])).tolist() == [[8.0, 5.0], [-3.0, -1.0]]


def test_lin_s_by_hand() -> None:
    # h = (3, -1): mean 1, deviation 2, LN = (1, -1), gained (2, -3) and shifted (2, -2); -1 + 2 - 2 ... = 0 + 3 = 3;
    # W_up 3 + b2 = (10, 11), h + that = (13, 10); LN's eps 1e-5 moves that by less than 1e-4
    model = by_hand(Lin(2), gain=[2.0, 3.0], shift=[0.0, 1.0], **HAND)
    torch.testing.assert_close(model(torch.tensor([3.0, -1.0])), torch.tensor([13.0, 10.0]), rtol=0, atol=1e-4)


def test_lin_s_gain_is_not_rounded_by_a_16_bit_base() -> None:
    model, x = Net(nn.Linear(64, 64)).bfloat16(), torch.randn(8, 64, dtype=torch.bfloat16)
    y = model(x)
    attach(model, AdapterSpec(Lin(4), Targets("layer")))
    (adapter,) = adapters_named(model, "default")
    jitter(adapter)
    before = adapter(model.layer, x, y)
    with torch.no_grad():
        adapter.get_parameter("gain").mul_(1 + 2**-9)  # less than half a step of bf16 above 1
    assert not torch.equal(adapter(model.layer, x, y), before)


def test_the_parallel_one_by_hand() -> None:
    # W = 5 I so that input and output differ: h = (5, -10), but x = (1, -2) is read: 4 * (7, 7) + h = (33, 18)
    model = by_hand(Parallel(2), **HAND)
    with torch.no_grad():
        model.layer.weight.mul_(5)  # type: ignore[operator]
    assert model(torch.tensor([1.0, -2.0])).tolist() == [33.0, 18.0]


def test_the_serial_ones_read_the_output_and_not_the_input() -> None:
    model = by_hand(Pfeiffer(2), **HAND)
    with torch.no_grad():
        model.layer.weight.mul_(5)  # type: ignore[operator]
    # h = (5, -10): -5 + 3 = -2, relu 0, h + b2 = (6, -11)
    assert model(torch.tensor([1.0, -2.0])).tolist() == [6.0, -11.0]


@pytest.mark.parametrize(("width", "parameters"), [(1, 7_078_080), (8, 40_109_568), (64, 304_361_472)])
def test_gpt3_counts_are_the_published_ones(width: int, parameters: int) -> None:
    # arXiv 2106.09685, table 15: 96 layers of 12,288 features with two adapters each, 192 (2 d r + r + d)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=96, n_embd=12288, n_head=96))
    handle = attach(model, AdapterSpec(Houlsby(reduction=12288 / width), Targets(Houlsby.targets)))
    assert len(handle.paths) == 192
    assert sum(p.numel() for p in handle.parameters()) == parameters


@pytest.mark.parametrize(
    ("method", "paths", "parameters"),
    [
        # 12 layers of 768 features; r = 48: 2 * 768 * 48 + 48 + 768 = 74,544 an adapter; r = 384 beside the MLP
        (Houlsby(), 24, 24 * 74_544),
        (Pfeiffer(), 12, 12 * 74_544),
        (Lin(), 12, 12 * (74_544 + 2 * 768)),
        (Parallel(), 12, 12 * (2 * 768 * 384 + 384 + 768)),
    ],
)
def test_each_goes_where_its_authors_put_it(method: Method, paths: int, parameters: int) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    handle = attach(model, AdapterSpec(method, Targets(method.targets)))
    assert len(handle.paths) == paths
    assert sum(p.numel() for p in handle.parameters()) == parameters


@pytest.mark.parametrize("method", [Houlsby(), Pfeiffer(), Lin(), Parallel()])
def test_a_whole_model_starts_as_the_base_to_the_bit(method: Method) -> None:
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                         num_attention_heads=4, vocab_size=50)).eval()  # fmt: skip
    before = model(IDS).logits
    moved(model, method)
    assert not torch.equal(model(IDS).logits, before)
    detach(model)
    attach(model, AdapterSpec(method, Targets(method.targets)))
    assert torch.equal(model(IDS).logits, before)


def test_the_first_step_trains_up_alone_and_the_second_everything() -> None:
    model = Net(nn.Linear(12, 8))
    handle = attach(model, AdapterSpec(Houlsby(2), Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    optimizer = torch.optim.SGD(handle.parameters(), 0.1)
    learned: list[set[str]] = []
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 12)).square().sum().backward()
        learned.append({name for name, p in adapter.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    assert learned == [{"up", "up_bias"}, {"up", "up_bias", "down", "down_bias"}]


@pytest.mark.parametrize("method", [Houlsby(4), Lin(4), Parallel(4)])
def test_dropped_layers_are_untouched(method: Method) -> None:
    # AdapterDrop: nothing below layer 5, so what those layers give is the base's bit for bit, and needs no backward
    model = gpt2().train()
    before = model(IDS, output_hidden_states=True).hidden_states
    classes = [type(module) for name, module in model.named_modules() if ".h." in name and int(name.split(".")[2]) < 5]
    moved(model, method, "5-11", Houlsby.train)
    after = model(IDS, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(after[:6], before[:6], strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(after[6:], before[6:], strict=True))
    lower = [module for name, module in model.named_modules() if ".h." in name and int(name.split(".")[2]) < 5]
    assert [type(module) for module in lower] == classes
    assert not any(isinstance(module, Adapted) for module in lower)
    assert [h.requires_grad for h in after[:7]] == [False] * 6 + [True]
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "adapters" not in name}
    assert trained == {
        f"transformer.h.{i}.ln_{j}.{k}" for i in range(5, 12) for j in (1, 2) for k in ("weight", "bias")
    }


def test_houlsby_s_recipe_trains_every_norm() -> None:
    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False)
    handle = attach(model, AdapterSpec(Houlsby(12), Targets(Houlsby.targets), Houlsby.train))
    # 24 adapters of r = 64; LayerNorms of the 12 layers and of the embeddings, 2 d each
    assert sum(p.numel() for p in handle.parameters()) == 24 * (2 * 768 * 64 + 64 + 768) + 25 * 2 * 768


@pytest.mark.parametrize("method", [Houlsby(2), Lin(2), Parallel(2)])
def test_rows_of_a_fused_layer_are_adapted_alone(method: Method) -> None:
    model, x = Net(nn.Linear(12, 8)), torch.randn(3, 5, 12)
    before = model(x)
    attach(model, AdapterSpec(method, Targets("layer[2:6]")))
    adapter = adapters_named(model, "default")[0]
    jitter(adapter)
    after = model(x)
    assert torch.equal(after[..., [0, 1, 6, 7]], before[..., [0, 1, 6, 7]])
    part = Net(nn.Linear(12, 4))
    part.layer.load_state_dict({k: v[2:6] for k, v in model.layer.state_dict().items() if "adapters" not in k})
    attach(part, AdapterSpec(method, Targets("layer")))
    adapters_named(part, "default")[0].load_state_dict(adapter.state_dict())
    assert_close(after[..., 2:6], part(x))


@pytest.mark.parametrize("kind", ["linear", "module"])
def test_dropout_thins_what_is_read_and_never_the_layer(kind: str) -> None:
    model = Net(nn.Linear(12, 12) if kind == "linear" else MLP()).train()
    x = torch.randn(400, 12)
    before = model(x)
    attach(model, AdapterSpec(Pfeiffer(1, "relu"), Targets("layer"), dropout=0.75))
    adapter = adapters_named(model, "default")[0]
    with torch.no_grad():
        adapter.get_parameter("down").copy_(torch.eye(12))
        adapter.get_parameter("up").copy_(torch.eye(12))
    read = model(x) - before  # relu of what is left of y, four times as large
    kept = read.abs() > 1e-5
    assert 0.2 < (kept & (before > 0)).sum() / (before > 0).sum() < 0.3
    assert_close(read[kept], 4 * before[kept])
    assert_close(model.eval()(x) - before, before.relu())


def test_an_adapter_beside_what_gives_back_no_tensor_is_refused() -> None:
    class Pair(MLP):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), None

    model = Net(Pair())
    attach(model, AdapterSpec(Parallel(), Targets("layer")))
    with pytest.raises(Exception, match="layer gives back a tuple, not a tensor, so nothing can be added to it"):
        model(torch.randn(2, 12))


@pytest.mark.parametrize("reduction", [0, -2, math.nan, math.inf, True])
def test_a_reduction_that_cannot_be_is_refused(reduction: float) -> None:
    with pytest.raises(SpecError, match=r"reduction must be a positive number, not .*; for r features give out / r"):
        Houlsby(reduction)


def test_an_activation_nobody_knows_is_refused() -> None:
    with pytest.raises(
        SpecError, match=r"unknown activation 'swsh'; did you mean 'swish'\?; known: relu, gelu, gelu_new"
    ):
        Pfeiffer(activation="swsh")


@pytest.mark.parametrize("scale", [0.0, -4.0, math.inf])
def test_a_scale_that_cannot_be_is_refused(scale: float) -> None:
    with pytest.raises(SpecError, match=r"scale must be a positive number, not .*; the usual one is 4"):
        Parallel(scale=scale)


def test_a_reduction_that_leaves_nothing_is_refused_with_its_path() -> None:
    with pytest.raises(SpecError, match="layer: reduction 16 leaves none of 7 features; lower it"):
        attach(Net(nn.Linear(12, 7)), AdapterSpec(Pfeiffer(), Targets("layer")))


def test_merging_is_refused_with_the_reason() -> None:
    with pytest.raises(MergeError, match="layer: lin depends on the input, so no single weight equals it"):
        merge(net("linear", "lin"))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", lambda x: x.clamp(min=0)),
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        ("gelu_new", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("swish", lambda x: x / (1 + torch.exp(-x))),
        ("tanh", lambda x: 1 - 2 / (torch.exp(2 * x) + 1)),
    ],
)
def test_activations_are_those_of_their_names(name: str, function: Any) -> None:
    model = by_hand(Pfeiffer(1, name), down=[[1.0, 0.0], [0.0, 1.0]], up=[[1.0, 0.0], [0.0, 1.0]])
    x = torch.randn(20, 2)
    assert_close(model(x) - x, function(x), scale=4.0)


def test_the_page_names_every_method_with_a_place_of_its_own() -> None:
    page = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| `")]
    told = {name: (re.findall(r"[\w-]+", where), re.findall(r"[\w-]+", what))
            for names, where, what in rows for name in re.findall(r"[\w+-]+", names)}  # fmt: skip
    own = {name: cls for name, cls in methods().items() if (cls.targets, cls.train) != (Method.targets, Method.train)}
    assert len(own) >= 6
    for name, cls in own.items():
        chosen = AdapterSpec(cls(), Targets(cls.targets), cls.train)
        assert told[name] == (list(chosen.targets.include), list(chosen.train))


def test_the_shared_part_is_no_method_by_itself() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Bottleneck()  # type: ignore[abstract]
