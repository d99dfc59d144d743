"""Whatever joins, leaves, is cancelled, put back or reloaded: every request's tokens are those it gets alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lorakit
from lorakit.errors import BusyError, RequestError, ServingError, UnknownAdapterError
from lorakit.serving.batching.engine import SlotEngine
from lorakit.serving.batching.place import Place
from lorakit.serving.requests import End, Request, Sampling, Token
from tests.serving.answers import Answer, ask
from tests.serving.models import VOCABULARY, made

RANKS = {"a": 2, "b": 8, "c": 4}
STOP = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that PEFT made and wrote, of different ranks and targets."""
    root = tmp_path_factory.mktemp("adapters")
    for number, (name, rank) in enumerate(RANKS.items()):
        torch.manual_seed(number)
        targets = ["q_proj", "v_proj"] if name == "c" else "all-linear"
        model = get_peft_model(made("llama", torch.float32), LoraConfig(r=rank, lora_alpha=8, target_modules=targets))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_" in key:
                    p.normal_(0, 0.25)
        model.save_pretrained(root / name)
    return {name: root / name for name in RANKS}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Any:
    """What PEFT alone writes with one adapter: `(adapter or None, prompt, tokens) -> ids`, greedy."""
    model = PeftModel.from_pretrained(made("llama", torch.float32), folders["a"], adapter_name="a").eval()
    for name in ("b", "c"):
        model.load_adapter(folders[name], adapter_name=name)
    known: dict[tuple[Any, ...], list[int]] = {}

    def write(adapter: str | None, prompt: tuple[int, ...], tokens: int) -> list[int]:
        if (key := (adapter, prompt)) not in known or len(known[key]) < tokens:
            settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                if adapter is None:
                    with model.disable_adapter():
                        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
                else:
                    model.set_adapter(adapter)
                    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
            known[key] = made[0, len(prompt) :].tolist()
        return known[key][:tokens]

    return write


@pytest.fixture
def engine(folders: dict[str, Path]) -> Iterator[SlotEngine]:
    """An engine of four slots with every adapter loaded."""
    made_engine = SlotEngine(made("llama", torch.float32), stops=[STOP], slots=4, queue=200)
    for name, folder in folders.items():
        made_engine.load(name, folder)
    yield made_engine
    made_engine.close()


def until(met: Callable[[], bool], seconds: float = 20.0) -> None:
    began = time.monotonic()
    while not met():
        assert time.monotonic() - began < seconds
        time.sleep(0.005)


def note(order: list[str], name: str, event: Token | End) -> None:
    """Remember the order in which requests get their first tokens."""
    if name not in order:
        order.append(name)


def prompt(rng: random.Random, longest: int = 30) -> tuple[int, ...]:
    return tuple(rng.choices(range(VOCABULARY), k=rng.randint(1, longest)))


def until_stop(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(STOP)] if STOP in tokens else tokens


def check(answer: Answer, request: Request, alone: Any, *, cancelled: bool = False) -> None:
    """Assert that an answer is what PEFT alone writes, ended as it should; only some may have been cancelled."""
    wanted, end = alone(request.adapter, request.prompt, request.sampling.max_tokens), answer.end
    if cancelled and end.reason == "cancelled":
        assert answer.tokens == until_stop(wanted)[: len(answer.tokens)]
    else:
        assert answer.tokens == until_stop(wanted)
        assert end == End("stop" if STOP in wanted else "length")


@pytest.mark.parametrize("seed", range(3))
def test_each_request_gets_the_tokens_of_peft_alone_whoever_joins_and_leaves(
    engine: SlotEngine, folders: dict[str, Path], alone: Any, seed: int
) -> None:
    rng = random.Random(seed)
    asked: list[tuple[Request, Answer]] = []
    for number in range(60):
        sampling = Sampling(max_tokens=rng.randint(1, 12))
        request = Request(prompt(rng), rng.choice([None, "a", "b", "c"]), sampling=sampling, id=f"{seed}-{number}")
        answer = Answer()
        engine.submit(request, answer)
        asked.append((request, answer))
        if rng.random() < 0.2:
            engine.cancel(rng.choice(asked)[0].id)
        if rng.random() < 0.1:
            name = rng.choice(list(folders))
            engine.unload(name)
            engine.load(name, folders[name])
        if rng.random() < 0.3:
            time.sleep(0.01)
    for request, answer in asked:
        check(answer, request, alone, cancelled=True)
    ended = {answer.end.reason for _, answer in asked}
    assert {"length", "cancelled"} <= ended <= {"length", "stop", "cancelled"}
    assert engine.stats().running == engine.stats().waiting == 0


