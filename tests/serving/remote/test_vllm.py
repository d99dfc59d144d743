"""VLLMEngine keeps the engine's contract over vLLM's HTTP, and the server's adapters as they should be."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import AdapterFileError, BusyError, RequestError, ServingError, SpecError, UnknownAdapterError
from lorakit.inject.sites import sites
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA
from lorakit.persist import save
from lorakit.serving.remote.vllm import VLLMEngine
from lorakit.serving.requests import End, Request, Sampling, Token
from tests.serving.answers import Answer, ask
from tests.serving.fake_vllm import FakeVLLM, written
from tests.serving.models import ROOM, SIZES, VOCABULARY, adapter, made

PROMPT = (5, 6, 7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the tiny Llama; `dora` is one vLLM refuses."""
    torch.manual_seed(0)
    root, model = tmp_path_factory.mktemp("store"), made("llama", torch.float32)
    methods = {"a": LoRA(2, 4.0), "b": LoRA(4, 8.0), "dora": DoRA(LoRA(2, 4.0))}
    for name, method in methods.items():
        save(adapter(model, AdapterSpec(method, Targets(("q_proj", "v_proj")))), root / name)
    return {name: root / name for name in methods}


@pytest.fixture
def fake() -> Iterator[FakeVLLM]:
    with FakeVLLM().running() as server:
        yield server


def engine_on(fake: FakeVLLM, **more: Any) -> VLLMEngine:
    given: dict[str, Any] = {"skeleton": SKELETON, "vocabulary": VOCABULARY, "every": 30.0, **more}
    return VLLMEngine(fake.url, **given)


SKELETON = sites(made("llama", torch.float32))


@pytest.fixture
def engine(fake: FakeVLLM) -> Iterator[VLLMEngine]:
    engine = engine_on(fake, slots=4, queue=4, stops=[3])
    yield engine
    engine.close()


def until(happened: Callable[[], bool]) -> None:
    """Wait for something that comes soon."""
    end = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def asked(adapter: str | None = None, tokens: int = 4, **more: Any) -> Request:
    return Request(PROMPT, adapter, sampling=Sampling(max_tokens=tokens), **more)


def test_answers_with_several_adapters_at_once_are_each_of_its_own(
    engine: VLLMEngine, folders: dict[str, Path]
) -> None:
    for name in ("a", "b"):
        engine.load(name, folders[name])
    answers = ask(engine, [asked("a"), asked("b"), asked(), asked("a")])
    places = [folders["a"], folders["b"], None, folders["a"]]
    assert [one.tokens for one in answers] == [written(place, list(PROMPT), 4) for place in places]
    assert len({tuple(one.tokens) for one in answers}) == 3
    assert {one.end for one in answers} == {End("length")}
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.running, stats.waiting) == (12, 16, 0, 0)


def test_the_token_that_ends_an_answer_is_not_in_it(engine: VLLMEngine, fake: FakeVLLM) -> None:
    fake.stop_after = 2
    (answer,) = ask(engine, [asked()])
    assert answer.tokens == written(None, list(PROMPT), 2)
    assert answer.end == End("stop")


