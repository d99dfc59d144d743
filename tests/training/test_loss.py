"""One loss for training and evaluation: sums and counts that add up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lorakit.data import Collator, prepare
from lorakit.training.base import load_base
from lorakit.training.loss import batches, mean_loss, mean_of_batch, summed_loss, trained_labels
from tests.tolerances import assert_close
from tests.training.samples import pairs


def test_the_sum_is_worked_out_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [9.0, 9.0]]])
    labels = torch.tensor([[-100, 1, 0]])  # position 1 by the logits of 0: 3/4; position 2 by those of 1: 1/2
    loss, count = summed_loss(logits, labels)
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(2))
    assert count.item() == trained_labels(labels).item() == 2


def test_the_first_label_has_nothing_to_be_predicted_from() -> None:
    labels = torch.tensor([[5, -100, -100]])
    loss, count = summed_loss(torch.randn(1, 3, 8), labels)
    assert (loss.item(), count.item()) == (0.0, 0)


def test_classes_are_not_shifted() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    loss, count = summed_loss(logits, labels)
    assert_close(loss / count, torch.nn.functional.cross_entropy(logits, labels))


def test_the_sum_over_the_count_is_the_loss_of_the_model(base: Path) -> None:
    model, tokenizer = load_base(str(base))
    batch = Collator(tokenizer.pad_token_id)(list(prepare(pairs(6), tokenizer, max_length=64).dataset))
    loss, count = summed_loss(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
    assert_close(loss / count, model(**batch).loss)
    assert_close(mean_of_batch(model, batch), model(**batch).loss)


def test_half_precision_logits_are_summed_in_fp32() -> None:
    assert summed_loss(torch.randn(1, 4, 8).bfloat16(), torch.tensor([[1, 2, 3, 4]]))[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_torch_s(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROWS": 3, "VALUES": 0, "CHUNKS": 99}.items():
        monkeypatch.setattr(f"lorakit.kernels.linear_cross_entropy.{name}", value)
    logits = (3 * torch.randn(4, 7, 11)).to(dtype).requires_grad_()
    labels = torch.randint(0, 11, (4, 7))
    labels[torch.rand(4, 7) < 0.4] = -100
    loss, count = summed_loss(logits, labels)
    (found,) = torch.autograd.grad(loss / count, logits)
    flat, right = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    wanted = torch.nn.functional.cross_entropy(flat.to(torch.promote_types(dtype, torch.float32)), right)
    assert_close(loss / count, wanted)
    assert_close(found, torch.autograd.grad(wanted, logits)[0])


def test_the_gradient_is_kept_once_in_the_logits_dtype_and_nothing_wide() -> None:
    logits, saved = torch.randn(1, 64, 1000).bfloat16().requires_grad_(), []
    pack = lambda t: saved.append((t.numel(), t.dtype)) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        summed_loss(logits, torch.randint(0, 1000, (1, 64)))
    assert saved == [(63_000, torch.bfloat16), (63, torch.int64)], "the last position predicts nothing"


@pytest.mark.parametrize("size", [1, 3, 50])
def test_the_mean_does_not_depend_on_the_batches(base: Path, size: int) -> None:
    model, tokenizer = load_base(str(base))
    model.train()
    rows = prepare(pairs(20), tokenizer, max_length=64)
    loss, count = mean_loss(model, rows.dataset, size, tokenizer.pad_token_id)
    alone = [mean_loss(model, rows.dataset.select([i]), 1, tokenizer.pad_token_id) for i in range(20)]
    assert count == rows.report.trained_tokens
    assert loss == pytest.approx(sum(each * n for each, n in alone) / count, rel=1e-6)
    assert model.training


def test_batches_cover_every_row_once_and_draw_no_random_number(base: Path) -> None:
    _, tokenizer = load_base(str(base))
    rows = prepare(pairs(20), tokenizer, max_length=64).dataset
    before = torch.get_rng_state()
    sorted_rows = [batch["input_ids"] for batch in batches(rows, 8, 0, "cpu", by_length=True)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(ids) for ids in sorted_rows] == [8, 8, 4]
    assert sorted_rows[0].shape[1] >= sorted_rows[-1].shape[1]
    assert sum(int((batch["attention_mask"]).sum()) for batch in batches(rows, 7, 0, "cpu")) == sum(
        map(len, rows["input_ids"])
    )


def test_a_failing_evaluation_leaves_the_model_in_training_mode(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_base(str(base))
    model.train()
    rows = prepare(pairs(2), tokenizer, max_length=64).dataset

    def fails(**_: object) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(RuntimeError, match="no memory left"):
        mean_loss(model, rows, 2, 0)
    assert model.training