def test_those_put_back_for_want_of_positions_read_their_own_text_again(folders: dict[str, Path], alone: Any) -> None:
    tight = SlotEngine(made("llama", torch.float32), stops=[STOP], slots=4, positions=60)
    tight.load("b", folders["b"])
    rng = random.Random(4)
    asked = [Request(prompt(rng, 12), rng.choice([None, "b"]), sampling=Sampling(max_tokens=30)) for _ in range(8)]
    for request, answer in zip(asked, ask(tight, asked), strict=True):
        check(answer, request, alone)
    assert tight.stats().preemptions > 0
    tight.close()


def test_a_long_prompt_is_read_in_pieces_beside_others(
    monkeypatch: pytest.MonkeyPatch, engine: SlotEngine, alone: Any
) -> None:
    monkeypatch.setattr("lorakit.serving.batching.engine.PIECE", 5)
    rng = random.Random(1)
    asked = [Request(tuple(rng.choices(range(VOCABULARY), k=n)), a, sampling=Sampling(max_tokens=9))
             for n, a in ((60, "a"), (3, "b"), (47, None), (1, "c"), (80, "a"))]  # fmt: skip
    for request, answer in zip(asked, ask(engine, asked), strict=True):
        check(answer, request, alone)


def test_a_prompt_that_takes_a_step_by_itself_is_answered(
    monkeypatch: pytest.MonkeyPatch, engine: SlotEngine, alone: Any
) -> None:
    monkeypatch.setattr("lorakit.serving.batching.engine.PIECE", 5)
    request = Request(tuple(random.Random(2).choices(range(VOCABULARY), k=70)), "a", sampling=Sampling(max_tokens=5))
    check(ask(engine, [request])[0], request, alone)


def test_the_oldest_prompt_is_read_first_whoever_ends_meanwhile(
    monkeypatch: pytest.MonkeyPatch, engine: SlotEngine
) -> None:
    monkeypatch.setattr("lorakit.serving.batching.engine.PIECE", 3)
    order: list[str] = []
    short, long = (Sampling(max_tokens=n, ignore_eos=True) for n in (3, 2))
    asked = [
        Request((1,), sampling=short, id="first"),
        Request((1,), sampling=replace(short, max_tokens=30), id="stays"),
    ]
    asked += [Request((2,) * 60, sampling=long, id=name) for name in ("old", "middle", "new")]
    heard = [partial(note, order, request.id) for request in asked]
    for request, sink in zip(asked, heard, strict=True):
        engine.submit(request, sink)
    until(lambda: {"old", "middle", "new"} <= set(order))
    assert [name for name in order if name not in ("first", "stays")] == ["old", "middle", "new"]


def test_an_adapter_no_memory_is_left_for_ends_its_own_request_alone(
    monkeypatch: pytest.MonkeyPatch, engine: SlotEngine, alone: Any
) -> None:
    made_rows = Place.make_rows

    def small(self: Place, count: int, rank: int, stretched: bool) -> None:
        if rank == RANKS["b"]:
            raise MemoryError("no more")
        made_rows(self, count, rank, stretched)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "make_rows", small)
        others = [Request((3, 1, n), "a", sampling=Sampling(max_tokens=10)) for n in range(3)]
        *fine, failed = ask(engine, [*others, Request((1, 2), "b")])
        for request, answer in zip(others, fine, strict=True):
            check(answer, request, alone)
    assert failed.end == End("error", "the adapter could not be taken in: MemoryError: no more")
    request = Request((1, 2), "b", sampling=Sampling(max_tokens=10))
    check(ask(engine, [request])[0], request, alone)


def test_an_engine_that_breaks_ends_everybody_says_so_and_takes_nothing_more(
    monkeypatch: pytest.MonkeyPatch, engine: SlotEngine
) -> None:
    def fail(*args: Any) -> Any:
        raise MemoryError("no more")

    monkeypatch.setattr(engine, "_sweep", fail)
    (answer,) = ask(engine, [Request((1, 2))])
    assert answer.end == End("error", "the engine broke: MemoryError: no more")
    assert engine.stats().broken == "MemoryError: no more"
    with pytest.raises(ServingError, match="the engine broke: MemoryError: no more; start the server again"):
        engine.submit(Request((1, 2)), Answer())


def test_an_adapter_unloaded_while_its_request_waits_is_let_go(engine: SlotEngine) -> None:
    answers = [Answer() for _ in range(9)]
    for number, answer in enumerate(answers):
        engine.submit(Request((1,), "b" if number == 8 else None, sampling=Sampling(max_tokens=20)), answer)
    engine.unload("b")
    assert {answer.end.reason for answer in answers} <= {"stop", "length"}
    until(lambda: not engine._orphans)
    assert not engine._held


