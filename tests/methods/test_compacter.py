"""Compacter: sums of Kronecker products against torch.kron, rules that all layers share, and what does not divide."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5Model

from lorakit.core.method import Method
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.methods.compacter import Compacter, product
from lorakit.methods.compacter_plus_plus import CompacterPlusPlus
from tests.law.cases import Net, jitter
from tests.tolerances import assert_close

IDS = torch.arange(14).reshape(2, 7)
T5_BASE = Site("layer", 768, 768)


def llama() -> LlamaForCausalLM:
    """Return a tiny Llama."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=50
    )
    return LlamaForCausalLM(config).eval()


def kron(rules: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `sum_i kron(R_i, S_i T_i)`."""
    return torch.stack([torch.kron(r, s @ t) for r, s, t in zip(rules, left, right, strict=True)]).sum(0)


@pytest.mark.parametrize(("n", "k", "d", "rho"), [(4, 768, 24, 1), (4, 24, 768, 1), (3, 6, 9, 2), (1, 5, 7, 3)])
def test_a_product_is_the_sum_of_krons(n: int, k: int, d: int, rho: int) -> None:
    rules, left, right = torch.randn(n, n, n), torch.randn(n, k // n, rho), torch.randn(n, rho, d // n)
    x = torch.randn(2, 5, k)
    assert_close(product(x, rules, left, right), x @ kron(rules, left, right))


def test_one_product_by_hand() -> None:
    # R_1 = [[1, 0], [0, 1]], R_2 = [[0, 1], [0, 0]]; S_1 T_1 = 2 * 1, S_2 T_2 = 1 * 3
    # W = 2 R_1 + 3 R_2 = [[2, 3], [0, 2]]; (1, 10) W = (2, 3 + 20) = (2, 23), and the transposed mistake (32, 20)
    rules = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]])
    left, right = torch.tensor([[[2.0]], [[1.0]]]), torch.tensor([[[1.0]], [[3.0]]])
    assert product(torch.tensor([1.0, 10.0]), rules, left, right).tolist() == [2.0, 23.0]


def test_one_rule_is_a_plain_low_rank_layer() -> None:
    # n = 1, R = [[1]], rho = 3: W = S T
    left, right, x = torch.randn(1, 8, 3), torch.randn(1, 3, 6), torch.randn(4, 8)
    assert_close(product(x, torch.ones(1, 1, 1), left, right), x @ left[0] @ right[0])


def test_the_rank_is_at_most_n_squared_rho() -> None:
    weight = kron(torch.randn(4, 4, 4), torch.randn(4, 192, 1), torch.randn(4, 1, 192))
    assert int(torch.linalg.matrix_rank(weight)) == 16


def test_the_published_count() -> None:
    # T5-base, n 4, reduction 32: a projection of 768 x 24 has 792 values instead of 18,432, and 64 are shared
    declared = Compacter().tensors(T5_BASE)
    assert declared["down_left"].numel + declared["down_right"].numel == 792
    assert declared["up_left"].numel + declared["up_right"].numel == 792
    assert (declared["down_bias"].numel, declared["up_bias"].numel) == (24, 768)
    assert declared["rules"].numel == 64
    assert [name for name, decl in declared.items() if decl.shared] == ["rules"]


@pytest.mark.parametrize(("method", "places"), [(Compacter(), 5), (CompacterPlusPlus(), 2)])
def test_t5_base_s_count(method: Method, places: int) -> None:
    # 12 blocks: 2 and 3 sublayers a block with all, 1 and 1 with the MLP alone; 2 * 792 + 24 + 768 each, 64 once
    with torch.device("meta"):
        model = T5Model(T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12))
    handle = attach(model, AdapterSpec(method, Targets(method.targets)))
    assert len(handle.paths) == 12 * places
    assert sum(p.numel() for p in handle.parameters()) == 12 * places * 2376 + 64


def test_the_shared_rules_get_gradient_from_every_layer() -> None:
    model = llama()
    handle = attach(model, AdapterSpec(Compacter(4, terms=2), Targets(Compacter.targets)))
    adapters = adapters_named(model, "default")
    assert len(adapters) == 6
    assert len({id(adapter.get_parameter("rules")) for adapter in adapters}) == 1
    assert sum(p.shape == (2, 2, 2) for p in handle.parameters()) == 1
    for adapter in adapters:
        jitter(adapter)
    whole = torch.autograd.grad(model(IDS, labels=IDS).loss, adapters[0].get_parameter("rules"))[0]
    parts = []
    for i in range(6):  # the same values, but each layer's rules a tensor of its own: what each contributes
        twin = copy.deepcopy(model)
        apart = adapters_named(twin, "default")
        for adapter in apart:
            adapter.rules = nn.Parameter(adapter.get_parameter("rules").detach().clone())
        parts.append(torch.autograd.grad(twin(IDS, labels=IDS).loss, apart[i].get_parameter("rules"))[0])
    assert all(part.abs().max() > 1e-6 for part in parts)
    assert_close(whole, torch.stack(parts).sum(0), scale=float(torch.stack(parts).abs().sum(0).max()))


def test_a_state_keeps_the_rules_once() -> None:
    model = llama()
    attach(model, AdapterSpec(CompacterPlusPlus(4, terms=2), Targets("mlp-out")))
    kept = state(model)
    assert kept.parameters == 3 * (3 * (32 + 8)) + 8
    again = llama()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    attach(again, kept)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_layers_with_another_number_of_terms_share_other_rules() -> None:
    model = llama()
    attach(model, AdapterSpec(Compacter(4, terms=2), Targets("mlp-out"), overrides=(Override.of(layers="2", terms=4),)))
    rules = [adapter.get_parameter("rules") for adapter in adapters_named(model, "default")]
    assert [tuple(r.shape) for r in rules] == [(2, 2, 2), (2, 2, 2), (4, 4, 4)]
    assert rules[0] is rules[1]


@pytest.mark.parametrize("method", [Compacter(4), CompacterPlusPlus(4)])
def test_a_whole_model_starts_as_the_base_to_the_bit(method: Method) -> None:
    model = llama()
    before = model(IDS).logits
    attach(model, AdapterSpec(method, Targets(method.targets)))
    assert torch.equal(model(IDS).logits, before)


def test_it_leaves_its_start_at_once() -> None:
    # the first gradient must be large enough for Adam's eps of 1e-8, which rules of deviation 1e-4 would not give it
    model = Net(nn.Linear(768, 768))
    attach(model, AdapterSpec(Compacter(), Targets("layer")))
    adapter, direction = adapters_named(model, "default")[0], torch.randn(64, 768) / 64
    (model(torch.randn(64, 768)) * direction).sum().backward()
    first = adapter.get_parameter("up_right").grad
    assert first is not None
    assert first.abs().median() > 1e-4
    assert not any(adapter.get_parameter(n).grad.any() for n in ("down_left", "rules"))  # type: ignore[union-attr]


def test_its_start_is_the_stated_distribution() -> None:
    model = BertModel(BertConfig(num_hidden_layers=1), add_pooling_layer=False)
    attach(model, AdapterSpec(Compacter(terms=24), Targets("attention-out")))
    p = adapters_named(model, "default")[0].tensors()
    assert abs(p["rules"].std() * 24 - 1) < 0.03  # 13,824 values
    bound = (2 * 6 / (768 / 24 + 1)) ** 0.5  # Glorot uniform of (32, 1) with gain sqrt 2
    assert 0.98 * bound < p["down_left"].abs().max() <= bound
    assert not any(p[name].any() for name in ("up_right", "down_bias", "up_bias"))


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (Compacter(32, terms=5), "terms 5 does not divide both the 768 features and the bottleneck of 24; these do: "
                                 "1, 2, 3, 4, 6, 8, 12, 24; or change the reduction"),
        (Compacter(768 / 23), "terms 4 does not divide both the 768 features and the bottleneck of 23; these do: 1;"),
    ],
)  # fmt: skip
def test_terms_that_do_not_divide_are_refused_with_those_that_do(method: Method, told: str) -> None:
    with pytest.raises(SpecError, match=f"layer: {told}"):
        attach(Net(nn.Linear(768, 768)), AdapterSpec(method, Targets("layer")))


@pytest.mark.parametrize(("field", "letter"), [("terms", "the paper's n"), ("rank", "rho")])
def test_counts_that_cannot_be_are_refused(field: str, letter: str) -> None:
    bad: Any
    for bad in (0, -4, True):
        with pytest.raises(
            SpecError, match=rf"{field} \(.*{letter}.*\) must be a whole number of at least 1, not {bad}"
        ):
            Compacter(**{field: bad})
