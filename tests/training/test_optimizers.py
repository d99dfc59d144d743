"""bitsandbytes' AdamW in a recipe: the same groups as torch's, a quarter of the moments, resumed bit for bit.

The base is as narrow as 8-bit moments allow: bitsandbytes leaves tensors of fewer than 4096 numbers in 32 bits.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lorakit import AdapterSpec, LoRA, Targets, attach
from lorakit.errors import DeviceError, MissingExtraError, RecipeError
from lorakit.inject.attach import adapters_named
from lorakit.methods.lora_fa import LoRAFA
from lorakit.training import trainer
from lorakit.training.base import load_base
from lorakit.training.checkpoints import checkpoints
from lorakit.training.events import Event, read_events
from lorakit.training.groups import param_groups
from lorakit.training.optimizers import IN_8_BITS, PLAIN, UNPAGED, into_pages, make_optimizer, refuse_optimizer
from lorakit.training.precondition import precondition
from lorakit.training.recipe import Recipe, TrainSection, make_recipe
from lorakit.training.run import Run, train
from tests.data.samples import tokenizer
from tests.tolerances import assert_close
from tests.training.samples import VOCABULARY, recipe_of

bnb: Any = pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
NAMES = get_args(TrainSection.model_fields["optimizer"].annotation)
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 64, "alpha": 64, "train": "norms"},
    "adalora": {"method": "adalora", "target_rank": 32, "init_rank": 64, "alpha": 64, "tinit": 2, "tfinal": 3},
    "adaptive": {"method": "adaptive", "target_rank": 32, "low": 1, "high": 64, "alpha": 64, "rounds": 3},
}


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer, 64 wide, so that a factor of rank 64 has 4096 numbers or more."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases") / "wide"
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
                         eos_token_id=2)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def of(base: Path, folder: Path, method: str = "lora", **changes: Any) -> Recipe:
    """A recipe of 15 steps, 5 an epoch, two micro-batches each, with LoRA+ rates and 8-bit moments."""
    folder.mkdir(exist_ok=True)
    demanding = {"train__epochs": 3, "train__batch_size": 5, "train__accumulation": 2, "train__save_every": 2}
    plus = {"train__up_ratio": 4, "train__lr": 2e-3, "train__optimizer": "adamw-8bit"}
    return recipe_of(base, folder, **{"adapter": dict(ADAPTERS[method]), **demanding, **plus, **changes})


def losses(folder: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_events(folder / "run" / "events.jsonl") if e["event"] == "step"}


def saved_state(folder: Path) -> list[dict[str, Any]]:
    """Return the optimizer's state of each parameter, from the last checkpoint."""
    file = checkpoints(folder / "run")[-1] / "optimizer.pt"
    states = torch.load(file, weights_only=True)["state"].values()
    return [{**state, **state.get("__bnb_optimizer_quant_state__", {})} for state in states]


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    """Return a random parameter with a random gradient."""
    rng = torch.Generator().manual_seed(seed)
    made = nn.Parameter(torch.randn(shape, generator=rng))
    made.grad = torch.randn(shape, generator=rng)
    return made


@pytest.fixture(scope="module")
def whole(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, Path]]:
    """A run of each method that was never stopped, and its folder."""
    folders = {method: tmp_path_factory.mktemp(method) for method in ADAPTERS}
    return {method: (train(of(wide, folder, method)), folder) for method, folder in folders.items()}


# ---- one step ----


def test_the_recipe_names_every_optimizer() -> None:
    assert set(NAMES) == {PLAIN, *IN_8_BITS, *UNPAGED}
    assert Recipe().train.optimizer == PLAIN
    assert type(make_optimizer(PLAIN, [{"params": [parameter(2)]}])) is torch.optim.AdamW


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_has_the_groups_and_the_constants_of_torch(wide: Path, name: str) -> None:
    model, _ = load_base(str(wide))
    attach(model, AdapterSpec(LoRA(64, 64), Targets(("q_proj", "embed_tokens")), train=("model.norm",)))
    groups = param_groups(model, 1e-3, 16, weight_decay=0.1)
    made = make_optimizer(name, [dict(group) for group in groups])
    assert len(made.param_groups) == 4
    for group, asked in zip(made.param_groups, groups, strict=True):
        for key in ("name", "lr", "weight_decay"):
            assert group[key] == asked[key], key
        assert [id(p) for p in group["params"]] == [id(p) for p in asked["params"]]
        assert (tuple(group["betas"]), group["eps"]) == ((0.9, 0.999), 1e-8)