def test_numbers_that_are_none_end_their_request_and_nobody_after_it_in_that_slot(
    engine: SlotEngine, folders: dict[str, Path], tmp_path: Path, alone: Any
) -> None:
    state = lorakit.load(folders["b"])
    huge = tuple(replace(u, tensors={k: t * 1e30 for k, t in u.tensors.items()}) for u in state.updates)
    lorakit.save(replace(state, updates=huge), tmp_path / "huge")
    engine.load("huge", tmp_path / "huge")
    request = Request((3, 1, 4), "a", sampling=Sampling(max_tokens=12, ignore_eos=True))
    damaged = [Request((1,) * 60, "huge") for _ in range(4)]
    assert {answer.end.reason for answer in ask(engine, damaged)} == {"error"}
    long = Request((1,) * 50, sampling=Sampling(max_tokens=12, ignore_eos=True))  # so that slots are read that far
    first, second = ask(engine, [long, request])
    assert first.end.reason == second.end.reason == "length"
    assert second.tokens == alone("a", (3, 1, 4), 12)


@pytest.mark.parametrize("damaged", ["everywhere", "k_proj"])
def test_a_damaged_adapter_harms_nobody_beside_or_after_it(
    engine: SlotEngine, folders: dict[str, Path], tmp_path: Path, alone: Any, damaged: str
) -> None:
    state, rng = lorakit.load(folders["b"]), random.Random(0)
    huge = tuple(
        replace(u, tensors={k: t * 1e30 for k, t in u.tensors.items()})
        if damaged == "everywhere" or damaged in u.site.path
        else u
        for u in state.updates
    )
    lorakit.save(replace(state, updates=huge), tmp_path / "huge")
    engine.load("huge", tmp_path / "huge")
    asked = [
        Request(
            prompt(rng, 60),
            rng.choice(["huge", "huge", "a", "b", None]),
            sampling=Sampling(max_tokens=rng.randint(1, 12)),
        )
        for _ in range(120)
    ]
    for request, answer in zip(asked, ask(engine, asked), strict=True):
        if request.adapter != "huge":
            check(answer, request, alone)
    held = [tensor for pair in engine._decoder.slots._held.values() for tensor in pair]
    assert held
    assert not any(tensor.any() for tensor in held), "nothing is left where nobody is"


def test_a_closed_engine_keeps_no_keys_and_values(folders: dict[str, Path]) -> None:
    running = SlotEngine(made("llama", torch.float32), slots=2)
    ask(running, [Request((1, 2))])
    assert running._decoder.slots.bytes > 0
    running.close()
    assert running._decoder.slots.bytes == 0


def test_a_tenant_that_fills_the_queue_leaves_room_for_others() -> None:
    small = SlotEngine(made("llama", torch.float32), slots=1, queue=4, context=40)
    with pytest.raises(BusyError):
        for _ in range(40):
            small.submit(Request((1,), sampling=Sampling(max_tokens=39), tenant="loud"), Answer())
    quiet = [Answer() for _ in range(2)]
    for answer in quiet:
        small.submit(Request((1,), sampling=Sampling(max_tokens=1), tenant="quiet"), answer)
    with pytest.raises(BusyError, match="wait, and no more may"):
        for _ in range(8):
            small.submit(Request((1,), sampling=Sampling(max_tokens=39), tenant="quiet"), Answer())
    assert [answer.end.reason for answer in quiet] == ["length", "length"]
    small.close()


def test_a_deadline_ends_a_request_in_the_queue_and_a_running_one(engine: SlotEngine) -> None:
    long = Sampling(max_tokens=80, ignore_eos=True)
    soon = [Request((1, 2, 3), sampling=long, deadline=time.monotonic() + 0.02) for _ in range(12)]
    answers = ask(engine, soon)
    assert {answer.end.reason for answer in answers} == {"deadline"}
    assert 0 < sum(bool(answer.tokens) for answer in answers) < len(answers)


def test_a_full_queue_a_wrong_prompt_and_an_unknown_adapter_are_refused(folders: dict[str, Path]) -> None:
    small = SlotEngine(made("llama", torch.float32), slots=1, queue=2, context=40)
    with pytest.raises(BusyError, match="2 requests wait") as busy:
        for _ in range(40):
            small.submit(Request((1,), sampling=Sampling(max_tokens=39)), Answer())
    assert busy.value.retry_after >= 1
    with pytest.raises(UnknownAdapterError, match="no adapter 'a' is loaded"):
        small.submit(Request((1,), "a"), Answer())
    for ids, why in (((), "empty"), ((1,) * 40, "40 tokens and the context 40 positions"), ((VOCABULARY,), "token 97")):
        with pytest.raises(RequestError, match=why):
            small.submit(Request(ids), Answer())
    small.close()


