"""Nothing leaks between examples of one row, shared prompt or not; where a model leaks it is caught by measuring."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from lorakit.data import PackRule, prepare
from lorakit.data.isolation import (
    packing_is_isolated,
    packing_leak,
    refuse_leaky_packing,
    sharing_leak,
    why_not_shared,
)
from lorakit.data.packing import Collator
from lorakit.errors import DataError
from tests.data.samples import PAD, model, tokenizer

# flex attention runs uncompiled here, which takes milliseconds instead of half a minute and makes torch say so
FLEX = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
BACKENDS = [
    pytest.param(family, attention, marks=FLEX if attention == "flex_attention" else ())
    for family in ("llama", "qwen2", "gpt2")
    for attention in ("eager", "sdpa", "flex_attention")
    if (family, attention) != ("gpt2", "flex_attention")  # which transformers does not offer
]
ROWS = [{"prompt": "c" * n, "completion": "ab" * m} for n, m in ((1, 2), (5, 1), (9, 4), (2, 9), (4, 4), (7, 3))]


def losses(network: Any, rows: Dataset) -> dict[tuple[int, ...], float]:
    """Summed loss of each example, found by its ids, over one batch of all rows."""
    batch = Collator(PAD)(list(rows))
    with torch.no_grad():
        logits = network(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    token_loss = cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    found = {}
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        starts = [j for j, at in enumerate(row.get("position_ids", range(length))) if at == 0]
        for start, stop in pairwise([*starts, length]):
            found[tuple(row["input_ids"][start:stop])] = float(token_loss[i, start : stop - 1].sum())
    return found


@pytest.fixture
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("family", "attention"), BACKENDS)
def test_an_example_has_the_same_loss_packed_and_alone(family: str, attention: str) -> None:
    network = model(family, attention)
    packed = losses(network, prepare(ROWS, tokenizer(), max_length=30, packing=PackRule(30)).dataset)
    alone: dict[tuple[int, ...], float] = {}
    for row in prepare(ROWS, tokenizer(), max_length=30).dataset:
        alone |= losses(network, Dataset.from_list([row]))
    assert packed.keys() == alone.keys()
    for ids, loss in alone.items():
        assert packed[ids] == pytest.approx(loss, rel=1e-6)  # fp32 sums of a dozen losses near 5, in another order


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("family", "attention"), BACKENDS)
def test_isolation_is_measured_for_each_attention_backend(family: str, attention: str) -> None:
    network = model(family, attention)
    assert packing_leak(network) < 1e-6
    refuse_leaky_packing(network)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_cache_breaks_isolation_and_is_caught(attention: str) -> None:
    network = model("llama", attention, use_cache=True)
    assert not packing_is_isolated(network)
    assert packing_is_isolated(network, use_cache=False)


def test_a_family_that_ignores_positions_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        DataError, match="packing leaks in OPTForCausalLM with attention 'sdpa'.*set data.packing: never"
    ):
        refuse_leaky_packing(model("opt", "sdpa"))


def test_a_model_that_takes_no_positions_leaks_by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    network = model("gpt2", "sdpa")
    monkeypatch.setattr(network, "forward", lambda input_ids: None)
    assert packing_leak(network) == math.inf


def test_the_measurement_leaves_the_model_in_its_mode() -> None:
    network = model("llama", "sdpa").train()
    packing_leak(network)
    assert network.training


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "gpt2", "gpt-neox")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sharing_a_prompt_changes_no_logits_in_these_families(family: str, attention: str) -> None:
    network = model(family, attention).train()
    assert sharing_leak(network) < 1e-5
    assert why_not_shared(network, 64) == ""
    assert network.training


def test_a_family_that_reads_no_such_mask_keeps_its_prompts_apart() -> None:
    assert "logits would change in this model with attention 'eager'" in why_not_shared(model("bloom", "eager"), 64)


def test_a_model_that_lets_branches_see_each_other_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.data.branches.tree_mask", lambda positions, _: torch.ones(1, 1, 20, 20).bool().tril())
    assert sharing_leak(model("llama", "sdpa")) > 0.01


def test_a_window_shorter_than_the_examples_keeps_prompts_apart() -> None:
    network = model("mistral", "sdpa", sliding_window=32)
    assert why_not_shared(network, 33) == "its attention reaches 32 tokens back, and examples may have 33"
    assert why_not_shared(network, 32) == ""


def test_a_backend_without_masks_of_any_form_keeps_prompts_apart() -> None:
    assert why_not_shared(model("llama", "flex_attention"), 64) == (
        "attention 'flex_attention' takes no mask of branches"
    )
