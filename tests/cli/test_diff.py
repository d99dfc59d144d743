"""`lorakit diff`: two adapters side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from lorakit import AdapterSpec, LoRA, attach
from lorakit.core.spec import Targets
from lorakit.core.state import delta_of
from lorakit.inject.attach import state, weight_at
from lorakit.methods.dora import DoRA
from lorakit.methods.ia3 import IA3
from lorakit.persist import load, save
from lorakit.training.base import load_base
from tests.cli.conftest import answer, invoke
from tests.data.samples import tokenizer
from tests.training.samples import VOCABULARY


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
    assert "nowhere" in invoke("diff", tmp_path / "nowhere", two[0]).stderr
    assert "Missing argument" in invoke("diff", two[0]).stderr


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2, whose layers lie transposed and whom PEFT's files call linear."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases") / "gpt2"
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_file_of_peft_means_the_layers_of_its_base(gpt2: Path, tmp_path: Path) -> None:
    """PEFT's file of a DoRA on a square Conv1D calls it linear; its weight is the transposed one all the same."""
    spec = AdapterSpec(DoRA(LoRA(3, 6.0)), Targets(("attn.c_proj", "c_attn")))
    ours = _adapter(gpt2, spec, 1, tmp_path / "ours")
    theirs = tmp_path / "theirs"
    shutil.copytree(ours, theirs)
    (theirs / "lorakit.json").unlink()
    for pair in ((ours, theirs), (theirs, ours)):
        found = answer("diff", *pair, "--base", gpt2)
        assert found["same"]
        assert found["total"]["apart"] == pytest.approx(0, abs=1e-6)
    model = load_base(str(gpt2))[0]
    attach(model, load(ours))
    wanted = {}
    for update in load(ours).updates:
        delta = delta_of(update, weight_at(model.get_submodule(update.site.path), update.site))
        assert delta is not None
        wanted[update.site.key] = float(delta.norm())
    sizes = {key: gap["first"] for key, gap in answer("diff", theirs, ours, "--base", gpt2)["weights"].items()}
    assert sizes == pytest.approx(wanted, rel=1e-4)
    made = [answer("compress", place, "--rank", 2, "--base", gpt2, "--output", tmp_path / place.name[0])
            for place in (ours, theirs)]  # fmt: skip
    assert made[0]["error"] == pytest.approx(made[1]["error"], rel=1e-4)


def test_widths_that_a_file_does_not_tell_come_from_the_base(base: Path, tmp_path: Path) -> None:
    """PEFT's IA3 keeps a vector, which does not say how wide its layer is."""
    place = _adapter(base, AdapterSpec(IA3(), Targets(("k_proj", "v_proj"))), 1, tmp_path / "ia3")
    bare = tmp_path / "bare"
    shutil.copytree(place, bare)
    (bare / "lorakit.json").unlink()
    assert answer("diff", bare, place, "--base", base)["same"]
    assert answer("inspect", bare, "--base", base)["modules"]
    assert (
        "nothing was written"
        in invoke("compress", bare, "--rank", 16, "--base", base, "--output", tmp_path / "x").stderr
    )
    combined = answer("combine", bare, bare, "--base", base, "--how", "svd", "--rank", 8, "--output", tmp_path / "sum")
    assert combined["error"] < 1
