"""RayEngine's answers are one SlotEngine's, whichever replica gives them. Needs `lorakit[ray]`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import AdapterFileError, UnknownAdapterError
from lorakit.methods.lora import LoRA
from lorakit.persist import save
from lorakit.serving.batching.engine import SlotEngine
from lorakit.serving.requests import Request, Sampling
from tests.serving.answers import Answer, ask
from tests.serving.models import adapter, made

pytest.importorskip("ray.serve", reason="needs lorakit[ray]")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own warnings are Ray's


def engine() -> SlotEngine:
    """Return one replica's engine."""
    torch.set_num_threads(1)
    return SlotEngine(made("llama", torch.float32), slots=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root, model = tmp_path_factory.mktemp("store"), made("llama", torch.float32)
    for rank in (1, 2, 4, 8):
        save(adapter(model, AdapterSpec(LoRA(rank, 8.0), Targets(("q_proj", "v_proj", "up_proj")))), root / f"r{rank}")
    save(adapter(made("gpt2", torch.float32), AdapterSpec(LoRA(2), Targets("c_attn"))), root / "other")
    return {place.name: place for place in root.iterdir()}


@pytest.fixture(scope="module")
def replicas() -> Iterator[object]:
    from lorakit.serving.remote.ray import RayEngine

    made_engine = RayEngine(engine, replicas=2, adapters=2)  # fewer than there are, so that some go and come back
    yield made_engine
    made_engine.close()


def test_answers_are_those_of_one_engine_while_adapters_come_and_go(replicas: object, folders: dict[str, Path]) -> None:
    one = engine()
    names = [name for name in sorted(folders) if name != "other"]
    for name in names:
        one.load(name, folders[name])
        assert replicas.load(name, folders[name]) == one.load(name, folders[name])  # type: ignore[attr-defined]
    requests = [
        Request(tuple((5 * i + k) % 90 for k in range(3 + i)), name, sampling=Sampling(max_tokens=12))
        for i, name in enumerate([*names, None] * 6)
    ]
    found = ask(replicas, requests)  # type: ignore[arg-type]
    wanted = ask(one, requests)
    assert [(a.tokens, a.end) for a in found] == [(a.tokens, a.end) for a in wanted]
    assert replicas.stats().generated_tokens == 12 * len(requests)  # type: ignore[attr-defined]
    one.close()


def test_what_cannot_be_loaded_is_refused_as_by_one_engine(replicas: object, folders: dict[str, Path]) -> None:
    with pytest.raises(AdapterFileError, match="made for another model"):
        replicas.load("other", folders["other"])  # type: ignore[attr-defined]
    with pytest.raises(UnknownAdapterError):
        replicas.submit(Request((1, 2), "other"), Answer())  # type: ignore[attr-defined]


def test_cancels_and_deadlines_reach_the_replica(replicas: object) -> None:
    long = Sampling(max_tokens=90, ignore_eos=True)
    cancelled, late = Answer(), Answer()
    request = Request((1, 2), sampling=long)
    replicas.submit(request, cancelled)  # type: ignore[attr-defined]
    replicas.cancel(request.id)  # type: ignore[attr-defined]
    replicas.submit(Request((1, 2), sampling=long, deadline=time.monotonic() + 0.001), late)  # type: ignore[attr-defined]
    assert (cancelled.end.reason, late.end.reason) == ("cancelled", "deadline")
    (after,) = ask(replicas, [Request((1, 2), sampling=Sampling(max_tokens=4))])  # type: ignore[arg-type]
    assert len(after.tokens) == 4
