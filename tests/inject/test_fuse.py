"""Models that run fused against the same models as they are: values, gradients, what is kept, and what stays plain."""

from __future__ import annotations

import copy
import pickle
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import AdapterSpec, attach, detach, merge, use
from lorakit.core.fronts import fronts
from lorakit.core.registry import method
from lorakit.core.spec import Targets
from lorakit.errors import AliveError
from lorakit.inject.alive import alive
from lorakit.inject.fuse import Fusion, fuse, unfuse

transformers = pytest.importorskip("transformers")

WIDE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "vocab_size": 100}  # fmt: skip
GROUPED = {**WIDE, "num_key_value_heads": 2, "pad_token_id": 0}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "llama": ("Llama", GROUPED, {"adapted layers sharing an input": 10, "adapted layers": 4, "norms": 5,
                                 "gated MLPs": 2}),
    "mistral": ("Mistral", GROUPED, {"adapted layers sharing an input": 10, "adapted layers": 4, "norms": 5,
                                     "gated MLPs": 2}),
    "qwen2": ("Qwen2", GROUPED, {"adapted layers sharing an input": 10, "adapted layers": 4, "norms": 5,
                                 "gated MLPs": 2}),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}, {"adapted layers sharing an input": 10, "adapted layers": 4,
                                                    "norms": 9, "gated MLPs": 2}),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 8}, {"adapted layers sharing an input": 10, "adapted layers": 4,
                                                    "norms": 5, "gated MLPs": 2}),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8}, {"adapted layers sharing an input": 10, "adapted layers": 4,
                                                      "norms": 9, "gated MLPs": 2}),
    "phi": ("Phi", {**WIDE, "resid_pdrop": 0.0, **ENDS}, {"adapted layers sharing an input": 6, "adapted layers": 6,
                                                          "norms": 3, "activations": 2}),
    "phi3": ("Phi3", {**GROUPED, "resid_pdrop": 0.0}, {"adapted layers": 8, "norms": 5, "activations": 2}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "resid_pdrop": 0.0, **ENDS,
                      "embd_pdrop": 0.0, "attn_pdrop": 0.0}, {"adapted layers": 8, "norms": 5, "activations": 2}),
    "bert": ("Bert", {**WIDE, **STILL, "is_decoder": False}, {"adapted layers sharing an input": 6,
                                                              "adapted layers": 6, "norms": 6, "activations": 3}),
}  # fmt: skip


