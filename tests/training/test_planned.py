"""A plan is what training then does: counts, batches and steps of the real run, known figures of well-known shapes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakit.errors import DeviceError, LorakitError, RecipeError, SpecError
from lorakit.inject.skeleton import config_of, on_meta
from lorakit.planning.shapes import shape
from lorakit.training.events import read_events
from lorakit.training.forecast import Load, forecast
from lorakit.training.limits import limits
from lorakit.training.miniature import miniature
from lorakit.training.plan import calibrated, plan
from lorakit.training.planned import HERE, PlannedRun, Where
from lorakit.training.quantised import pack, write_packed
from lorakit.training.quantizer import Packing
from lorakit.training.rates import auto_rate
from lorakit.training.recipe import QuantSection, make_recipe
from lorakit.training.run import train
from tests.inject.families import FAMILIES
from tests.slow import others_slow, slow
from tests.training.samples import recipe_of, tokenizer


def of_shape(name: str, *devices: str, count: int = 1, strategy: str | None = None, **values: Any) -> PlannedRun:
    recipe = make_recipe({"model": name, "train": {"dtype": "bf16", "batch_size": 1}, **values})
    model = on_meta(config_of(shape(name)), "causal-lm")
    return plan(recipe, Where(devices, count, strategy), model=model)


def test_a_hybrid_is_planned_as_one_machine_and_says_so() -> None:
    names = {"train": {"parallel": "hybrid", "dtype": "bf16", "batch_size": 1}}
    (told,) = [one for one in of_shape("gpt2", "A10", count=8, **names).warnings if "hybrid" in one]
    assert told.endswith("this is the plan of one with 8 devices; of machines with fewer, plan with that many (--gpus)")
    assert not [one for one in of_shape("gpt2", "A10", count=8, strategy="fsdp").warnings if "hybrid" in one]


def test_a_start_that_corrects_a_quantised_base_is_refused_beside_a_dense_one(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="init loftq corrects a quantised base, and this one is dense; add quant: nf4"):
        plan(recipe_of(base, tmp_path, adapter__init="loftq"))
    assert plan(recipe_of(base, tmp_path, adapter__init="loftq", quant="nf4")).quant == "nf4"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter__method": "dora"},
        {"train__batch_size": 5},
        {"data__packing": "never"},
        {"quant": {"kind": "nf4", "principal": 4}},
        {"adapter__train": "norms"},
        {"train__batch_size": None, "train__batch_tokens": 128, "data__share_prompts": "always"},
    ],
)
def test_the_plan_is_the_run(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = recipe_of(base, tmp_path, **changes)
    planned = plan(recipe)
    run = train(recipe)
    events = {event["event"]: event for event in read_events(tmp_path / "run" / "events.jsonl")}
    assert planned.counts.trainable_parameters == run.trainable_parameters
    assert planned.counts.total_parameters == events["targets"]["base_parameters"]
    assert planned.counts.percent == events["targets"]["percent"]
    assert dict(planned.counts.hits) == events["targets"]["patterns"]
    assert planned.pace.steps == run.steps
    assert planned.load.rows == events["plan"]["batch_rows"]
    assert planned.load.packed == events["plan"]["packed"]
    assert planned.load.shared == (run.data["train"]["tokens_shared"] > 0)
    assert planned.data["train"].tokens == run.data["train"]["tokens"]
    (written,) = Path(run.adapter_dir).glob("adapter*.safetensors")
    assert sum(t.nbytes for t in load_file(written).values()) == planned.counts.adapter_bytes()


def test_the_share_trained_is_the_run_s_whatever_of_the_adapter_is_frozen(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path, adapter={"method": "vera", "rank": 8}, train__steps=1)
    planned = plan(recipe).counts
    train(recipe)
    (told,) = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "targets"]
    together = planned.total_parameters + planned.adapter_parameters + planned.frozen_in_adapter
    assert planned.frozen_in_adapter > 0
    assert told["percent"] == planned.percent == 100 * planned.adapter_parameters / together


def test_nothing_is_written_and_no_weight_is_read(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(base, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("safetensors.torch.load_file", None)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    plan(recipe)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_llama_of_7b_holds_what_is_known_of_it() -> None:
    found = of_shape("llama-2-7b", "A100 40GB", adapter={"rank": 8, "targets": ["q_proj", "v_proj"]})
    assert found.counts.trainable_parameters == 4_194_304
    assert found.memory.step.weights == pytest.approx(2 * 6_738_415_616, rel=1e-6)
    assert found.ways["4 bits"].step.weights == pytest.approx(3.87e9, rel=0.005)
    assert (found.memory.step.adapters, found.memory.step.optimizer // 8) == (4 * 4_194_304, 4_194_304 + 64)
    assert found.fits[0].verdict == "fits"


def test_what_does_not_fit_is_said_not_to() -> None:
    whole = {"method": "none", "train": "*"}
    full = of_shape("llama-2-70b", "A100 80GB", count=8, strategy="zero3", adapter=whole)
    assert full.fits[0].verdict == "does not fit"
    assert set(full.ways) == {"plain", "checkpointing"}, "what is trained whole cannot be packed"
    lora = of_shape("llama-2-70b", "A100 40GB", count=2, strategy="fsdp")
    assert lora.fits[0].verdict not in ("fits", "fits with checkpointing"), "in 16 bits the weights alone are too large"
    assert lora.ways["plain"].step.total > 2 * 40 * 2**30


@pytest.mark.parametrize(
    ("dtype", "times", "said"), [("bf16", 11.0, True), ("bf16", 1.1, False), ("fp32", 11.0, False)]
)
def test_a_dtype_the_processor_has_no_arithmetic_for_is_said(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, times: float, said: bool
) -> None:
    monkeypatch.setattr("lorakit.training.plan.times_fp32", lambda dtype: times)
    found = plan(recipe_of(base, tmp_path, train__dtype=dtype))
    assert any("no arithmetic in bf16: a product takes about 11 times" in one for one in found.warnings) is said


@pytest.mark.parametrize("family", others_slow(FAMILIES, ["bert", "gemma3", "gpt2", "mixtral", "qwen3", "t5", "vit"]))
def test_every_family_has_a_plan(family: str) -> None:
    model = on_meta(config_of(FAMILIES[family]))
    recipe = make_recipe({"model": family, "data": {"max_length": 16}, "train": {"dtype": "bf16", "batch_size": 2}})
    found = plan(recipe, model=model)
    assert found.memory.step.adapters == 4 * found.counts.trainable_parameters
    assert found.memory.step.activations > 0
    assert found.pace.flops_per_step > 0
    guessed = [w for w in found.warnings if "cannot be rehearsed on tokens alone" in w]
    assert bool(guessed) is (family in ("t5", "vit", "whisper"))


CONVNEXT = {"model_type": "convnext", "num_channels": 3, "patch_size": 4, "num_stages": 4, "depths": [1, 1, 2, 1],
            "hidden_sizes": [8, 16, 24, 32], "image_size": 32}  # fmt: skip
MAMBA = {"model_type": "mamba", "vocab_size": 96, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 6,
         "intermediate_size": 96}  # fmt: skip
GEMMA3 = {"model_type": "gemma3", "mm_tokens_per_image": 4,
          "text_config": {**FAMILIES["gemma3"], "max_position_embeddings": 24},
          "vision_config": {**FAMILIES["vit"], "model_type": "siglip_vision_model"}}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (CONVNEXT, "its configuration has no hidden_size, so activations and attention are not counted"),
        (MAMBA, ""),
        (GEMMA3, "for full fine-tuning"),
    ],
    ids=["convnext", "mamba", "gemma3"],
)
def test_a_family_of_other_sizes_has_a_plan_that_says_what_is_not_counted(config: dict[str, Any], said: str) -> None:
    recipe = make_recipe({"model": "a", "adapter": {"rank": 2}, "data": {"max_length": 32}, "train": {"batch_size": 2}})
    found = plan(recipe, model=on_meta(config_of(config)))
    assert found.load.length == (24 if config is GEMMA3 else 32)
    assert found.advice
    assert (found.memory.step.activations > 0) is (config is not CONVNEXT)
    assert [warning.endswith(said) for warning in found.warnings] == ([True] if said else [])


@pytest.mark.parametrize("config", [MAMBA, GEMMA3], ids=["mamba", "gemma3"])
def test_a_small_copy_is_small_in_all_its_parts(config: dict[str, Any]) -> None:
    made = miniature(on_meta(config_of(config)))  # type: ignore[arg-type]
    assert made.get_input_embeddings().weight.shape == (64, 32)
    assert max(max(p.shape) for p in made.parameters()) <= 16 * 16 * 3, "nothing but the patches' own"
    assert getattr(made.config, "vision_config", made.config).hidden_size == 32


def test_a_family_with_a_fit_may_nest_its_width() -> None:
    text = {**FAMILIES["llama"], "model_type": "llama4_text", "hidden_size": 2000}
    config = SimpleNamespace(model_type="llama4", get_text_config=lambda: SimpleNamespace(**text))
    assert auto_rate(config) == pytest.approx(5e-4)


def test_where_no_small_copy_can_be_built_packing_is_left_to_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> Any:
        raise LorakitError("no small copy")

    monkeypatch.setattr("lorakit.training.stage.miniature", refuse)
    recipe = make_recipe(recipe_of(base, tmp_path).model_dump() | {"train": {"device": "cpu"}})
    found = plan(recipe)
    assert not found.load.packed
    assert found.why == "whether packed examples would see each other is measured when the run starts: no small copy"


def test_a_tensor_that_sites_share_is_held_once() -> None:
    recipe = make_recipe({"model": "t5", "adapter": {"method": "hierarchical", "rank": 4}, "data": {"max_length": 16}})
    found = plan(recipe, model=on_meta(config_of(FAMILIES["t5"])))
    assert any(module.shared for module in found.counts.modules[1:])
    assert found.memory.step.adapters == 4 * found.counts.trainable_parameters


def test_an_optimizer_s_step_is_counted_once_for_all_its_micro_batches(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            time.sleep(0.5)
            return super().step(closure)

    monkeypatch.setattr("lorakit.training.calibration.make_optimizer", lambda name, groups: Slow(groups))
    recipe = recipe_of(base, tmp_path, train__accumulation=6)  # 48 rows, 8 a batch: one step
    alone, shared = (
        calibrated(plan(recipe, one), recipe) for one in (Where(), Where(("A10",), 4, "ddp", None, None, 1))
    )
    took = alone.pace.times[HERE].duration
    assert 0.4 < took.seconds < 1.5, "each of six micro-batches has a sixth of it, in proportion to its tokens"
    both = shared.pace.times[HERE]
    assert both.duration.seconds < 0.5 * took.seconds
    assert both.duration.reason.endswith("; 4 devices are assumed to be 4 times as fast")
    assert both.bill.hire == pytest.approx(4 * both.duration.seconds / 3600)


def test_each_device_that_was_named_has_its_time(base: Path, tmp_path: Path) -> None:
    found = plan(recipe_of(base, tmp_path), Where(("A10", "H100", "24 GB"), price_per_hour=1.0))
    slow, fast = (found.pace.times[name] for name in ("A10", "H100 80GB"))
    assert len(found.pace.times) == 2, "nobody knows how fast 24 GB are"
    assert slow.duration.seconds == pytest.approx(fast.duration.seconds * 67 / 31.2)
    assert slow.bill.hire == pytest.approx(slow.duration.seconds / 3600)


@pytest.mark.parametrize(
    ("asked", "there", "has_bf16", "dtype"),
    [("mps", False, False, "fp32"), ("cuda", False, False, "bf16"), ("cuda", True, False, "fp32"),
     ("cuda", True, True, "bf16"), ("cpu", True, True, "fp32"), ("auto", True, False, "fp32")],
)  # fmt: skip
def test_the_dtype_is_what_training_would_choose(
    asked: str, there: bool, has_bf16: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16)
    recipe = make_recipe({"model": "gpt2", "train": {"device": asked}, "data": {"max_length": 8}})
    assert plan(recipe, model=on_meta(config_of(FAMILIES["gpt2"]))).dtype == dtype


def gpt2_s_step(load: Load) -> int:
    """Return the bytes of a step of the usual adapter on GPT-2's shape."""
    spec = make_recipe({}).adapter.spec(seed=0, depth=12)
    return forecast(on_meta(config_of(shape("gpt2")), "causal-lm"), spec, load).step.total  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_largest_batch_is_that_of_the_way_that_is_recommended() -> None:
    found = of_shape("gpt2", "3.3 GB", "24 GB", train={"dtype": "bf16", "batch_size": 8})
    assert [fit.verdict for fit in found.fits] == ["fits with checkpointing", "fits"]
    assert [found.limits[name].way for name in ("3.3 GB", "24 GB")] == ["checkpointing", "plain"]
    most = found.limits["3.3 GB"].rows
    for rows, is_room in ((most, True), (most + 1, False)):
        assert (gpt2_s_step(replace(found.load, rows=rows, checkpointing=True)) <= 2.3e9) is is_room


