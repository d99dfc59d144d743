"""`lorakit inspect`: any adapter, beside its base and beside another, on one screen and on a page."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.inject.attach import attach, state
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture
from lorakit.persist import load, save
from lorakit.spectral.spectrum import spectrum
from lorakit.training.base import load_base
from tests.cli.conftest import answer, invoke
from tests.data.samples import tokenizer
from tests.training import samples

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "adapters" / "roberta_base_lora_mnli.bin"


def test_a_run_is_told_on_one_screen(run: Path, base: Path) -> None:
    said = invoke("inspect", run)
    assert said.exit_code == 0, said.stderr
    for word in ("lora, 14 updates", "self_attn.q_proj", "entropy rank", f"lorakit inspect {run} --base {base}"):
        assert word in said.stdout
    assert "|dW| / |W|" not in said.stdout, "a column of nothing"
    assert all(len(line) <= 100 for line in said.stdout.splitlines() if not line.startswith(("-", "what it", str(run))))
    listed = invoke("inspect", run, "--modules").stdout
    assert "model.layers.1.mlp.down_proj" in listed


def test_the_object_holds_the_library_s_numbers(run: Path, base: Path) -> None:
    said = answer("inspect", run, "--base", base, "--against", run, "--energy", 0.5, "--intruders")
    rows = spectrum(load(run / "adapter"))
    for module, row in zip(said["modules"], rows, strict=True):
        assert module["singular_values"] == pytest.approx(row.singular_values, rel=1e-5, abs=1e-9)
        assert module["needs"] == row.rank_at(0.5)
        assert module["interference"]["alignment"] == pytest.approx(1.0)
        assert module["interference"]["forecast"] == "repeat"
        assert module["amplification"]["factor"] > 0
        assert module["intruders"] >= 0
    weight = load_base(str(base))[0].get_submodule(said["modules"][0]["key"]).weight
    assert said["modules"][0]["weight_norm"] == pytest.approx(float(weight.detach().float().norm()), rel=1e-5)


def test_that_there_are_no_intruders_is_said_and_commands_are_quoted(run: Path, base: Path, tmp_path: Path) -> None:
    place = tmp_path / "a b"
    shutil.copytree(run, place)
    said = invoke("inspect", place, "--base", base, "--energy", 0.5).stdout
    assert f"lorakit compress '{place}' --energy 0.5 --output DIR" in said
    assert "intruder" not in said
    model = load_base(str(base))[0]
    with torch.no_grad():
        for parameter in attach(model, AdapterSpec(LoRA(2, 4.0))).parameters():
            parameter.mul_(1e-3).add_(1e-6)
    save(state(model), tmp_path / "small")
    said = invoke("inspect", tmp_path / "small", "--base", base, "--intruders").stdout
    assert "no intruder dimension in 14 weights" in said


def test_a_tied_head_is_beside_the_embeddings_weight(tmp_path: Path) -> None:
    config = samples.CONFIGS["llama"]()
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    tied = load_base(str(tmp_path / "base"))[0]
    attach(tied, AdapterSpec(LoRA(2, 4.0), Targets(["q_proj", "lm_head"])))
    save(state(tied), tmp_path / "adapter")
    found = answer("inspect", tmp_path / "adapter", "--base", tmp_path / "base")["modules"]
    norm = float(model.get_input_embeddings().weight.detach().norm())
    assert {m["key"]: m["weight_norm"] for m in found}["lm_head"] == pytest.approx(norm, rel=1e-5)


def test_a_page_is_written_and_nothing_else_overwritten(run: Path, tmp_path: Path) -> None:
    assert invoke("inspect", run, "--html", tmp_path / "page.html").exit_code == 0
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert invoke("inspect", run, "--html", tmp_path / "page.html").exit_code == 0
    (tmp_path / "notes.txt").write_text("mine")
    refused = invoke("inspect", run, "--html", tmp_path / "notes.txt")
    assert refused.exit_code == 2
    assert "is no page" in refused.stderr
    assert invoke("inspect", run, "--html", tmp_path / "no" / "page.html").exit_code == 2


def test_what_cannot_be_looked_at_says_what_to_do(run: Path, base: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        said = invoke("inspect", *arguments)
        assert said.exit_code == 2, said.stdout
        return said.stderr

    assert "is a base without an adapter" in refused(base)
    assert "--intruders compares W + dW with W" in refused(run, "--intruders")
    assert "--energy is a share above 0" in refused(run, "--energy", 0)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert "was trained on another base" in refused(run, "--base", other)
    broken = tmp_path / "broken"
    shutil.copytree(run / "adapter", broken)
    (broken / "lorakit.json").unlink()  # which has the checksum
    file = next(broken.glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    assert "holds NaN or infinity" in refused(broken)
    file.write_bytes(file.read_bytes()[:100])
    assert str(file.name) in refused(broken)


def test_methods_that_need_their_base_or_have_no_change_of_a_weight(base: Path, tmp_path: Path) -> None:
    for name, method in (("dora", DoRA(LoRA(4, 8.0))), ("mixture", Mixture(experts=2, rank=2))):
        model = load_base(str(base))[0]
        attach(model, AdapterSpec(method))
        save(state(model), tmp_path / name, "native")
    said = invoke("inspect", tmp_path / "dora")
    assert said.exit_code == 2
    assert f"lorakit inspect {tmp_path / 'dora'} --base {base}" in said.stderr
    assert invoke("inspect", tmp_path / "dora", "--base", base).exit_code == 0
    said = invoke("inspect", tmp_path / "mixture")
    assert "mixture depends on the input" in said.stderr
    assert "--base" not in said.stderr


def test_a_loralib_file_asks_for_its_alpha(tmp_path: Path) -> None:
    torch.save({"layer.q.lora_A": torch.randn(2, 8), "layer.q.lora_B": torch.randn(8, 2)}, tmp_path / "old.bin")
    assert "alpha" in invoke("inspect", tmp_path / "old.bin").stderr
    assert answer("inspect", tmp_path / "old.bin", "--alpha", 16)["modules"][0]["rank"] == 2


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="needs ../shared/data/adapters")
def test_the_published_adapter_used_little_rank_in_its_last_layers() -> None:
    """The worked example of docs/inspect.md."""
    said = answer("inspect", PUBLISHED, "--alpha", 16)
    ranks = {m["key"]: m["effective_ranks"]["entropy"] for m in said["modules"]}
    assert len(ranks) == 24
    assert ranks["roberta.encoder.layer.11.attention.self.query"] == pytest.approx(1.5, abs=0.1)
    assert ranks["roberta.encoder.layer.4.attention.self.query"] == pytest.approx(7.4, abs=0.1)
    assert sum(m["needs"] for m in said["modules"]) == 103
