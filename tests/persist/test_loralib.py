"""Files of the original LoRA package, and the adapter its authors published."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn

from lorakit.errors import AdapterFileError
from lorakit.inject.attach import attach, state
from lorakit.persist import load, save
from lorakit.persist.loralib import load_loralib
from tests.tolerances import assert_close

NAME = "roberta_base_lora_mnli.bin"


@pytest.fixture
def published(shared_data: Path) -> Path:
    file = shared_data / "adapters" / NAME
    if not file.exists():
        pytest.skip(f"needs the published adapter {NAME}")
    return file


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(3)
    config = RobertaConfig(num_labels=3, vocab_size=100, max_position_embeddings=40)
    return RobertaForSequenceClassification(config).eval()


def tokens() -> Tensor:
    return torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(4))


def test_the_published_mnli_adapter_lands_on_query_and_value(published: Path) -> None:
    found = load(published, alpha=16)
    assert len(found.updates) * 2 + len(found.trained) == 52
    assert {u.site.path for u in found.updates} == {
        f"roberta.encoder.layer.{n}.attention.self.{which}" for n in range(12) for which in ("query", "value")
    }
    assert {(u.method.rank, u.method.alpha) for u in found.updates} == {(8, 16.0)}  # type: ignore[attr-defined]
    assert sorted(found.trained) == [
        "classifier.dense.bias", "classifier.dense.weight", "classifier.out_proj.bias", "classifier.out_proj.weight",
    ]  # fmt: skip
    assert all(u.tensors["up"].abs().max() > 0 for u in found.updates)


def test_the_published_adapter_computes_what_its_formula_says_and_peft_agrees(published: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    raw = torch.load(published, map_location="cpu", weights_only=True)
    bare = roberta()
    oracle, model = copy.deepcopy(bare), copy.deepcopy(bare)
    weights = dict(oracle.named_parameters())
    with torch.no_grad():
        for name, tensor in raw.items():
            if name.endswith("lora_A"):
                path = name.removesuffix(".lora_A")
                weights[f"{path}.weight"] += 16 / 8 * raw[f"{path}.lora_B"] @ tensor
            elif not name.endswith("lora_B"):
                weights[name].copy_(tensor)
        expected = oracle(tokens()).logits
    attach(model, load(published, alpha=16))
    save(state(model), tmp_path)
    with torch.no_grad():
        assert_close(model(tokens()).logits, expected)
        assert_close(PeftModel.from_pretrained(bare, str(tmp_path)).eval()(tokens()).logits, expected)


def test_the_file_converts_without_a_model(published: Path, tmp_path: Path) -> None:
    save(load(published, alpha=16), tmp_path)
    again = load(tmp_path)
    assert again.spec == load(published, alpha=16).spec
    assert again.parameters == load(published, alpha=16).parameters


def test_a_missing_alpha_is_asked_for_with_the_paper_s_value(tmp_path: Path) -> None:
    torch.save({"q.lora_A": torch.zeros(2, 4)}, tmp_path / "x.bin")
    with pytest.raises(AdapterFileError, match="do not store alpha; pass alpha=.*r 8 and alpha 16"):
        load(tmp_path / "x.bin")


class Merged(nn.Module):
    """A fused layer of the original package, trained a little."""

    def __init__(self, enabled: list[bool]) -> None:
        super().__init__()
        self.qkv = loralib.MergedLinear(5, 12, r=2, lora_alpha=6, enable_lora=enabled, merge_weights=False)
        nn.init.normal_(self.qkv.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        y: Tensor = self.qkv(x)
        return y


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, False], [True, True, True]])
def test_merged_linear_is_slices_of_the_fused_layer(enabled: list[bool], tmp_path: Path) -> None:
    theirs = Merged(enabled)
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "x.bin")
    ours = nn.Module()
    ours.qkv = nn.Linear(5, 12)
    ours.qkv.load_state_dict({"weight": theirs.qkv.weight, "bias": theirs.qkv.bias})
    found = load_loralib(tmp_path / "x.bin", alpha=6, enabled=enabled)
    assert [u.site.rows for u in found.updates] == [(4 * i, 4 * i + 4) for i, on in enumerate(enabled) if on]
    attach(ours, found)
    x = torch.randn(3, 5)
    assert_close(ours.qkv(x), theirs(x))


def test_plain_and_embedding_layers_of_the_original_package_load(tmp_path: Path) -> None:
    theirs = nn.Sequential(
        loralib.Embedding(9, 6, r=3, lora_alpha=6, merge_weights=False),
        loralib.Linear(6, 7, r=2, lora_alpha=6, merge_weights=False),
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "x.bin")
    ours = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 7))
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "lora_" not in k})
    attach(ours, load(tmp_path / "x.bin", alpha=6))
    x = torch.tensor([[1, 8], [0, 3]])
    assert_close(ours(x), theirs(x))


def test_every_fault_is_listed(tmp_path: Path) -> None:
    z = torch.zeros
    torch.save(
        {"a.lora_A": z(2, 4), "b.lora_A": z(2, 4), "b.lora_B": z(6, 3), "c.lora_A": z(4, 5), "c.lora_B": z(8, 2),
         "head.weight": torch.full((2,), torch.nan)},
        tmp_path / "x.bin",
    )  # fmt: skip
    with pytest.raises(AdapterFileError) as caught:
        load(tmp_path / "x.bin", alpha=1)
    for line in (
        "x.bin: 4 tensor(s) do not fit",
        "a: lora_B is missing",
        "b: lora_A (2, 4), lora_B (6, 3) do not multiply",
        "c: lora_A (4, 5), lora_B (8, 2) are a MergedLinear with 2 projections; pass enabled=",
        "head.weight: holds NaN or infinity",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"alpha": 4, "r": 3}, r"have rank 2, not 3"),
        ({"alpha": 4, "enabled": (True, True, True)}, r"have 1 projection\(s\), but enabled=.* names 3"),
        ({"alpha": 0}, "alpha must be a positive number"),
    ],
)
def test_arguments_that_contradict_the_file_are_refused(arguments: Any, said: str, tmp_path: Path) -> None:
    torch.save({"q.lora_A": torch.zeros(2, 4), "q.lora_B": torch.zeros(6, 2)}, tmp_path / "x.bin")
    with pytest.raises(AdapterFileError, match=said):
        load_loralib(tmp_path / "x.bin", **arguments)


def test_a_file_without_factors_is_no_adapter(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(AdapterFileError, match="holds 1 tensors, none of them lora_A or lora_B"):
        load(tmp_path / "x.pt", alpha=1)
