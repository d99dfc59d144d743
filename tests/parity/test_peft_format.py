"""Parity of PEFT's file format, both ways: PEFT loads what we save, we load what PEFT saves, and the outputs agree."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.state import AdapterState
from lorakit.errors import AdapterFileError
from lorakit.inject.attach import adapters_named, attach, state
from lorakit.methods.block import BlockDiagonal
from lorakit.methods.loha import LoHa
from lorakit.methods.lora import LoRA
from lorakit.persist import load, save
from tests.law.cases import jitter
from tests.tolerances import assert_close


class Convolutions(nn.Module):
    """Every convolution PEFT adapts, and a bare name (`mix`) that is also the end of another path."""

    def __init__(self) -> None:
        super().__init__()
        self.space = nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1))
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, stride=2, padding=1)
        self.mix = nn.Conv2d(12, 6, 1)
        self.inner = nn.ModuleDict({"mix": nn.Conv1d(6, 6, 3, groups=2, padding=1), "free": nn.Linear(6, 6)})
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(batch, 5)` from `(batch, 2, 2, 6, 6)`."""
        y = self.mix(self.grouped(self.space(x).flatten(1, 2)).relu()).flatten(2)
        logits: Tensor = self.out(self.inner["free"](self.inner["mix"](y).mean(-1)))
        return logits


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32)).eval()


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def convolutions() -> nn.Module:
    torch.manual_seed(1)
    return Convolutions().eval()


def tokens() -> Tensor:
    return torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(2))


def pictures() -> Tensor:
    return torch.randn(2, 2, 2, 6, 6, generator=torch.Generator().manual_seed(2))


def logits(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


@dataclass(frozen=True)
class Case:
    """A base, its input, and one adapter said twice: in lorakit's words and in PEFT's."""

    base: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    spec: AdapterSpec
    peft: dict[str, Any]


def case(
    base: Callable[[], nn.Module], targets: tuple[str, ...], *overrides: Override, inputs: Any = tokens, **peft: Any
) -> Case:
    train = tuple(peft.get("modules_to_save", ()))
    spec = AdapterSpec(LoRA(4, 8.0), Targets(targets), train=train, overrides=overrides)
    return Case(base, inputs, spec, {"target_modules": list(targets), **peft})


CASES = {
    "gpt2, every layer": case(gpt2, ("c_attn", "c_proj", "c_fc")),
    "gpt2, embeddings": case(gpt2, ("wte", "wpe", "c_attn")),
    "llama, linear": case(llama, ("q_proj", "v_proj", "down_proj")),
    "llama, head": case(llama, ("lm_head", "o_proj")),
    "llama, patterns": case(
        llama,
        ("q_proj", "v_proj", "up_proj"),
        Override.of("v_proj", rank=2, alpha=3.0),
        Override.of("up_proj", layers="1", alpha=5.0),
        Override.of("q_proj", layers="0", rank=6),
        rank_pattern={"v_proj": 2, "layers.0.self_attn.q_proj": 6},
        alpha_pattern={"v_proj": 3.0, r"layers\.1\.mlp\.up_proj": 5.0},
    ),
    "bert, classification head": case(bert, ("query", "value"), modules_to_save=["classifier"]),
    "bert, container saved whole": case(bert, ("query", "value"), modules_to_save=["pooler", "classifier"]),
    "convolutions": case(
        convolutions, ("space", "grouped", "mix", "inner.mix", "out"), Override.of("space", rank=2), inputs=pictures,
        rank_pattern={"space": 2},
    ),
}  # fmt: skip


@contextmanager
def peft_noise() -> Iterator[None]:
    """Quiet the warnings PEFT gives on any such model, and only those."""
    with warnings.catch_warnings():
        for message in (
            "LoRA adapter added to ConvNd layer with groups > 1",
            "fan_in_fan_out is set to",
            "Setting `save_embedding_layers` to `True`",
            "Model has `tie_word_embeddings=True`",
            "Could not find a config file",
            "Could not identify embedding",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def ours(spec: AdapterSpec, base: nn.Module) -> nn.Module:
    """Return `base` with random factors attached, and whatever is trained whole moved off the base."""
    handle = attach(base, spec)
    for adapter in adapters_named(base, "default"):
        jitter(adapter)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return base


def theirs(case: Case, base: nn.Module, **more: Any) -> Any:
    """Return PEFT's model of a case with random factors, what it saves whole moved off the base."""
    from peft import LoraConfig, get_peft_model

    with peft_noise():
        model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **{**case.peft, **more}))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def peft_loads(path: Path, base: nn.Module) -> Any:
    """Return PEFT's reading of a directory; a missing or unexpected key is an error."""
    from peft import PeftModel

    with peft_noise():
        return PeftModel.from_pretrained(base, str(path)).eval()  # type: ignore[arg-type]


def peft_saves(model: Any, path: Path) -> None:
    with peft_noise():
        model.save_pretrained(str(path))