@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_row_does_not() -> None:
    found = of_shape("gpt2", "RTX 3060")
    most = found.limits["RTX 3060"]
    room = 12288 * 2**20 - 10**9
    for rows, is_room in ((most.rows, True), (most.rows + 1, False)):
        assert (gpt2_s_step(replace(found.load, rows=rows)) <= room) is is_room
    assert most.length == 1024, "GPT-2 has no more positions"


@pytest.mark.parametrize("adapter", [slow({}), {"method": "none", "train": "*"}], ids=["lora", "full"])
def test_the_longest_context_fits_and_a_longer_one_does_not(adapter: dict[str, Any]) -> None:
    # a thousandth stays free; the optimizer's moment is the fullest of short rows, the forward that of long ones
    config = {"model_type": "llama", "vocab_size": 500, "hidden_size": 128, "intermediate_size": 256,
              "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4,
              "max_position_embeddings": 100_000, "tie_word_embeddings": False}  # fmt: skip
    model = on_meta(config_of(config), "causal-lm")
    spec = make_recipe({"adapter": adapter}).adapter.spec(seed=0, depth=6)
    load, room = Load(1, 64), 60 * 10**6
    (most,) = limits(model, spec, load, [room])  # type: ignore[arg-type]
    for rows, length, is_room in (
        (1, most.length, True),
        (1, most.length + 8, False),
        (most.rows, 64, True),
        (most.rows + 1, 64, False),
    ):
        held = forecast(model, spec, replace(load, rows=rows, length=length)).step.total  # type: ignore[arg-type]
        assert held <= room if is_room else held > 0.999 * room, (rows, length, held)


