"""Attaching to real models: what stays, what is guarded, and what a refusal leaves behind."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorakit.core.adapters import Adapted
from lorakit.core.spec import AdapterSpec, Override, Targets, method_from_json
from lorakit.errors import AdapterFileError, AliveError, AttachError, LorakitError, MergeError, SpecError, TargetError
from lorakit.inits.pissa import Pissa
from lorakit.inject.activate import active, use
from lorakit.inject.alive import alive
from lorakit.inject.attach import adapters_named, attach, detach, state
from lorakit.inject.merge import merge
from lorakit.inject.sites import sites
from lorakit.inject.skeleton import shapes_of, ties_of
from lorakit.methods.dora import DoRA
from lorakit.methods.ia3 import IA3
from lorakit.methods.lora import LoRA
from lorakit.planning.counting import count
from tests.law.cases import jitter
from tests.tolerances import assert_close


def llama(**changes: object) -> LlamaForCausalLM:
    """Return a tiny Llama."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **{**sizes, **changes})).eval()


def gpt2() -> GPT2LMHeadModel:
    """Return a tiny GPT-2."""
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(config).eval()


MODELS: list[Callable[[], nn.Module]] = [llama, gpt2]
IDS = torch.arange(14).reshape(2, 7)


def moved(model: nn.Module, spec: AdapterSpec, name: str = "default") -> nn.Module:
    """Attach and move every tensor off its start."""
    attach(model, spec, name)
    for adapter in adapters_named(model, name):
        jitter(adapter)
    return model


@pytest.mark.parametrize("build", MODELS)
def test_the_base_keeps_its_keys_its_classes_and_its_checkpoint(build: Callable[[], nn.Module]) -> None:
    model = build()
    checkpoint = copy.deepcopy(model.state_dict())
    before = model(IDS).logits
    moved(model, AdapterSpec(LoRA(4)))
    assert checkpoint.keys() <= model.state_dict().keys()
    assert all(isinstance(model.get_submodule(s.path), nn.Module) for s in sites(model).sites)
    adapted = model(IDS).logits
    model.load_state_dict(checkpoint, strict=True)
    assert torch.equal(model(IDS).logits, adapted), "a base checkpoint leaves the adapter alone"
    with use(model, {}):
        assert torch.equal(model(IDS).logits, before)
    assert torch.equal(model(IDS).logits, adapted)


def test_the_skeleton_does_not_see_the_adapter() -> None:
    model = llama()
    before = sites(model)
    attach(model, AdapterSpec(LoRA(4)))
    assert sites(model) == before


def test_an_adapted_checkpoint_with_a_missing_tensor_is_not_taken_for_a_bare_base() -> None:
    model = llama()
    attach(model, AdapterSpec(LoRA(4)))
    broken = model.state_dict()
    del broken["model.layers.0.self_attn.q_proj.adapters.by_name.default.up"]
    with pytest.raises(RuntimeError, match=r"Missing key.*q_proj.adapters.by_name.default.up"):
        model.load_state_dict(broken)


def test_only_the_adapter_trains() -> None:
    model = llama()
    handle = attach(model, AdapterSpec(LoRA(4), train=("model.norm",)))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trainable if "adapters" not in n} == {"model.norm.weight"}
    assert len(handle.parameters()) == len(trainable)
    assert "14 updates" in repr(handle)


