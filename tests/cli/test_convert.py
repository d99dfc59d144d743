"""`lorakit convert`: formats change, values do not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorakit.core.method import Method
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.attach import attach, state
from lorakit.methods.dora import DoRA
from lorakit.methods.hierarchical import Hierarchical
from lorakit.methods.ia3 import IA3
from lorakit.methods.krona import KronA
from lorakit.methods.lokr import LoKr
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture
from lorakit.persist import load, save
from lorakit.training.base import load_base
from tests.cli.conftest import answer, invoke
from tests.tolerances import assert_close
from tests.training.samples import save_base


def test_there_and_back_is_the_same_adapter(run: Path, tmp_path: Path) -> None:
    there = answer("convert", run, "--to", "native", "--output", tmp_path / "native")
    back = answer("convert", tmp_path / "native", "--to", "peft", "--output", tmp_path / "peft")
    assert there["layers"] == back["layers"] == 14
    assert (tmp_path / "native" / "adapter.lorakit.safetensors").is_file()
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    one, two = load(run / "adapter"), load(tmp_path / "peft")
    for mine, theirs in zip(one.updates, two.updates, strict=True):
        assert mine.site.path == theirs.site.path
        assert all(torch.equal(mine.tensors[key], theirs.tensors[key]) for key in mine.tensors)


def test_a_loralib_file_becomes_a_peft_adapter(tmp_path: Path) -> None:
    tensors = {"layer.q.lora_A": torch.randn(2, 8), "layer.q.lora_B": torch.randn(8, 2)}
    torch.save(tensors, tmp_path / "old.bin")
    said = answer("convert", tmp_path / "old.bin", "--alpha", 16, "--to", "peft", "--output", tmp_path / "new")
    assert (said["layers"], said["parameters"]) == (1, 32)
    update = load(tmp_path / "new").updates[0]
    assert update.site.path == "layer.q"
    assert update.method.alpha == 16  # type: ignore[attr-defined]


def test_the_merged_layers_of_a_loralib_file_need_their_switches(tmp_path: Path) -> None:
    torch.save({"c_attn.lora_A": torch.randn(4, 8), "c_attn.lora_B": torch.randn(16, 2)}, tmp_path / "old.bin")
    asked = ("convert", tmp_path / "old.bin", "--alpha", 4, "--to", "native", "--output", tmp_path / "new")
    assert "--enabled yes,no,yes" in invoke(*asked).stderr
    assert "'true' is neither yes nor no" in invoke(*asked, "--enabled", "true,no").stderr
    assert answer(*asked, "--enabled", "yes,no,yes")["layers"] == 2
    assert [u.site.rows for u in load(tmp_path / "new").updates] == [(0, 8), (16, 24)]


def test_the_lora_paper_s_own_adapter_converts(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "adapters" / "roberta_base_lora_mnli.bin"
    said = answer("convert", file, "--alpha", 16, "--to", "peft", "--output", tmp_path / "mnli")
    assert said["layers"] == 24  # query and value of twelve layers


def test_nothing_there_says_what_is_near(run: Path, tmp_path: Path) -> None:
    result = invoke("convert", run / "adaptor", "--to", "peft", "--output", tmp_path / "x")
    assert result.exit_code == 2
    assert result.stderr == f"error: {run / 'adaptor'} does not exist; did you mean 'adapter'?\n"


@pytest.mark.parametrize("place", ["adapter", ".", "../theirs"])
def test_a_folder_that_holds_anything_is_not_written_over(run: Path, tmp_path: Path, place: str) -> None:
    copy, theirs = tmp_path / "run", tmp_path / "theirs"
    shutil.copytree(run, copy)
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years")
    output = copy / place
    before = sorted(p.name for p in output.iterdir())
    result = invoke("convert", copy, "--to", "native", "--output", output)
    assert (result.exit_code, result.stderr) == (2, f"error: {output} is not empty; name another --output\n")
    assert sorted(p.name for p in output.iterdir()) == before


def test_alpha_and_enabled_are_refused_where_the_adapter_stores_them(run: Path, tmp_path: Path) -> None:
    for option in (("--alpha", 99), ("--enabled", "yes,no")):
        result = invoke("convert", run, "--to", "native", "--output", tmp_path / "new", *option)
        assert result.exit_code == 2
        assert result.stderr == (
            f"error: {run / 'adapter'} stores its alpha and its layers; leave {option[0]} out, it is for the original "
            "loralib's files\n"
        )
    assert not (tmp_path / "new").exists()


def test_a_base_is_no_adapter(base: Path, tmp_path: Path) -> None:
    for source in (base, "lorakit/tales"):
        result = invoke("convert", source, "--to", "native", "--output", tmp_path / "new")
        assert (result.exit_code, result.stderr) == (
            2, f"error: {source} is a base without an adapter; give the folder of a run or an adapter\n",
        )  # fmt: skip


def saved(base: Path, method: Method, folder: Path, named: Path | None = None) -> Path:
    """Write an adapter of a method on a base, moved off its start, in lorakit's own format; it may name its base."""
    torch.manual_seed(0)
    model, _ = load_base(str(base))
    handle = attach(model, AdapterSpec(method, Targets(("q_proj", "down_proj"))))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    kept = state(model)
    save(replace(kept, base=replace(kept.base, name=None if named is None else str(named))), folder, "native")
    return folder


