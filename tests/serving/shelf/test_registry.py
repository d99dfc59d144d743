"""Between a model's name and the engine: adapters come in by one door, and stay while they are used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.errors import AdapterFileError, BusyError, RequestError, ServingError, UnknownAdapterError
from lorakit.serving.requests import Loaded
from lorakit.serving.shelf.manifest import Golden
from lorakit.serving.shelf.names import Names
from lorakit.serving.shelf.registry import Model, Registry, Resolved, Use
from lorakit.serving.shelf.store import Store
from tests.serving.adapters import folder_of, shelve, with_golden
from tests.serving.echo import EchoEngine


@pytest.fixture
def engine() -> Iterator[EchoEngine]:
    made = EchoEngine()
    yield made
    made.close()


@pytest.fixture
def registry(engine: EchoEngine, tmp_path: Path) -> Registry:
    return made(engine, tmp_path)


def made(engine: EchoEngine, place: Path, memory: int = 1 << 20) -> Registry:
    names = Names(place / "names.json", bases=("llama",))
    return Registry(engine, Store(place / "store"), names, memory=memory, roots=[place / "root"])


def test_an_added_adapter_is_used_by_its_name_and_gone_from_use_after(
    registry: Registry, engine: EchoEngine, tmp_path: Path
) -> None:
    digest = registry.add("support", folder_of(tmp_path / "root" / "a")).digest
    with registry.use("llama:support") as found:
        assert found == Resolved(digest, "support")
        assert registry.usage().in_use == 1
    assert registry.usage().in_use == 0
    assert engine.loaded.keys() == {digest}
    with registry.use("llama") as base:
        assert base.digest is None
        assert registry.usage().in_use == 0
    with pytest.raises(UnknownAdapterError, match="did you mean 'support'"), registry.use("suport"):
        pytest.fail("the base must not answer")


def test_a_use_ends_once_whoever_ends_it(registry: Registry, tmp_path: Path) -> None:
    registry.add("support", folder_of(tmp_path / "root" / "a"))
    other, one = registry.use("support"), registry.use("support")
    other.__enter__()
    one.__enter__()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: one.__exit__(None, None, None), range(8)))
    assert registry.usage().in_use == 1
    registry.use("support").__exit__(None, None, None)
    assert registry.usage().in_use == 1
    other.__exit__(None, None, None)
    assert registry.usage().in_use == 0


def test_a_restart_finds_names_and_loads_when_asked(registry: Registry, engine: EchoEngine, tmp_path: Path) -> None:
    digest = registry.add("support", folder_of(tmp_path / "root" / "a")).digest
    fresh = EchoEngine()
    again = made(fresh, tmp_path)
    assert again.add("support", tmp_path / "root" / "a").digest == digest
    assert not fresh.loads
    with again.use("support") as found:
        assert (found.digest, fresh.loads[digest]) == (digest, 1)
    fresh.close()


@pytest.mark.parametrize("way", ["beside", "dots", "link", "inner link", "prefix", "nul", "missing"])
def test_an_adapter_from_elsewhere_is_refused_and_the_roots_are_named(
    way: str, registry: Registry, tmp_path: Path
) -> None:
    outside = folder_of(tmp_path / "outside")
    root = tmp_path / "root"
    folder_of(root / "real")
    (root / "link").symlink_to(outside)
    (root / "inner").symlink_to(tmp_path)
    shutil.copytree(outside, tmp_path / "root-evil")
    folder = {
        "beside": outside,
        "dots": root / "real" / ".." / ".." / "outside",
        "link": root / "link",
        "inner link": root / "inner" / "outside",
        "prefix": tmp_path / "root-evil",
        "nul": root / "a\0b",
        "missing": tmp_path / "none",
    }[way]
    with pytest.raises(RequestError, match="does not lie where this server takes adapters from: ") as refused:
        registry.add("support", folder)
    assert f"from: {root}, {tmp_path / 'store'}; put it there" in str(refused.value)
    assert registry.store.manifests() == []
    assert registry.names.pointers() == {}


def test_an_adapter_may_come_from_a_root_through_links_inside_it_or_from_the_store(
    registry: Registry, tmp_path: Path
) -> None:
    folder_of(tmp_path / "root" / "a")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "root" / "a")
    digest = registry.add("one", tmp_path / "root" / "link").digest
    assert registry.add("two", registry.store.get(digest)).digest == digest
    assert registry.names.pointers() == {"one": digest, "two": digest}


def test_a_name_keeps_its_adapter_unless_it_is_replaced(registry: Registry, engine: EchoEngine, tmp_path: Path) -> None:
    first = registry.add("support", folder_of(tmp_path / "root" / "a", 1.0)).digest
    other = folder_of(tmp_path / "root" / "b", 2.0)
    with pytest.raises(RequestError, match="support is another adapter already .*replace it, or choose another name"):
        registry.add("support", other)
    assert registry.names.resolve("support").digest == first
    assert len(registry.store.manifests()) == 1
    assert registry.add("support", tmp_path / "root" / "a").digest == first
    assert len(registry.names.history("support")) == 1
    assert engine.loads[first] == 1


def test_who_is_being_answered_keeps_the_adapter_it_began_with(
    registry: Registry, engine: EchoEngine, tmp_path: Path
) -> None:
    first = registry.add("support", folder_of(tmp_path / "root" / "a", 1.0)).digest
    with registry.use("support") as old:
        second = registry.add("support", folder_of(tmp_path / "root" / "a", 2.0), replace=True).digest
        assert first != second
        with registry.use("support") as new:
            assert (old.digest, new.digest) == (first, second)
            assert engine.loaded.keys() == {first, second}
    assert registry.rollback("support") == first
    with registry.use("support") as back:
        assert back.digest == first
    assert engine.loads[first] == 1


def test_an_adapter_the_engine_refuses_leaves_the_name_as_it_was(
    registry: Registry, engine: EchoEngine, tmp_path: Path
) -> None:
    first = registry.add("support", folder_of(tmp_path / "root" / "a", 1.0)).digest
    bad = with_golden(folder_of(tmp_path / "root" / "b", 2.0), Golden((1, 2), (1, 2)))
    with pytest.raises(AdapterFileError, match="golden prompt 1 of 1, token 1: expected 1, found 2"):
        registry.add("support", bad, replace=True)
    assert registry.names.resolve("support").digest == first
    assert engine.loaded.keys() == {first}
    with pytest.raises(RequestError, match="'../x' is no name"):
        registry.add("../x", tmp_path / "root" / "a")


def test_a_changed_file_in_the_store_is_not_served_and_the_adapter_may_be_added_anew(
    registry: Registry, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "root" / "a")
    digest = registry.store.add(folder).digest
    registry.names.point("support", digest)
    file = registry.store.get(digest) / "adapter_model.safetensors"
    file.chmod(0o644)
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with (
        pytest.raises(AdapterFileError, match="is not as it was stored; delete that folder and add"),
        registry.use("support"),
    ):
        pass
    registry.add("support", folder)
    assert file.read_bytes() == good
    with registry.use("support") as found:
        assert found.digest == digest


def test_a_folder_of_runs_is_one_of_their_adapters(registry: Registry, tmp_path: Path) -> None:
    folder_of(tmp_path / "runs" / "one" / "adapter", 1.0)
    folder_of(tmp_path / "runs" / "two", 2.0)
    (tmp_path / "runs" / "other").mkdir()
    assert registry.scan(tmp_path / "runs") == ["one", "two"]


def test_a_use_that_needs_no_load_begins_at_once(registry: Registry, tmp_path: Path) -> None:
    registry.names.point("support", registry.store.add(folder_of(tmp_path / "a")).digest)
    first = registry.use("support")
    assert first.enter_at_once() is None
    with first:
        again = registry.use("support")
        assert again.enter_at_once() is not None
        assert registry.usage().in_use == 1
    again.__exit__(None, None, None)
    assert registry.usage().in_use == 0


def test_a_removed_adapter_leaves_memory_with_its_last_user(
    registry: Registry, engine: EchoEngine, tmp_path: Path
) -> None:
    first = registry.add("support", folder_of(tmp_path / "root" / "a", 1.0)).digest
    second = registry.add("support", folder_of(tmp_path / "root" / "b", 2.0), replace=True).digest
    registry.add("kept", tmp_path / "root" / "a")
    registry.pin("support")
    with registry.use("support"):
        registry.remove("support")
        with pytest.raises(UnknownAdapterError), registry.use("support"):
            pytest.fail("it is gone")
        assert engine.loaded.keys() == {first, second}
    assert engine.loaded.keys() == {first}
    assert registry.store.get(second).is_dir()
    with pytest.raises(UnknownAdapterError):
        registry.remove("support")


def test_a_pin_keeps_what_its_name_leads_to_wherever_it_is_turned(engine: EchoEngine, tmp_path: Path) -> None:
    registry = made(engine, tmp_path, memory=200)
    one, two, three = shelve(registry.store, 100, 3)
    for name, digest in (("a", one), ("b", two), ("c", three)):
        registry.names.point(name, digest)
    registry.pin("a")
    for name in "bcb":
        with registry.use(name):
            pass
    assert engine.loaded.keys() == {one, two}
    with registry.use("b"), pytest.raises(BusyError), registry.use("c"):
        pytest.fail("there is no room")
    registry.point("a", two)
    with registry.use("c"):
        assert engine.loaded.keys() == {two, three}
    registry.unpin("a")
    registry.unpin("never pinned")
    with registry.use(one):
        assert two not in engine.loaded
    with pytest.raises(UnknownAdapterError):
        registry.pin("none")


def test_a_pin_goes_with_its_name(engine: EchoEngine, tmp_path: Path) -> None:
    registry = made(engine, tmp_path, memory=100)
    one, two = shelve(registry.store, 100, 2)
    registry.names.point("a", one)
    registry.names.point("b", two)
    registry.pin("a")
    registry.remove("a")
    registry.point("a", one)
    with registry.use("b"):
        assert engine.loaded.keys() == {two}


def test_an_alias_is_turned_only_to_what_loads(registry: Registry, engine: EchoEngine, tmp_path: Path) -> None:
    good = registry.add("support@a", folder_of(tmp_path / "root" / "a", 1.0)).digest
    (bad,) = shelve(registry.store, 100)
    registry.names.point("support@b", bad)
    engine.broken[bad] = AdapterFileError("the shapes do not fit")
    registry.point("support@prod", "support@a")
    for target in ("support@b", {"support@a": 1.0, "support@b": 1.0}, bad):
        with pytest.raises(AdapterFileError, match="the shapes do not fit"):
            registry.point("support@prod", target)
    with pytest.raises(UnknownAdapterError, match="'support@c' is no digest and no name here"):
        registry.point("support@prod", "support@c")
    with pytest.raises(UnknownAdapterError, match="is not in the store"):
        registry.point("support@prod", "ab" * 32)
    registry.names.point("support@prod", "support@b")
    registry.names.point("support@prod", good)
    with pytest.raises(AdapterFileError):
        registry.rollback("support@prod")
    assert registry.names.resolve("support@prod").digest == good


def test_the_models_are_the_base_the_names_and_the_aliases(registry: Registry, tmp_path: Path) -> None:
    digest = registry.add("support", folder_of(tmp_path / "root" / "a")).digest
    (other,) = shelve(registry.store, 100)
    registry.names.point("x@one", other)
    registry.names.point("x@ab", {"x@one": 1.0, "support": 3.0})
    base, support, shared, one = registry.models()
    assert base == Model("llama", loaded=True)
    assert (support.id, support.digest, support.parent, support.loaded) == ("support", digest, "llama", True)
    assert support.since is not None
    assert (one.id, one.digest, one.loaded) == ("x@one", other, False)
    assert (shared.id, shared.digest, shared.loaded) == ("x@ab", None, False)
    assert shared.arms == {"x@one": 1.0, "support": 3.0}


def test_a_folder_of_adapters_is_added_by_their_folders_names(
    registry: Registry, engine: EchoEngine, tmp_path: Path
) -> None:
    place = tmp_path / "adapters"
    for number, name in enumerate(["support", "sales-2"]):
        folder_of(place / name, float(number))
    (place / "notes").mkdir()
    (place / "README.md").write_text("mine")
    folder_of(place / ".hidden")
    assert registry.scan(place) == ["sales-2", "support"]
    assert len(engine.loads) == 2
    assert registry.scan(place) == ["sales-2", "support"]
    assert len(registry.names.history("support")) == 1


def test_a_folder_that_is_itself_an_adapter_or_a_run_is_told_so(registry: Registry, tmp_path: Path) -> None:
    for place in (folder_of(tmp_path / "one"), folder_of(tmp_path / "run" / "adapter").parent):
        with pytest.raises(ServingError, match=f"{place} is itself an adapter or a run; give the folder it lies in"):
            registry.scan(place)


def test_two_folders_with_adapters_of_one_name_are_refused(registry: Registry, tmp_path: Path) -> None:
    for number, place in enumerate(("a", "b")):
        folder_of(tmp_path / place / "support", float(number))
    assert registry.scan(tmp_path / "a") == ["support"]
    before = registry.names.pointers()
    with pytest.raises(ServingError, match=f"support: {tmp_path / 'a'} has one of this name too; rename"):
        registry.scan(tmp_path / "b")
    assert registry.names.pointers() == before
    assert registry.scan(tmp_path / "a") == ["support"]


def test_every_broken_adapter_that_is_skipped_is_in_the_log(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(17):
        (folder_of(tmp_path / f"cut-{number}x") / "adapter_model.safetensors").write_bytes(b"")
    assert registry.scan(tmp_path, skip=True) == []
    assert all(f"cut-{number}x: " in caplog.text for number in range(17))


def test_broken_adapters_are_told_together_and_the_others_added(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "adapters"
    folder_of(place / "good")
    (folder_of(place / "cut") / "adapter_model.safetensors").write_bytes(b"")
    (folder_of(place / "pickle") / "extra.bin").write_bytes(b"")
    folder_of(place / "odd name")
    (place / "away").symlink_to(folder_of(tmp_path / "elsewhere"))
    with pytest.raises(
        ServingError, match="4 of 5 adapters cannot be served; repair them, move them away, or leave them"
    ) as told:
        registry.scan(place)
    for line in ("- away: ", "- cut: ", "- odd name: 'odd name' is no name", "- pickle: "):
        assert line in str(told.value)
    assert registry.names.pointers().keys() == {"good"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ServingError, match="empty holds no adapter"):
        registry.scan(tmp_path / "empty")
    assert registry.scan(place, skip=True) == ["good"]
    assert registry.scan(tmp_path / "empty", skip=True) == []
    assert ["4 of 5" in caplog.messages[0], "empty holds no adapter" in caplog.messages[1]] == [True, True]
    with pytest.raises(ServingError, match="none is not a folder"):
        registry.scan(tmp_path / "none")


def test_a_restart_takes_a_folders_news_and_leaves_a_rollback(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "adapters"
    folder_of(place / "support", 1.0)
    registry.scan(place)
    first = registry.names.resolve("support").digest
    folder_of(place / "support", 2.0)
    registry.scan(place)
    second = registry.names.resolve("support").digest
    assert first != second
    registry.rollback("support")
    assert not caplog.messages
    registry.scan(place)
    assert registry.names.resolve("support").digest == first
    (told,) = caplog.messages
    assert told == f"support stays {first[:12]}, to which it was turned; its folder holds {second[:12]}, of before"
    folder_of(place / "support", 3.0)
    registry.scan(place)
    assert registry.names.resolve("support").digest not in (first, second)


NAMES = st.sampled_from(["n0", "n1", "n2", "n3"])
STEPS = st.one_of(
    st.tuples(st.just("use"), NAMES),
    st.tuples(st.just("release"), st.integers(0, 3)),
    st.tuples(st.just("add"), NAMES, st.integers(0, 5)),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("pin"), NAMES),
    st.tuples(st.just("unpin"), NAMES),
    st.tuples(st.just("rollback"), NAMES),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=10, max_size=30))
def test_memory_is_never_exceeded_and_nothing_in_use_or_pinned_goes(
    engine: EchoEngine, tmp_path: Path, steps: list[tuple[Any, ...]]
) -> None:
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    (tmp_path / "names.json").unlink(missing_ok=True)
    for digest in list(engine.loaded):
        engine.unload(digest)
    memory = 250
    registry = made(engine, tmp_path, memory)
    digests = [shelve(registry.store, size)[0] for size in (50, 60, 70, 100, 120, 200)]
    uses: list[tuple[Use, str]] = []
    pinned: set[str] = set()
    for step, what, *more in steps:
        try:
            if step == "use":
                use = registry.use(what)
                uses.append((use, use.__enter__().digest or ""))
            elif step == "release" and what < len(uses):
                uses.pop(what)[0].__exit__(None, None, None)
            elif step == "add":
                registry.point(what, digests[more[0]])
            elif step == "remove":
                registry.remove(what)
                pinned.discard(what)
            elif step == "rollback":
                registry.rollback(what)
            elif step == "pin":
                registry.pin(what)
                pinned.add(what)
            elif step == "unpin":
                registry.unpin(what)
                pinned.discard(what)
        except (BusyError, UnknownAdapterError, RequestError):
            pass
        held = {digest for _, digest in uses}
        usage = registry.usage()
        assert engine.peak_bytes <= memory
        assert usage.bytes == sum(one.bytes for one in engine.loaded.values()) <= memory
        assert usage.in_use == len(held)
        assert held <= engine.loaded.keys()
        still = registry.names.pointers()
        assert {str(still[name]) for name in pinned} <= engine.loaded.keys()
    for use, _ in uses:
        use.__exit__(None, None, None)
    assert registry.usage().in_use == 0


def test_pruning_waits_until_another_server_has_named_what_it_stored(registry: Registry, tmp_path: Path) -> None:
    loading, go_on = Event(), Event()

    class Slow(EchoEngine):
        def load(self, digest: str, folder: Path) -> Loaded:
            loading.set()
            assert go_on.wait(60)
            return super().load(digest, folder)

    slow = Slow()
    other = made(slow, tmp_path)
    folder = folder_of(tmp_path / "root" / "a")
    with ThreadPoolExecutor(2) as threads:
        adding = threads.submit(other.add, "support", folder)
        assert loading.wait(60)  # stored, and not named yet
        pruning = threads.submit(registry.prune)
        with pytest.raises(TimeoutError):
            pruning.result(timeout=0.3)
        go_on.set()
        assert pruning.result(60) == []
        assert registry.store.digests() == [adding.result(60).digest]
    other.names.delete("support")
    assert [one.digest for one in registry.prune()] == [adding.result().digest]
    slow.close()