def test_steps_are_bit_for_bit_those_of_bitsandbytes_by_hand() -> None:
    ours = [parameter(64, 64), parameter(64, 70, seed=1), parameter(64, seed=2)]
    theirs = copy.deepcopy(ours)
    for mine, other in zip(ours, theirs, strict=True):
        other.grad = None if mine.grad is None else mine.grad.clone()
    rates = {"slow": (1e-2, 0.1), "fast": (4e-2, 0.1), "fast, no decay": (4e-2, 0.0)}
    named = zip(rates.items(), ours, strict=True)
    optimizer = make_optimizer(
        "adamw-8bit", [{"name": name, "lr": lr, "weight_decay": wd, "params": [p]} for (name, (lr, wd)), p in named]
    )
    by_hand = [
        bnb.optim.AdamW8bit([p], lr=lr, weight_decay=wd) for p, (lr, wd) in zip(theirs, rates.values(), strict=True)
    ]
    for _ in range(3):
        optimizer.step()
        for each in by_hand:
            each.step()
    for mine, other, each in zip(ours, theirs, by_hand, strict=True):
        assert torch.equal(mine, other)
        kept, expected = optimizer.state[mine], each.state[other]
        assert kept.keys() == expected.keys()
        assert all(torch.equal(torch.as_tensor(kept[key]), torch.as_tensor(expected[key])) for key in kept)


def test_one_step_by_hand() -> None:
    """g = 2: m = 0.1 g = 0.2, v = 0.001 g^2 = 0.004, each the largest of its block, so code 255; the step is -lr."""
    p = nn.Parameter(torch.zeros(4096))
    p.grad = torch.full((4096,), 2.0)
    optimizer = make_optimizer("adamw-8bit", [{"params": [p], "lr": 0.5, "weight_decay": 0.0}])
    optimizer.step()
    state = optimizer.state[p]
    assert_close(p, torch.full((4096,), -0.5))
    assert_close(state["absmax1"], torch.full((16,), 0.2))
    assert_close(state["absmax2"], torch.full((16,), 0.004))
    assert {*state["state1"].tolist(), *state["state2"].tolist()} == {255}


@pytest.mark.parametrize(("shape", "bytes_"), [((256, 256), 133_120), ((63, 65), 8 * 4095)])
def test_moments_take_a_quarter_of_the_memory_and_small_ones_all_of_it(shape: tuple[int, int], bytes_: int) -> None:
    """65,536 numbers: a byte and 4 / 256 bytes of scale for each of two moments, 2.03 bytes instead of 8."""
    p = parameter(*shape)
    optimizer = make_optimizer("adamw-8bit", [{"params": [p], "lr": 1e-3, "weight_decay": 0.0}])
    optimizer.step()
    own = [v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor) and not k.startswith("qmap")]
    assert sum(tensor.nbytes for tensor in own) == bytes_


def test_gradients_of_zero_move_nothing() -> None:
    """LoRA's `down` has them in the first step, and a block of zeros has no scale to divide by."""
    p = parameter(64, 64)
    before, p.grad = p.detach().clone(), torch.zeros(64, 64)
    optimizer = make_optimizer("adamw-8bit", [{"params": [p], "lr": 1e-3, "weight_decay": 0.0}])
    optimizer.step()
    assert torch.equal(p, before)


def test_gradients_are_corrected_before_the_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128))
    attach(model, AdapterSpec(LoRAFA(32, 32.0), Targets("0")))  # half the width: A A^T is far from singular
    up = adapters_named(model, "default")[0].get_parameter("up")
    optimizer = make_optimizer("adamw-8bit", param_groups(model, 0.01))
    precondition(model, optimizer)
    model(torch.randn(7, 64)).square().sum().backward()
    assert up.grad is not None
    plain = up.grad.clone()
    optimizer.step()
    down = adapters_named(model, "default")[0].get_buffer("down")
    assert optimizer.state[up]["state1"].dtype == torch.uint8
    assert_close(up.grad, torch.linalg.solve(down @ down.T + 1e-8 * torch.eye(32), plain.T).T)


