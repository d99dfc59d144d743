"""PEFT's format without PEFT: what is refused and why, patterns, prefixes, slices, and the note beside it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lorakit.core.method import LowRank, Tensors, down_up
from lorakit.core.site import Decl, Site
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.core.state import AdapterState, Update
from lorakit.errors import AdapterFileError
from lorakit.methods.lora import LoRA
from lorakit.persist import files, load, save
from lorakit.persist.peft import from_peft, to_peft
from tests.persist.samples import adapter, lora_update, same, slices
from tests.tolerances import assert_close

PREFIX = "base_model.model."


def config(**more: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], **more}


def pair(path: str, rank: int = 4, out: int = 6, in_: int = 5) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{path}.lora_A.weight": torch.randn(rank, in_),
        f"{PREFIX}{path}.lora_B.weight": torch.randn(out, rank),
    }


def refusal(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    with pytest.raises(AdapterFileError) as caught:
        from_peft(config, tensors)
    return str(caught.value)


def test_patterns_and_checksums_of_another_type_are_told(tmp_path: Path) -> None:
    told = refusal(config(rank_pattern=[1]), pair("q"))
    assert told == "the configuration is wrong: rank_pattern must be an object, not [1]"
    save(adapter(), tmp_path)
    note = json.loads((tmp_path / "lorakit.json").read_text())
    (tmp_path / "lorakit.json").write_text(json.dumps({**note, "sha256": []}))
    with pytest.raises(AdapterFileError, match=r"lorakit\.json is damaged: sha256 must be an object"):
        load(tmp_path)


def test_a_note_of_a_layer_without_tensors_is_refused(tmp_path: Path) -> None:
    save(slices(), tmp_path)
    note = json.loads((tmp_path / "lorakit.json").read_text())
    note["updates"].append({**note["updates"][0], "path": "zz"})
    (tmp_path / "lorakit.json").write_text(json.dumps(note))
    with pytest.raises(AdapterFileError, match=r"lorakit\.json is damaged .*no tensors for zz"):
        load(tmp_path)


@pytest.mark.parametrize("make", [adapter, slices])
def test_save_and_load_are_inverse(make: Any, tmp_path: Path) -> None:
    before = make()
    save(before, tmp_path)
    found = load(tmp_path)
    assert (found.spec, found.purpose) == (before.spec, before.purpose)
    after = {u.site.key: u for u in found.updates}
    assert len(after) == len(before.updates)
    for mine in before.updates:
        yours = after[mine.site.key]
        assert (mine.site, mine.method) == (yours.site, yours.method)
        for name, tensor in mine.tensors.items():
            assert_close(yours.tensors[name], tensor)  # a slice's own scale is folded in and out again


@pytest.mark.parametrize("stabilised", [False, True])
def test_slices_become_one_lora_with_the_sum_of_their_ranks(stabilised: bool) -> None:
    state = slices()
    state = replace(
        state, updates=tuple(replace(u, method=replace(u.method, stabilised=stabilised)) for u in state.updates),
        spec=replace(state.spec, method=replace(state.spec.method, stabilised=stabilised)),
    )  # fmt: skip
    settings, tensors = to_peft(state)
    a, b = tensors[f"{PREFIX}h.0.attn.qkv.lora_A.weight"], tensors[f"{PREFIX}h.0.attn.qkv.lora_B.weight"]
    assert (a.shape, b.shape) == ((5, 5), (12, 5))
    key = "^h\\.0\\.attn\\.qkv"
    assert settings["rank_pattern"].get(key, settings["r"]) == 5
    alpha = settings["alpha_pattern"].get(key, settings["lora_alpha"])
    scale = alpha / (math.sqrt(5) if stabilised else 5)
    expected = torch.zeros(12, 5)
    for u in state.updates[:2]:
        assert u.site.rows is not None
        expected[slice(*u.site.rows)] = u.method.scale * u.tensors["up"] @ u.tensors["down"]  # type: ignore[attr-defined]
    assert_close(scale * b @ a, expected)


def test_slices_that_do_not_know_their_layer_are_refused() -> None:
    site = Site("qkv", 4, 5, rows=(0, 4))
    state = AdapterState(AdapterSpec(LoRA(2), Targets("qkv[0:4]")), (lora_update(site, LoRA(2)),))
    with pytest.raises(AdapterFileError, match="qkv: the sites of its rows do not tell the height"):
        to_peft(state)
    grouped = Site("conv", 8, 3, (3,), kind="conv1d", groups=2).slice(0, 4)
    state = AdapterState(AdapterSpec(LoRA(2), Targets("conv[0:4]")), (lora_update(grouped, LoRA(2)),))
    with pytest.raises(AdapterFileError, match="PEFT has no form for rows of a grouped convolution"):
        to_peft(state)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"use_dora": True, "use_bdlora": {"nblocks": 2}}, "use_dora = True"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config = {'beta': 1.0}"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"target_parameters": ["experts.up"]}, "target_parameters = ['experts.up']"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices = [1, 2]"),
        ({"layer_replication": [[0, 4]]}, "layer_replication = [[0, 4]]"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"alora_invocation_tokens": [7]}, "alora_invocation_tokens"),
        ({"something_new": 3}, "something_new = 3"),
        ({"init_lora_weights": "pissa_niter_4"}, "it changed the base weights"),
    ],
)
def test_what_lorakit_does_not_have_is_refused_by_name(more: dict[str, Any], said: str) -> None:
    assert said in refusal(config(**more), pair("q"))


def test_every_unknown_feature_is_listed_at_once() -> None:
    text = refusal(config(use_kasa=True, lora_bias=True), pair("q"))
    assert "use_kasa" in text
    assert "lora_bias" in text


def test_another_kind_of_adapter_is_refused_by_its_type() -> None:
    said = refusal(config(peft_type="OFT"), pair("q"))
    assert "PEFT type 'OFT'; this lorakit reads " in said
    assert all(kind in said for kind in ("IA3", "LOHA", "LOKR", "LORA", "VERA"))
    assert "PEFT type None" in refusal({"r": 4}, pair("q"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"r": "8"}, "r must be a whole number, not '8'"),
        ({"r": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"lora_alpha": None}, "lora_alpha must be a number, not None"),
        ({"lora_alpha": -1}, "alpha must be a positive number"),
        ({"rank_pattern": {"q(": 2}}, "the pattern 'q(' is not a regular expression"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(more: dict[str, Any], said: str) -> None:
    assert said in refusal(config(**more), pair("q"))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_never_ends_is_given_up(key: str) -> None:
    pytest.importorskip("regex", reason="only this package matches within a time")
    path = "model.layers.0.self_attn.q_proj"
    began = time.thread_time()
    said = refusal(config(target_modules=["q_proj"], **{key: {"((.|.)+)+[YZ]": 8}}), pair(path))
    assert f"takes too long to be matched with {path}; write the module's name" in said
    assert time.thread_time() - began < 1


def test_settings_with_no_bearing_on_the_result_are_accepted() -> None:
    harmless = config(
        task_type="CAUSAL_LM", inference_mode=True, revision="main", megatron_core="megatron.core", loftq_config={},
        peft_version="0.18.0", exclude_modules=["x"], layers_to_transform=[0], qalora_group_size=16, lora_bias=False,
        init_lora_weights="gaussian", eva_config={"rho": 2.0}, layers_pattern=None, fan_in_fan_out=True,
    )  # fmt: skip
    assert len(from_peft(harmless, pair("q")).updates) == 1


def test_patterns_match_the_end_of_a_path_and_the_first_wins() -> None:
    tensors = {**pair("h.0.q", 2), **pair("h.1.q", 3), **pair("h.0.k")}
    patterns = {"h.0.q": 2, "q": 3}
    state = from_peft(config(rank_pattern=patterns, alpha_pattern={"q": 7, "h.0.q": 1}), tensors)
    found: dict[str, Any] = {u.site.path: u.method for u in state.updates}
    assert {path: (m.rank, m.alpha) for path, m in found.items()} == {
        "h.0.k": (4, 8.0), "h.0.q": (2, 7.0), "h.1.q": (3, 7.0),
    }  # fmt: skip
    sorted_again = dict(reversed(patterns.items()))
    text = refusal(config(rank_pattern=sorted_again), tensors)
    assert "h.0.q: lora_A has rank 2, the configuration says 3 (r, or rank_pattern in its order)" in text


def test_a_bare_name_that_ends_another_path_keeps_its_own_rank() -> None:
    spec = AdapterSpec(LoRA(2, 2.0), Targets(("re:fc", "inner.fc")))
    updates = (lora_update(Site("fc", 6, 5), LoRA(2, 2.0)), lora_update(Site("inner.fc", 6, 5), LoRA(3, 9.0)))
    settings, tensors = to_peft(AdapterState(spec, updates))
    back = from_peft(json.loads(json.dumps(settings, sort_keys=True)), tensors)  # PEFT sorts when it saves
    assert {u.site.path: u.method for u in back.updates} == {u.site.path: u.method for u in updates}
    assert settings["target_modules"] == r"fc|inner\.fc"
    assert back.spec.targets.include == ("re:fc", "inner.fc")


def test_every_bad_tensor_is_listed() -> None:
    tensors = {**pair("h.0.q"), **pair("h.1.q"), **pair("h.2.q", 3), **pair("h.3.q"), **pair("h.4.q")}
    del tensors[f"{PREFIX}h.0.q.lora_B.weight"]
    tensors[f"{PREFIX}h.1.q.lora_B.weight"] = torch.zeros(6, 3)
    tensors[f"{PREFIX}h.3.q.lora_magnitude_vector"] = torch.zeros(6)
    tensors[f"{PREFIX}h.4.q.base_layer.lora_A.weight"] = torch.zeros(4, 5)
    tensors["stray"] = torch.zeros(2)
    tensors[f"{PREFIX}score.weight"] = torch.full((2, 2), torch.nan)
    text = refusal(config(), tensors)
    for line in (
        "7 tensor(s) of the adapter do not fit",
        "h.0.q.lora_B: missing, its partner has shape (4, 5)",
        "h.1.q: lora_A (4, 5) and lora_B (6, 3) do not multiply",
        "h.2.q: lora_A has rank 3, the configuration says 4",
        "h.3.q.lora_magnitude_vector: extra, not a tensor of a LoRA adapter, shape (6,)",
        "h.4.q.base_layer.lora_A.weight: extra, nested in base_layer",
        "stray: extra, not under base_model.model.",
        "score.weight: holds NaN or infinity",
    ):
        assert line in text


def test_a_factor_with_nan_is_refused() -> None:
    tensors = pair("q")
    tensors[f"{PREFIX}q.lora_A.weight"][0, 0] = torch.inf
    assert "q.down: holds NaN or infinity" in refusal(config(), tensors)


def test_no_factor_at_all_is_refused() -> None:
    assert "none of its 1 tensors is a LoRA factor" in refusal(config(), {f"{PREFIX}score.weight": torch.zeros(2, 2)})


def test_keys_with_the_adapter_s_name_in_them_are_read() -> None:
    tensors = {key.replace(".weight", ".mine.weight"): t for key, t in pair("q").items()}
    tensors[f"{PREFIX}head.modules_to_save.mine.dense.weight"] = torch.zeros(2, 2)
    tensors[f"{PREFIX}wte.lora_embedding_A.mine"] = torch.zeros(4, 9)
    tensors[f"{PREFIX}wte.lora_embedding_B.mine"] = torch.zeros(3, 4)
    state = from_peft(config(modules_to_save=["head"]), tensors)
    assert [(u.site.path, u.site.kind, u.site.out, u.site.in_) for u in state.updates] == [
        ("q", "linear", 6, 5), ("wte", "embedding", 3, 9),
    ]  # fmt: skip
    assert list(state.trained) == ["head.dense.weight"]
    assert state.spec.train == ("head",)


def test_modules_to_save_match_any_end_of_a_path_as_in_peft() -> None:
    names = ("pre_classifier.weight", "classifier.weight", "h.0.norm.weight", "embed.weight")
    tensors = {**pair("q"), **{f"{PREFIX}{name}": torch.zeros(2, 2) for name in names}}
    state = from_peft(config(modules_to_save=["classifier", "norm", "score"]), tensors)
    assert set(state.trained) == set(names)
    assert state.spec.train == ("pre_classifier", "classifier", "h.0.norm")


def test_a_module_that_peft_would_find_in_an_adapted_layer_is_not_named_to_it() -> None:
    updates = (lora_update(Site("h.pre_dense", 6, 5), LoRA(4)),)
    trained = {"dense.weight": torch.zeros(2, 2), "dense.bias": torch.zeros(2), "top.bias": torch.zeros(2)}
    state = AdapterState(AdapterSpec(LoRA(4), Targets("pre_dense"), train=("dense", "top")), updates, trained)
    settings, tensors = to_peft(state)
    assert settings["modules_to_save"] == ["top"]
    assert {f"{PREFIX}{name}" for name in trained} <= tensors.keys()


def test_a_table_that_may_be_tied_is_put_into_the_base_and_a_head_is_copied() -> None:
    trained = {"embed.weight": torch.zeros(9, 2), "score.weight": torch.zeros(3, 2)}
    spec = AdapterSpec(LoRA(4), Targets("q"), train=("embed", "score"))
    settings, _ = to_peft(AdapterState(spec, (lora_update(Site("h.q", 6, 5), LoRA(4)),), trained))
    assert settings["modules_to_save"] == ["score"]


@dataclass(frozen=True)
class Doubled(LowRank):
    """A method PEFT has no form for."""

    rank: int = 2
    name: ClassVar[str] = "doubled"
    paper: ClassVar[str] = "none"

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare the pair."""
        return down_up(self.rank, site)

    def init(self, p: Tensors, site: Site, weight: Tensor, rng: torch.Generator) -> None:
        """Leave everything."""

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """Return twice the product."""
        return p["down"], 2 * p["up"]