def stabilised(spec: AdapterSpec) -> AdapterSpec:
    return replace(spec, method=replace(spec.method, stabilised=True))  # type: ignore[call-arg]


def same(one: AdapterState, other: AdapterState) -> None:
    """Assert that two states hold the same updates and whole modules, bit for bit."""
    mine, yours = ({u.site.key: u for u in s.updates} for s in (one, other))
    assert mine.keys() == yours.keys()
    for key, update in mine.items():
        assert (update.site, update.method) == (yours[key].site, yours[key].method)
        assert all(torch.equal(t, yours[key].tensors[name]) for name, t in update.tensors.items())
    assert one.trained.keys() == other.trained.keys()
    assert all(torch.equal(t, other.trained[name]) for name, t in one.trained.items())


@pytest.mark.parametrize("rs", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("name", CASES)
def test_peft_loads_ours_with_equal_logits(name: str, rs: bool, tmp_path: Path) -> None:
    case = CASES[name]
    model = ours(stabilised(case.spec) if rs else case.spec, case.base())
    save(state(model), tmp_path / "adapter")
    x = case.inputs()
    assert (logits(model, x) - logits(case.base(), x)).abs().max() > 1e-2
    assert_close(logits(peft_loads(tmp_path / "adapter", case.base()), x), logits(model, x))


@pytest.mark.parametrize("rs", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("convolutions", "llama, head")])
def test_we_load_peft_s_with_equal_logits(name: str, rs: bool, tmp_path: Path) -> None:
    case = CASES[name]
    model = theirs(case, case.base(), use_rslora=rs)
    peft_saves(model, tmp_path)
    base = case.base()
    attach(base, load(tmp_path))
    assert_close(logits(base, case.inputs()), logits(model, case.inputs()))


@pytest.mark.parametrize("name", CASES)
def test_a_saved_adapter_comes_back_bit_for_bit_with_its_spec(name: str, tmp_path: Path) -> None:
    before = state(ours(CASES[name].spec, CASES[name].base()))
    save(before, tmp_path)
    after = load(tmp_path)
    same(before, after)
    assert after.spec == before.spec
    assert after.base == before.base


@pytest.mark.parametrize("name", CASES)
def test_peft_s_files_alone_mean_the_same_adapter(name: str, tmp_path: Path) -> None:
    model = ours(CASES[name].spec, CASES[name].base())
    save(state(model), tmp_path)
    (tmp_path / "lorakit.json").unlink()
    base = CASES[name].base()
    attach(base, load(tmp_path))
    same(state(model), state(base))
    save(state(base), tmp_path / "again")
    again = CASES[name].base()
    attach(again, load(tmp_path / "again"))
    same(state(model), state(again))


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|v)_proj"])
def test_we_load_peft_s_targets_given_as_a_word_or_an_expression(targets: str, tmp_path: Path) -> None:
    model = theirs(CASES["llama, linear"], llama(), target_modules=targets)
    peft_saves(model, tmp_path)
    base = llama()
    attach(base, load(tmp_path))
    assert_close(logits(base, tokens()), logits(model, tokens()))


def test_we_load_a_grouped_convolution_of_peft_s_only_where_it_is_one(tmp_path: Path) -> None:

    peft_saves(theirs(CASES["convolutions"], convolutions()), tmp_path)
    with pytest.raises(AdapterFileError, match="grouped: lora_A mixes the channels of 4 groups"):
        load(tmp_path)


def test_slices_of_a_fused_layer_are_one_lora_for_peft_and_slices_again_for_us(tmp_path: Path) -> None:
    spec = AdapterSpec(
        LoRA(4, 8.0), Targets(("c_attn[q,v]", "mlp.c_proj")), overrides=(Override.of("c_attn[v]", rank=2, alpha=7.0),)
    )
    for each in (spec, stabilised(spec)):
        model = ours(each, gpt2())
        save(state(model), tmp_path)
        assert_close(logits(peft_loads(tmp_path, gpt2()), tokens()), logits(model, tokens()))
        base = gpt2()
        attach(base, load(tmp_path))
        assert [u.site for u in state(base).updates] == [u.site for u in state(model).updates]
        assert_close(logits(base, tokens()), logits(model, tokens()))


def test_tied_embeddings_trained_whole_stay_tied_in_peft(tmp_path: Path) -> None:
    for name in ("embed_tokens", "lm_head"):
        model = ours(AdapterSpec(LoRA(4, 8.0), Targets("q_proj"), train=(name,)), llama(tied=True))
        save(state(model), tmp_path)
        assert_close(logits(peft_loads(tmp_path, llama(tied=True)), tokens()), logits(model, tokens()))


def test_a_resized_vocabulary_travels_with_the_adapter(tmp_path: Path) -> None:
    def resized() -> Any:
        base: Any = llama()
        base.resize_token_embeddings(57, mean_resizing=False)
        return base

    x = tokens() + 7
    model = ours(AdapterSpec(LoRA(4, 8.0), Targets("q_proj"), train=("embed_tokens", "lm_head")), resized())
    save(state(model), tmp_path)
    assert_close(logits(peft_loads(tmp_path, resized()), x), logits(model, x))
    base = resized()
    attach(base, load(tmp_path))
    assert_close(logits(base, x), logits(model, x))