def test_a_refused_adapter_leaves_the_model_as_it_was() -> None:
    model = llama()
    before = {k: (type(m), vars(m).keys()) for k, m in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    model.model.layers[1].mlp.down_proj.forward = lambda x: x  # type: ignore[method-assign]
    for spec in (
        AdapterSpec(LoRA(4), Targets(("q_proj", "v_porj"))),
        AdapterSpec(LoRA(4), Targets(("q_proj", "norm"))),
        AdapterSpec(LoRA(40), Targets("q_proj")),
        AdapterSpec(LoRA(4), Targets(("q_proj", "down_proj"))),
        AdapterSpec(LoRA(4), Targets("q_proj"), train=("nrom",)),
        AdapterSpec(LoRA(4), Targets("q_proj"), train=("q_proj",)),
    ):
        with pytest.raises(LorakitError):
            attach(model, spec)
    del model.model.layers[1].mlp.down_proj.forward
    assert {k: (type(m), vars(m).keys()) for k, m in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_patched_forward_is_refused_by_path() -> None:
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward  # type: ignore[method-assign]
    with pytest.raises(
        AttachError, match=r"replaced `forward` on these layers(.|\n)*model\.layers\.0\.self_attn\.q_proj"
    ):
        attach(model, AdapterSpec(LoRA(4)))


def test_accelerate_s_hooks_are_put_back_around_the_adapter() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    seen: list[str] = []

    class Note(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> tuple[object, object]:
            seen.append(type(module).__name__)
            return args, kwargs

    model, plain = llama(), llama()
    plain.load_state_dict(model.state_dict())
    add_hook_to_module(model.model.layers[0].self_attn.q_proj, Note())
    for m in (model, plain):
        torch.manual_seed(3)
        moved(m, AdapterSpec(LoRA(4), Targets("q_proj")))
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert seen == ["AdaptedLinear"]
    detach(model)
    model(IDS)
    assert seen == ["AdaptedLinear", "Linear"]


def test_alive_passes_a_working_adapter_and_names_the_dead() -> None:
    model = llama()
    attach(model, AdapterSpec(LoRA(4), Targets(("q_proj", "v_proj"))))
    with alive(model):
        model(IDS, labels=IDS).loss.backward()
    with (
        pytest.raises(AliveError, match=r"4 of 4 active adapters were never called(.|\n)*layers\.0\.self_attn\.q_proj"),
        alive(model),
    ):
        model.model.embed_tokens(IDS)
    model.zero_grad(set_to_none=True)
    cut = r"4 of 4 active adapters got no gradient(.|\n)*enable_input_require_grads"
    with pytest.raises(AliveError, match=cut), alive(model), torch.no_grad():
        model(IDS)
    use(model, {})
    with pytest.raises(AliveError, match="no adapter is active on this model"), alive(model):
        pass


def test_an_adapter_without_a_method_trains_the_base_itself_and_alive_knows() -> None:
    model = gpt2()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = attach(model, AdapterSpec(None, train="biases"))
    assert len(handle.parameters()) == len([name for name in before if name.endswith(".bias")])
    with alive(model):
        model(IDS).logits.sum().backward()
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(1.0)
    saved = state(model)
    assert (saved.updates, {name.rpartition(".")[2] for name in saved.trained}) == ((), {"bias"})
    detach(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    attach(model, saved)
    assert all(torch.equal(p, before[name] + 1) == name.endswith(".bias") for name, p in model.named_parameters())
    model.zero_grad(set_to_none=True)
    with pytest.raises(AliveError, match="no parameter that is trained whole got a gradient"), alive(model):
        model(IDS)


def test_what_is_trained_without_a_method_has_to_exist() -> None:
    with pytest.raises(TargetError, match="train 'biases': this model has none; models like LLaMA are built without"):
        attach(llama(), AdapterSpec(None, train="biases"))
    with pytest.raises(SpecError, match="without a method nothing would be trained"):
        AdapterSpec(None)
    everything = attach(llama(), AdapterSpec(None, train="*"))
    assert sum(p.numel() for p in everything.parameters()) == sum(p.numel() for p in llama().parameters())
    norms = attach(llama(), AdapterSpec(None, train="norms"))
    assert {p.dim() for p in norms.parameters()} == {1}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_a_frozen_base_reaches_every_adapter(reentrant: bool) -> None:
    model = llama().train()
    attach(model, AdapterSpec(LoRA(4)))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with alive(model):
        model(IDS, labels=IDS).loss.backward()


def test_dropout_acts_in_training_only_and_on_the_branch_only() -> None:
    model = llama()
    moved(model, AdapterSpec(LoRA(4), dropout=0.5))
    quiet = model(IDS).logits
    assert torch.equal(model(IDS).logits, quiet)
    model.train()
    assert not torch.equal(model(IDS).logits, quiet)
    use(model, {})
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_names_and_choices_that_cannot_be_are_refused() -> None:
    model = llama()
    attach(model, AdapterSpec(LoRA(4)), "support")
    with pytest.raises(AttachError, match="an adapter named 'support' is attached already; detach it first"):
        attach(model, AdapterSpec(LoRA(4)), "support")
    with pytest.raises(AttachError, match=r"adapter name 'a\.b' must be non-empty and without"):
        attach(model, AdapterSpec(LoRA(4)), "a.b")
    with pytest.raises(
        AttachError, match=r"no adapter named 'suport' is attached; did you mean 'support'\?; attached:"
    ):
        use(model, {"suport": 1.0})
    with pytest.raises(AttachError, match="no adapter named 'x'"):
        detach(model, "x")
    for wrong in (float("nan"), float("inf"), "1", True):
        with pytest.raises(AttachError, match="support: a weight is a finite number or a .* tensor, not "):
            use(model, {"support": wrong})  # type: ignore[dict-item]
    use(model, {"support": 1})
    assert isinstance(active(model)["support"], float), "which the fused way asks for"
    use(model, {"support": torch.ones(3)})
    with pytest.raises(AttachError, match=r"q_proj: weights for 3 rows meet a batch of 2; give one weight per row"):
        model(IDS)


@pytest.mark.parametrize(("target", "train"), [("lm_head", "wte"), ("wte", "lm_head"), ("lm_head", "lm_head")])
def test_a_tied_table_is_not_adapted_under_one_name_and_trained_whole_under_the_other(target: str, train: str) -> None:
    model, spec = gpt2(), AdapterSpec(LoRA(4), Targets(target), train=(train,))
    with pytest.raises(AttachError, match="both adapted and trained whole"):
        attach(model, spec)
    with pytest.raises(SpecError, match="both adapted and trained whole"):
        count(spec, sites(model), shapes_of(model), ties_of(model))


def test_dropout_that_would_do_nothing_is_refused() -> None:
    for method in (None, IA3()):
        with pytest.raises(SpecError, match="nothing here computes from it; remove dropout"):
            AdapterSpec(method, train="norm", dropout=0.1)
    overrides = [Override.of("down_proj", side="input")]
    assert AdapterSpec(IA3(), Targets("mlp"), dropout=0.1, overrides=overrides).dropout == 0.1


def test_an_override_reaches_the_method_inside_and_names_the_field_nobody_has() -> None:
    spec = AdapterSpec(DoRA(LoRA(16)), Targets("q_proj"), overrides=[Override.of("q_proj", layers="1", rank=4)])
    model = llama()
    attach(model, spec)
    assert [len(u.tensors["down"]) for u in state(model).updates] == [16, 4]
    with pytest.raises(SpecError, match="override of mlp: method lora has no field 'rnak'; did you mean 'rank'"):
        AdapterSpec(DoRA(), overrides=[Override.of("mlp", rnak=4)])


@pytest.mark.parametrize("inner", [5, None, ["lora"]])
def test_a_method_inside_is_named_or_refused(inner: Any) -> None:
    with pytest.raises(SpecError, match="inner must be a method's name, or its name and fields as "):
        method_from_json({"name": "dora", "inner": inner})
    assert method_from_json({"name": "dora", "inner": {"rank": 4}}) == DoRA(LoRA(4))


def test_what_was_trained_whole_does_not_learn_while_its_adapter_is_off_nor_does_the_base() -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    handle = attach(model, AdapterSpec(LoRA(4), Targets("q_proj"), train="norm"))
    norm = model.get_parameter("model.norm.weight")
    with use(model, {}):
        assert not norm.requires_grad
        assert all(p is not norm for p in handle.parameters())
    assert norm.requires_grad
    assert any(p is norm for p in handle.parameters())
    norm.requires_grad_(False)  # its owner's own choice
    with use(model, {}):
        pass
    assert not norm.requires_grad
    detach(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(AttachError, match="no adapter named 'default' is attached"):
        handle.parameters()


def test_each_row_of_a_model_s_batch_chooses() -> None:
    model = moved(llama(), AdapterSpec(LoRA(4)), "a")
    moved(model, AdapterSpec(LoRA(2), Targets("mlp")), "b")
    use(model, {"a": 1.0})
    a = model(IDS).logits
    use(model, {"b": 1.0})
    b = model(IDS).logits
    with use(model, {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}):
        mixed = model(IDS).logits
    assert_close(mixed, torch.stack([a[0], b[1]]))
    assert active(model) == {"b": 1.0}


def test_modules_trained_whole_come_and_go_with_their_adapter() -> None:
    model = llama()
    original = model.lm_head.weight.detach().clone()
    attach(model, AdapterSpec(LoRA(4), Targets("q_proj"), train=("lm_head",)))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    trained = state(model)
    assert torch.equal(trained.trained["lm_head.weight"], 2 * original)
    with use(model, {}):
        assert torch.equal(model.lm_head.weight, original)
        assert torch.equal(state(model).trained["lm_head.weight"], 2 * original)
    assert torch.equal(model.lm_head.weight, 2 * original)
    with pytest.raises(AttachError, match="adapters 'default' and 'second' both train lm_head.weight whole"):
        attach(model, trained, "second")
    with pytest.raises(AttachError, match="'default' trained lm_head.weight whole, which is there or not"):
        use(model, {"default": torch.ones(2)})
    detach(model)
    assert torch.equal(model.lm_head.weight, original)
    attach(model, trained, "back")
    assert torch.equal(model.lm_head.weight, 2 * original)


def test_a_tied_head_is_trained_once() -> None:
    model = llama(tie_word_embeddings=True)
    handle = attach(model, AdapterSpec(LoRA(4), Targets("q_proj"), train=("lm_head", "embed_tokens")))
    assert sum(p is model.lm_head.weight for p in handle.parameters()) == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad


def test_an_adapter_of_another_base_is_refused() -> None:
    torch.manual_seed(1)
    first = moved(llama(), AdapterSpec(LoRA(4)))
    given = state(first)
    torch.manual_seed(2)
    with pytest.raises(AdapterFileError, match=r"trained on another base(.|\n)*the weights differ"):
        attach(llama(), given)
    with pytest.raises(AdapterFileError, match="another model, and this model has none of its 14 layers, such as "):
        attach(gpt2(), given)
    with pytest.raises(AdapterFileError, match=r"7 adapter tensor\(s\) do not fit|adapter tensor\(s\) do not fit"):
        attach(llama(intermediate_size=64), given)
    half = copy.deepcopy(first)
    detach(half)
    attach(half.to(torch.bfloat16), given)  # the same base in another dtype is the same base


def test_a_nan_in_a_state_is_named() -> None:
    model = moved(llama(), AdapterSpec(LoRA(4)))
    given = state(model)
    next(iter(given.updates[3].tensors.values()))[0, 0] = torch.nan
    with pytest.raises(AdapterFileError, match=r"o_proj\.down: holds NaN or infinity"):
        attach(model, given, "second")


def test_a_7b_shape_is_adapted_in_under_two_seconds() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig())
    began = time.process_time()  # of this process alone: the machine may be busy with others
    handle = attach(model, AdapterSpec(LoRA(16)))
    assert time.process_time() - began < 2
    assert sum(p.numel() for p in handle.parameters()) == 39_976_960
    detach(model)
    handle = attach(model, AdapterSpec(LoRA(8), Targets(("q_proj", "v_proj"))))
    assert sum(p.numel() for p in handle.parameters()) == 4_194_304


def test_attaching_after_compiling_is_not_ignored() -> None:
    torch._dynamo.reset()
    model = llama()
    compiled = torch.compile(model, backend="eager")
    before = compiled(IDS).logits
    moved(model, AdapterSpec(LoRA(4)))
    assert not torch.equal(compiled(IDS).logits, before)
    assert_close(compiled(IDS).logits, model(IDS).logits)


def test_a_target_that_matches_nothing_says_so_on_a_whole_model() -> None:
    with pytest.raises(TargetError, match="'c_attn' matched nothing"):
        attach(llama(), AdapterSpec(LoRA(4), Targets("c_attn")))


def test_an_adapter_that_trained_its_embedding_knows_its_base_again() -> None:
    model = moved(llama(), AdapterSpec(LoRA(4), Targets("q_proj"), train=("embed_tokens",)))
    base = copy.deepcopy(model)
    detach(base)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
    adapted = model(IDS).logits
    attach(base, state(model))
    assert torch.equal(base(IDS).logits, adapted)


def test_values_a_state_only_keeps_are_installed_frozen_and_go_again() -> None:
    model = llama()
    original = model.model.embed_tokens.weight.detach().clone()
    given = state(moved(copy.deepcopy(model), AdapterSpec(LoRA(4), Targets(("q_proj", "embed_tokens")))))
    kept = replace(given, trained={"model.embed_tokens.weight": 2 * original})
    handle = attach(model, kept)
    assert torch.equal(model.model.embed_tokens.weight, 2 * original)
    assert not model.model.embed_tokens.weight.requires_grad
    assert torch.equal(state(model).trained["model.embed_tokens.weight"], 2 * original)
    assert all(p is not model.model.embed_tokens.weight for p in handle.parameters())
    detach(model)
    assert torch.equal(model.model.embed_tokens.weight, original)


def test_both_names_of_a_tied_weight_are_one_value() -> None:
    model = llama(tie_word_embeddings=True)
    original = model.lm_head.weight.detach().clone()
    given = state(moved(copy.deepcopy(model), AdapterSpec(LoRA(4), Targets("q_proj"), train=("lm_head",))))
    both = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), 2 * original)
    attach(model, replace(given, trained=both))
    assert torch.equal(model.lm_head.weight, 2 * original)
    assert model.lm_head.weight.requires_grad
    detach(model)
    assert torch.equal(model.lm_head.weight, original)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("build", MODELS)
def test_a_whole_model_compiles_without_a_graph_break(build: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    model = moved(build(), AdapterSpec(LoRA(4)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wanted = model(IDS, use_cache=False).logits
    wanted.logsumexp(-1).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    made = compiled(IDS, use_cache=False).logits
    made.logsumexp(-1).sum().backward()
    assert_close(made, wanted)
    for mine, theirs in zip([p.grad for p in model.parameters() if p.grad is not None], grads, strict=True):
        assert_close(mine, theirs)


def test_an_adapted_model_generates_with_its_cache_as_without() -> None:
    model = moved(llama(), AdapterSpec(LoRA(4)))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(IDS, use_cache=True, **settings), model.generate(IDS, use_cache=False, **settings)
    )  # type: ignore[operator]


def test_modules_of_a_detached_adapter_stop_training() -> None:
    model = llama()
    attach(model, AdapterSpec(LoRA(4), Targets("q_proj"), train=("lm_head",)), "one")
    attach(model, AdapterSpec(LoRA(4), Targets("v_proj")), "two")
    detach(model, "one")
    assert not model.lm_head.weight.requires_grad
    detach(model, "two")
    assert model.lm_head.weight.requires_grad


def test_added_tokens_do_not_make_another_base() -> None:
    model = moved(llama(), AdapterSpec(LoRA(4)))
    given = state(model)
    detach(model)
    model.resize_token_embeddings(51, mean_resizing=False)
    attach(model, given)


def test_the_input_may_be_given_by_name() -> None:
    layer = nn.Sequential(nn.Linear(6, 6))
    moved(layer, AdapterSpec(LoRA(2), Targets("0")))
    x = torch.randn(2, 6)
    assert torch.equal(layer[0](input=x), layer[0](x))


def give_away(parameter: nn.Parameter) -> None:
    """Leave a parameter as DeepSpeed's ZeRO-3 does: its shape told beside it, its values elsewhere."""
    parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
    parameter.data = parameter.data.new_empty(0)


def test_the_state_of_divided_weights_is_refused_and_not_empty() -> None:
    model = llama()
    handle = attach(model, AdapterSpec(LoRA(4)))
    whole = state(model)
    probed = [model.get_parameter(f"{path}.weight") for path in whole.base.probes]
    assert [id(p) for p in handle.read_by_state()] == [id(p) for p in [*handle.parameters(), *probed]]
    here = {id(p): p.data for p in model.parameters()}
    for parameter in model.parameters():
        give_away(parameter)
    with pytest.raises(AttachError, match=r"(?s)divided among processes.*read_by_state.*q_proj\.down"):
        state(model)
    with pytest.raises(MergeError, match="divided among processes; save the adapter"):
        merge(model)
    for parameter in handle.parameters():
        parameter.data = here[id(parameter)]
    with pytest.raises(AttachError, match=r"(?s)divided among processes.*layers\.0\.self_attn\.q_proj"):
        state(model)
    for parameter in handle.read_by_state():
        parameter.data = here[id(parameter)]
    gathered = state(model)
    assert gathered.base == whole.base
    assert all(
        torch.equal(one.tensors[key], other.tensors[key])
        for one, other in zip(gathered.updates, whole.updates, strict=True)
        for key in one.tensors
    )


def test_a_start_that_reads_a_divided_weight_is_refused() -> None:
    model = llama()
    for parameter in model.parameters():
        give_away(parameter)
    with pytest.raises(AttachError, match=r"(?s)divided among processes.*before they are divided"):
        attach(model, AdapterSpec(LoRA(4, init_=Pissa())))
    assert not any(isinstance(module, Adapted) for module in model.modules()), "a refused adapter changes nothing"
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("build", MODELS)
def test_a_model_that_is_divided_already_takes_an_adapter_that_starts_without_it(
    build: Callable[[], nn.Module],
) -> None:
    whole, divided = build(), build()
    for parameter in divided.parameters():
        give_away(parameter)
    one, other = (attach(model, AdapterSpec(LoRA(4))) for model in (whole, divided))
    assert one.paths == other.paths
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
