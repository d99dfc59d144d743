"""A step that is compiled, recomputed or offloaded is the same step: values, gradients, and what it holds."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from lorakit import AdapterSpec, attach
from lorakit.core.reading import blocks_of
from lorakit.core.registry import method
from lorakit.errors import DeviceError, LorakitError, RecipeError
from lorakit.inject.fuse import fuse
from lorakit.persist.native import load_native
from lorakit.training.events import Event, read_events
from lorakit.training.forecast import Load, forecast
from lorakit.training.loss import loss_of_batch
from lorakit.training.recipe import make_recipe
from lorakit.training.run import train
from lorakit.training.step import compile_blocks, offloaded, recompute, refuse_step, uncompiled
from tests.slow import others_slow, slow
from tests.training import samples

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""torch's compiler asks for it and hides the warning, unless warnings are errors, as here."""

FAMILIES: dict[str, Any] = {
    "llama": samples.CONFIGS["llama"],
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=samples.VOCABULARY, n_positions=128,
                               bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Let no test see the graphs of another one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(family: str, name: str = "lora", layers: int | None = None) -> tuple[Any, list[torch.nn.Parameter]]:
    """Return a small model in training with an adapter off its start, and the adapter's parameters."""
    config = FAMILIES[family]()
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    model.config.use_cache = False
    lora = method("lora")(4, 8.0)  # type: ignore[call-arg]
    parameters = attach(model, AdapterSpec(lora if name == "lora" else method(name)(lora))).parameters()  # type: ignore[call-arg]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, parameters


def batch(rows: int, length: int, *, packed: bool, seed: int) -> dict[str, Tensor]:
    """Return a batch of two examples a row, or of rows padded to one length."""
    ids = torch.randint(2, samples.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    if packed:
        places = torch.cat([torch.arange(length // 2 - seed), torch.arange(length - length // 2 + seed)])
        return {"input_ids": ids, "labels": ids, "position_ids": places.repeat(rows, 1)}
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    return {"input_ids": ids, "labels": ids.where(mask == 1, -100), "attention_mask": mask}


def step(model: Any, parameters: list[torch.nn.Parameter], given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of a batch and its gradients."""
    inputs = {name: tensor for name, tensor in given.items() if name != "labels"}
    loss, count = loss_of_batch(model, inputs, given["labels"])
    return loss.detach() / count, list(torch.autograd.grad(loss / count, parameters))


def same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
    for found, wanted in zip(one[1], other[1], strict=True):
        assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())


@pytest.fixture(params=["aot_eager", slow("inductor")])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Trace as ever and run what was traced by torch (seconds), or compile it as a user does (minutes)."""
    compile_module = torch.nn.Module.compile

    def compiled(module: torch.nn.Module, **options: Any) -> None:
        compile_module(module, backend=request.param, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    return str(request.param)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("family", "packed"),
    others_slow(itertools.product(("llama", "gpt2"), (True, False)), [("llama", True)]),
)
def test_a_compiled_step_is_the_step_and_compiles_no_more_after_the_second(family: str, packed: bool) -> None:
    model, parameters = made(family)
    shapes = [(3, 32)] * 4 if packed else [(3, 32), (4, 24), (2, 40), (5, 17), (3, 31)]
    batches = [batch(*shape, packed=packed, seed=seed) for seed, shape in enumerate(shapes)]
    with uncompiled():
        wanted = [step(model, parameters, given) for given in batches]
    assert compile_blocks(model, dynamic=not packed) == 2
    graphs: list[int] = []
    for given, eager in zip(batches, wanted, strict=True):
        same(step(model, parameters, given), eager)
        with uncompiled(), torch.no_grad():
            model.eval()
            model(input_ids=given["input_ids"][:1, :7])
            model.train()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0, "something is compiled"
    assert graphs[1:] == [graphs[1]] * (len(graphs) - 1), "and nothing anew"
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
def test_compiled_blocks_and_recomputed_ones_go_together() -> None:
    model, parameters = made("llama", "dora", layers=3)
    given = batch(3, 32, packed=True, seed=0)
    eager = step(model, parameters, given)
    recompute(model, 2.0)
    compile_blocks(model, dynamic=False)
    same(step(model, parameters, given), eager)
    same(step(model, parameters, given), eager)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # four runs compile anew: three minutes on a quiet core, more than five beside other work
@pytest.mark.usefixtures("backend")
def test_a_compiled_run_ends_where_a_plain_one_does_and_goes_on_bit_for_bit(base: Path, tmp_path: Path) -> None:
    """With dropout, accumulation, validation and epochs that end in a short batch."""

    def recipe(name: str, **changes: Any) -> Any:
        (tmp_path / name).mkdir()
        valid = samples.write_rows(tmp_path / name / "valid.jsonl", samples.pairs(10, 200))
        packed = {"train__batch_size": None, "train__batch_tokens": 256, "train__compile": True, "train__steps": 5}
        other = {"data__validation": valid, "train__accumulation": 2, "train__save_every": 2, **packed, **changes}
        return samples.recipe_of(base, tmp_path / name, **other)

    def losses(run: Any) -> list[float]:
        return [e["loss"] for e in read_events(Path(run.output) / "events.jsonl") if e["event"] in ("step", "evaluate")]

    def stop(event: Event) -> None:
        if event["event"] == "step" and event["step"] == 3:
            raise KeyError

    compiled, plain = train(recipe("compiled")), train(recipe("plain", train__compile=False))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    (told,) = [e for e in read_events(Path(compiled.output) / "events.jsonl") if e["event"] == "compiled"]
    assert (told["blocks"], told["fused"]) == (2, False)
    torch._dynamo.reset()  # the runs before it count towards the limit of graphs, past which blocks run as written
    whole, stopped = train(recipe("whole", adapter__dropout=0.1)), recipe("stopped", adapter__dropout=0.1)
    with pytest.raises(KeyError):
        train(stopped, listen=stop)
    torch._dynamo.reset()
    resumed = train(stopped, resume=True)
    first, second = (load_native(Path(run.output) / "checkpoint-5") for run in (whole, resumed))
    for one, other in zip(first.updates, second.updates, strict=True):
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_what_cannot_be_compiled_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LorakitError, match="train.compile compiles blocks, and Linear has no one stack of them"):
        compile_blocks(torch.nn.Linear(2, 2), dynamic=False)
    train = make_recipe({"train": {"compile": True}}).train
    refuse_step(train, torch.device("cpu"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(DeviceError, match="train.compile needs a C.. compiler, and there is no 'no-such-compiler'"):
        refuse_step(train, torch.device("cpu"))
    refuse_step(train, torch.device("cuda"))


# ---- blocks that are recomputed ----


@pytest.mark.parametrize(("choice", "chosen"), [(False, 0), (True, 4), (0.5, 2), (0.3, 1), (3.0, 3), (1.0, 1)], ids=str)
def test_the_first_blocks_are_recomputed_and_the_step_is_the_same(choice: bool | float, chosen: int) -> None:
    model, parameters = made("llama", layers=4)
    fuse(model)
    given = batch(3, 32, packed=True, seed=0)
    plain = step(model, parameters, given)
    recompute(model, choice)
    assert [block.gradient_checkpointing for block in blocks_of(model)] == [True] * chosen + [False] * (4 - chosen)
    same(step(model, parameters, given), plain)


def test_each_recomputed_block_holds_less_and_the_first_ones_are_the_ones_to_choose() -> None:
    model = AutoModelForCausalLM.from_config(replaced(6))
    spec, load = AdapterSpec(method("lora")(4, 8.0)), Load(4, 64)  # type: ignore[call-arg]
    found = [forecast(model, spec, replace(load, checkpointing=c)) for c in (False, 1.0, 0.5, 5.0, True)]
    kept = [one.between.activations for one in found]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 5
    each = (kept[0] - kept[4]) / 6
    for blocks, held in zip((0, 1, 3, 5, 6), kept, strict=True):
        assert held == pytest.approx(kept[0] - blocks * each, rel=0.02), "a straight line"
    assert 5 * (found[2].flops - found[1].flops) == 2 * (found[4].flops - found[1].flops) > 0, "as much work each"


def replaced(layers: int) -> Any:
    config = copy.deepcopy(FAMILIES["llama"]())
    config.num_hidden_layers = layers
    return config


def test_blocks_that_are_not_there_are_refused() -> None:
    model, _ = made("llama")
    with pytest.raises(LorakitError, match="train.checkpointing: 3 blocks, and LlamaForCausalLM has 2"):
        recompute(model, 3.0)
    model.config.num_hidden_layers = 9
    with pytest.raises(LorakitError, match="0.5 counts blocks, and LlamaForCausalLM has no one stack of them"):
        recompute(model, 0.5)


@pytest.mark.parametrize(
    ("value", "what"),
    [(-1, "more than 0"), (2.5, "a whole number of them"), ("half", "true or false or a number")],
)
def test_checkpointing_takes_a_share_or_a_number(value: Any, what: str) -> None:
    with pytest.raises(RecipeError, match=rf"train.checkpointing: .*{what}"):
        make_recipe({"train": {"checkpointing": value}})
    for good in (True, False, 0.5, 3):
        assert make_recipe({"train": {"checkpointing": good}}).train.checkpointing == good
        assert isinstance(make_recipe({"train": {"checkpointing": good}}).train.checkpointing, bool | float)
    assert make_recipe({"train": {"checkpointing": 1}}).train.checkpointing is not True


# ---- activations on the host ----


@pytest.mark.parametrize("checkpointing", [False, 1.0])
@pytest.mark.parametrize("fused", [True, False])
def test_offloaded_activations_come_back_and_no_parameter_goes(fused: bool, checkpointing: bool | float) -> None:
    """The device here is the CPU: what moves and what comes back is tested, not the copies of CUDA."""
    model, parameters = made("llama")
    if fused:
        fuse(model)
    recompute(model, checkpointing)
    given = batch(3, 32, packed=True, seed=0)
    plain = step(model, parameters, given)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    gone: list[Tensor] = []
    returned: list[int] = []

    def away(tensor: Tensor) -> Tensor:
        assert tensor.untyped_storage().data_ptr() not in own
        gone.append(tensor.detach().clone())
        return gone[-1]

    def back(kept: Tensor) -> Tensor:
        returned.append(kept.nbytes)
        return kept.clone()

    model.zero_grad()
    with offloaded(model, away, back, small=64):
        loss, count = loss_of_batch(model, {k: v for k, v in given.items() if k != "labels"}, given["labels"])
    assert gone, "something moved"
    assert not returned, "nothing came back before the backward"
    same((loss.detach() / count, list(torch.autograd.grad(loss / count, parameters))), plain)
    assert set(returned) <= {t.nbytes for t in gone}
    assert min(t.nbytes for t in gone) >= 64


def test_a_tensor_that_two_functions_save_moves_once_unless_it_was_written_to() -> None:
    x = torch.ones(4, requires_grad=True)
    gone: list[Tensor] = []

    def away(tensor: Tensor) -> Tensor:
        gone.append(tensor.clone())
        return gone[-1]

    with offloaded(torch.nn.Identity(), away, lambda kept: kept, small=0):
        y = x * 1.0
        z = y.square() + y.square()
        assert len(gone) == 1
        w = z.detach() + 1
        out = (z * w).sum()
        w.add_(1)
        again = (z * w).sum()
    assert len(gone) == 3, "the tensor that changed was saved anew"
    (out + again).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, torch.full((4,), (3.0 + 4.0) * 4))


def test_a_plan_of_an_offloaded_step_holds_almost_no_activations() -> None:
    model = AutoModelForCausalLM.from_config(replaced(6))
    spec, load = AdapterSpec(method("lora")(4, 8.0)), Load(8, 512)  # type: ignore[call-arg]
    kept, left = (forecast(model, spec, replace(load, offload=o)).between.activations for o in (False, True))
    assert left < 0.1 * kept


def test_offloading_where_it_saves_nothing_is_refused() -> None:
    train = make_recipe({"train": {"offload_activations": True}}).train
    refuse_step(train, torch.device("cuda"))
    with pytest.raises(DeviceError, match="this run is on cpu, where it would save nothing"):
        refuse_step(train, torch.device("cpu"))
    with pytest.raises(RecipeError, match="what compiled blocks keep cannot be moved"):
        make_recipe({"train": {"offload_activations": True, "compile": True}})
