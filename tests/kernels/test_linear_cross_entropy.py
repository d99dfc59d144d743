"""The loss of a head's logits without the logits: equal to its plain twin, to torch's, and to a sum by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernels.linear_cross_entropy import Temper, linear_cross_entropy, summed_cross_entropy
from tests.tolerances import assert_close

MODULE = "lorakit.kernels.linear_cross_entropy"
TEMPERS = [Temper(), Temper(scale=0.25), Temper(cap=3.0), Temper(scale=2.0, cap=3.0)]
tempers = pytest.mark.parametrize("temper", TEMPERS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROWS": 3, "VALUES": 0, "CHUNKS": 99}.items():
        monkeypatch.setattr(f"{MODULE}.{name}", value)


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return 14 rows of 6 numbers, a head of 11 classes with its bias, 8 trained rows and their labels."""
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((14, 6), (11, 6), (11,)))
    rows = torch.tensor([0, 1, 3, 4, 8, 9, 12, 13])
    return hidden, weight, bias, rows, torch.randint(0, 11, (8,))


def test_the_sum_is_worked_out_by_hand() -> None:
    hidden, weight = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [2.0, 1.0]])
    bias = torch.tensor([0.0, math.log(3.0) - 1.0])  # logits (1, 1 + log 3), (1, log 3)
    rows, labels = torch.tensor([1, 2]), torch.tensor([1, 0])
    loss = linear_cross_entropy(hidden, weight, bias, rows, labels)
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(1 + 3 / math.e))


@tempers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_torch_on_whole_logits(temper: Temper, dtype: torch.dtype) -> None:
    hidden, weight, bias, rows, labels = case(dtype)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    wanted = F.cross_entropy(temper.plain(F.linear(*wide))[rows], labels, reduction="sum")
    loss = linear_cross_entropy(hidden, weight, bias, rows, labels, temper)
    assert loss.dtype == torch.float32
    assert_close(loss, wanted.float(), dtype=dtype)
    found = torch.autograd.grad(loss / 7, (hidden, weight, bias))
    for own, theirs in zip(found, torch.autograd.grad(wanted / 7, wide), strict=True):
        assert own.dtype == dtype
        assert_close(own, theirs.to(dtype))
    assert not found[0][[2, 5, 6, 7, 10, 11]].any(), "a row that is not trained has no gradient"


@tempers
def test_it_equals_its_plain_twin(temper: Temper) -> None:
    hidden, weight, bias, rows, labels = case()
    found = linear_cross_entropy(hidden, weight, bias, rows, labels, temper)
    plain = summed_cross_entropy(temper.plain(F.linear(hidden, weight, bias)), rows, labels)
    assert_close(found, plain)
    inputs = (hidden, weight, bias)
    for own, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(plain, inputs), strict=True):
        assert_close(own, theirs)


@tempers
def test_its_gradient_is_that_of_its_values(temper: Temper) -> None:
    hidden, weight, bias, rows, labels = case(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *given: linear_cross_entropy(*given, rows, labels, temper), (hidden, weight, bias)
    )
    assert torch.autograd.gradcheck(lambda x: summed_cross_entropy(x, rows, labels), F.linear(hidden, weight, bias))


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    hidden, weight, _, rows, labels = case()
    weight.requires_grad_(False)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, None, rows, labels).backward()
    assert saved == [(8, 6), (8,)]
    assert weight.grad is None


def test_no_row_is_trained() -> None:
    hidden, weight, bias, rows, labels = case()
    loss = linear_cross_entropy(hidden, weight, bias, rows[:0], labels[:0])
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_the_logits_of_large_numbers_do_not_overflow() -> None:
    hidden, weight, _, rows, labels = case()
    loss = linear_cross_entropy(1e4 * hidden, weight, None, rows, labels)
    assert_close(loss, F.cross_entropy(1e4 * F.linear(hidden, weight)[rows], labels, reduction="sum"))


def test_no_more_logits_exist_at_once_than_one_chunk_has(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    real = F.linear

    def watched(*given: Any) -> Tensor:
        out = real(*given)
        seen.append(tuple(out.shape))
        return out

    monkeypatch.setattr(f"{MODULE}.F.linear", watched)
    hidden, weight, bias, rows, labels = case()
    linear_cross_entropy(hidden, weight, bias, rows, labels)
    assert seen == [(3, 11), (3, 11), (2, 11)]
