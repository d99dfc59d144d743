"""The mixture of experts: the weights belong to tokens, its limits are LoRA and the mean, and its penalty acts."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.core.adapters import Adapter
from lorakit.core.method import Penalised
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import AliveError, MergeError, SpecError
from lorakit.inject.alive import alive
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.merge import merge
from lorakit.inject.penalty import penalty as total_penalty
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture
from tests.law.cases import Net, jitter
from tests.tolerances import assert_close

E, R = 4, 2


def mixed(method: Mixture, rows: str = "") -> tuple[Net, Adapter]:
    """Return a linear layer 12 -> 8 with a mixture moved off its start, and the adapter."""
    model = Net(nn.Linear(12, 8))
    attach(model, AdapterSpec(method, Targets(f"layer{rows}")))
    adapter = adapters_named(model, "default")[0]
    jitter(adapter)
    return model, adapter


def base(model: Net, x: Tensor) -> Tensor:
    """Return what the layer gives without its mixture."""
    return nn.functional.linear(x, model.layer.get_parameter("weight"), model.layer.get_parameter("bias"))


def expert(adapter: Adapter, x: Tensor, e: int) -> Tensor:
    """Return s B_e A_e x."""
    method: Any = adapter.method
    r = slice(e * method.rank, (e + 1) * method.rank)
    down, up = adapter.get_parameter("down")[r], adapter.get_parameter("up")[:, r]
    return method.alpha / method.rank * x @ down.T @ up.T


def penalty(model: nn.Module) -> Tensor:
    """Return the sum of the penalties of the last forward."""
    terms = []
    for adapter in adapters_named(model, "default"):
        assert isinstance(adapter.method, Penalised)
        terms.append(adapter.method.penalty(adapter.tensors(), adapter.notes))
    return torch.stack(terms).sum()


def test_one_case_by_hand() -> None:
    # two experts of rank 1 on 2 -> 1, s = 3 / 1: A_1 = (1, 0), B_1 = 2, A_2 = (0, 1), B_2 = 5;
    # the router reads ln 3 from the first input alone: x = (1, 1) has g = (3/4, 1/4): 3 (3/4 * 2 + 1/4 * 5) = 8.25
    model = Net(nn.Linear(2, 1, bias=False))
    attach(model, AdapterSpec(Mixture(experts=2, rank=1, alpha=3.0), Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    with torch.no_grad():
        model.layer.get_parameter("weight").zero_()
        adapter.get_parameter("down").copy_(torch.eye(2))
        adapter.get_parameter("up").copy_(torch.tensor([[2.0, 5.0]]))
        adapter.get_parameter("router").copy_(torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(model(torch.ones(1, 2)), torch.tensor([[8.25]]))
    # entropy of (3/4, 1/4): 0.5623 nats
    assert float(adapter.notes["entropy"]) == pytest.approx(0.562335, abs=1e-6)


@pytest.mark.parametrize("top", [None, 2, 3])
def test_a_router_that_is_sure_gives_that_expert_alone(top: int | None) -> None:
    model, adapter = mixed(Mixture(E, R, 3.0, top))
    x = torch.randn(3, 5, 12)
    x[..., 0] = 1.0
    with torch.no_grad():
        adapter.get_parameter("router").zero_()
        adapter.get_parameter("router")[2, 0] = 1e4
    assert_close(model(x), base(model, x) + expert(adapter, x, 2))


def test_a_router_that_cannot_tell_gives_the_mean() -> None:
    model, adapter = mixed(Mixture(E, R, 3.0))
    with torch.no_grad():
        adapter.get_parameter("router").zero_()
    x = torch.randn(3, 5, 12)
    assert_close(model(x), base(model, x) + torch.stack([expert(adapter, x, e) for e in range(E)]).mean(0))
    assert float(adapter.notes["entropy"]) == pytest.approx(math.log(E))


@pytest.mark.parametrize("top", [None, 2, 3])
@pytest.mark.parametrize("batch", [E, 3, 1])
def test_weights_belong_to_tokens_also_where_the_batch_is_as_long_as_the_experts_are_many(
    batch: int, top: int | None
) -> None:
    model, adapter = mixed(Mixture(E, R, 3.0, top))
    x = torch.randn(batch, E, 12)
    y, router = model(x), adapter.get_parameter("router")
    for row in range(batch):
        for token in range(E):
            g = (router @ x[row, token]).softmax(0)
            chosen = g.argsort(descending=True)[:top].tolist()
            total = g[chosen].sum()
            wanted = base(model, x[row, token])
            for e in chosen:
                wanted = wanted + g[e] / total * expert(adapter, x[row, token], e)
            assert_close(y[row, token], wanted, scale=float(y.detach().abs().max()))


def test_the_loop_over_the_batch_axis_would_be_caught() -> None:
    # the mistake the test above is for: it runs where batch == experts, and differs
    model, adapter = mixed(Mixture(E, R, 3.0))
    x = torch.randn(E, E, 12)
    g = (x @ adapter.get_parameter("router").T).softmax(-1)
    zipped = base(model, x) + sum(weights[..., None] * expert(adapter, x, e) for e, weights in enumerate(g))
    assert zipped.shape == model(x).shape
    assert not torch.allclose(zipped, model(x), atol=1e-2)


def test_dropout_thins_what_experts_read_and_not_what_the_router_does() -> None:
    model = Net(nn.Linear(8, 4))
    attach(model, AdapterSpec(Mixture(experts=3, rank=2), Targets("layer"), dropout=0.5))
    (adapter,) = adapters_named(model, "default")
    jitter(adapter)
    x, shares = torch.randn(5, 8), []
    y = model.eval()(x)
    shares.append(adapter.notes["likelihood"])
    assert not torch.equal(model.train()(x), y)
    shares.append(adapter.notes["likelihood"])
    assert torch.equal(*shares)


def test_all_experts_on_top_are_the_soft_mixture() -> None:
    model, adapter = mixed(Mixture(E, R, 3.0, top=E))
    x = torch.randn(3, 5, 12)
    y = model(x)
    adapter.method = Mixture(E, R, 3.0)
    assert_close(y, model(x))


def test_equal_experts_are_one_lora() -> None:
    model, adapter = mixed(Mixture(2, 4, 8.0))
    with torch.no_grad():
        adapter.get_parameter("down")[4:] = adapter.get_parameter("down")[:4]
        adapter.get_parameter("up")[:, 4:] = adapter.get_parameter("up")[:, :4]
    twin = Net(nn.Linear(12, 8))
    twin.layer.load_state_dict({k: v for k, v in model.layer.state_dict().items() if "adapters" not in k})
    attach(twin, AdapterSpec(LoRA(4, 8.0), Targets("layer")))
    other = adapters_named(twin, "default")[0]
    with torch.no_grad():
        other.get_parameter("down").copy_(adapter.get_parameter("down")[:4])
        other.get_parameter("up").copy_(adapter.get_parameter("up")[:, :4])
    x = torch.randn(3, 5, 12)
    assert_close(model(x), twin(x))


def test_a_slice_of_a_fused_layer_is_mixed_alone() -> None:
    model, adapter = mixed(Mixture(E, R, 3.0), rows="[2:6]")
    x = torch.randn(3, 5, 12)
    change = model(x) - base(model, x)
    g = (x @ adapter.get_parameter("router").T).softmax(-1)
    wanted = sum(g[..., e : e + 1] * expert(adapter, x, e) for e in range(E))
    assert isinstance(wanted, Tensor)
    assert_close(change[..., 2:6], wanted, scale=float(model(x).detach().abs().max()))
    assert not change[..., [0, 1, 6, 7]].any()


@pytest.mark.parametrize("top", [2, 3])
def test_routing_and_penalty_equal_mixtral_s(top: int) -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func

    model, adapter = mixed(Mixture(E, R, 3.0, top, balance=0.5))
    config = MixtralConfig(hidden_size=12, num_local_experts=E, num_experts_per_tok=top)
    theirs = MixtralTopKRouter(config)
    with torch.no_grad():
        theirs.weight.copy_(adapter.get_parameter("router"))
    x = torch.randn(3, 5, 12)
    y = model(x)
    logits, weights, which = theirs(x)
    wanted = base(model, x).flatten(0, 1).clone()
    for token in range(15):
        for weight, e in zip(weights[token], which[token].tolist(), strict=True):
            wanted[token] += weight * expert(adapter, x.flatten(0, 1)[token], e)
    assert_close(y.flatten(0, 1), wanted)
    # they add the shares up over a token's choices, so theirs is `top` at perfect balance where the paper's is 1
    assert_close(penalty(model), 0.5 * load_balancing_loss_func((logits,), E, top) / top)


@pytest.mark.parametrize("top", [2, 3])
def test_the_switch_penalty_is_its_weight_at_perfect_balance_and_experts_fold_at_collapse(top: int) -> None:
    model, adapter = mixed(Mixture(E, R, 3.0, top, balance=0.01))
    with torch.no_grad():
        adapter.get_parameter("router").copy_(9.0 * torch.eye(E, 12))
    turns = [torch.eye(E, 12)[[(e + k) % E for e in range(E)]] for k in range(top)]
    model(torch.stack(turns).sum(0))  # token e wants expert e and those after it
    assert_close(adapter.notes["share"], torch.full((E,), 1 / E))
    assert penalty(model).item() == pytest.approx(0.01, rel=1e-5)
    with torch.no_grad():
        adapter.get_parameter("router").zero_()
        adapter.get_parameter("router")[0] = 1e3  # all the likelihood, and of every choice its part
    model(torch.ones(5, 12))
    assert penalty(model).item() == pytest.approx(0.01 * E / top, rel=1e-5)


def test_the_soft_penalty_is_the_squared_coefficient_of_variation_by_hand() -> None:
    # experts 2, mean likelihood (3/4, 1/4): variance (unbiased) 2 (1/4)^2 = 1/8, mean 1/2: (1/8) / (1/4) = 0.5
    model, adapter = mixed(Mixture(2, R, 3.0, balance=0.1))
    with torch.no_grad():
        adapter.get_parameter("router").zero_()
        adapter.get_parameter("router")[0, 0] = math.log(3.0)
    model(torch.ones(6, 12))
    assert penalty(model).item() == pytest.approx(0.05)
    with torch.no_grad():
        adapter.get_parameter("router").zero_()
    model(torch.ones(6, 12))
    assert penalty(model).item() == 0.0


@pytest.mark.parametrize("top", [None, 2])
def test_training_on_the_penalty_balances_the_router(top: int | None) -> None:
    model, adapter = mixed(Mixture(E, R, 3.0, top, balance=1.0))
    x, router = torch.randn(64, 12) + 1.0, adapter.get_parameter("router")
    with torch.no_grad():
        router.mul_(3.0)
    optimizer, found = torch.optim.Adam([router], 0.05), []
    for _ in range(60):
        model(x)
        loss = penalty(model)
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    even = 0.0 if top is None else 1.0
    assert found[0] > even + 0.05
    assert abs(found[-1] - even) < 0.5 * (found[0] - even)


def test_without_balance_there_is_no_penalty_and_no_graph_is_kept() -> None:
    model, adapter = mixed(Mixture(E, R, 3.0, top=2))
    model(torch.randn(3, 12))
    assert penalty(model).item() == 0.0
    assert not any(note.requires_grad for note in adapter.notes.values())
    assert all(note.numel() <= E for note in adapter.notes.values()), "means, not a row a token"


def two_layers(method: Mixture) -> nn.Sequential:
    """Return a model of two mixed layers, moved off their start."""
    model = nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 6))
    attach(model, AdapterSpec(method, Targets(("0", "2"))))
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    return model


def gradients(model: nn.Module, forward: Any, x: Tensor) -> list[Tensor]:
    """Return the gradients of a loss with the penalty in it."""
    model.zero_grad()
    loss = forward(x).square().mean() + penalty(model)
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("top", [None, 2])
def test_checkpointing_and_compiling_keep_the_gradients_of_the_penalty(top: int | None) -> None:
    model, x = two_layers(Mixture(E, R, 3.0, top, balance=0.5)), torch.randn(4, 5, 12)
    wanted = gradients(model, model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for forward in (compiled, compiled, lambda x: checkpoint(model, x, use_reentrant=False)):
        for grad, other in zip(gradients(model, forward, x), wanted, strict=True):
            assert_close(grad, other)


def test_a_layer_that_a_step_skips_adds_nothing_of_the_step_before() -> None:
    layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    attach(layers, AdapterSpec(Mixture(experts=3, rank=2, top=2, balance=0.1), Targets(["0", "1"])))
    terms = []
    for chosen in (0, 1, 0):  # as LayerDrop does, and a base's own experts
        term = total_penalty(layers) if layers[chosen](torch.randn(5, 8)) is not None else None
        assert term is not None
        term.backward()  # through the step before, it would fail
        terms.append(float(term.detach()))
    assert all(0.05 < term < 0.15 for term in terms)  # one of two layers: the mean of about balance and 0
    after = total_penalty(layers)
    assert after is not None
    assert not after.any()


def test_reentrant_checkpointing_which_would_drop_the_penalty_is_refused() -> None:
    model, x = two_layers(Mixture(E, R, 3.0, balance=0.5)), torch.randn(4, 5, 12, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=True)
    with pytest.raises(AliveError, match="kept no gradient for the mixture's router.*use use_reentrant=False"):
        penalty(model)
    y.sum().backward()
    unweighed = two_layers(Mixture(E, R, 3.0))
    checkpoint(unweighed, x, use_reentrant=True)
    assert penalty(unweighed).item() == 0.0, "without balance nothing is lost"


def test_a_copy_carries_no_notes_and_evaluation_no_graph() -> None:
    model, x = two_layers(Mixture(E, R, 3.0, balance=0.5)), torch.randn(4, 12)
    model(x)
    twin = copy.deepcopy(model)
    assert not adapters_named(twin, "default")[0].notes
    assert penalty(twin).item() == 0.0
    assert adapters_named(model, "default")[0].notes
    with torch.no_grad():
        model(x)
        assert not penalty(model).requires_grad


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_keeps_the_routing_and_leaves_the_notes_alone(strict: bool) -> None:
    model, x = two_layers(Mixture(E, R, 3.0, top=2)).eval(), torch.randn(4, 12)
    y = model(x)
    before = dict(adapters_named(model, "default")[0].notes)
    program = torch.export.export(model, (x,), strict=strict)
    assert_close(program.module()(torch.flip(x, [0])), torch.flip(y, [0]))
    assert adapters_named(model, "default")[0].notes == before


def test_a_layer_that_gets_no_token_adds_nothing_and_no_nan() -> None:
    for top in (None, 2):
        model, _ = mixed(Mixture(E, R, 3.0, top, balance=0.5))
        assert model(torch.randn(0, 12)).shape == (0, 8)
        assert penalty(model).isfinite()
        assert model(torch.randn(12)).shape == (8,)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_router_stays_in_fp32(autocast: bool) -> None:
    # likelihoods 1e-4 apart are one bf16 number; the first expert must still lose
    model, adapter = mixed(Mixture(3, R, 3.0, top=2))
    with torch.no_grad():
        adapter.get_parameter("router").fill_(1.0)
        adapter.get_parameter("router")[1:, 0] = 1.0004
    x = torch.ones(3, 12)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    else:
        model.layer.weight.data = model.layer.weight.data.bfloat16()  # type: ignore[union-attr]
        model.layer.bias.data = model.layer.bias.data.bfloat16()  # type: ignore[union-attr]
        assert model(x.bfloat16()).dtype == torch.bfloat16
    assert adapter.notes["share"].tolist() == [0.0, 0.5, 0.5]
    assert {note.dtype for note in adapter.notes.values()} == {torch.float32}


def test_every_tensor_is_reached_from_the_start() -> None:
    model = Net(nn.Linear(12, 8))
    attach(model, AdapterSpec(Mixture(E, R, top=2, balance=0.01), Targets("layer")))
    with alive(model):
        (model(torch.randn(3, 12)).sum() + penalty(model)).backward()
    assert adapters_named(model, "default")[0].get_parameter("router").grad is not None


def test_it_is_not_merged_and_says_why() -> None:
    model, _ = mixed(Mixture(E, R))
    with pytest.raises(MergeError, match="layer: mixture depends on the input, so no single weight equals it"):
        merge(model)


def test_768_counts() -> None:
    model = Net(nn.Linear(768, 768))
    handle = attach(model, AdapterSpec(Mixture(experts=8, rank=4), Targets("layer")))
    # 8 experts of 4 (768 + 768) = 6,144, and a router of 8 * 768
    assert sum(p.numel() for p in handle.parameters()) == 49_152 + 6_144


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"experts": 0}, "experts must be a whole number of at least 2, not 0"),
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"alpha": 0.0}, "alpha must be a positive number, not 0.0"),
        ({"top": 9}, "top must be 2 to 8, the number of experts, or left out, not 9"),
        ({"top": 1}, "top must be 2 to 8.* not 1; a single choice has weight 1 whatever the router says, so the loss"),
        ({"balance": -0.1}, "balance must be a number of at least 0, not -0.1"),
        ({"balance": math.inf}, "balance must be a number of at least 0, not inf"),
        ({"experts": 1}, "experts must be a whole number of at least 2, not 1; with one the router has no choice"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        Mixture(**fields)


def test_layers_it_does_not_fit_are_refused_with_the_reason() -> None:
    with pytest.raises(SpecError, match="layer: rank 9 exceeds min\\(out, in\\) = 8; lower the rank or exclude"):
        attach(Net(nn.Linear(12, 8)), AdapterSpec(Mixture(2, 9), Targets("layer")))
    with pytest.raises(SpecError, match="mixture does not fit a layer of kind embedding; it fits"):
        attach(Net(nn.Embedding(12, 8)), AdapterSpec(Mixture(2, 2), Targets("layer")))