def test_every_word_of_sampling_reaches_vllm(engine: VLLMEngine, fake: FakeVLLM) -> None:
    sampling = Sampling(max_tokens=1000, temperature=0.7, top_p=0.9, top_k=5, seed=11, frequency_penalty=0.5,
                        presence_penalty=-0.5, logit_bias={4: -3.0}, logprobs=2)  # fmt: skip
    (answer,) = ask(engine, [Request(PROMPT, sampling=sampling)])
    body = fake.bodies[-1]
    told = {key: body[key] for key in ("prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "logit_bias")}
    assert told == {"prompt": [5, 6, 7], "max_tokens": 61, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 11,
                    "logit_bias": {"4": -3.0}}  # fmt: skip
    assert (body["frequency_penalty"], body["presence_penalty"], body["stop_token_ids"]) == (0.5, -0.5, [3])
    assert (body["repetition_penalty"], body["min_p"]) == (1.0, 0.0)  # no default of the server's steps in
    first = answer.events[0]
    assert isinstance(first, Token)
    assert (first.logprob, first.top) == (-0.5, ((first.id, -0.5), (first.id + 1, -1.5)))
    ask(engine, [Request(PROMPT, sampling=Sampling(ignore_eos=True))])
    assert (fake.bodies[-1]["ignore_eos"], fake.bodies[-1]["stop_token_ids"]) == (True, [])
    assert (fake.bodies[-1]["top_k"], fake.bodies[-1]["temperature"], fake.bodies[-1]["logprobs"]) == (-1, 0.0, None)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(PROMPT, "a", scale=0.5), "the scale is 0.5, and vLLM serves adapters as trained; leave it at 1"),
        (Request(PROMPT, sampling=Sampling(logit_bias={4: 101.0})), "logit_bias of token 4 is 101.0; vLLM takes"),
        (Request(PROMPT, sampling=Sampling(seed=1 << 63)), "vLLM takes whole numbers of 64 bits"),
        (Request(()), "the prompt is empty"),
        (Request((VOCABULARY,)), f"token {VOCABULARY} is not one"),
        (Request((1,) * 64), "the prompt has 64 tokens and the context 64"),
    ],
)
def test_what_vllm_has_no_word_for_is_refused_before_it_is_sent(
    engine: VLLMEngine, fake: FakeVLLM, folders: dict[str, Path], request_: Request, words: str
) -> None:
    engine.load("a", folders["a"])
    with pytest.raises(RequestError, match=words):
        engine.submit(request_, Answer())
    assert not fake.bodies


def test_an_adapter_that_is_not_loaded_is_never_answered_for(engine: VLLMEngine, folders: dict[str, Path]) -> None:
    with pytest.raises(UnknownAdapterError):
        engine.submit(asked("a"), Answer())
    engine.load("a", folders["a"])
    engine.unload("a")
    with pytest.raises(UnknownAdapterError):
        engine.submit(asked("a"), Answer())


def test_a_cancel_reaches_the_server_and_ends_the_request(engine: VLLMEngine, fake: FakeVLLM) -> None:
    fake.go.clear()
    answer, request = Answer(), asked(tokens=20)
    engine.submit(request, answer)
    until(lambda: bool(answer.tokens))
    engine.cancel(request.id)
    assert answer.end == End("cancelled")
    until(lambda: fake.aborted == 1)
    assert engine.stats().running == 0


def test_deadlines_end_what_runs_and_what_waits(engine: VLLMEngine, fake: FakeVLLM) -> None:
    fake.go.clear()
    answers, deadline = [Answer() for _ in range(6)], time.monotonic() + 0.2
    for answer in answers:
        engine.submit(asked(deadline=deadline), answer)
    assert [answer.end.reason for answer in answers] == ["deadline"] * 6
    until(lambda: fake.aborted == 4)  # two never began


def test_more_than_may_wait_are_refused_and_the_others_are_answered(engine: VLLMEngine, fake: FakeVLLM) -> None:
    fake.go.clear()
    answers = [Answer() for _ in range(8)]
    for answer in answers:
        engine.submit(asked(), answer)
    with pytest.raises(BusyError):
        engine.submit(asked(), Answer())
    fake.go.set()
    assert {answer.end.reason for answer in answers} == {"length"}


def test_closing_ends_every_request_once(fake: FakeVLLM) -> None:
    engine = engine_on(fake, slots=1, queue=4)
    fake.go.clear()
    answers = [Answer(), Answer()]
    for answer in answers:
        engine.submit(asked(), answer)
    engine.close()
    assert [answer.end.reason for answer in answers] == ["cancelled", "cancelled"]
    with pytest.raises(BusyError):
        engine.submit(asked(), Answer())