def test_a_method_without_a_peft_form_is_refused_and_the_other_format_named(tmp_path: Path) -> None:
    site = Site("h.q", 6, 5)
    update = Update(site, Doubled(), {"down": torch.zeros(2, 5), "up": torch.zeros(6, 2)})
    state = AdapterState(AdapterSpec(Doubled(), Targets("q")), (update,))
    with pytest.raises(AdapterFileError, match=r"no PEFT form:\n  - h.q: doubled"):
        save(state, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(AdapterFileError, match="the adapter has no updates"):
        save(replace(state, updates=()), tmp_path / "a")


def test_a_named_adapter_lies_one_directory_deeper_and_two_are_told_apart(tmp_path: Path) -> None:
    save(adapter(1.0), tmp_path / "first")
    assert same(load(tmp_path), adapter(1.0))
    save(adapter(2.0), tmp_path / "second")
    with pytest.raises(AdapterFileError, match="holds 2 adapters; name one of: first, second"):
        load(tmp_path)


def test_an_older_adapter_in_a_pickle_is_read_without_running_it(tmp_path: Path) -> None:
    save(adapter(1.0), tmp_path)
    tensors, _ = files.read_safetensors(tmp_path / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "lorakit.json").unlink()
    assert load(tmp_path).parameters == adapter().parameters


def test_an_edited_configuration_is_noticed(tmp_path: Path) -> None:
    save(adapter(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8.0', '"lora_alpha": 80.0'))
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json was changed after it was saved"):
        load(tmp_path)


def test_a_note_of_another_version_is_refused(tmp_path: Path) -> None:
    save(adapter(), tmp_path)
    file = tmp_path / "lorakit.json"
    note = json.loads(file.read_text())
    for change, said in (
        ({"format": 2}, r"lorakit\.json has format 2, this lorakit reads 1"),
        ({"spec": {"version": 7}}, r"lorakit\.json is damaged or of another version"),
        ({"base": None}, r"lorakit\.json is damaged"),
    ):
        file.write_text(json.dumps({**note, **change}))
        with pytest.raises(AdapterFileError, match=said):
            load(tmp_path)


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    save(adapter(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors is missing"):
        load(tmp_path)


def test_a_huge_rank_in_the_configuration_is_one_line(tmp_path: Path) -> None:
    update = adapter().updates[0]
    many = [replace(update, site=replace(update.site, path=f"h.{i}.q")) for i in range(20)]
    save(AdapterState(AdapterSpec(LoRA(4, 8.0), Targets("q")), tuple(many)), tmp_path)
    (tmp_path / "lorakit.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 100_000}))
    with pytest.raises(AdapterFileError) as caught:
        load(tmp_path)
    assert len(str(caught.value).splitlines()) <= 3, str(caught.value)
    for value, said in ((10**400, "an integer of about 400 digits"), ("x", "'x'")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": value}))
        with pytest.raises(AdapterFileError, match=f"r must be a whole number, not {said}$"):
            load(tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": value}))
        with pytest.raises(AdapterFileError, match=f"lora_alpha must be a number, not {said}$"):
            load(tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": value}))
        with pytest.raises(AdapterFileError, match=f"lora_dropout must be a number, not {said}$"):
            load(tmp_path)
