"""A classifier that computes its first position alone: the same loss and gradients, and only where it may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import AdapterSpec, attach
from lorakit.core.fronts import fronts
from lorakit.core.registry import method
from lorakit.inject.fuse import fuse
from lorakit.inject.pooled import FirstAlone, compute_first_alone

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}  # fmt: skip


def made(family: str, **options: Any) -> Any:
    """Return a small classifier of a family."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    return getattr(transformers, f"{family}ForSequenceClassification")(config)


def batch() -> dict[str, Tensor]:
    """Return three rows, two of them padded, with their classes."""
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, 7:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}


def step(model: nn.Module, parameters: list[nn.Parameter]) -> tuple[Tensor, tuple[Tensor, ...], list[int]]:
    """Return the loss, the gradients, and the rows each MLP of the model was given."""
    rows: list[int] = []
    hooks = [m.register_forward_hook(lambda _m, given, _out: rows.append(given[0].numel() // 32))
             for name, m in model.named_modules() if name.endswith("intermediate")]  # fmt: skip
    loss = model(**batch()).loss
    for hook in hooks:
        hook.remove()
    return loss, torch.autograd.grad(loss, parameters, allow_unused=True), rows


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "XLMRoberta"])
def test_loss_and_gradients_are_the_same_and_less_is_computed(family: str, fused: bool) -> None:
    model = made(family)
    spec = AdapterSpec(method("lora")(4, 8.0), train=("classifier",))  # type: ignore[call-arg]
    parameters = attach(model, spec).parameters()
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    loss, grads, rows = step(model, parameters)
    if fused:
        fuse(model)
    assert compute_first_alone(model)
    again, same, fewer = step(model, parameters)
    assert rows == [27, 27, 27]
    assert fewer == [27, 27, 3]
    torch.testing.assert_close(again, loss)
    for one, other in zip(same, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_on_the_meta_device_the_code_alone_decides() -> None:
    with torch.device("meta"):
        assert compute_first_alone(made("Bert"))


def test_a_model_that_reads_other_positions_stays_as_it_is() -> None:
    class Mean(nn.Module):
        """Says `hidden_states[:, 0]` and means all of them."""

        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(32, 32)

        def forward(self, hidden_states: Tensor) -> Tensor:
            mean: Tensor = self.dense(hidden_states.mean(1)) + 0 * hidden_states[:, 0]
            return mean

    model = made("Bert")
    model.bert.pooler = Mean()
    assert not compute_first_alone(model)
    assert not any(FirstAlone in fronts(module) for module in model.modules())
    assert not compute_first_alone(made("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64)), "of other code"
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES)
    assert not compute_first_alone(transformers.BertForMaskedLM(config))
    assert not compute_first_alone(transformers.BertForTokenClassification(config))