def test_a_low_rank_method_becomes_the_lora_it_equals(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    place = saved(base, Hierarchical(2, 4.0, 2, 2), tmp_path / "native")
    asked = ("convert", place, "--output", tmp_path / "peft")
    exact = f"lorakit convert {place} --as-lora --output {tmp_path / 'peft'}"
    assert exact in invoke(*asked, "--to", "peft").stderr
    said = answer(*exact.split()[1:])
    assert (said["method"], said["as_lora"]["max_error"]) == ("hierarchical", 0.0)
    plain = {update.site.key: update for update in load(tmp_path / "peft").updates}
    for mine in load(place).updates:
        theirs = plain[mine.site.key]
        assert theirs.method.name == "lora"
        like = torch.zeros(mine.site.shape)
        deltas = [u.method.delta(u.tensors, like) for u in (mine, theirs)]  # type: ignore[attr-defined]
        assert_close(deltas[1], deltas[0])


def test_any_change_of_a_weight_becomes_the_nearest_lora_with_its_error_said(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    place = saved(base, DoRA(LoRA(2)), tmp_path / "native")
    asked: tuple[object, ...] = ("convert", place, "--as-lora", "--base", base, "--rank")
    coarse = answer(*asked, 4, "--output", tmp_path / "a")["as_lora"]
    whole = answer(*asked, 64, "--output", tmp_path / "b")["as_lora"]
    assert 1 > coarse["max_error"] >= coarse["total_error"] > 0.01 > 1e-4 > whole["max_error"]
    assert coarse["max_error"] == max(coarse["errors"].values())
    assert len(coarse["errors"]) == 4
    shown = invoke(*asked, 4, "--output", tmp_path / "c").stdout
    assert f"rank 4: {coarse['total_error']:.2%} of the change of the weights is lost" in " ".join(shown.split())
    assert {u.method.name for u in load(tmp_path / "a").updates} == {"lora"}


@pytest.mark.parametrize("method", [DoRA(LoRA(2)), IA3(), KronA(2, 2), LoKr(2)])
@pytest.mark.parametrize("named", [True, False])
def test_the_command_in_the_message_writes_the_nearest_lora(tmp_path: Path, method: Method, named: bool) -> None:
    base = save_base(tmp_path / "base")
    place = saved(base, method, tmp_path / "native", base if named else None)
    asked = ("convert", place, "--as-lora", "--output", tmp_path / "a")
    told = invoke(*asked)
    assert told.exit_code == 2
    assert "merge them" not in told.stderr
    assert "no LoRA equals them" in told.stderr
    exact = f"lorakit convert {place} --as-lora --rank 16 --output {tmp_path / 'a'}"
    assert exact in told.stderr
    done = invoke(*exact.split()[1:])
    if not named and method.name in ("dora", "ia3"):
        assert "depends on the weights" in done.stderr
        exact += " --base BASE"
        assert exact in done.stderr
        done = invoke(*exact.replace("BASE", str(base)).split()[1:])
    assert done.exit_code == 0, done.stderr
    assert {u.method.name for u in load(tmp_path / "a").updates} == {"lora"}
    assert (tmp_path / "a" / "adapter_config.json").is_file()


def test_no_lora_comes_near_what_depends_on_the_input(tmp_path: Path) -> None:
    place = saved(save_base(tmp_path / "base"), Mixture(2, 2), tmp_path / "native")
    for asked in (("--as-lora",), ("--as-lora", "--rank", 4), ("--to", "peft")):
        said = invoke("convert", place, *asked, "--output", tmp_path / "a").stderr
        assert "mixture" in said
        assert "merge" not in said
        assert "lorakit convert" not in said
        assert "native" in said


def test_a_format_is_asked_for_where_none_is_meant(run: Path, tmp_path: Path) -> None:
    asked = ("convert", run, "--output", tmp_path / "x")
    assert invoke(*asked).stderr == "error: name the format to write: --to peft, or --to native\n"
    assert answer(*asked, "--as-lora")["format"] == "peft"
    assert answer("convert", run, "--as-lora", "--to", "native", "--output", tmp_path / "y")["format"] == "native"


def test_rank_and_base_go_with_as_lora(run: Path, tmp_path: Path) -> None:
    said = invoke("convert", run, "--to", "peft", "--rank", 4, "--output", tmp_path / "x").stderr
    assert "--rank and --base say how to write a plain LoRA; add --as-lora" in said
