"""Hierarchical LoRA: who shares what, the sum of three LoRAs, and LoRA where the shared levels rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.adapters import Adapter
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.methods.hierarchical import Hierarchical
from lorakit.methods.lora import LoRA
from lorakit.persist.native import load_native, save_native
from tests.law.cases import Net, jitter
from tests.tolerances import assert_close

SMALL = Hierarchical(rank=3, alpha=6.0, group_rank=2, global_rank=1, group_size=2)


class Block(nn.Module):
    """One layer of a stack, with two weights of one shape and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.up = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        """Return something every weight acts on."""
        y: Tensor = self.q(x).tanh() + self.v(x) + self.up(x)[..., :6]
        return y


class Stack(nn.Module):
    """Five layers and one beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList(Block() for _ in range(5)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stack's output."""
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.last(x)
        return y


def adapted(method: Any = SMALL, moved: bool = True) -> tuple[Stack, dict[str, Adapter]]:
    """Return an adapted stack and its adapters by path, off their start where `moved`."""
    model = Stack()
    attach(model, AdapterSpec(method, Targets("re:.*")))
    found = adapters_named(model, "default")
    for adapter in found if moved else []:
        jitter(adapter)
    return model, {adapter.site.path: adapter for adapter in found}


def test_one_case_by_hand() -> None:
    # three levels of rank 1 on 1 x 1 weights, alpha 2, so s = 2 each: 2 (2 * 3 + 5 * 7 + 11 * 13) = 2 * 184 = 368
    method = Hierarchical(rank=1, alpha=2.0, group_rank=1, global_rank=1)
    values = {"leaf": (2.0, 3.0), "group": (5.0, 7.0), "global": (11.0, 13.0)}
    p = {
        f"{k}_{n}": torch.tensor([[v]]) for k, pair in values.items() for n, v in zip(("up", "down"), pair, strict=True)
    }
    down, up = method.factors(p)
    assert (up @ down).tolist() == [[368.0]]


def test_weights_share_within_one_shape_and_one_group_of_layers() -> None:
    _, by_path = adapted(moved=False)

    def same(a: str, b: str, name: str) -> bool:
        return by_path[a].get_parameter(name) is by_path[b].get_parameter(name)

    for name in ("up", "down"):
        assert same("layers.0.q", "layers.4.v", f"global_{name}"), "the whole model"
        assert same("layers.0.q", "last", f"global_{name}"), "and what stands beside the stack"
        assert same("layers.0.q", "layers.1.v", f"group_{name}"), "layers 0 and 1"
        assert not same("layers.1.q", "layers.2.q", f"group_{name}"), "another group"
        assert not same("layers.0.q", "last", f"group_{name}"), "outside any layer"
        assert not same("layers.0.q", "layers.0.v", f"leaf_{name}")
        assert by_path["layers.0.q"].get_parameter(f"global_{name}").shape == ((6, 1) if name == "up" else (1, 6))
        assert not same("layers.0.q", "layers.0.up", f"global_{name}"), "another shape"


def test_dw_is_the_sum_of_three_loras_and_one_lora_of_the_ranks_sum() -> None:
    _, by_path = adapted()
    adapter = by_path["layers.3.up"]
    p = {name: t.detach() for name, t in adapter.tensors().items()}
    wanted = sum(
        6.0 / rank * p[f"{level}_up"] @ p[f"{level}_down"] for level, rank in (("leaf", 3), ("group", 2), ("global", 1))
    )
    delta = adapter.delta(torch.zeros(9, 6))
    assert_close(delta, wanted)  # type: ignore[arg-type]
    down, up = SMALL.factors(p)
    assert (down.shape, up.shape) == ((6, 6), (9, 6))
    assert_close(up @ down, delta)


def test_in_a_grouped_convolution_each_level_acts_as_its_lora_does() -> None:
    model = Net(nn.Conv2d(12, 8, 3, groups=2))
    attach(model, AdapterSpec(Hierarchical(rank=4, alpha=6.0, group_rank=2, global_rank=2), Targets("layer")))
    adapter, zero = adapters_named(model, "default")[0], torch.zeros(8, 6, 3, 3)
    jitter(adapter)
    p = {name: t.detach() for name, t in adapter.tensors().items()}
    wanted = sum(
        LoRA(rank, 6.0).delta({name: p[f"{level}_{name}"] for name in ("down", "up")}, zero)
        for level, rank in (("leaf", 4), ("group", 2), ("global", 2))
    )
    assert_close(adapter.delta(zero), wanted)  # type: ignore[arg-type]


def test_the_rank_is_at_most_the_ranks_sum() -> None:
    model = Net(nn.Linear(20, 18))
    attach(model, AdapterSpec(SMALL, Targets("layer")))
    adapter = adapters_named(model, "default")[0]
    jitter(adapter)
    assert int(torch.linalg.matrix_rank(adapter.delta(torch.zeros(18, 20)))) == 6


def test_a_shared_factor_s_gradient_is_the_sum_over_its_sharers() -> None:
    model, by_path = adapted()
    model, x = model.double(), torch.randn(4, 6).double()
    sharers = [adapter for path, adapter in by_path.items() if not path.endswith("up")]
    shared = sharers[0].get_parameter("global_up")
    model(x).square().sum().backward()
    assert shared.grad is not None
    wanted = shared.grad.clone()
    parts = []
    for adapter in sharers:  # a copy of its own for each, in turn
        own = nn.Parameter(shared.detach().clone())
        adapter.global_up = own
        parts.append(torch.autograd.grad(model(x).square().sum(), own)[0])
        adapter.global_up = shared
    assert len(parts) == 11
    assert_close(sum(parts), wanted)  # type: ignore[arg-type]


def test_with_all_but_the_leaf_at_rest_it_is_lora_from_the_start_on() -> None:
    base, x = Stack(), torch.randn(8, 6)
    outputs = []
    for method in (SMALL, LoRA(3, 6.0)):
        model = copy.deepcopy(base)
        handle = attach(model, AdapterSpec(method, Targets("re:.*"), seed=5))
        levels = {id(p) for a in adapters_named(model, "default") for n, p in a.named_parameters() if "leaf" in n}
        learns = [p for p in handle.parameters() if id(p) in levels or method.name == "lora"]
        optimizer = torch.optim.AdamW(learns, 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        outputs.append(model(x).detach())
    assert_close(*outputs)


def test_a_file_keeps_what_is_shared_once(tmp_path: Any) -> None:
    model, _ = adapted()
    save_native(state(model), tmp_path)
    kept, x = load_native(tmp_path), torch.randn(3, 6)
    # leaf 11 * 3 * 12 + 5 * 3 * 15 = 621; group 2 * (4 * 12 + 3 * 15) = 186; global 12 + 15 = 27
    assert kept.parameters == 621 + 186 + 27
    twin = Stack()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    attach(twin, kept)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"global_rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"group_rank": -2}, "rank must be a whole number of at least 1, not -2"),
        ({"alpha": -1.0}, "alpha must be a positive number"),
        ({"group_size": 0}, "group_size must be a whole number of at least 1, not 0 layers"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        Hierarchical(**fields)


def test_a_level_the_weight_has_no_room_for_is_refused() -> None:
    with pytest.raises(SpecError, match=r"layer: rank 9 exceeds min\(out, in\) = 8; lower the rank or exclude"):
        attach(Net(nn.Linear(12, 8)), AdapterSpec(Hierarchical(global_rank=9), Targets("layer")))
