"""`lorakit diff`: two adapters side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit import AdapterSpec, LoRA, attach
from lorakit.core.spec import Targets
from lorakit.inject.attach import state
from lorakit.methods.dora import DoRA
from lorakit.persist import save
from lorakit.training.base import load_base
from tests.cli.conftest import answer, invoke


@pytest.fixture(scope="module")
def two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoRA on every linear layer, and one of another rank on the queries."""
    return tuple(
        _adapter(base, spec, seed, tmp_path_factory.mktemp("adapters") / f"{seed}")
        for seed, spec in ((1, AdapterSpec(LoRA(3, 6.0))), (2, AdapterSpec(LoRA(5, 6.0), Targets(("q_proj",)))))
    )  # type: ignore[return-value]


def _adapter(base: Path, spec: AdapterSpec, seed: int, place: Path) -> Path:
    model = load_base(str(base))[0]
    handle = attach(model, spec)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save(state(model), place)
    return place


def test_it_shows_settings_weights_and_what_one_has_alone(two: tuple[Path, Path]) -> None:
    said = invoke("diff", *two)
    assert said.exit_code == 0, said.stderr
    assert "method.rank" in said.stdout
    assert "q_proj" in said.stdout
    assert "cos(A, B)" in said.stdout
    assert "- only A changes 12 weights: " in said.stdout
    found = answer("diff", *two)
    assert found["settings"]["method.rank"] == [3, 5]
    assert not found["same"]
    both = [gap for gap in found["weights"].values() if gap["second"]]
    assert len(both) == 2
    assert len(found["weights"]) == 14


def test_the_same_adapter_is_said_to_be(two: tuple[Path, Path]) -> None:
    assert "- they do the same to the base" in invoke("diff", two[0], two[0]).stdout
    found = answer("diff", two[0], two[0])
    assert found["same"]
    assert found["settings"] == {}
    assert found["total"]["apart"] == 0


def test_every_weight_is_listed_when_asked(two: tuple[Path, Path]) -> None:
    assert "model.layers.1.mlp.down_proj" in invoke("diff", *two, "--modules").stdout


def test_what_leans_on_its_weight_reads_the_base(base: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    dora = _adapter(base, AdapterSpec(DoRA(LoRA(3, 6.0))), 1, tmp_path / "dora")
    found = answer("diff", dora, two[0])
    assert found["total"]["first"] > 0
    assert found["weights"].keys() == answer("diff", *two)["weights"].keys()


def test_wrong_commands_say_what_to_do(base: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    assert "is a base without an adapter" in invoke("diff", base, two[0]).stderr
    assert invoke("diff", tmp_path / "nowhere", two[0]).exit_code == 2
    assert invoke("diff", two[0]).exit_code == 2