def test_an_answer_that_breaks_off_ends_with_an_error_and_the_tokens_that_came(
    engine: VLLMEngine, fake: FakeVLLM
) -> None:
    fake.break_after = 2
    (answer,) = ask(engine, [asked()])
    assert len(answer.tokens) == 2
    assert answer.end.reason == "error"
    assert fake.url in answer.end.detail


def test_a_server_that_lost_its_adapters_gets_them_back_by_the_first_request(
    engine: VLLMEngine, fake: FakeVLLM, folders: dict[str, Path]
) -> None:
    for name in ("a", "b"):
        engine.load(name, folders[name])
    fake.adapters.clear()
    (answer,) = ask(engine, [asked("a")])
    assert answer.tokens == written(folders["a"], list(PROMPT), 4)
    assert fake.adapters.keys() == {"a", "b"}


def test_a_server_that_was_restarted_is_repaired_by_the_next_look(folders: dict[str, Path]) -> None:
    first = FakeVLLM()
    with first.running():
        engine = engine_on(first, every=0.05)
        engine.load("a", folders["a"])
    (answer,) = ask(engine, [asked("a")])
    assert (answer.tokens, answer.end.reason) == ([], "error")
    assert f"vLLM at {first.url} does not answer" in answer.end.detail
    with FakeVLLM(port=first.server_address[1]).running() as second:
        until(lambda: second.loads == ["a"])
        (answer,) = ask(engine, [asked("a")])
        assert answer.end.reason == "length"
        engine.close()


def test_reconciling_loads_what_is_missing_and_leaves_what_others_loaded(
    engine: VLLMEngine, fake: FakeVLLM, folders: dict[str, Path]
) -> None:
    for name in ("a", "b"):
        engine.load(name, folders[name])
    assert engine.reconcile() == []
    del fake.adapters["b"]
    fake.adapters["other"] = "/elsewhere"
    assert engine.reconcile() == ["b"]
    fake.adapters["b"] = "/elsewhere"
    assert engine.reconcile() == ["b"]
    assert fake.adapters["b"] == str(folders["b"])
    assert fake.adapters.keys() == {"a", "b", "other"}
    engine.unload("a")
    until(lambda: fake.adapters.keys() == {"b", "other"})


def test_an_adapter_leaves_after_the_requests_that_name_it(fake: FakeVLLM, folders: dict[str, Path]) -> None:
    engine = engine_on(fake, slots=1, queue=4)
    engine.load("a", folders["a"])
    fake.go.clear()
    answers = [Answer(), Answer()]
    for answer in answers:
        engine.submit(asked("a"), answer)
    until(lambda: bool(answers[0].tokens))
    engine.unload("a")
    engine.reconcile()
    fake.go.set()
    assert [answer.end for answer in answers] == [End("length")] * 2
    assert answers[1].tokens == written(folders["a"], list(PROMPT), 4)
    engine.reconcile()
    assert not fake.adapters
    engine.close()


def test_a_name_that_another_path_has_is_loaded_from_ours(
    engine: VLLMEngine, fake: FakeVLLM, folders: dict[str, Path]
) -> None:
    fake.adapters["a"] = "/gone/a"
    engine.load("a", folders["a"])
    assert fake.adapters["a"] == str(folders["a"])
    engine.load("a", folders["a"])
    assert fake.loads == ["a"]  # what is there is not loaded twice


def test_a_folder_whose_content_changed_is_refused(
    engine: VLLMEngine, folders: dict[str, Path], tmp_path: Path
) -> None:
    place = shutil.copytree(folders["a"], tmp_path / "adapter")
    engine.load("first", place)
    shutil.copytree(folders["b"], place, dirs_exist_ok=True)
    with pytest.raises(AdapterFileError, match="content that changed needs a folder of its own"):
        engine.load("second", place)


def test_loaded_tells_layers_and_bytes(engine: VLLMEngine, folders: dict[str, Path]) -> None:
    loaded = engine.load("a", folders["a"])
    assert (loaded.modules, loaded.bytes) == (4, (folders["a"] / "adapter_model.safetensors").stat().st_size)


