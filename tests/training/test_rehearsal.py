"""A rehearsal: pieces of memory counted by hand, and held against what real tensors and torch's own counters say."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lorakit.planning.memory import Parts
from lorakit.training.rehearsal import Rehearsal, Scene, rehearse


class Square(nn.Module):
    """y = sum((x W^T)^2), whose backward needs x W^T, x and W."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y * y


def scene(build: type[nn.Module] = Square) -> Scene:
    return Scene(
        build=build,
        prepare=lambda model: None,
        batch=lambda: {"x": torch.zeros(16, 8)},
        loss=lambda model, batch: model(**batch).sum(),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    )


def test_a_step_by_hand() -> None:
    # W has 4 * 8 fp32 numbers = 128 bytes, its gradient 128, two moments 256 and a count of 4
    # forward: y = x W^T is 16 * 4 numbers = 256 bytes and is saved; y * y, another 256, dies at the sum, 4 bytes
    found = rehearse(scene())
    assert found.between == Parts(adapters=128, optimizer=260, activations=256 + 4)
    assert found.evaluation == Parts(adapters=128, optimizer=260, temporaries=512)
    # backward: d(y * y) is a view of one number; 2 y dy needs y dy twice, and their sum: fullest with three of them
    assert found.step.activations == 256 + 4
    assert found.step.total >= 128 + 260 + 2 * 256
    assert found.flops == 2 * (2 * 16 * 8 * 4), "the product forward, and the gradient of W; x needs none"


def test_what_is_frozen_has_no_gradient_and_saves_nothing() -> None:
    def freeze(model: nn.Module) -> None:
        model.register_parameter("bias", nn.Parameter(torch.zeros(4)))
        model.layer.requires_grad_(False)  # type: ignore[union-attr]

    class Shifted(Square):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x) + self.bias
            return y

    made = scene(Shifted)
    found = rehearse(Scene(made.build, freeze, made.batch, made.loss, lambda m: torch.optim.AdamW([m.bias])))  # type: ignore[list-item]
    assert found.between == Parts(weights=128, adapters=16, optimizer=2 * 16 + 4, activations=4)
    assert found.flops == 2 * 16 * 8 * 4


def test_flops_are_torch_s() -> None:
    model, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.zeros(16, 8)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    made = Scene(
        lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)),
        lambda model: None,
        lambda: {"input": torch.zeros(16, 8)},
        lambda model, batch: model(**batch).sum(),
        lambda model: torch.optim.AdamW(model.parameters()),
    )
    assert rehearse(made).flops == counter.get_total_flops()


def test_nothing_is_allocated() -> None:
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2**20, 2**20, bias=False)  # four terabytes

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y

    made = scene(Huge)
    found = rehearse(Scene(made.build, made.prepare, lambda: {"x": torch.zeros(1, 2**20)}, made.loss, made.optimizer))
    assert found.between.adapters == 2**42


def test_a_line_goes_on_as_it_began() -> None:
    two = Rehearsal((Parts(weights=20, logits=5),), Parts(activations=7), Parts(), 100)
    three = Rehearsal((Parts(weights=30, logits=5),), Parts(activations=9), Parts(), 150)
    assert two.continued(three, 4) == Rehearsal((Parts(weights=60, logits=5),), Parts(activations=15), Parts(), 300)


def test_which_moment_is_the_fullest_may_change_with_the_depth() -> None:
    # forward: 100 of logits and 1 a block; backward's end: 10 a block
    two = Rehearsal((Parts(logits=100, activations=2), Parts(gradients=20)), Parts(), Parts(), 0)
    three = Rehearsal((Parts(logits=100, activations=3), Parts(gradients=30)), Parts(), Parts(), 0)
    assert two.step.logits == 100
    assert two.continued(three, 10).step == Parts(gradients=120)
