"""What every initialisation keeps, on every layer kind it fits, and what each of them refuses."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import Override, attach, gather, state
from lorakit.core.adapters import Adapter
from lorakit.core.init import by_group, leading
from lorakit.core.registry import inits
from lorakit.core.spec import AdapterSpec, Targets, method_from_json, method_to_json
from lorakit.errors import SpecError
from lorakit.inits.eva import Eva
from lorakit.inits.gaussian import Gaussian
from lorakit.inits.kaiming import Kaiming
from lorakit.inits.lora_ga import LoRAGA
from lorakit.inits.orthogonal import Orthogonal
from lorakit.inits.pissa import Pissa
from lorakit.inject.attach import adapters_named
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA
from tests.inits.samples import INITS, PAIRS, quantise, square, started
from tests.law.cases import KINDS, Net, dense, inputs, jitter, weight_of
from tests.tolerances import assert_close

EXACT = [(kind, name) for kind, name in PAIRS if name not in ("loftq", "orthogonal")]
"""Those whose first forward is the base's to the bit: a factor is 0, or the start is taken off as a difference of 0."""

pairs = pytest.mark.parametrize(("kind", "name"), PAIRS)


def test_the_table_covers_the_registry() -> None:
    assert {init.name for init in INITS.values()} == set(inits())


@pytest.mark.parametrize(("kind", "name"), EXACT)
def test_the_first_forward_is_the_base_s_to_the_bit(kind: str, name: str) -> None:
    model, _, x, before = started(kind, name)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("kind", "name"), [pair for pair in PAIRS if pair[1] == "orthogonal"])
def test_two_factors_that_cancel_leave_the_base_to_rounding(kind: str, name: str) -> None:
    # dW is a sum of r products that cancel, so its error is the rounding of the largest of these sums of magnitudes
    model, adapter, x, before = started(kind, name)
    down, up = (by_group(adapter.site, adapter.get_parameter(p).detach()) for p in ("down", "up"))
    size = float(2 * (up.abs() @ down.abs()).max())  # s = 8 / 4, or less
    assert size > 0.01, "the claim would be trivial"
    delta = adapter.delta(weight_of(model))
    assert_close(delta, torch.zeros_like(delta), scale=size)
    assert_close(model(x), before)


@pairs
def test_once_moved_the_branch_equals_the_delta(kind: str, name: str) -> None:
    model, adapter, x, _ = started(kind, name)
    jitter(adapter)
    assert_close(model(x), dense(model, x, weight_of(model) + adapter.delta(weight_of(model))))


@pairs
def test_the_first_backward_reaches_a_factor(kind: str, name: str) -> None:
    model, adapter, x, _ = started(kind, name)
    model(x).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 1e-3 for p in adapter.parameters())


@pairs
def test_a_state_needs_no_evidence(kind: str, name: str) -> None:
    model, adapter, x, _ = started(kind, name)
    jitter(adapter)
    kept, y = state(model), model(x)
    attach(model, kept, "again")
    model.layer.adapters.weights.pop("default")  # type: ignore[union-attr, operator]
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("name", INITS)
def test_the_start_is_the_seed_s(name: str) -> None:
    model, x = Net(KINDS["linear"].layer()), inputs("linear")
    spec = AdapterSpec(LoRA(4, 8.0, init_=INITS[name]), Targets("layer"))
    evidence, found = gather(model, spec, [x], loss=square), []
    if name == "loftq":
        quantise(model)
    for state_of_the_world in (1, 2):
        torch.manual_seed(state_of_the_world)  # the global generator plays no part
        other = copy.deepcopy(model)
        attach(other, spec, evidence=evidence)
        found.append(adapters_named(other, "default")[0].get_parameter("down"))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["pissa", "olora", "lora-ga"])
def test_a_kept_start_is_frozen_and_the_update_is_what_was_learned_since(name: str) -> None:
    model, adapter, _, _ = started("linear", name)
    jitter(adapter)
    t = {key: value.detach() for key, value in adapter.tensors().items()}
    assert {key for key, p in adapter.named_parameters() if p.requires_grad} == {"down", "up"}
    learned = 2.0 * (t["up"] @ t["down"] - t["up_start"] @ t["down_start"])
    assert_close(adapter.delta(weight_of(model)), learned, scale=float((t["up"] @ t["down"]).abs().max()))


