"""Parity with PEFT where a pair starts off zero: as a plain LoRA of rank 2r, and against PEFT's own PiSSA and OLoRA.

PEFT moves the base, we do not, so factors cannot be compared; after the same change of both pairs, logits can. An SVD
leaves the sign of each direction open: the change is turned with PEFT's signs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import load, save, state
from lorakit.core.init import Init
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import AdapterFileError
from lorakit.inits.gaussian import Gaussian
from lorakit.inits.olora import OLoRA
from lorakit.inits.pissa import Pissa
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.sites import sites
from lorakit.methods.lora import LoRA
from tests.inject.test_attach import IDS, MODELS, gpt2, llama
from tests.law.cases import KINDS, Net, jitter
from tests.tolerances import assert_close


def moved(model: nn.Module, init: Init, stabilised: bool = False) -> nn.Module:
    """Attach and move both factors of every pair."""
    attach(model, AdapterSpec(LoRA(4, 8.0, stabilised, init)))
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    return model


@torch.no_grad()
def fallen(model: nn.Module) -> nn.Module:
    """Return the model with each weight's spectrum falling by 0.3 a step, so that two SVDs agree on its directions."""
    for site in sites(model).sites:
        weight: Any = model.get_submodule(site.path).weight
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(u @ torch.diag(s[0] * 0.3 ** torch.arange(len(s))) @ vh)
    return model


@pytest.mark.parametrize("init", [Pissa(), Pissa(4), OLoRA()])
@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("build", MODELS)
def test_saved_it_is_a_lora_of_rank_2r_on_the_untouched_base(
    build: Callable[[], nn.Module], stabilised: bool, init: Init, tmp_path: Path
) -> None:
    from peft import PeftModel

    base = build()
    model = moved(copy.deepcopy(base), init, stabilised)
    y = model(IDS).logits
    save(state(model), tmp_path)
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))  # type: ignore[arg-type]
    assert {c.r for c in theirs.peft_config.values()} == {8}
    assert_close(theirs(IDS).logits, y)
    attach(base, load(tmp_path))
    assert_close(base(IDS).logits, y)


@pytest.mark.parametrize(
    ("kind", "rows"),
    [("linear", ""), ("linear", "[0:4,6:8]"), ("conv2d, grouped, reflected", ""), ("embedding", "")],
)
def test_saved_slices_groups_and_tables_read_back_as_they_were(kind: str, rows: str, tmp_path: Path) -> None:
    model, x = Net(KINDS[kind].layer()), KINDS[kind].inputs()
    twin = copy.deepcopy(model)
    attach(model, AdapterSpec(LoRA(2, 4.0, init_=Pissa()), Targets(f"layer{rows}")))
    for adapter in adapters_named(model, "default"):
        jitter(adapter)
    if "reflected" in kind:  # which PEFT forgets
        with pytest.raises(AdapterFileError, match="forgets the padding_mode of a convolution"):
            save(state(model), tmp_path)
    save(state(model), tmp_path, "native" if "reflected" in kind else "peft")
    attach(twin, load(tmp_path))
    assert_close(twin(x), model(x))


@pytest.mark.parametrize(
    ("init", "name", "build"),
    [
        (Pissa(), "pissa", llama),
        (Pissa(), "pissa", gpt2),
        (Pissa(8), "pissa_niter_8", llama),
        (OLoRA(), "olora", llama),
    ],
)
def test_peft_s_own_model_gives_the_same_logits(init: Init, name: str, build: Callable[[], nn.Module]) -> None:
    from peft import LoraConfig, get_peft_model

    base = fallen(build())
    before = base(IDS).logits
    ours = moved(copy.deepcopy(base), init)
    paths = [adapter.site.path for adapter in adapters_named(ours, "default")]
    conv1d = build is gpt2
    config = LoraConfig(r=4, lora_alpha=8, target_modules=paths, init_lora_weights=name, fan_in_fan_out=conv1d)  # type: ignore[arg-type]
    theirs: Any = get_peft_model(base, config)  # type: ignore[arg-type]
    assert_close(theirs(IDS).logits, before)
    with torch.no_grad():
        for adapter in adapters_named(ours, "default"):
            layer, t = theirs.base_model.model.get_submodule(adapter.site.path), adapter.tensors()
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            sign = (down * t["down_start"]).sum(1).sign()
            assert_close(sign.unsqueeze(1) * down, t["down_start"], scale=10.0)  # two SVDs of one matrix
            down += sign.unsqueeze(1) * (t["down"] - t["down_start"])
            up += (t["up"] - t["up_start"]) * sign
    y = ours(IDS).logits.detach()
    assert not torch.allclose(y, before, atol=1e-2)
    assert_close(y, theirs(IDS).logits)


def test_peft_still_factors_gpt2_s_weights_the_wrong_way_round() -> None:
    # where this fails, PEFT has mended it: add gpt2 to the olora case above
    from peft import LoraConfig, get_peft_model

    layer = Conv1D(12, 12)
    nn.init.normal_(layer.weight)
    model, x = Net(layer), torch.randn(3, 12)
    before = model(x)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], init_lora_weights="olora", fan_in_fan_out=True)
    theirs: Any = get_peft_model(copy.deepcopy(model), config)  # type: ignore[arg-type]
    assert not torch.allclose(theirs(x), before, atol=0.1)
    attach(model, AdapterSpec(LoRA(4, init_=OLoRA()), Targets("layer")))
    assert torch.equal(model(x), before)


def test_gaussian_of_power_1_is_peft_s() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, target_modules=["layer"], init_lora_weights="gaussian")
    peft: Any = get_peft_model(Net(nn.Linear(900, 900)), config)  # type: ignore[arg-type]
    ours = Net(nn.Linear(900, 900))
    attach(ours, AdapterSpec(LoRA(16, init_=Gaussian(power=1.0)), Targets("layer")))
    mine = adapters_named(ours, "default")[0].get_parameter("down").detach()
    theirs = peft.base_model.model.layer.lora_A["default"].weight.detach()
    assert abs(float(mine.std() / theirs.std()) - 1) < 0.03