def test_an_adapter_vllm_refuses_is_not_sent(engine: VLLMEngine, fake: FakeVLLM, folders: dict[str, Path]) -> None:
    with pytest.raises(SpecError, match="use_dora: DoRA, which vLLM does not serve; .*lorakit export .* --rank R"):
        engine.load("dora", folders["dora"])
    assert not fake.loads


def test_an_adapter_of_another_base_is_not_sent(fake: FakeVLLM, folders: dict[str, Path]) -> None:
    wider = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 64}, **ROOM, num_key_value_heads=2))
    for other, words in (
        (wider, r"shape \(2, 32\), expected \(2, 64\): model.layers.0"),
        (made("gpt2"), "made for another model, and this model has none of its 4 layers"),
    ):
        engine = engine_on(fake, skeleton=sites(other))
        with pytest.raises(AdapterFileError, match=words):
            engine.load("a", folders["a"])
        engine.close()
    assert not fake.loads


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ((500, "The size of tensor a (256) must match the size of tensor b (768)"), AdapterFileError,
         "could not load .*The size of tensor a .*; is it an adapter of /models/base"),
        ((500, "LoRA rank 32 is greater than max_lora_rank 16."), SpecError, "start it with --max-lora-rank 8"),
        ((404, "No adapter found"), AdapterFileError, "let it see the store under the same path"),
        ((400, "no"), RequestError, "refused .*: no"),
    ],
)  # fmt: skip
def test_a_refused_load_says_what_to_do_and_leaves_nothing(
    engine: VLLMEngine, fake: FakeVLLM, folders: dict[str, Path], answer: tuple[int, str], kind: type[Exception],
    words: str,
) -> None:  # fmt: skip
    fake.refuse_load = answer
    with pytest.raises(kind, match=words):
        engine.load("a", folders["a"])
    with pytest.raises(UnknownAdapterError):
        engine.submit(asked("a"), Answer())


def test_the_server_s_length_is_the_limit_unless_ours_is_less(fake: FakeVLLM) -> None:
    for ours, expected in ((None, 64), (32, 32), (100, 64)):
        engine = engine_on(fake, context=ours)
        assert engine.limits.context == expected
        engine.close()


def test_servers_that_cannot_be_used_are_told_at_the_start() -> None:
    with FakeVLLM(runtime=False).running() as fake, pytest.raises(ServingError, match="VLLM_ALLOW_RUNTIME_LORA"):
        engine_on(fake)
    with FakeVLLM(key="secret").running() as fake:
        with pytest.raises(ServingError, match="401 Unauthorized; set LORAKIT_ENGINE_KEY"):
            engine_on(fake)
        engine_on(fake, api_key="secret").close()
    with pytest.raises(ServingError, match="does not answer"):
        engine_on(fake)  # gone
    with pytest.raises(ServingError, match="no address of a server"):
        VLLMEngine("localhost:8000", skeleton=SKELETON, vocabulary=1)


def test_another_base_behind_the_same_address_gets_no_adapters(
    engine: VLLMEngine, fake: FakeVLLM, folders: dict[str, Path]
) -> None:
    engine.load("a", folders["a"])
    fake.root, fake.adapters = "/models/other", {}
    with pytest.raises(ServingError, match="serves /models/other now, not /models/base"):
        engine.reconcile()
    assert not fake.adapters


def test_many_threads_ask_cancel_and_reload_and_every_request_ends(fake: FakeVLLM, folders: dict[str, Path]) -> None:
    engine = engine_on(fake, slots=4, queue=500)
    engine.load("a", folders["a"])
    answers: list[Answer] = []

    def client(number: int) -> None:
        for turn in range(20):
            request, answer = asked("a" if turn % 2 else None, tenant=str(number)), Answer()
            answers.append(answer)
            engine.submit(request, answer)
            if turn % 5 == 0:
                engine.cancel(request.id)
            if turn == 10 and number == 0:
                fake.adapters.clear()

    threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.end.reason for answer in answers} <= {"length", "cancelled"}
    engine.close()
