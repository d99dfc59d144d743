"""`lorakit export`: what it writes is what the adapter does, in files vLLM does not refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import AdapterSpec, Override, Targets, attach, detach, save, state
from lorakit.core.method import Method
from lorakit.inits.pissa import Pissa
from lorakit.inject.attach import adapters_named
from lorakit.methods.block import BlockDiagonal
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA
from lorakit.persist import load
from lorakit.serving.remote.servable import refusals
from lorakit.training.base import load_base
from tests.cli.conftest import answer, invoke
from tests.tolerances import assert_close

IDS = torch.tensor([[5, 9, 40, 7, 33]])


def made(base: Path, method: Method, place: Path, format: Any = "peft", **spec: Any) -> torch.Tensor:
    """Write an adapter of a method that changes its base, and return the logits it gives."""
    model, _ = load_base(str(base))
    attach(model, AdapterSpec(method, Targets(("q_proj", "v_proj")), **spec))
    torch.manual_seed(1)
    with torch.no_grad():
        for one in adapters_named(model, "default"):
            for values in one.parameters():
                values.add_(0.1 * torch.randn_like(values))
    save(state(model), place, format)
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def given_by(base: Path, place: Path) -> torch.Tensor:
    """Return the logits of the base with an adapter."""
    model, _ = load_base(str(base))
    plain = logits(model)
    attach(model, load(place))
    found = logits(model)
    assert (found - plain).abs().max() > 1e-3
    detach(model)
    return found


@pytest.mark.parametrize(
    ("method", "format", "spec"),
    [
        (LoRA(4, 8.0), "peft", {}),
        (LoRA(4, 8.0, stabilised=True), "native", {}),
        (LoRA(4, 8.0), "peft", {"overrides": [Override(Targets("v_proj"), (("alpha", 3.0),))]}),
        (LoRA(4, 8.0, init_=Pissa()), "native", {}),
        (BlockDiagonal(2, 4), "native", {}),
    ],
)
def test_what_is_written_gives_the_adapter_s_logits(
    base: Path, tmp_path: Path, method: Method, format: str, spec: dict[str, Any]
) -> None:
    wanted = made(base, method, tmp_path / "adapter", format, **spec)
    said = answer("export", tmp_path / "adapter", "--output", tmp_path / "out")
    assert refusals(tmp_path / "out") == []
    assert_close(given_by(base, tmp_path / "out"), wanted)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not config.get("alpha_pattern") or config["alpha_pattern"] == config["rank_pattern"]
    assert said["command"].startswith(f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules out=")


def test_an_adapted_table_is_said_to_depend_on_the_model_s_class(base: Path, tmp_path: Path) -> None:
    model, _ = load_base(str(base))
    attach(model, AdapterSpec(LoRA(2), Targets(("q_proj", "embed_tokens"))))
    save(state(model), tmp_path / "adapter")
    said = invoke("export", tmp_path / "adapter", "--output", tmp_path / "out").stdout
    assert "where its class of the model lists model.embed_tokens among its embedding_modules" in said


def test_dora_says_how_it_is_written_and_with_a_rank_what_is_lost(base: Path, tmp_path: Path) -> None:
    wanted = made(base, DoRA(LoRA(2, 4.0)), tmp_path / "adapter")
    refused = invoke("export", tmp_path / "adapter", "--output", tmp_path / "out")
    assert refused.exit_code == 2
    assert f"lorakit export {tmp_path / 'adapter'} --rank 16 --output {tmp_path / 'out'}" in refused.stderr
    assert not (tmp_path / "out").exists()
    said = answer("export", tmp_path / "adapter", "--output", tmp_path / "out", "--rank", 16)
    assert 0 < said["as_lora"]["total_error"] < 1
    assert refusals(tmp_path / "out") == []
    full = answer("export", tmp_path / "adapter", "--output", tmp_path / "full", "--rank", 32)
    assert full["as_lora"]["total_error"] < 1e-5  # q_proj and v_proj have no more rows
    assert_close(given_by(base, tmp_path / "full"), wanted, scale=10)


def test_a_lora_is_truncated_to_a_rank_that_is_asked_for(base: Path, tmp_path: Path) -> None:
    made(base, LoRA(8, 8.0), tmp_path / "adapter")
    said = answer("export", tmp_path / "adapter", "--output", tmp_path / "out", "--rank", 4)
    assert 0 < said["as_lora"]["total_error"] < 1
    assert {update.method.rank for update in load(tmp_path / "out").updates} == {4}  # type: ignore[attr-defined]


def test_parts_of_the_base_that_were_trained_are_refused_with_the_way_out(base: Path, tmp_path: Path) -> None:
    made(base, LoRA(2), tmp_path / "adapter", train=("norm",))
    refused = invoke("export", tmp_path / "adapter", "--output", tmp_path / "out")
    assert refused.exit_code == 2
    assert f"lorakit merge {tmp_path / 'adapter'} --output DIR" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_llama_cpp_gets_the_merged_model_and_its_converter_s_command(base: Path, tmp_path: Path) -> None:
    wanted = made(base, LoRA(4, 8.0), tmp_path / "adapter")
    result = invoke("export", tmp_path / "adapter", "--output", tmp_path / "out", "--for", "llama.cpp")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == (
        f"convert it: python convert_hf_to_gguf.py {tmp_path / 'out'} --outfile {tmp_path / 'out'}.gguf"
    )
    (tmp_path / "out" / "mine.gguf").write_text("x")
    kept = invoke("export", tmp_path / "adapter", "--output", tmp_path / "out", "--for", "llama.cpp")
    assert kept.exit_code == 2
    assert "holds what no merge wrote; move it away:\n  - mine.gguf" in kept.stderr
    assert (tmp_path / "out" / "mine.gguf").read_text() == "x"
    assert_close(logits(load_base(str(tmp_path / "out"))[0]), wanted, scale=10)
    refused = invoke("export", tmp_path / "adapter", "--output", tmp_path / "b", "--for", "llama.cpp", "--rank", 4)
    assert "leave it out" in refused.stderr


def test_a_folder_with_something_in_it_is_left_alone(base: Path, tmp_path: Path) -> None:
    made(base, LoRA(2), tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    refused = invoke("export", tmp_path / "adapter", "--output", tmp_path / "out")
    assert "is not empty" in refused.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