def test_a_base_that_is_packed_already_is_planned_as_such(base: Path, tmp_path: Path) -> None:
    packing = Packing(QuantSection())
    model = pack(str(base), packing, torch.device("cpu"))
    write_packed(model, packing, tmp_path / "packed")
    tokenizer().save_pretrained(tmp_path / "packed")
    (tmp_path / "run").mkdir()
    found = plan(recipe_of(tmp_path / "packed", tmp_path / "run"))
    assert (found.quant, found.own) == ("nf4", "4 bits")
    assert found.memory.step.weights < plan(recipe_of(base, tmp_path)).memory.step.weights


def test_a_target_may_name_a_block() -> None:
    found = of_shape("gpt2", adapter={"rank": 8, "targets": ["transformer.h.5.attn.c_attn"]})
    assert found.counts.trainable_parameters == 8 * (768 + 2304)
    assert found.memory.step.adapters == 4 * 8 * (768 + 2304)


def test_few_rows_are_enough_to_calibrate(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path, train__batch_size=40)
    assert calibrated(plan(recipe), recipe).pace.times[HERE].duration.seconds > 0


def test_a_calibrated_plan_tells_the_time_of_the_run(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path, train__epochs=3)
    found = calibrated(plan(recipe, Where(price_per_hour=3600.0)), recipe)
    took = train(recipe).seconds
    told = found.pace.times[HERE]
    assert told.duration.seconds == pytest.approx(took, rel=5, abs=5), "tiny steps beside other work"
    assert told.bill.hire == pytest.approx(told.duration.seconds)


def test_what_a_user_gets_wrong_is_said_before_anything_is_built(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="RTX 3091"):
        plan(recipe_of(base, tmp_path), Where(("RTX 3091",)))
    with pytest.raises(RecipeError, match="rank"):
        make_recipe({"adapter": {"rank": 0}})
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(LorakitError, match=r"none.jsonl"):
        plan(recipe_of(base, tmp_path, data__train=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dtype": "fp16"}, "fp16 training needs a CUDA device, this is cpu; use dtype: fp32"),
        slow({"optimizer": "paged-adamw"}, "use train.optimizer: adamw"),
        ({"offload_activations": True}, "where it would save nothing"),
    ],
)
def test_what_the_cpu_of_the_recipe_cannot_do_is_not_planned(
    base: Path, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    recipe = recipe_of(base, tmp_path, **{f"train__{name}": value for name, value in changes.items()})
    with pytest.raises(DeviceError, match=why):
        plan(recipe)
    assert plan(recipe, Where(("A10",))).pace.steps, "planned for another device"