def made(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a small model of a family, training."""
    name, options, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**options)
    torch.manual_seed(0)
    kind = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager" if family == "gemma2" else "sdpa").to(dtype)
    model.config.use_cache = False
    return model.train()


def adapted(
    model: Any, name: str = "lora", dropout: float = 0.0, called: str = "default", seed: int = 1
) -> list[nn.Parameter]:
    """Attach an adapter a little off its start."""
    lora = method("lora")(4, 8.0)  # type: ignore[call-arg]
    made = {"lora": lambda: lora, "dora": lambda: method("dora")(lora)}.get(name, method(name))()  # type: ignore[call-arg]
    found = attach(model, AdapterSpec(made, dropout=dropout), called).parameters()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in found:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return found


def step(model: Any, parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor], int]:
    """Return the loss, the gradients and the bytes autograd kept."""
    ids = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(2))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = model(ids, labels=ids).loss
    return loss.detach(), list(torch.autograd.grad(loss, parameters)), sum(kept.values())


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference of two tensors of a list, relative to their size."""
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["lora", "dora", "adalora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_has_the_plain_one_s_loss_and_gradients_and_keeps_less(family: str, name: str) -> None:
    model = made(family)
    parameters = adapted(model, name)
    loss, grads, kept = step(model, parameters)
    fusion = fuse(model)
    assert fusion.counts() == {"runs": FAMILIES[family][2], "plain": {}}
    fused_loss, fused_grads, fused_kept = step(model, parameters)
    assert float(abs(loss - fused_loss)) < 2e-6
    assert apart(fused_grads, grads) < 1e-5
    assert fused_kept < kept
    unfuse(model)
    again = step(model, parameters)
    assert torch.equal(again[0], loss)
    assert all(map(torch.equal, again[1], grads))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert"])
def test_in_16_bits_the_gradients_are_no_further_from_the_exact_ones_than_plain(family: str) -> None:
    """In the median of several adapters: which of two roundings is nearer is chance in each."""
    ratios = []
    for seed in range(7):
        model = made(family, torch.bfloat16)
        parameters = adapted(model, seed=seed)
        wide = copy.deepcopy(model).float()
        _, exact, _ = step(wide, [p for p in wide.parameters() if p.requires_grad])
        _, plain, _ = step(model, parameters)
        fuse(model)
        _, fused, _ = step(model, parameters)
        ratios.append(apart(fused, exact) / apart(plain, exact))
    assert statistics.median(ratios) < 1.2


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma", "phi", "gpt2", "bert"])
def test_in_16_bits_nothing_is_kept_in_fp32_but_numbers_per_row_though_adapters_are(family: str) -> None:
    """Adapters are their own fp32 master copies: a step casts their thin factors, never an activation."""
    model = made(family, torch.bfloat16)
    parameters = adapted(model)
    assert {p.dtype for p in parameters} == {torch.float32}

    def wide() -> list[int]:
        """Return the sizes of the fp32 tensors that blocks keep, parameters left out."""
        own, sizes = {p.untyped_storage().data_ptr() for p in model.parameters()}, []

        def note(t: Tensor) -> Tensor:
            if t.dtype == torch.float32 and t.untyped_storage().data_ptr() not in own:
                sizes.append(t.numel())
            return t

        ids = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(2))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            logits = model(ids).logits
        assert logits.dtype == torch.bfloat16
        return sizes

    tokens = 2 * 12
    if family in ("llama", "mistral", "qwen2", "gemma"):
        assert max(wide()) >= tokens * 32, "the plain norm keeps a wide copy"
    fuse(model)
    assert max(wide(), default=0) <= tokens * 4, "the logarithms of attention's sums, a number per head and token"


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_checkpointing_and_dropout_give_the_same_step(family: str) -> None:
    model = made(family)
    parameters = adapted(model, dropout=0.2)
    fuse(model)
    loss, grads, kept = step(model, parameters)
    model.activation_checkpointing_enable({"use_reentrant": False})
    again, same, less = step(model, parameters)
    assert torch.equal(loss, again), "a block that is computed again draws the same mask"
    assert apart(same, grads) < 1e-6
    assert less < kept


def test_the_base_s_own_dropout_keeps_no_mask_and_rests_where_the_model_does() -> None:
    config = transformers.BertConfig(**WIDE, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1)
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(config).train()
    parameters = adapted(model)
    ids = torch.arange(12)[None]
    plain = step(model, parameters)
    still = model.eval()(ids).logits
    runs = fuse(model.train()).counts()["runs"]
    assert runs["dropout"] == 7, "the embeddings', and three of each block"
    assert runs["attention with dropout"] == 2
    fused = step(model, parameters)
    assert fused[2] < plain[2]
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = step(model, parameters)
    assert torch.equal(fused[0], again[0])
    assert apart(again[1], fused[1]) < 1e-6
    torch.testing.assert_close(model.eval()(ids).logits, still)


def test_a_layer_that_reads_another_input_computes_alone() -> None:
    """As in cross-attention, whose query reads the decoder and whose key and value read the encoder."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out: Tensor = self.query(x) + self.key(y) * self.value(y)
            return out

    torch.manual_seed(0)
    model = Cross()
    parameters = adapted(model)
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    plain = model(x, y)
    wanted = torch.autograd.grad(plain.square().sum(), parameters)
    fuse(model)
    for _ in range(2):
        torch.testing.assert_close(model(x, y), plain)
    found = torch.autograd.grad(model(x, y).square().sum(), parameters)
    assert apart(list(found), list(wanted)) < 1e-6


def test_weights_of_an_adapter_and_two_at_once_act_as_ever() -> None:
    model = made("llama")
    adapted(model, called="a")
    ids = torch.arange(12)[None]
    fuse(model)

    def logits(weights: dict[str, Any]) -> Tensor:
        use(model, weights)
        out: Tensor = model(ids).logits
        return out

    def plain(weights: dict[str, Any]) -> Tensor:
        unfuse(model)
        out = logits(weights)
        fuse(model)
        return out

    for weights in ({"a": 0.5}, {}, {"a": torch.tensor([0.3])}):
        torch.testing.assert_close(logits(weights), plain(weights), rtol=1e-5, atol=1e-5)
    adapted(model, called="b")
    fuse(model)
    torch.testing.assert_close(logits({"a": 1.0, "b": 0.5}), plain({"a": 1.0, "b": 0.5}), rtol=1e-5, atol=1e-5)


def test_what_stays_plain_says_why() -> None:
    model = made("llama")
    attach(model, AdapterSpec(method("mixture")()))  # type: ignore[call-arg]
    assert fuse(model).counts()["plain"] == {"mixture is no product of two factors": 14}
    other = made("gpt2")
    attach(other, AdapterSpec(method("lora")(4), Targets(("c_attn[q]",))))  # type: ignore[call-arg]
    assert fuse(other).counts()["plain"] == {"an update of some rows of a fused layer": 2}


def test_a_module_whose_forward_is_its_own_is_left_alone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.variance_epsilon)

    model = nn.Sequential(nn.Linear(8, 8), OddRMSNorm(), nn.LayerNorm(8))
    adapted(model)
    assert fuse(model) == Fusion({"0": "adapted layers", "2": "norms"}, {})


@pytest.mark.parametrize("family", ["llama", "gemma", "bert"])
def test_under_autocast_of_the_model_s_own_dtype_it_runs_fused(family: str) -> None:
    """As with a 16-bit classifier whose new head is trained in fp32: autocast is for the head alone."""
    model = made(family, torch.bfloat16)
    parameters = adapted(model)
    wide = copy.deepcopy(model).float()
    _, exact, _ = step(wide, [p for p in wide.parameters() if p.requires_grad])
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads, kept = step(model, parameters)
        fuse(model)
        fused_loss, fused_grads, fused_kept = step(model, parameters)
    assert float(fused_loss) == pytest.approx(float(loss), rel=2e-3)
    assert apart(fused_grads, exact) < 1.5 * apart(grads, exact)
    assert fused_kept < 0.8 * kept


def test_trained_norms_and_another_dtype_s_autocast_take_the_plain_way() -> None:
    model = made("llama")
    attach(model, AdapterSpec(method("lora")(4), train=("norms",)))  # type: ignore[call-arg]
    parameters = [p for p in model.parameters() if p.requires_grad]
    _, grads, _ = step(model, parameters)
    fuse(model)
    _, fused, _ = step(model, parameters)
    moved = [(a, b) for a, b in zip(fused, grads, strict=True) if float(b.norm()) > 0]
    assert apart([a for a, _ in moved], [b for _, b in moved]) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(step(model, parameters)[0].isfinite())


def test_the_proof_that_an_adapter_takes_part_watches_the_fused_way_too() -> None:
    model = made("llama")
    parameters = adapted(model)
    fuse(model)
    with alive(model):
        model(torch.arange(6)[None]).logits.sum().backward()
    assert all(p.grad is not None for p in parameters)
    with pytest.raises(AliveError, match=r"14 of 14 active adapters were never called"), alive(model):
        model.get_input_embeddings()(torch.arange(6)).sum()


def test_a_fused_model_is_copied_pickled_merged_and_detached_like_any_other() -> None:
    model = made("llama")
    adapted(model)
    ids = torch.arange(12)[None]
    fuse(model)
    out = model(ids).logits
    copied, revived = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copied(ids).logits, out)
    torch.testing.assert_close(revived(ids).logits, out)
    held = copied.model.layers[0].self_attn.q_proj.adapters.fast
    assert all(any(m is own for own in copied.modules()) for m in held._modules), "a copy's layers are its own"
    merged = merge(copied)
    torch.testing.assert_close(
        (merged if isinstance(merged, nn.Module) else copied)(ids).logits, out, rtol=1e-4, atol=1e-4
    )
    detach(model)
    unfuse(model)
    assert not any(fronts(module) for module in model.modules())


def test_layers_that_lost_their_adapter_or_their_group_compute_as_they_are() -> None:
    model = made("llama")
    queries = Targets(("q_proj",))
    attach(model, AdapterSpec(method("lora")(4), Targets(("q_proj", "k_proj", "v_proj"))), "a")  # type: ignore[call-arg]
    attach(model, AdapterSpec(method("lora")(4), queries), "b")  # type: ignore[call-arg]
    fuse(model)
    ids = torch.arange(12)[None]
    model(ids)
    detach(model, "a")
    left = model(ids).logits
    unfuse(model)
    torch.testing.assert_close(left, model(ids).logits)


def test_layers_that_read_different_inputs_stop_computing_together() -> None:
    model = made("llama")
    adapted(model)
    fuse(model)
    attention = model.model.layers[0].self_attn
    x, y = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    for _ in range(3):
        attention.q_proj(x), attention.k_proj(y)
    held = attention.q_proj.adapters.fast._held
    assert held is None, "nothing is computed that nobody asks for, and no graph is kept"