def test_the_context_ends_an_answer(engine: SlotEngine) -> None:
    (answer,) = ask(engine, [Request((1,) * 90, sampling=Sampling(max_tokens=50, ignore_eos=True))])
    assert answer.end.reason == "length"
    assert len(answer.tokens) == engine.limits.context - 90


def test_an_adapter_unloaded_in_use_serves_its_last_request_and_nobody_after(engine: SlotEngine, alone: Any) -> None:
    request = Request((3, 1, 4), "b", sampling=Sampling(max_tokens=40))
    answer = Answer()
    engine.submit(request, answer)
    engine.unload("b")
    with pytest.raises(UnknownAdapterError):
        engine.submit(Request((3,), "b"), Answer())
    check(answer, request, alone)


def test_a_scale_weighs_the_adapter_of_one_request_alone(engine: SlotEngine, alone: Any) -> None:
    asked = [Request((7, 8, 9), "b", scale=scale, sampling=Sampling(max_tokens=10)) for scale in (1.0, 0.0, 1.0)]
    whole, none, again = ask(engine, asked)
    assert whole.tokens == again.tokens == until_stop(alone("b", (7, 8, 9), 10))
    assert none.tokens == until_stop(alone(None, (7, 8, 9), 10))


def test_a_seed_gives_the_same_draws_in_any_company(engine: SlotEngine) -> None:
    sampling = Sampling(max_tokens=12, temperature=1.5, top_p=0.95, seed=11)
    mine = Request((9, 9), "a", sampling=sampling)
    (alone,) = ask(engine, [mine])
    crowd = [Request((i, 2), None, sampling=Sampling(max_tokens=5, temperature=1.0)) for i in range(6)]
    crowded = ask(engine, [*crowd, Request((9, 9), "a", sampling=sampling)])[-1]
    other = ask(engine, [Request((9, 9), "a", sampling=Sampling(12, temperature=1.5, top_p=0.95, seed=12))])[0]
    assert alone.tokens == crowded.tokens != other.tokens


def test_a_listener_that_fails_harms_nobody_else(engine: SlotEngine, alone: Any) -> None:
    def broken(event: Token | End) -> None:
        raise RuntimeError("gone")

    engine.submit(Request((1, 2), "a", sampling=Sampling(max_tokens=20)), broken)
    request = Request((3, 1, 4), "a", sampling=Sampling(max_tokens=10))
    (answer,) = ask(engine, [request])
    check(answer, request, alone)


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch, engine: SlotEngine, alone: Any
) -> None:
    def fail(*args: Any) -> Any:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(engine._decoder, "step", fail)
        (failed,) = ask(engine, [Request((1, 2), "a")])
    assert failed.end == End("error", "MemoryError: no more")
    request = Request((3, 1, 4), "a", sampling=Sampling(max_tokens=10))
    check(ask(engine, [request])[0], request, alone)


def test_threads_may_ask_cancel_load_and_unload_at_once(
    engine: SlotEngine, folders: dict[str, Path], alone: Any
) -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for number in range(12):
            adapter = rng.choice([None, "a", "b"])
            request = Request(prompt(rng, 8), adapter, sampling=Sampling(max_tokens=4), id=f"{seed}.{number}")
            answer = Answer()
            engine.submit(request, answer)
            if rng.random() < 0.2:
                engine.cancel(request.id)
            if seed == 0:
                engine.unload("c")
                engine.load("c", folders["c"])
            if answer.end.reason in ("stop", "length") and answer.tokens != until_stop(
                alone(adapter, request.prompt, 4)
            ):
                wrong.append(request.id)

    lock = threading.Lock()
    write = alone

    def guarded(*args: Any) -> list[int]:
        with lock:
            found: list[int] = write(*args)
            return found

    alone = guarded
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_close_ends_everybody_and_may_be_called_twice(folders: dict[str, Path]) -> None:
    model = made("llama", torch.float32)
    before = [type(module) for module in model.modules()]
    running = SlotEngine(model, slots=2)
    answers = [Answer() for _ in range(5)]
    for answer in answers:
        running.submit(Request((1, 2), sampling=Sampling(max_tokens=90)), answer)
    running.close()
    running.close()
    assert {answer.end.reason for answer in answers} == {"cancelled"}
    with pytest.raises(BusyError, match="stopping"):
        running.submit(Request((1,)), Answer())
    assert [type(module) for module in model.modules()] == before
