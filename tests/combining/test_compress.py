"""Compressed adapters: by hand, the best for their bytes, what is stated is what is stored, and PEFT reads the same."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lorakit.combining import STORED, compress, truncate
from lorakit.combining.compress import stored_bytes
from lorakit.core.site import Site
from lorakit.core.state import AdapterState
from lorakit.errors import AdapterFileError, CombineError, SpecError
from lorakit.methods.dora import DoRA
from lorakit.methods.ia3 import IA3
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture
from lorakit.persist import load, save
from tests.combining.samples import Q, V, adapter, delta, deltas, product, ranks


def diagonal(*values: float) -> AdapterState:
    """Return the adapter whose dW is this diagonal."""
    return product(torch.diag(torch.tensor(values)).tolist())


def test_by_hand() -> None:
    """diag(4, 2, 1), the first direction kept: |error| = sqrt 5 of sqrt 21, and no input moves by more than 2 |x|."""
    made = compress(diagonal(4.0, 2.0, 1.0), rank=1)
    torch.testing.assert_close(delta(made.state), torch.diag(torch.tensor([4.0, 0, 0])).double())
    assert made.error == pytest.approx((5 / 21) ** 0.5)
    (loss,), (bound,) = made.losses.values(), made.bounds.values()
    assert (loss.error, loss.size) == (pytest.approx(5**0.5), pytest.approx(21**0.5))
    assert (bound.error, bound.size) == (pytest.approx(2.0), pytest.approx(4.0))
    assert made.bytes == 4 * (3 + 3)


@pytest.mark.parametrize("asked", [{"rank": 2}, {"energy": 0.8}])
def test_rank_and_energy_are_truncation(asked: dict[str, float]) -> None:
    torch.manual_seed(0)
    state = adapter(LoRA(4, 8.0))
    made, cut = compress(state, **asked), truncate(state, **asked)  # type: ignore[arg-type]
    assert made.error == pytest.approx(cut.error)
    for key, dense in deltas(cut.state).items():
        torch.testing.assert_close(deltas(made.state)[key], dense, rtol=1e-5, atol=1e-6)
    assert list(made.ranks.values()) == ranks(made.state)


def test_what_is_stated_is_the_error_of_what_is_there() -> None:
    torch.manual_seed(1)
    state = adapter(LoRA(4, 8.0))
    for dtype in STORED:
        made = compress(state, rank=3, dtype=dtype)
        whole = deltas(state)
        for key, dense in deltas(made.state).items():
            error = torch.linalg.svdvals(dense - whole[key])
            assert made.losses[key].error == pytest.approx(float(error.norm()), rel=1e-4)
            assert made.bounds[key].error == pytest.approx(float(error[0]), rel=1e-4)


def test_a_budget_is_shared_out_as_no_other_choice_of_ranks_does_better() -> None:
    torch.manual_seed(2)
    state = adapter(LoRA(4, 4.0), sites=(Q, V, Site("h.1.attn.q", 7, 5)))
    sigma = {key: torch.linalg.svdvals(dense)[:4].square() for key, dense in deltas(state).items()}
    cost = {u.site.key: 4 * (u.site.out + u.site.in_) for u in state.updates}
    for size in (60, 120, 250, 400, 600):
        made = compress(state, size=size)
        assert made.bytes == sum(cost[key] * rank for key, rank in made.ranks.items()) <= size
        left = sum(float(sigma[key][rank:].sum()) for key, rank in made.ranks.items())
        for choice in itertools.product(range(5), repeat=3):
            bytes_ = sum(cost[key] * rank for key, rank in zip(sigma, choice, strict=True))
            if bytes_ <= made.bytes:
                other = sum(float(sigma[key][rank:].sum()) for key, rank in zip(sigma, choice, strict=True))
                assert left <= other + 1e-6, (made.ranks, choice)


def test_an_update_without_a_direction_is_left_out_and_the_spec_names_the_others() -> None:
    loud, faint = diagonal(9.0, 8.0, 7.0), adapter(LoRA(2, 0.002), sites=(Q,))
    both = AdapterState(loud.spec, (*loud.updates, *faint.updates))
    made = compress(both, size=100)
    assert made.ranks[Q.key] == 0
    assert [update.site.key for update in made.state.updates] == ["layer"]
    assert made.losses[Q.key].relative == 1.0
    assert made.error < 1.0


@pytest.mark.parametrize(("dtype", "error"), [("bf16", 6e-3), ("fp16", 8e-4), ("fp8", 0.06), ("int8", 0.02)])
def test_fewer_bits_say_their_error_and_keep_their_bytes(dtype: str, error: float) -> None:
    torch.manual_seed(3)
    state = adapter(LoRA(4, 8.0), sites=(Site("a", 64, 48), Site("b", 32, 80)))
    made = compress(state, dtype=dtype)
    assert 0 < made.error < error
    assert made.bytes == stored_bytes(state) * STORED[dtype].itemsize // 4
    assert made.ranks == {"a": 4, "b": 4}


@pytest.mark.parametrize("format", ["peft", "native"])
@pytest.mark.parametrize("dtype", ["fp8", "int8", "bf16"])
def test_8_bits_are_written_as_such_and_read_back_as_they_were(tmp_path: Path, dtype: str, format: str) -> None:
    torch.manual_seed(4)
    made = compress(adapter(LoRA(4, 8.0)), rank=3, dtype=dtype)
    save(made.state, tmp_path, format, dtype=made.dtype)  # type: ignore[arg-type]
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {  # noqa: SIM118
            {"fp8": "F8_E4M3", "int8": "I8", "bf16": "BF16"}[dtype]
        }
    back = load(tmp_path)
    for key, dense in deltas(made.state).items():
        torch.testing.assert_close(deltas(back)[key], dense, rtol=1e-6, atol=1e-7)


def test_a_dtype_that_would_change_values_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"int8 does not hold these tensors exactly"):
        save(adapter(LoRA(4, 8.0)), tmp_path / "a", dtype=torch.int8)
    assert not (tmp_path / "a" / "adapter_config.json").exists()


@pytest.mark.parametrize("dtype", ["fp32", "int8", "fp8"])
def test_peft_computes_with_it_what_lorakit_does(tmp_path: Path, dtype: str) -> None:
    """Ranks and scales of their own for each layer go into rank_pattern and alpha_pattern, scales of 8 bits too."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from lorakit import attach
    from lorakit.core.spec import AdapterSpec
    from lorakit.inject.attach import state as state_of

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=50,
                                          num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()

    model = base()
    handle = attach(model, AdapterSpec(LoRA(6, 12.0)))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) * torch.rand(()))
    made = compress(state_of(model), size=6000 * STORED[dtype].itemsize // 4, dtype=dtype)
    assert len(set(made.ranks.values())) > 2
    save(made.state, tmp_path, dtype=made.dtype)
    ids = torch.arange(12)[None]
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    ours = base()
    attach(ours, load(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=2e-5)
        assert (ours(ids).logits - base()(ids).logits).abs().max() > 0.05


def test_a_change_that_leans_on_its_weight_takes_it_from_the_base() -> None:
    torch.manual_seed(5)
    weights = {Q.key: torch.randn(7, 5), V.key: torch.randn(6, 9)}
    for method in (DoRA(LoRA(2, 4.0)), IA3()):
        state = adapter(method)
        with pytest.raises(CombineError, match="give it, base="):
            compress(state, rank=2)
        made = compress(state, rank=5, base=weights)
        exact = deltas(state, weights)
        for key, dense in deltas(made.state).items():
            error = float((dense - exact[key]).norm())
            assert error == pytest.approx(made.losses[key].error, rel=1e-3, abs=1e-4 * float(exact[key].norm()))


def test_what_cannot_be_asked_is_refused() -> None:
    state = adapter(LoRA(4, 8.0))
    for asked, said in (
        ({}, "compress to what"),
        ({"rank": 2, "energy": 0.9}, "rank and energy all say how much"),
        ({"rank": 0}, "rank"),
        ({"energy": 1.5}, "energy must lie"),
        ({"size": 0}, "size is a number of bytes above 0"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
    ):
        with pytest.raises(SpecError, match=said):
            compress(state, **asked)  # type: ignore[arg-type]
    with pytest.raises(CombineError, match="40 bytes hold nothing of it: a single direction of a weight takes 48"):
        compress(state, size=40)
    headed = adapter(LoRA(4, 8.0), trained={"head.weight": torch.zeros(5, 5)})
    with pytest.raises(CombineError, match="trained whole take 100 of them and stay, and a single direction"):
        compress(headed, size=120)
    assert 100 < compress(headed, size=160).bytes <= 160
    with pytest.raises(CombineError, match="no change of a weight"):
        compress(adapter(Mixture(experts=2, rank=2)), rank=1)
    state.updates[0].tensors["up"][0, 0] = float("nan")
    with pytest.raises(CombineError, match="NaN"):
        compress(state, rank=1)