def test_an_update_with_its_start_taken_off_by_hand() -> None:
    # W = 3, s = 2, A0 = B0 = sqrt(3 / 2); learned A = 2, B = 5: dW = 2 (5 * 2 - 3 / 2) = 17
    model = Net(nn.Linear(1, 1, bias=False))
    nn.init.constant_(model.layer.weight, 3.0)  # type: ignore[arg-type]
    attach(model, AdapterSpec(LoRA(1, 2.0, init_=Pissa()), Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    assert_close(adapter.tensors()["up_start"].abs(), torch.tensor([[1.5**0.5]]))
    nn.init.constant_(adapter.get_parameter("down"), 2.0)
    nn.init.constant_(adapter.get_parameter("up"), 5.0)
    assert_close(model(torch.ones(1)), torch.tensor([20.0]))


def test_a_16_bit_base_still_starts_at_itself() -> None:
    model, x = Net(nn.Linear(12, 8)).bfloat16(), torch.randn(3, 12).bfloat16()
    before = model(x)
    attach(model, AdapterSpec(LoRA(4, init_=Pissa()), Targets("layer")))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["pissa", "olora", "lora-ga"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_was_learned_since_the_start_is_not_rounded_away_on_a_16_bit_base(name: str, dora: bool) -> None:
    model, x = Net(nn.Linear(64, 48, bias=False)), torch.randn(16, 64)
    method: Any = LoRA(4, 8.0, init_=INITS[name])
    spec = AdapterSpec(DoRA(method) if dora else method, Targets("layer"))
    evidence = gather(model, spec, [x], loss=square)
    model, x = model.bfloat16(), x.bfloat16()
    before = model(x)
    attach(model, spec, evidence=evidence)
    adapter = adapters_named(model, "default")[0]
    with torch.no_grad():
        for p in (adapter.get_parameter("down"), adapter.get_parameter("up")):
            p.add_(1e-4 * torch.randn_like(p))
        if dora:
            adapter.get_parameter("magnitude").copy_(
                torch.linalg.vector_norm(weight_of(model).float() + pair(adapter), dim=1)
            )
        learned = x.float() @ adapter.delta(weight_of(model)).T
        found = adapter(model.layer, x, before).float()
    assert float((found - learned).norm() / learned.norm()) < 1e-2


def pair(adapter: Adapter) -> Tensor:
    """Return what a kept start's pair has learned since, scaled."""
    t = adapter.tensors()
    return 2.0 * (t["up"] @ t["down"] - t["up_start"] @ t["down_start"]).detach()


def test_dora_of_pissa_starts_at_the_base_too() -> None:
    model, x = Net(nn.Linear(12, 8)), torch.randn(3, 12)
    before = model(x)
    attach(model, AdapterSpec(DoRA(LoRA(4, init_=Pissa())), Targets("layer")))
    assert torch.equal(model(x), before)


def test_dora_of_eva_is_measured_as_eva_is() -> None:
    model, spec = Net(nn.Linear(12, 8)), AdapterSpec(DoRA(LoRA(4, init_=Eva())), Targets("layer"))
    attach(model, spec, evidence=gather(model, spec, [torch.randn(30, 12)]))
    down = adapters_named(model, "default")[0].get_parameter("down")
    assert_close(down @ down.T, torch.eye(4))


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
def test_files_hold_it_both_ways(init: Any) -> None:
    method = LoRA(8, init_=init)
    written = method_to_json(method)
    assert written["init"]["name"] == init.name
    assert method_from_json(written) == method


def test_it_is_named_alone_or_in_full() -> None:
    assert method_from_json({"name": "lora", "init": "pissa"}) == LoRA(init_=Pissa())
    full = {"name": "lora", "init": {"name": "pissa", "iterations": 16}}
    assert method_from_json(full) == LoRA(init_=Pissa(16))
    assert method_from_json({"name": "dora", "init": "olora"}) == DoRA(LoRA(init_=inits()["olora"]()))


def test_a_file_from_before_there_was_a_choice_starts_as_ever() -> None:
    assert method_from_json({"name": "lora", "rank": 4, "alpha": 8.0, "stabilised": False}) == LoRA(4, 8.0)


def test_an_override_may_start_elsewhere() -> None:
    spec = AdapterSpec(LoRA(2), Targets(["0", "1"]), overrides=[Override.of("1", init="pissa", rank=1)])
    assert spec == AdapterSpec(LoRA(2), Targets(["0", "1"]), overrides=[Override.of("1", init=Pissa(), rank=1)])
    assert AdapterSpec.from_json(spec.to_json()) == spec
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    attach(model, spec)
    assert [sorted(a.tensors()) for a in adapters_named(model, "default")] == [
        ["down", "up"],
        ["down", "down_start", "up", "up_start"],
    ]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("pisa", "unknown initialisation 'pisa'; did you mean 'pissa'"),
        ({"name": "pissa", "iteration": 16}, "init pissa has no field 'iteration'; did you mean 'iterations'"),
        ({"name": "eva", "tau": 2}, "init eva has no field 'tau'; its fields: rho"),
        ({"name": "eva", "rho": 0.5}, "rho must be a number from 1, not 0.5; 1 keeps every rank, 2 is usual"),
        ({"name": "olora", "rho": 2}, "init olora has no field 'rho'; its fields: none"),
        ({"iterations": 16}, "names none; write init: pissa, or init: {name: pissa, iterations: 16}"),
        ({"name": "pissa", "iterations": -1}, "iterations must be a whole number from 0, or none for an exact SVD"),
        ({"name": "lora-ga", "gamma": 0}, "gamma must be a positive number, not 0"),
        ({"name": "gaussian", "power": -1}, "power must be a number from 0, not -1; std is 1/sqrt"),
    ],
)
def test_what_is_none_is_refused(given: Any, told: str) -> None:
    with pytest.raises(SpecError, match=re.escape(told)):
        method_from_json({"name": "lora", "init": given})


def test_a_start_of_another_type_is_refused_where_no_type_checker_runs() -> None:
    method = LoRA()
    object.__setattr__(method, "init_", "pissa")
    with pytest.raises(SpecError, match=r"init must be an initialisation such as .* Pissa\(\), not 'pissa'"):
        method.__post_init__()


@pytest.mark.parametrize(
    ("layer", "rank", "init", "told"),
    [
        (lambda: nn.Embedding(12, 8), 4, Eva(), "layer: init eva does not fit a layer of kind embedding; it fits"),
        (lambda: nn.Linear(12, 8), 5, LoRAGA(), r"layer: init lora-ga takes 2 \* 5 singular .* has 8; use rank 4 or"),
        (lambda: nn.Linear(12, 8), 3, Orthogonal(), "layer: init orthogonal halves the rank, and 3 is odd; use rank 4"),
        (
            lambda: nn.Conv2d(12, 8, 3, groups=2),
            2,
            Orthogonal(),
            "halves the rank in each of 2 groups, and 1 is odd; use rank 4",
        ),
    ],
)
def test_a_layer_it_does_not_fit_is_refused(layer: Callable[[], nn.Module], rank: int, init: Any, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        attach(Net(layer()), AdapterSpec(LoRA(rank, init_=init), Targets("layer")))


@pytest.mark.parametrize("name", ["eva", "lora-ga", "loftq"])
def test_without_its_evidence_nothing_is_attached(name: str) -> None:
    model = Net(nn.Linear(12, 8))
    with pytest.raises(SpecError, match=rf"layer: init {name} starts from .*; call gather\(model, spec, batches\)"):
        attach(model, AdapterSpec(LoRA(4, init_=INITS[name]), Targets("layer")))
    assert type(model.layer) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_evidence_of_another_shape_is_refused() -> None:
    model, spec = Net(nn.Linear(12, 8)), AdapterSpec(LoRA(4, init_=Eva()), Targets("layer"))
    with pytest.raises(SpecError, match=r"evidence of shape \(8, 8\), expected \(12, 12\); gather it with this model"):
        attach(model, spec, evidence={"layer": torch.eye(8)})


def test_on_the_meta_device_nothing_needs_to_be_measured() -> None:
    with torch.device("meta"):
        model = Net(nn.Linear(12, 8))
    attach(model, AdapterSpec(LoRA(4, init_=LoRAGA()), Targets("layer")))
    assert adapters_named(model, "default")[0].get_buffer("up_start").is_meta


def test_gaussian_s_deviation_is_1_over_the_root_of_r_or_over_r() -> None:
    for power, std in ((0.5, 0.25), (1.0, 0.0625)):  # r = 16
        model = Net(nn.Linear(900, 900))
        attach(model, AdapterSpec(LoRA(16, init_=Gaussian(power)), Targets("layer")))
        adapter = adapters_named(model, "default")[0]
        assert abs(float(adapter.get_parameter("down").detach().std()) / std - 1) < 0.02
        assert not adapter.get_parameter("up").any()


@pytest.mark.parametrize("init", [Kaiming(), Gaussian()])
def test_an_embedding_starts_the_other_way_round(init: Any) -> None:
    model = Net(nn.Embedding(11, 6))
    attach(model, AdapterSpec(LoRA(4, init_=init), Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    assert not adapter.get_parameter("down").any()
    assert adapter.get_parameter("up").all()


def test_a_randomised_svd_is_the_exact_one_where_the_spectrum_falls() -> None:
    u, v = torch.linalg.qr(torch.randn(2, 40, 30)).Q, torch.linalg.qr(torch.randn(2, 50, 30)).Q
    matrix = u @ torch.diag(2.0 ** -torch.arange(30)) @ v.mT
    exact, sketched = leading(matrix, 5), leading(matrix, 5, 4, torch.Generator().manual_seed(3))
    for a, b in zip(exact, sketched, strict=True):
        assert a.shape == b.shape
    assert_close(sketched[1], exact[1])
    first, second = ((u * s.unsqueeze(1)) @ vh for u, s, vh in (exact, sketched))
    assert_close(second, first)


def test_the_square_loss_has_a_gradient_of_full_rank() -> None:
    model, spec = Net(nn.Linear(12, 8)), AdapterSpec(LoRA(4, init_=LoRAGA()), Targets("layer"))
    gradient = gather(model, spec, [torch.randn(40, 12)], loss=square)["layer"]
    assert int(torch.linalg.matrix_rank(gradient)) == 8
