"""Parity of PEFT's files for every method PEFT has, both ways: it loads what we save, and we load what it saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.method import Method
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.state import trim
from lorakit.inject.attach import attach, state
from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.block import BlockDiagonal
from lorakit.methods.dora import DoRA
from lorakit.methods.ia3 import IA3
from lorakit.methods.loha import LoHa
from lorakit.methods.lokr import LoKr
from lorakit.methods.lora import LoRA
from lorakit.methods.lora_fa import LoRAFA
from lorakit.methods.vera import VeRA
from lorakit.persist import files, load, save
from tests.parity.test_peft_format import gpt2, llama, logits, peft_loads, peft_noise, peft_saves, same, tokens
from tests.tolerances import assert_close


class Pictures(nn.Module):
    """Convolutions of each dimension without groups, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Conv2d(4, 8, 3, padding=1)
        self.line = nn.Conv1d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(batch, 5)` from `(batch, 4, 6, 6)`."""
        y: Tensor = self.out(self.line(self.plane(x).relu().flatten(2)).mean(-1))
        return y


def pictures() -> nn.Module:
    torch.manual_seed(1)
    return Pictures().eval()


def pixels() -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Case:
    """A base, its input, and one adapter said twice: in lorakit's words and in PEFT's."""

    base: Callable[[], nn.Module]
    method: Method
    targets: tuple[str, ...]
    config: str
    peft: dict[str, Any]
    overrides: tuple[Override, ...] = ()

    @property
    def x(self) -> Tensor:
        return pixels() if self.base is pictures else tokens()

    def adapted(self) -> nn.Module:
        """Return our model with every trained tensor of the adapter off its start."""
        model = self.base()
        handle = attach(model, AdapterSpec(self.method, Targets(self.targets), overrides=self.overrides))
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    def theirs(self) -> Any:
        """Return PEFT's model with every trained tensor off its start."""
        import peft

        arguments = dict(self.peft)
        if "use_bdlora" in arguments:
            from peft.tuners.lora import BdLoraConfig

            arguments["use_bdlora"] = BdLoraConfig(**arguments["use_bdlora"])
        config = getattr(peft, self.config)(target_modules=list(self.targets), **arguments)
        with peft_noise():
            model: Any = peft.get_peft_model(self.base(), config)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model.eval()


_LORA = {"r": 4, "lora_alpha": 8}
_UP = {"target_modules_bd_b": ["q_proj", "up_proj"], "target_modules_bd_a": [], "nblocks": 2}
_BOTH = {"target_modules_bd_b": ["q_proj"], "target_modules_bd_a": ["down_proj"], "nblocks": 2}
CASES = {
    "adalora": Case(
        llama, AdaLoRA(4, 6, 8.0), ("q_proj", "down_proj"), "AdaLoraConfig",
        {"target_r": 4, "init_r": 6, "lora_alpha": 8, "total_step": 10},
    ),
    "adalora, gpt2": Case(
        gpt2, AdaLoRA(4, 6, 8.0), ("c_attn", "c_proj"), "AdaLoraConfig",
        {"target_r": 4, "init_r": 6, "lora_alpha": 8, "total_step": 10},
    ),
    "adalora, convolution": Case(
        pictures, AdaLoRA(4, 5, 8.0), ("plane", "out"), "AdaLoraConfig",
        {"target_r": 4, "init_r": 5, "lora_alpha": 8, "total_step": 10},
    ),
    "block-diagonal": Case(
        llama, BlockDiagonal(4, 8.0, side="up"), ("q_proj", "up_proj"), "LoraConfig", {**_LORA, "use_bdlora": _UP}
    ),
    "block-diagonal, sides": Case(
        llama, BlockDiagonal(4, 8.0, side="up"), ("q_proj", "down_proj"), "LoraConfig", {**_LORA, "use_bdlora": _BOTH},
        (Override.of("down_proj", side="down"),),
    ),
    "dora": Case(llama, DoRA(LoRA(4, 8.0)), ("q_proj", "down_proj"), "LoraConfig", {**_LORA, "use_dora": True}),
    "dora, gpt2": Case(gpt2, DoRA(LoRA(4, 8.0)), ("c_attn", "c_fc", "wte"), "LoraConfig", {**_LORA, "use_dora": True}),
    "dora, patterns": Case(
        llama, DoRA(LoRA(4, 8.0, True)), ("q_proj", "v_proj"), "LoraConfig",
        {**_LORA, "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
        (Override.of("v_proj", inner=LoRA(2, 8.0, True)),),
    ),
    "dora, convolutions": Case(
        pictures, DoRA(LoRA(4, 8.0)), ("plane", "line", "out"), "LoraConfig", {**_LORA, "use_dora": True}
    ),
    "ia3": Case(
        llama, IA3(), ("k_proj", "v_proj", "down_proj"), "IA3Config", {"feedforward_modules": ["down_proj"]},
        (Override.of("down_proj", side="input"),),
    ),
    "ia3, input": Case(gpt2, IA3("input"), ("c_proj",), "IA3Config", {"feedforward_modules": ["c_proj"]}),
    "ia3, convolution": Case(pictures, IA3("input"), ("plane",), "IA3Config", {"feedforward_modules": ["plane"]}),
    "loha": Case(
        llama, LoHa(4, 8.0), ("q_proj", "down_proj"), "LoHaConfig", {"r": 4, "alpha": 8, "rank_pattern": {"q_proj": 2}},
        (Override.of("q_proj", rank=2),),
    ),
    "loha, convolutions": Case(pictures, LoHa(3, 6.0), ("plane", "line", "out"), "LoHaConfig", {"r": 3, "alpha": 6}),
    "lokr": Case(llama, LoKr(1, 4.0), ("q_proj", "down_proj"), "LoKrConfig", {"r": 1, "alpha": 4}),
    "lokr, both factored": Case(
        llama, LoKr(1, 4.0, 8, True), ("q_proj", "down_proj"), "LoKrConfig",
        {"r": 1, "alpha": 4, "decompose_factor": 8, "decompose_both": True},
    ),
    "lokr, whole": Case(llama, LoKr(8, 16.0), ("q_proj", "down_proj"), "LoKrConfig", {"r": 8, "alpha": 16}),
    "lokr, convolutions": Case(pictures, LoKr(1, 4.0), ("plane", "line", "out"), "LoKrConfig", {"r": 1, "alpha": 4}),
    "lora-fa": Case(llama, LoRAFA(4, 8.0), ("q_proj", "down_proj"), "LoraConfig", _LORA),
    "vera": Case(llama, VeRA(8), ("q_proj", "down_proj", "up_proj"), "VeraConfig", {"r": 8}),
    "vera, gpt2": Case(gpt2, VeRA(8, key=3), ("c_attn", "c_proj"), "VeraConfig", {"r": 8, "projection_prng_key": 3}),
}  # fmt: skip

EFFECTIVE = {
    f"{name}, by a core": replace(CASES[name], targets=targets, peft={**CASES[name].peft, "use_effective_conv2d": True})
    for name, targets in {
        "loha, convolutions": ("plane", "line", "out"),
        "lokr, convolutions": ("plane", "out"),  # PEFT 0.21 cannot run a one-dimensional one
    }.items()
}
"""What PEFT writes and this does not: the core of a Tucker-2 decomposition, which is multiplied out."""


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_ours_with_equal_logits_and_its_own_keys(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.adapted()
    save(state(model), tmp_path / "ours")
    assert (logits(model, case.x) - logits(case.base(), case.x)).abs().max() > 5e-3
    assert_close(logits(peft_loads(tmp_path / "ours", case.base()), case.x), logits(model, case.x))
    peft_saves(case.theirs(), tmp_path / "theirs")
    mine, yours = (files.read_safetensors(tmp_path / n / "adapter_model.safetensors")[0] for n in ("ours", "theirs"))
    table = {key for key in yours if key.endswith("base_layer.weight")}  # PEFT saves the table it adapts as well
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in yours.items() if k not in table}


@pytest.mark.parametrize("case", [*CASES.values(), *EFFECTIVE.values()], ids=[*CASES, *EFFECTIVE])
def test_we_load_peft_s_with_equal_logits(case: Case, tmp_path: Path) -> None:
    model = case.theirs()
    peft_saves(model, tmp_path)
    found = load(tmp_path)
    base = case.base()
    attach(base, found)
    assert_close(logits(base, case.x), logits(model, case.x))
    save(found, tmp_path / "again")
    again = case.base()
    attach(again, load(tmp_path / "again"))
    assert_close(logits(again, case.x), logits(model, case.x))


@pytest.mark.parametrize("name", CASES)
def test_a_saved_adapter_comes_back_bit_for_bit_with_its_spec(name: str, tmp_path: Path) -> None:
    before = state(CASES[name].adapted())
    save(before, tmp_path)
    after = load(tmp_path)
    same(before, after)
    assert (after.spec, after.base, after.parameters) == (before.spec, before.base, before.parameters)


@pytest.mark.parametrize("name", CASES)
def test_peft_s_files_alone_mean_the_same_adapter(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.adapted()
    save(state(model), tmp_path)
    (tmp_path / "lorakit.json").unlink()
    base = case.base()
    found = load(tmp_path)
    attach(base, found)
    assert_close(logits(base, case.x), logits(model, case.x))
    if name not in ("lora-fa", "lokr, whole"):  # to PEFT a LoRA; and an alpha that means nothing where W1, W2 are whole
        assert {u.site.path: u.method for u in found.updates} == {u.site.path: u.method for u in state(model).updates}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # which are PEFT's own, and not ignored
def test_triplets_adalora_pruned_are_left_out_both_ways(tmp_path: Path) -> None:
    case = CASES["adalora"]
    model = case.adapted()
    first = state(model)
    for number, update in enumerate(first.updates):
        update.tensors["gain"][number + 1 :: 2] = 0  # another number of triplets at each weight
    pruned = case.base()
    attach(pruned, first)
    small = trim(first)
    assert len({u.method for u in small.updates}) > 1
    save(small, tmp_path / "ours")
    same(small, load(tmp_path / "ours"))
    theirs = peft_loads(tmp_path / "ours", case.base())
    assert_close(logits(theirs, case.x), logits(pruned, case.x))
    peft_saves(theirs, tmp_path / "theirs")
    again = case.base()
    attach(again, load(tmp_path / "theirs"))
    assert_close(logits(again, case.x), logits(pruned, case.x))