# ---- runs ----


def test_a_run_learns_as_with_32_bits_and_its_large_moments_have_8(
    wide: Path, tmp_path: Path, whole: dict[str, tuple[Run, Path]]
) -> None:
    train(of(wide, tmp_path, train__optimizer="adamw"))
    eight, full = losses(whole["lora"][1]), losses(tmp_path)
    assert eight[15] < 0.9 * eight[1]
    assert eight != full
    # a moment is off by up to a hundredth of the largest of its block, of which a loss 10 % lower feels as little
    assert list(eight.values()) == pytest.approx(list(full.values()), rel=1e-3)
    states = saved_state(whole["lora"][1])
    sizes = {(s["state1"].dtype, s["state1"].numel() >= 4096) for s in states}
    assert sizes == {(torch.uint8, True), (torch.float32, False)}
    assert len(states) == 2 * 7 + 3, "a pair for each linear layer, and the norms"


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("step", [5, 13])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    wide: Path, tmp_path: Path, whole: dict[str, tuple[Run, Path]], method: str, step: int
) -> None:
    class Stopped(Exception):
        """Stands for a crash."""

    def stop(event: Event) -> None:
        if event["event"] == "step" and event["step"] == step:
            raise Stopped

    recipe = of(wide, tmp_path, method)
    with pytest.raises(Stopped):
        train(recipe, listen=stop)
    torch.rand(7)
    run = train(recipe, resume=True)
    expected, folder = whole[method]
    files = [sorted(Path(each.adapter_dir).glob("*.safetensors")) for each in (run, expected)]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    assert losses(tmp_path) == losses(folder)


def test_adaptive_forgets_the_moments_of_what_it_resized_and_only_those(whole: dict[str, tuple[Run, Path]]) -> None:
    states = saved_state(whole["adaptive"][1])
    assert {state["state1"].dtype for state in states} == {torch.uint8}
    assert {15, *(15 - step for step in (4, 8, 12))} >= {state["step"] for state in states} != {15}


def test_a_checkpoint_remembers_whose_steps_they_were(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = of(wide, tmp_path, train__steps=2, train__save_every=1)
    with monkeypatch.context() as then:
        then.setattr("lorakit.training.checkpoints.package_of", lambda name: {"bitsandbytes": "0.1"})
        train(recipe)
    (tmp_path / "run" / "run.json").unlink()
    train(recipe, resume=True)
    starts = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "start"]
    assert starts[-1]["versions_changed"] == {"bitsandbytes": ["0.1", bnb.__version__]}


# ---- pages ----


