"""The engine's memory holds what is in use, and beside it what fits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import AdapterFileError, BusyError, ServingError, UnknownAdapterError
from lorakit.serving.requests import Loaded
from lorakit.serving.shelf.manifest import Golden
from lorakit.serving.shelf.residents import Residents
from lorakit.serving.shelf.store import Store
from tests.serving.adapters import shelve
from tests.serving.echo import EchoEngine


@pytest.fixture
def engine() -> Iterator[EchoEngine]:
    made = EchoEngine()
    yield made
    made.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_the_longest_unused_makes_room(engine: EchoEngine, store: Store) -> None:
    one, two, three, four = shelve(store, 100, 4)
    residents = Residents(engine, store, 300, set)
    for digest in (one, two, three, one):
        residents.hold(digest)
        residents.release(digest)
    residents.hold(four)
    assert residents.loaded() == {one, three, four} == engine.loaded.keys()
    assert engine.loads == {one: 1, two: 1, three: 1, four: 1}
    usage = residents.usage()
    assert (usage.bytes, usage.adapters, usage.in_use, usage.loads, usage.evictions) == (300, 3, 1, 4, 1)


def test_what_is_in_use_or_pinned_stays_and_the_next_is_told_to_wait(engine: EchoEngine, store: Store) -> None:
    one, two, three = shelve(store, 100, 3)
    pinned = {two}
    residents = Residents(engine, store, 200, lambda: pinned)
    residents.hold(one)
    residents.hold(two)
    residents.release(two)
    with pytest.raises(BusyError, match="takes 100 bytes, and of 200 the rest is in use or pinned") as busy:
        residents.hold(three)
    assert busy.value.retry_after > 0
    assert residents.loaded() == {one, two}
    pinned.clear()
    residents.hold(three)
    assert residents.loaded() == {one, three}
    residents.release(one)
    residents.hold(two)
    assert residents.loaded() == {two, three}


def test_nothing_is_dropped_for_what_will_not_fit(engine: EchoEngine, store: Store) -> None:
    small, other = shelve(store, 100, 2)
    (large,) = shelve(store, 250)
    (larger,) = shelve(store, 301)
    residents = Residents(engine, store, 300, set)
    residents.hold(small)
    residents.hold(other)
    residents.release(other)
    with pytest.raises(BusyError):
        residents.hold(large)
    with pytest.raises(ServingError, match="takes 301 bytes, and all adapters together may take 300; give them more"):
        residents.hold(larger)
    assert residents.loaded() == {small, other}
    assert not engine.unloads


def test_the_engines_own_number_replaces_what_the_files_told(engine: EchoEngine, store: Store) -> None:
    one, two = shelve(store, 100, 2)
    real = engine.load

    def wide(digest: str, folder: Path) -> Loaded:
        real(digest, folder)
        return Loaded(digest, 1, 200)

    engine.load = wide  # type: ignore[method-assign]
    residents = Residents(engine, store, 350, set)
    residents.hold(one)
    with pytest.raises(BusyError):
        residents.hold(two)
    assert engine.loaded.keys() == {one} == residents.loaded()
    residents.release(one)
    residents.hold(two)
    assert engine.loaded.keys() == {two}
    assert residents.usage().bytes == 200


def test_sixteen_threads_load_once(engine: EchoEngine, store: Store) -> None:
    (digest,) = shelve(store, 100)
    engine.load_seconds = 0.05
    residents = Residents(engine, store, 100, set)
    together = threading.Barrier(16)

    def ask(_: int) -> bool:
        together.wait()
        residents.hold(digest)
        return digest in engine.loaded

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(ask, range(16)))
    assert engine.loads[digest] == 1
    assert residents.usage().in_use == 1
    for left in range(15, -1, -1):
        residents.release(digest)
        assert residents.usage().in_use == bool(left)


def test_a_failure_reaches_all_who_wait_and_is_not_kept(engine: EchoEngine, store: Store) -> None:
    (digest,) = shelve(store, 100)
    engine.load_seconds = 0.1
    engine.broken[digest] = AdapterFileError("the shapes do not fit")
    residents = Residents(engine, store, 100, set)
    together = threading.Barrier(8)

    def ask(_: int) -> str:
        together.wait()
        try:
            residents.hold(digest)
        except AdapterFileError as failed:
            return str(failed)
        return "loaded"

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(ask, range(8))) == {"the shapes do not fit"}
    assert engine.loads[digest] == 1
    assert (residents.usage().failures, residents.usage().bytes) == (1, 0)
    engine.broken.clear()
    residents.hold(digest)
    assert residents.loaded() == {digest}


def test_who_leaves_goes_with_its_last_user(engine: EchoEngine, store: Store) -> None:
    one, two = shelve(store, 100, 2)
    residents = Residents(engine, store, 300, set)
    for digest in (one, one, two):
        residents.hold(digest)
    residents.release(two)
    residents.leave(two)
    residents.leave(one)
    residents.leave("never here")
    assert engine.loaded.keys() == {one}
    residents.release(one)
    assert engine.loaded.keys() == {one}
    residents.release(one)
    assert not engine.loaded


def test_who_is_asked_for_again_does_not_leave(engine: EchoEngine, store: Store) -> None:
    (one,) = shelve(store, 100)
    residents = Residents(engine, store, 300, set)
    residents.hold(one)
    residents.leave(one)
    residents.hold(one)
    residents.release(one)
    residents.release(one)
    assert engine.loaded.keys() == {one}


def test_what_is_not_stored_is_unknown(engine: EchoEngine, store: Store) -> None:
    with pytest.raises(UnknownAdapterError, match="is not in the store"):
        Residents(engine, store, 300, set).hold("ab" * 32)


@pytest.mark.parametrize(
    ("golden", "message"),
    [
        (Golden((1, 2, 3), (3, 9)), "golden prompt 2 of 2, token 2: expected 9, found 2; this server does not answer"),
        (Golden((1, 99_999), (1,)), "golden prompt 2 of 2: token 99999 is not one of the model's 1000"),
    ],
)
def test_another_answer_to_a_golden_prompt_refuses_the_adapter(
    engine: EchoEngine, store: Store, golden: Golden, message: str
) -> None:
    (digest,) = shelve(store, 100, golden=(Golden((4, 5), (5, 4, 5)), golden))
    residents = Residents(engine, store, 300, set)
    with pytest.raises(AdapterFileError, match=f"adapter {digest[:12]}: {message}"):
        residents.hold(digest)
    assert not engine.loaded
    assert residents.usage().bytes == 0


def test_golden_prompts_are_asked_once_and_of_the_adapter(engine: EchoEngine, store: Store) -> None:
    (digest,) = shelve(store, 100, golden=(Golden((4, 5), (5, 4, 5)),))
    (other,) = shelve(store, 99)
    residents = Residents(engine, store, 100, set)
    for one in (digest, other, digest):
        residents.hold(one)
        residents.release(one)
    assert engine.loads[digest] == 2
    assert [(r.adapter, r.sampling.temperature) for r in engine.submitted] == [(digest, 0.0)]


def test_an_engine_that_gives_no_answer_is_told(
    engine: EchoEngine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (digest,) = shelve(store, 100, golden=(Golden((4, 5), (5,)),))
    monkeypatch.setattr("lorakit.serving.shelf.golden.SECONDS", 0.02)
    residents = Residents(engine, store, 100, set)
    with engine.hold(), pytest.raises(ServingError, match="golden prompt 1 of 1: the engine ended it with 'deadline'"):
        residents.hold(digest)
    assert not engine.loaded
    residents.hold(digest)


def test_five_hundred_adapters_take_no_more_than_the_memory(engine: EchoEngine, store: Store) -> None:
    digests = shelve(store, 64, 500)
    residents = Residents(engine, store, 64 * 20, set)

    def ask(number: int) -> Any:
        digest = digests[number * 7919 % 500]
        residents.hold(digest)
        assert digest in engine.loaded
        residents.release(digest)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(1000)))
    assert engine.peak_bytes <= 64 * 20
    assert len(engine.loaded) == 20
    assert residents.usage().evictions == sum(engine.unloads.values()) == sum(engine.loads.values()) - 20
