"""`lorakit combine`: several adapters become one, exactly where they can and with the error where not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorakit import AdapterSpec, LoRA, attach, use
from lorakit.core.state import Purpose
from lorakit.inject.attach import state
from lorakit.methods.dora import DoRA
from lorakit.persist import load, save
from lorakit.training.base import load_base
from tests.cli.conftest import answer, invoke
from tests.training import samples

IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random LoRAs of different ranks on the base."""
    places = []
    for seed, rank in ((1, 3), (2, 5)):
        model = load_base(str(base))[0]
        handle = attach(model, AdapterSpec(LoRA(rank, 2.0 * rank)))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.copy_(0.1 * torch.randn_like(parameter))
        places.append(tmp_path_factory.mktemp("adapters") / f"{seed}")
        save(state(model), places[-1])
    return places[0], places[1]


def test_the_sum_does_what_the_adapters_do_together(base: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    said = answer("combine", *two, "--weights", "0.7,-1.3", "--output", tmp_path / "sum")
    assert said["error"] < 1e-6
    assert set(said["ranks"].values()) == {8}
    model = load_base(str(base))[0].eval()
    attach(model, load(two[0]), "a")
    attach(model, load(two[1]), "b")
    use(model, {"a": 0.7, "b": -1.3})
    other = load_base(str(base))[0].eval()
    attach(other, load(tmp_path / "sum"))
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["concat", "svd", "ties", "dare"])
def test_every_way_says_how_far_it_is(two: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    said = invoke("combine", *two, "--how", how, "--output", tmp_path / how)
    assert said.exit_code == 0, said.stderr
    assert "from the exact weighted sum" in said.stdout
    assert len(load(tmp_path / how).updates) == 14


def test_what_peft_calls_linear_is_named_and_measured(base: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    said = answer("combine", two[0], two[0], "--how", "factorwise", "--output", tmp_path / "a")
    assert said["error"] == pytest.approx(1.0, abs=1e-5), "twice itself has as much again in its cross terms"
    refused = invoke("combine", *two, "--how", "factorwise", "--output", tmp_path / "b")
    assert "linear and concat take any ranks" in refused.stderr


def test_dare_is_the_same_for_the_same_seed(two: tuple[Path, Path], tmp_path: Path) -> None:
    errors = [
        answer("combine", *two, "--how", "dare", "--density", 0.4, "--seed", seed, "--output", tmp_path / name)["error"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert errors[0] == errors[1] != errors[2]


def test_a_change_that_leans_on_its_weight_reads_the_base(base: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_base(str(base))[0]
    handle = attach(model, AdapterSpec(DoRA(LoRA(2, 4.0))))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save(state(model), tmp_path / "dora")
    said = answer("combine", tmp_path / "dora", two[0], "--how", "svd", "--rank", 8, "--output", tmp_path / "sum")
    assert 0 < said["error"] < 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--weights", "1"], "1 weights for 2 adapters"),
        (["--weights", "one,two"], "are no numbers"),
        (["--weights", "0,0"], "every weight is 0"),
        (["--rank", 4], "--how linear has no --rank; svd and ties and dare take it"),
        (["--how", "svd", "--density", 0.5], "--how svd has no --density; ties and dare take it"),
        (["--how", "ties", "--density", 2], "density is the share"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    two: tuple[Path, Path], tmp_path: Path, asked: list[object], said: str
) -> None:
    refused = invoke("combine", *two, "--output", tmp_path / "none", *asked)
    assert refused.exit_code == 2, refused.stdout
    assert said in refused.stderr
    assert not (tmp_path / "none").exists()


def test_tensors_trained_whole_read_the_base_where_their_weights_do_not_sum_to_1(
    base: Path, two: tuple[Path, Path], tmp_path: Path
) -> None:
    model = load_base(str(base))[0]
    attach(model, AdapterSpec(None, train=("norms",)))
    start = model.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    save(state(model), tmp_path / "norms", "native")
    said = answer("combine", two[0], tmp_path / "norms", "--weights", "0.5,0.5", "--output", tmp_path / "sum")
    assert said["weights"] == [0.5, 0.5]
    torch.testing.assert_close(load(tmp_path / "sum").trained["model.norm.weight"], start + 0.5)
    result = invoke(
        "combine", tmp_path / "norms", tmp_path / "norms", "--weights", "0.5,0.5", "--output", tmp_path / "n"
    )
    assert result.exit_code == 0, result.stderr  # without an update, which PEFT's format would need
    assert result.stdout.splitlines()[2].startswith("5 tensors trained whole, ")
    assert result.stdout.splitlines()[-1] == f"wrote {tmp_path}/n (native)"
    torch.testing.assert_close(load(tmp_path / "n").trained["model.norm.weight"], start + 1.0)


def test_an_adapter_less_itself_is_nothing(two: tuple[Path, Path], tmp_path: Path) -> None:
    answer("combine", two[0], two[0], "--weights", "1,-1", "--output", tmp_path / "none")
    assert not any(tensor.any() for update in load(tmp_path / "none").updates for tensor in update.tensors.values())


def test_bases_of_other_names_are_one_where_the_user_says_so(
    base: Path, two: tuple[Path, Path], tmp_path: Path
) -> None:
    for i, name in enumerate(("a/base", "b/base")):
        shutil.copytree(two[i], tmp_path / f"{i}")
        (tmp_path / f"{i}" / "lorakit.json").unlink()
        config = tmp_path / f"{i}" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": name}))
    pair = (tmp_path / "0", tmp_path / "1")
    assert "if they are, name it with --base" in invoke("combine", *pair, "--output", tmp_path / "sum").stderr
    assert answer("combine", *pair, "--base", base, "--output", tmp_path / "sum")["error"] < 1e-6


def test_the_random_head_of_a_base_without_one_is_no_base_s_own_value(tmp_path: Path) -> None:
    encoder = str(samples.save_encoder(tmp_path / "bert"))
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = load_base(encoder, task="classification", labels=("a", "b"))[0]
        attach(model, AdapterSpec(LoRA(2, 4.0), train=("classifier",)))
        made = state(model)
        save(replace(made, purpose=Purpose("classification", "classification", None, ("a", "b"))), tmp_path / f"{seed}")
    pair = (tmp_path / "0", tmp_path / "1")
    refused = invoke("combine", *pair, "--output", tmp_path / "sum")
    assert refused.exit_code == 2, refused.stdout
    assert "only a mean is defined" in refused.stderr
    mean = answer("combine", *pair, "--weights", "0.5,0.5", "--output", tmp_path / "mean")
    assert mean["weights"] == [0.5, 0.5]
    heads = [load(place).trained["classifier.weight"] for place in (*pair, tmp_path / "mean")]
    torch.testing.assert_close(heads[2], (heads[0] + heads[1]) / 2)


def test_errors_speak_of_options(base: Path, tmp_path: Path) -> None:
    model = load_base(str(base))[0]
    attach(model, AdapterSpec(DoRA(LoRA(2, 4.0))))
    save(state(model), tmp_path / "dora")
    dora = tmp_path / "dora"
    assert "--how svd --rank N comes as near" in invoke("combine", dora, dora, "--output", tmp_path / "x").stderr
    assert "give --rank or --energy" in invoke("combine", dora, dora, "--how", "svd", "--output", tmp_path / "x").stderr
    assert invoke("combine", dora, dora, "--how", "dare", "--seed", 10**20, "--output", tmp_path / "x").exit_code == 2