def test_moments_that_were_loaded_go_into_pages_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no pages, so a mark stands for them, and a copy for the way to the device; real ones are below."""

    def paged(self: Any, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
        buffer: Any = torch.zeros_like(p, dtype=dtype)
        buffer.is_paged = True
        return buffer

    monkeypatch.setattr(bnb.optim.AdamW, "get_state_buffer", paged)
    monkeypatch.setattr(bnb.optim.AdamW, "prefetch_state", lambda self, p: None)
    p = parameter(64, 64)
    groups = [{"params": [p], "lr": 1e-3, "weight_decay": 0.0}]
    stepped, loaded = make_optimizer("paged-adamw-8bit", groups), make_optimizer("paged-adamw-8bit", groups)
    stepped.step()
    loaded.load_state_dict(stepped.state_dict())
    loaded.state[p].update({moment: loaded.state[p][moment].clone() for moment in ("state1", "state2")})
    into_pages(SimpleNamespace(optimizer=loaded))  # as accelerate wraps it
    for moment in ("state1", "state2"):
        assert loaded.state[p][moment].is_paged
        assert torch.equal(loaded.state[p][moment], stepped.state[p][moment])


def test_a_resumed_run_puts_what_it_loaded_into_pages(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = of(wide, tmp_path, train__steps=2, train__save_every=1)
    train(recipe)
    (tmp_path / "run" / "run.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    seen: list[set[int]] = []
    monkeypatch.setattr(trainer, "into_pages", lambda o: seen.append({state["step"] for state in o.state.values()}))
    train(recipe, resume=True)
    assert seen == [{1}]


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_an_optimizer_without_pages_stays_as_it_is(name: str) -> None:
    p = parameter(64, 64)
    optimizer = make_optimizer(name, [{"params": [p], "lr": 1e-3, "weight_decay": 0.0}])
    optimizer.step()
    before = dict(optimizer.state[p])
    into_pages(optimizer)
    assert all(optimizer.state[p][key] is value for key, value in before.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", UNPAGED)
def test_paged_moments_are_in_pages_step_like_others_and_stay_there_after_a_resume(name: str) -> None:
    refuse_optimizer(name, torch.device("cuda"))
    p, twin = (nn.Parameter(parameter(320, 320).detach().cuda()) for _ in range(2))
    p.grad, twin.grad = (parameter(320, 320, seed=1).detach().cuda() for _ in range(2))
    paged, loaded = (make_optimizer(name, [{"params": [p], "lr": 1e-2, "weight_decay": 0.0}]) for _ in range(2))
    plain = bnb.optim.AdamW([twin], lr=1e-2, weight_decay=0.0, optim_bits=8 if name in IN_8_BITS else 32)
    for _ in range(2):
        paged.step()
        plain.step()
    assert torch.equal(p, twin)
    loaded.load_state_dict(copy.deepcopy(paged.state_dict()))
    assert not hasattr(loaded.state[p]["state1"], "is_paged"), "bitsandbytes pages them itself now: into_pages can go"
    into_pages(loaded)
    assert loaded.state[p]["state1"].is_paged
    assert torch.equal(loaded.state[p]["state1"].cpu(), paged.state[p]["state1"].cpu())
    loaded.step()


# ---- what is refused ----


@pytest.mark.parametrize("name", UNPAGED)
def test_pages_without_a_cuda_device_are_refused_before_anything_is_loaded(tmp_path: Path, name: str) -> None:
    recipe = recipe_of(tmp_path / "no base here", tmp_path, train__optimizer=name)
    with pytest.raises(DeviceError) as refused:
        train(recipe)
    assert str(refused.value) == (
        f"train.optimizer: {name} keeps its moments in memory that a CUDA device and its host share, and this run is "
        f"on cpu; use train.optimizer: {name.removeprefix('paged-')}"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["adamw-8bit", "paged-adamw"])
def test_an_absent_bitsandbytes_is_named_with_its_extra(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"package 'bitsandbytes', .* pip install 'lorakit\[quant\]'"):
        make_optimizer(name, [])
    if name == "adamw-8bit":
        with pytest.raises(MissingExtraError, match=r"lorakit\[quant\]"):
            train(of(wide, tmp_path, train__optimizer=name))
    refuse_optimizer("adamw", CPU)


def test_a_bitsandbytes_that_cannot_step_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Any) -> None:
        raise NotImplementedError("no kernel\n for this device")

    monkeypatch.setattr(bnb.optim.AdamW, "step", absent)
    with pytest.raises(DeviceError) as refused:
        refuse_optimizer("adamw-8bit", CPU)
    assert str(refused.value) == (
        f"train.optimizer: adamw-8bit does not work on cpu with bitsandbytes {bnb.__version__} (no kernel for this "
        "device); use train.optimizer: adamw, or another bitsandbytes"
    )
    monkeypatch.setattr(bnb.optim.AdamW, "step", lambda self: None)
    with pytest.raises(DeviceError, match=r"\(a step of -1 was one of 0\); use train.optimizer: adamw"):
        refuse_optimizer("adamw-8bit", CPU)


def test_trying_an_optimizer_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    refuse_optimizer("adamw-8bit", CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_misspelt_optimizer_is_told_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"train\.optimizer: .*adamw-8bit"):
        make_recipe({"train": {"optimizer": "adamw_8bit"}})


def test_another_optimizer_is_no_resume(wide: Path, tmp_path: Path) -> None:
    train(of(wide, tmp_path, train__steps=2))
    with pytest.raises(RecipeError, match=r"train\.optimizer: 'adamw-8bit' -> 'adamw'"):
        train(of(wide, tmp_path, train__steps=2, train__optimizer="adamw"), resume=True)


def test_bitsandbytes_is_not_imported_before_it_is_asked_for() -> None:
    code = "import lorakit, lorakit.training.optimizers, sys; sys.exit('bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