def test_peft_s_tied_modules_to_save_load_with_equal_logits(tmp_path: Path) -> None:
    case = CASES["llama, linear"]
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    model = theirs(case, llama(tied=True), **saved)
    peft_saves(model, tmp_path)
    base = llama(tied=True)
    attach(base, load(tmp_path))
    assert_close(logits(base, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_a_copy_of_a_tied_table_that_peft_trained_apart_is_refused_where_both_ends_would_change(
    layer: str, tmp_path: Path
) -> None:
    model = theirs(CASES["llama, linear"], llama(tied=True), target_modules=["q_proj"], modules_to_save=[layer])
    peft_saves(model, tmp_path / "theirs")
    found = load(tmp_path / "theirs")
    save(found, tmp_path / "native", format="native")
    save(found, tmp_path / "peft")
    for place in ("theirs", "native", "peft"):
        with pytest.raises(AdapterFileError, match=rf"{layer}.weight: PEFT trained a copy of its own, .* is tied to"):
            attach(llama(tied=True), load(tmp_path / place))
    apart = llama()
    apart.load_state_dict(llama(tied=True).state_dict())
    attach(apart, found)
    assert_close(logits(apart, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("layer", ["model.embed_tokens", "lm_head"])
def test_the_table_peft_saves_beside_its_lora_is_kept_and_not_trained(layer: str, tmp_path: Path) -> None:
    targets = [layer.rpartition(".")[2], "q_proj"]  # PEFT saves the base's table whenever it meets this name
    model = theirs(CASES["llama, linear"], llama(), target_modules=targets)
    peft_saves(model, tmp_path)
    found = load(tmp_path)
    assert list(found.trained) == [f"{layer}.weight"]
    assert torch.equal(found.trained[f"{layer}.weight"], llama().get_parameter(f"{layer}.weight"))
    assert found.spec.train == ()
    base = llama()
    attach(base, replace(found, trained={}))
    assert_close(logits(base, tokens()), logits(model, tokens()))
    other = replace(found, trained={name: 2 * table for name, table in found.trained.items()})
    save(other, tmp_path / "again")
    with torch.no_grad():
        base.get_parameter(f"{layer}.weight").mul_(2)
    assert_close(logits(peft_loads(tmp_path / "again", llama()), tokens()), logits(base, tokens()))


def test_we_load_an_adapter_peft_saved_under_a_name(tmp_path: Path) -> None:
    case = CASES["bert, classification head"]
    model = theirs(case, bert())
    from peft import LoraConfig

    with peft_noise():
        model.add_adapter("second", LoraConfig(r=2, lora_alpha=4, target_modules=["key"]))
        model.save_pretrained(str(tmp_path), selected_adapters=["second"])
    found = load(tmp_path)
    assert {u.site.path.rpartition(".")[2] for u in found.updates} == {"key"}


def test_convolutions_that_peft_would_compute_otherwise_are_refused_in_its_format_and_kept_in_ours(
    tmp_path: Path,
) -> None:
    def base() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(4, 8, 3, dilation=2, padding_mode="reflect", padding=2))

    x = torch.randn(2, 4, 9, 9)
    for method, lost in ((LoRA(4, 8.0), "dilation and the padding_mode"), (LoHa(2, 4.0), "padding_mode")):
        model, again = ours(AdapterSpec(method, Targets("0")), base()), base()
        with pytest.raises(AdapterFileError, match=f"forgets the {lost} of a convolution"):
            save(state(model), tmp_path / "peft")
        save(state(model), tmp_path / method.name, "native")
        found = load(tmp_path / method.name)
        assert found.updates[0].site.habits == {"dilation", "padding_mode"}
        attach(again, found)
        assert torch.equal(again(x), model(x))


def test_block_diagonal_is_refused_on_a_transposed_layer_which_peft_cannot_divide(tmp_path: Path) -> None:
    model = ours(AdapterSpec(BlockDiagonal(4, 8.0, side="up"), Targets("c_fc")), gpt2())
    with pytest.raises(AdapterFileError, match="PEFT's LORA has no layer of kind transposed-linear"):
        save(state(model), tmp_path)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = ours(CASES["llama, patterns"].spec, llama())
    for name in ("one", "two"):
        save(state(copy.deepcopy(model)), tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_patterns_name_whole_paths_so_their_order_means_nothing(tmp_path: Path) -> None:
    spec = AdapterSpec(LoRA(4, 8.0), Targets(("mix", "out")), overrides=(Override.of("re:mix", rank=2, alpha=2.0),))
    model = ours(spec, convolutions())
    save(state(model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^mix": 2}
    assert_close(logits(peft_loads(tmp_path, convolutions()), pictures()), logits(model, pictures()))
