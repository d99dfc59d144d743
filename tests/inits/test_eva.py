"""EVA: the directions of the inputs, by hand, against torch's SVD of the inputs themselves, and planted ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inits.eva import Eva
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.evidence import gather
from lorakit.methods.lora import LoRA
from tests.inits.samples import started
from tests.law.cases import KINDS, Net
from tests.tolerances import assert_close


def measured(layer: nn.Module, rank: int, *batches: Tensor) -> Tensor:
    """Return A after EVA saw these batches."""
    model, spec = Net(layer), AdapterSpec(LoRA(rank, init_=Eva()), Targets("layer"))
    attach(model, spec, evidence=gather(model, spec, batches))
    return adapters_named(model, "default")[0].get_parameter("down").detach()


def test_one_case_by_hand() -> None:
    # inputs (3, 0) and (0, 1): X^T X = diag(9, 1), so r = 1 keeps the first axis
    model, spec = Net(nn.Linear(2, 2)), AdapterSpec(LoRA(1, init_=Eva()), Targets("layer"))
    evidence = gather(model, spec, [torch.tensor([[3.0, 0.0], [0.0, 1.0]])])
    assert evidence["layer"].tolist() == [[9.0, 0.0], [0.0, 1.0]]
    attach(model, spec, evidence=evidence)
    assert_close(adapters_named(model, "default")[0].get_parameter("down").abs(), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("kind", ["linear", "transposed-linear", "conv1d", "conv2d", "conv3d"])
def test_the_rows_of_a_are_orthonormal(kind: str) -> None:
    _, adapter, _, _ = started(kind, "eva")
    groups = adapter.site.groups
    for block in adapter.get_parameter("down").detach().chunk(groups):
        assert_close(block.flatten(1) @ block.flatten(1).T, torch.eye(4 // groups))


def test_they_are_the_right_singular_vectors_of_all_the_inputs_together() -> None:
    spread = torch.diag(torch.arange(12.0, 0, -1))
    batches = [torch.randn(5, 7, 12) @ spread, torch.randn(9, 12) @ spread]
    down = measured(nn.Linear(12, 8), 4, *batches)
    rows = torch.cat([b.reshape(-1, 12) for b in batches])
    right = torch.linalg.svd(rows, full_matrices=False).Vh[:4]
    assert_close((down @ right.T).abs(), torch.eye(4), scale=50.0)  # X^T X squares the conditioning of X


def test_directions_planted_in_the_inputs_are_found() -> None:
    planted = torch.linalg.qr(torch.randn(12, 3)).Q.T
    down = measured(nn.Linear(12, 8), 3, torch.randn(40, 3) @ planted)
    assert_close(down.T @ down, planted.T @ planted, scale=10.0)


def test_a_convolution_s_inputs_are_its_patches_group_by_group() -> None:
    kind = "conv2d, grouped, reflected"
    layer, x = KINDS[kind].layer(), KINDS[kind].inputs()
    spec = AdapterSpec(LoRA(4, init_=Eva()), Targets("layer"))
    moment = gather(Net(layer), spec, [x])["layer"]
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    for i, own in enumerate(padded.chunk(2, dim=1)):
        patches = nn.functional.unfold(own, 3).transpose(1, 2).flatten(0, 1)
        assert_close(moment[i], patches.T @ patches)


@pytest.mark.parametrize("said", ["labels", "attention_mask"])
def test_tokens_that_do_not_count_are_left_out(said: str) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor, **rest: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y

    model, spec = Reader(), AdapterSpec(LoRA(1, init_=Eva()), Targets("layer"))
    x = torch.tensor([[[3.0, 0.0], [0.0, 5.0]]])
    marks = {"labels": torch.tensor([[7, -100]]), "attention_mask": torch.tensor([[1, 0]])}
    batch = {"x": x, said: marks[said]}
    assert gather(model, spec, [batch])["layer"].tolist() == [[9.0, 0.0], [0.0, 0.0]]
    assert gather(model, spec, [{"x": x}])["layer"].tolist() == [[9.0, 0.0], [0.0, 25.0]]
