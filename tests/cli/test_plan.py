"""`lorakit plan`: one screen, every source it takes, and what it says of wrong ones."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest

from lorakit.cli.screen import console, table
from tests.cli.conftest import answer, invoke, write_recipe


def test_one_screen_says_what_is_trained_held_and_where_it_fits(base: Path, tmp_path: Path) -> None:
    result = invoke("plan", write_recipe(tmp_path, base), "--device", "RTX 4090")
    assert result.exit_code == 0, result.stderr
    said = result.stdout
    assert "parameters, fp32" in said
    assert "trains 3,712 (10.22 %) by lora" in said
    assert len(said.splitlines()) < 50
    for words in (
        "self_attn.q_proj",
        "48 rows, format prompt+completion",
        "tokens an example: ",
        "[[",
        "6 steps",
        "step ",
        "checkpoint",
        "RTX 4090 (24.0 GiB): fits",
        "largest on RTX 4090",
        "advice (--advice says why)",
    ):
        assert words in said, f"{words!r} is not in\n{said}"


def test_json_has_the_keys_scripts_rely_on(base: Path, tmp_path: Path) -> None:
    found = answer("plan", write_recipe(tmp_path, base))
    assert {"trainable_parameters", "total_parameters", "modules", "memory", "fits", "warnings"} <= found.keys()
    assert set(found["modules"][0]) >= {"path", "kind", "shape", "rank", "parameters", "pattern"}
    assert set(found["memory"]) == {"load", "step", "evaluation", "checkpoint", "merge"}
    assert found["trainable_parameters"] == sum(m["parameters"] for m in found["modules"])


@pytest.mark.parametrize("source", ["directory", "config.json", "shape"])
def test_a_base_may_be_only_its_sizes(source: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((base / "config.json").read_bytes())
    given = {"directory": [tmp_path / "bare"], "config.json": [base / "config.json"], "shape": ["--shape", "gpt2"]}
    found = answer("plan", *given[source])
    assert found["dtype"] == "bf16"
    assert found["pace"]["steps"] is None
    assert found["total_parameters"] == (124_439_808 if source == "shape" else found["total_parameters"])


def test_a_pattern_that_means_two_things_is_pointed_out() -> None:
    result = invoke("plan", "--shape", "gpt2", "--set", "adapter.targets=[c_attn,c_proj]", "--set", "adapter.rank=8")
    assert "trains 811,008" in result.stdout
    assert "442,368" in result.stdout
    assert "attn.c_proj" in result.stdout


def test_what_the_cache_of_the_frozen_part_costs_is_said(base: Path, tmp_path: Path) -> None:
    said = invoke("plan", write_recipe(tmp_path, base, cache_frozen=True), "--set", "adapter.layers=top:1").stdout
    said = " ".join(said.split())
    told = r"a step, and once for train.cache_frozen [1-9][\d.]* [MG]FLOP and [\d.]+ [kM]B on disk"
    assert re.search(told, said), said


def test_several_are_put_side_by_side(base: Path, tmp_path: Path) -> None:
    one = write_recipe(tmp_path, base)
    other = tmp_path / "other.yaml"
    other.write_text(one.read_text().replace("rank: 4", "rank: 8"))
    found = answer("plan", one, "--compare", other)
    assert found["compared"][str(other)]["trainable_parameters"] == 2 * found["trainable_parameters"]
    assert "compared" in invoke("plan", one, "--compare", other).stdout


def test_a_comparison_ends_with_a_verdict(base: Path, tmp_path: Path) -> None:
    one = write_recipe(tmp_path, base)
    other = tmp_path / "other.yaml"
    other.write_text(one.read_text().replace("rank: 4", "rank: 8"))
    said = invoke("plan", one, "--compare", other, "--device", "RTX 4090", "--device", "A10").stdout.splitlines()[-4:]
    assert said[0].startswith(f"smallest step: {one}, ")
    assert re.fullmatch(rf"smallest adapter's file: {one}, [\d.]+ kB, [\d.]+ kB \(50%\) less than {other}", said[1])
    assert said[2:] == [f"{device}: {one} fits, {other} fits" for device in ("RTX 4090", "A10")]


def test_two_devices_have_two_times(base: Path, tmp_path: Path) -> None:
    said = invoke("plan", write_recipe(tmp_path, base), "--device", "RTX 4090", "--device", "A10").stdout
    for name in ("RTX 4090", "A10"):
        assert re.search(rf"^on {name} about [\d.e-]+ s \(.*\): 35% of .* on 1 x {name}, assumed$", said, re.MULTILINE)


def test_data_beside_a_shape_are_said_to_be_unread(tmp_path: Path) -> None:
    said = invoke("plan", "--shape", "gpt2", "--set", f"data.train={tmp_path / 'train.jsonl'}").stdout
    assert "train.jsonl was not read, as gpt2 is only a configuration and has no tokenizer" in " ".join(said.split())
    assert "was not read" not in invoke("plan", "--shape", "gpt2").stdout


def test_a_table_into_a_closed_pipe_is_no_success() -> None:
    read, write = os.pipe()
    os.close(read)
    closed = os.fdopen(write, "w")
    with pytest.raises(BrokenPipeError):
        console(closed).print(table("", "a", rows=[("1",)]))
    with suppress(BrokenPipeError):
        closed.close()


def test_a_device_may_be_an_amount_of_memory(base: Path, tmp_path: Path) -> None:
    found = answer("plan", write_recipe(tmp_path, base), "--device", "24 GB")
    assert found["fits"][0]["verdict"] == "fits"
    assert found["pace"]["times"] == {}, "nothing is known of its speed"
    said = invoke("plan", tmp_path / "recipe.yaml", "--device", "24 GB").stdout
    assert "no time on 24 GB: no throughput is known in fp32; --calibrate there" in said


def test_a_page_is_written(base: Path, tmp_path: Path) -> None:
    result = invoke("plan", write_recipe(tmp_path, base), "--html", tmp_path / "plan.html")
    assert result.stdout.splitlines()[-1] == f"wrote {tmp_path / 'plan.html'}"
    assert "self_attn.q_proj" in (tmp_path / "plan.html").read_text(encoding="utf-8")


def test_a_page_replaces_nothing_but_a_page(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    before = (tmp_path / "train.jsonl").read_bytes()
    refused = invoke("plan", recipe, "--html", tmp_path / "train.jsonl")
    assert refused.exit_code == 2
    assert "train.jsonl is there already, and is no page" in refused.stderr
    assert (tmp_path / "train.jsonl").read_bytes() == before
    assert "there is no folder" in invoke("plan", recipe, "--html", tmp_path / "no" / "plan.html").stderr
    for _ in range(2):
        assert invoke("plan", recipe, "--html", tmp_path / "plan.html").exit_code == 0


def test_what_cannot_be_checkpointed_is_planned_without(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    changes = ("--set", "adapter.method=prefix-tuning", "--set", "adapter.tokens=4")
    recipe.write_text(recipe.read_text().replace("  rank: 4\n", "").replace("  alpha: 8\n", ""))
    found = answer("plan", recipe, *changes)
    assert "checkpointing" not in found["ways"]
    assert found["memory"]["step"]["total"] > 0


def test_what_training_would_refuse_is_refused(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    recipe.write_text(recipe.read_text().replace("  rank: 4\n", "").replace("  alpha: 8\n", ""))
    changes = ("--set", "adapter.method=adalora", "--set", "adapter.tinit=20", "--set", "adapter.tfinal=50")
    refused = invoke("plan", recipe, *changes)
    assert refused.exit_code == 2
    assert "leaves none to prune" in refused.stderr


def test_full_fine_tuning_of_a_7b_holds_what_is_known_and_has_a_rate_of_its_own() -> None:
    found = answer("plan", "--shape", "llama-2-7b", "--set", "adapter.method=none", "--set", "adapter.train=*")
    step = found["memory"]["step"]
    assert min(step.values()) >= 0
    assert step["adapters"] == 4 * 6_738_415_616
    assert step["optimizer"] == pytest.approx(8 * 6_738_415_616, rel=1e-6)
    assert found["ways"]["checkpointing"]["step"]["total"] > 16 * 6_738_415_616
    assert {line["topic"]: line["value"] for line in found["advice"]}["learning rate"] == "2.86e-5"


def test_experts_are_counted_and_pointed_out(tmp_path: Path) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
             "max_position_embeddings": 32768}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", **sizes}))
    found = answer("plan", tmp_path / "config.json")
    active = 32 * (4096 * (4096 + 2 * 1024 + 4096) + 2 * 3 * 4096 * 14336) + 4096 * 32000
    assert found["pace"]["flops_per_step"] == pytest.approx(4 * active * 4096, rel=0.05)
    assert any("experts in one tensor each" in warning for warning in found["warnings"])


def test_several_devices_share_a_step_and_zero3_is_for_other_tools() -> None:
    said = invoke("plan", "--shape", "gpt2", "--device", "T4", "--gpus", "2", "--strategy", "fsdp").stdout
    assert "on each of 2 devices under fsdp: T4 " in said
    assert "for other tools" not in said
    for recipe, asked, planned in (("ddp", (), "ddp"), ("fsdp", (), "fsdp"), ("hybrid", (), "hybrid"),
                                   ("fsdp", ("--strategy", "hybrid"), "hybrid")):  # fmt: skip
        asked = ("--gpus", "2", "--set", f"train.parallel={recipe}", *asked)
        assert f"2 x, {planned}: T4" in invoke("plan", "--shape", "gpt2", "--device", "T4", *asked).stdout
    alone = invoke("plan", "--shape", "gpt2", "--device", "T4", "--gpus", "2").stdout
    assert "ddp leaves the whole base on each device; fsdp divides it (--strategy fsdp" in alone
    assert "for other tools" in invoke("plan", "--shape", "gpt2", "--gpus", "2", "--strategy", "zero3").stdout
    assert "say how many with --gpus" in invoke("plan", "--shape", "gpt2", "--strategy", "ddp").stderr


def test_a_step_that_the_devices_cannot_share_is_refused_as_training_does(base: Path, tmp_path: Path) -> None:
    refused = invoke("plan", write_recipe(tmp_path, base), "--gpus", "3")
    assert refused.exit_code == 2
    assert "which 3 processes cannot share evenly" in refused.stderr


def test_prices_without_a_time_say_what_is_missing(base: Path, tmp_path: Path) -> None:
    bare = invoke("plan", "--shape", "gpt2", "--watts", "300").stdout
    assert (
        "no energy and no price: they follow from the time, which asks for rows to train on (data.train) and a" in bare
    )
    recipe = write_recipe(tmp_path, base)
    assert "which asks for a device of known speed (--device, or" in invoke("plan", recipe, "--watts", "300").stdout
    for asked, why in (
        (("--price-per-kwh", "3"), "needs the watts of a device"),
        (("--watts", "inf"), "give a finite"),
    ):
        refused = invoke("plan", recipe, *asked)
        assert (refused.exit_code, why in refused.stderr) == (2, True), refused.stderr
    assert invoke("plan", "--shape", "gpt2", "--device", "0 GB").exit_code == 2


def test_modules_and_reasons_are_listed_on_demand(base: Path, tmp_path: Path) -> None:
    said = invoke("plan", write_recipe(tmp_path, base), "--modules", "--advice").stdout
    assert "model.layers.1.mlp.down_proj" in said
    assert "because" in said


def test_a_few_real_steps_tell_the_time(base: Path, tmp_path: Path) -> None:
    found = answer("plan", write_recipe(tmp_path, base), "--calibrate")
    assert "measured steps" in found["pace"]["times"]["this machine"]["duration"]["reason"]
    refused = invoke("plan", "--shape", "gpt2", "--calibrate")
    assert refused.exit_code == 2
    assert "--calibrate runs steps, so it needs a recipe with data.train" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a recipe, a base or a config.json, or --shape NAME; one of them"),
        (("--shape", "llama-8b"), "llama-3-8b"),
        (("--shape", "gpt2", "--device", "A100"), "A100"),
        (("--shape", "gpt2", "--set", "adapter.rnk=3"), "rnk"),
        (("--shape", "gpt2", "--gpus", "2", "--strategy", "zero4"), "zero4"),
        (("missing.yaml",), "missing.yaml"),
    ],
)
def test_wrong_words_are_answered_with_the_right_ones(arguments: tuple[str, ...], message: str) -> None:
    result = invoke("plan", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_config_that_is_cut_off_or_lacks_a_size_is_named(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "hidden_size" in invoke("plan", tmp_path / "config.json").stderr
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert str(tmp_path / "config.json") in invoke("plan", tmp_path / "config.json").stderr
