"""Methods PEFT has a form for, without PEFT: what is refused both ways, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.method import Method
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.state import AdapterState
from lorakit.errors import AdapterFileError
from lorakit.inits.pissa import Pissa
from lorakit.inject.attach import attach, state
from lorakit.methods.block import BlockDiagonal
from lorakit.methods.dora import DoRA
from lorakit.methods.hierarchical import Hierarchical
from lorakit.methods.ia3 import IA3
from lorakit.methods.krona import KronA
from lorakit.methods.loha import LoHa
from lorakit.methods.lokr import LoKr
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture
from lorakit.methods.vera import VeRA
from lorakit.persist import load, peft_refusal, save
from lorakit.persist.peft import from_peft, to_peft

PREFIX = "base_model.model."


def model() -> nn.Module:
    """One layer of each kind, under paths that tell them."""
    return nn.ModuleDict(
        {
            "linear": nn.Linear(12, 8),
            "bare": nn.Linear(12, 8, bias=False),
            "linear2": nn.Linear(12, 8),
            "table": nn.Embedding(12, 8),
            "line": nn.Conv1d(12, 8, 3),
            "grouped": nn.Conv2d(12, 8, 3, groups=2),
        }
    )


def of(method: Method, *targets: str, overrides: tuple[Override, ...] = ()) -> AdapterState:
    """Return the state of a method at those layers."""
    base = model()
    attach(base, AdapterSpec(method, Targets(targets), overrides=overrides))
    return state(base)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (of(DoRA(LoRA(4)), "grouped"), "grouped: PEFT's LORA has no grouped convolution"),
        (of(DoRA(IA3("input")), "linear"), "linear: PEFT has DoRA of lora alone, not of ia3"),
        (of(DoRA(LoRA(4, init_=Pissa())), "linear"), "linear: PEFT's LORA has no place for down_start, up_start"),
        (of(LoHa(2), "table"), "table: PEFT's LOHA has no layer of kind embedding"),
        (of(LoHa(2), "grouped"), "grouped: PEFT's LOHA has no grouped convolution"),
        (of(LoKr(8), "line"), "line: PEFT's LoKr mixes channels and positions"),
        (of(LoKr(1), "table"), "table: PEFT's LOKR has no layer of kind embedding"),
        (of(IA3(), "linear"), "linear: PEFT's output side multiplies its bias too"),
        (of(IA3("input"), "line"), "line: PEFT's IA3 has no layer of kind conv1d"),
        (of(BlockDiagonal(4), "linear"), "linear: PEFT has one side in blocks, not both"),
        (of(LoHa(2), "linear[0:4]"), "linear[0:4]: PEFT has no loha for rows of a layer"),
        (
            of(VeRA(4), "linear", "bare", overrides=(Override.of("bare", rank=8),)),
            "PEFT's VERA has one r for all layers",
        ),
        (
            of(BlockDiagonal(4, side="up"), "linear", "bare", overrides=(Override.of("bare", blocks=4),)),
            "PEFT has one number of blocks for all layers, not [2, 4]",
        ),
        (
            of(BlockDiagonal(4, side="up"), "re:linear", "linear2", overrides=(Override.of("linear2", side="down"),)),
            "PEFT would read linear2 as side up, for linear is a part of its name",
        ),
        (
            of(LoKr(1), "linear", "bare", overrides=(Override.of("bare", factor=2),)),
            "PEFT has one decompose_factor for all layers",
        ),
    ],
)
def test_what_peft_has_no_form_for_is_refused_with_the_layer_and_the_reason(given: AdapterState, said: str) -> None:
    why = peft_refusal(given)
    assert why is not None
    assert said in why
    assert "native" not in why  # what to do is said by `save` and by the command, each in its words


@pytest.mark.parametrize("method", [Mixture(2, 2), KronA(2, 3), Hierarchical(2, 4.0, 2, 2)])
def test_a_method_without_a_form_is_refused_by_its_name(method: Method, tmp_path: Path) -> None:
    with pytest.raises(
        AdapterFileError, match=rf"no PEFT form:\n  - bare: {method.name}.*\n.*save\(\.\.\., format='native'\)"
    ):
        save(of(method, "bare"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_bank_that_is_no_part_of_the_widest_is_refused() -> None:
    given = of(VeRA(4), "linear", "bare")
    moved = {**given.updates[0].tensors, "down": given.updates[0].tensors["down"] + 1}
    given = replace(given, updates=(given.updates[1], replace(given.updates[0], tensors=moved)))
    with pytest.raises(AdapterFileError, match="linear.down is no part of the one vera_A PEFT has for all layers"):
        to_peft(given)


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        (
            {"peft_type": "VERA", "r": 4, "save_projection": False},
            {"q.vera_lambda_b": (6,), "q.vera_lambda_d": (4,)},
            "save_projection = False",
        ),
        ({"peft_type": "VERA", "r": 4}, {"q.vera_lambda_b": (6,)}, "q.vera_lambda_d: missing"),
        ({"peft_type": "VERA", "r": 1}, {"q.vera_lambda_b": (6,), "q.vera_lambda_d": (1,)}, "base_model.vera_A: miss"),
        (
            {"peft_type": "LOHA", "r": 2, "alpha": 2},
            {"q.hada_w1_a": (6, 3), "q.hada_w1_b": (3, 5), "q.hada_w2_a": (6, 3), "q.hada_w2_b": (3, 5)},
            "q: hada_w1_a has rank 3, the configuration says 2",
        ),
        (
            {"peft_type": "LOHA", "r": 2, "alpha": 2},
            {"q.hada_w1_a": (6, 2), "q.hada_w1_b": (3, 5), "q.hada_w2_a": (6, 2), "q.hada_w2_b": (2, 5)},
            "do not multiply",
        ),
        (
            {"peft_type": "LOHA", "r": 2, "alpha": 2},
            {**{f"q.hada_w{i}_{s}": (2, 2) for i in (1, 2) for s in "ab"}, "q.hada_t1": (2, 2, 3, 3)},
            "(2, 2), (2, 18), (2, 2), (2, 2) do not multiply",
        ),
        (
            {"peft_type": "LOHA", "r": 2, "alpha": 2},
            {**{f"q.hada_w{i}_{s}": (2, 2) for i in (1, 2) for s in "ab"}, "q.hada_t1": (3, 2, 3, 3)},
            "q: a core and two factors of shapes (3, 2, 3, 3), (2, 2), (2, 2) do not multiply",
        ),
        ({"peft_type": "LOKR", "r": 1, "alpha": 1}, {"q.lokr_w1": (2, 2)}, "not the factors of one Kronecker product"),
        (
            {"peft_type": "LOKR", "r": 8, "alpha": 8},
            {"q.lokr_w1": (2, 2), "q.lokr_w2": (2, 2, 3)},
            "mixes channels and positions",
        ),
        ({"peft_type": "IA3"}, {"q.ia3_l": (3, 2)}, "ia3_l of shape (3, 2) is no vector"),
        (
            {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["k"]}},
            {"q.lora_A.weight": (4, 3), "q.lora_B.weight": (6, 4)},
            "use_bdlora names no side of q",
        ),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_dora": True},
         {"q.lora_A.weight": (4, 3), "q.lora_B.weight": (6, 4)}, "q.lora_magnitude_vector: missing"),
        ({"peft_type": "VERA", "r": "4"}, {}, "r must be a whole number, not '4'"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_with_the_reason(
    config: dict[str, Any], tensors: dict[str, Any], said: str
) -> None:
    given: dict[str, Tensor] = {f"{PREFIX}{key}": torch.randn(shape) for key, shape in tensors.items()}
    with pytest.raises(AdapterFileError) as caught:
        from_peft(config, given)
    assert said in str(caught.value)


def test_peft_s_ia3_of_an_output_with_a_bias_is_refused_where_the_layer_is_met() -> None:
    read = from_peft({"peft_type": "IA3", "feedforward_modules": []}, {f"{PREFIX}linear.ia3_l": torch.randn(8, 1)})
    with pytest.raises(AdapterFileError, match="have a bias, and the adapter is for layers without one"):
        attach(model(), read)
    assert peft_refusal(read) is None


def test_a_whole_lokr_of_peft_s_takes_its_scale_into_w1() -> None:
    w1, w2 = torch.randn(2, 3), torch.randn(4, 4)
    tensors = {f"{PREFIX}bare.lokr_w1": w1, f"{PREFIX}bare.lokr_w2": w2}
    (update,) = from_peft({"peft_type": "LOKR", "r": 8, "alpha": 16}, tensors).updates
    assert torch.equal(update.tensors["w1"], 2 * w1)  # PEFT's alpha / r; ours has s = 1 where both are whole
    config, again = to_peft(AdapterState(AdapterSpec(update.method, Targets("bare")), (update,)))
    assert (config["r"], config["alpha"]) == (8, 8.0)
    assert torch.equal(again[f"{PREFIX}bare.lokr_w1"], 2 * w1)


def test_a_layer_that_says_nothing_of_its_bias_is_not_guessed_about(tmp_path: Path) -> None:
    given = of(IA3(), "bare")
    assert peft_refusal(given) is None
    save(given, tmp_path, "native")
    assert peft_refusal(load(tmp_path)) is None
    unknown = replace(given.updates[0], site=replace(given.updates[0].site, bias=None))
    assert "a bias, which this layer may have," in (peft_refusal(replace(given, updates=(unknown,))) or "")
