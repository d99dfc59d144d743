"""Whoever has had least is next; nobody waits for ever, and nobody saves up."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lorakit.serving.fair_queue import FairQueue


def filled(items: list[tuple[str, str | None]]) -> FairQueue[tuple[str, str | None, int]]:
    queue: FairQueue[tuple[str, str | None, int]] = FairQueue()
    for number, (tenant, adapter) in enumerate(items):
        queue.push((tenant, adapter, number), tenant, adapter)
    return queue


def served(queue: FairQueue[tuple[str, str | None, int]], turns: int, tokens: float) -> list[tuple[str, str | None]]:
    """Return whose turn each was, each of them charged with `tokens`."""
    found = []
    for _ in range(turns):
        tenant, adapter, _ = queue.pop() or ("", None, 0)
        queue.charge(tenant, adapter, tokens)
        found.append((tenant, adapter))
    return found


def test_one_tenants_flood_leaves_every_second_turn_to_the_other() -> None:
    queue = filled([("loud", "a")] * 50 + [("quiet", "a")] * 5)
    assert Counter(tenant for tenant, _ in served(queue, 10, 10)) == {"loud": 5, "quiet": 5}


def test_within_a_tenant_a_hot_adapter_does_not_starve_a_rare_one() -> None:
    queue = filled([("one", "hot")] * 50 + [("one", "rare")])
    served = [queue.pop()]
    queue.charge("one", "hot", 10)
    served.append(queue.pop())
    assert [adapter for _, adapter, _ in filter(None, served)] == ["hot", "rare"]


def test_work_is_shared_by_tokens_and_not_by_requests() -> None:
    queue = filled([("long", None)] * 40 + [("short", None)] * 40)
    tokens: Counter[str] = Counter()
    for _ in range(44):
        tenant, adapter, _ = queue.pop() or ("", None, 0)
        cost = 10 if tenant == "long" else 1
        queue.charge(tenant, adapter, cost)
        tokens[tenant] += cost
    assert abs(tokens["long"] - tokens["short"]) <= 10


def test_whoever_was_away_comes_back_without_arrears() -> None:
    queue = filled([("busy", None)] * 20)
    for _ in range(10):
        queue.pop()
        queue.charge("busy", None, 100)
    for number in range(10):
        queue.push(("late", None, number), "late", None)
    assert Counter(tenant for tenant, _ in served(queue, 8, 100)) == {"busy": 4, "late": 4}


def test_whoever_comes_while_nobody_waits_begins_at_the_level_of_who_was_served_last() -> None:
    queue = filled([("busy", "a")])
    queue.pop()
    queue.charge("busy", "a", 500_000)
    queue.forget({("busy", "a")})
    for number in range(8):
        queue.push(("late", "b", number), "late", "b")
        queue.push(("busy", "a", number), "busy", "a")
        queue.push(("busy", "c", number), "busy", "c")
    assert Counter(served(queue, 8, 100)) == {("late", "b"): 4, ("busy", "a"): 2, ("busy", "c"): 2}


def test_a_full_queue_takes_from_those_alone_who_have_less_than_their_share() -> None:
    queue = filled([("loud", None)] * 9)
    assert not queue.full("loud", 10)
    queue.push(("loud", None, 9), "loud", None)
    assert queue.full("loud", 10)
    for number in range(5):
        assert not queue.full("quiet", 10)
        queue.push(("quiet", None, number), "quiet", None)
    assert queue.full("quiet", 10)
    assert not queue.full("third", 10)


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from([None, "a", "b"])), max_size=30))
def test_every_item_comes_once_and_those_of_one_tenant_and_adapter_in_order(
    items: list[tuple[str, str | None]],
) -> None:
    queue = filled(items)
    assert len(queue) == len(items) == sum(queue.waiting().values())
    popped = []
    while (item := queue.pop()) is not None:
        popped.append(item)
        queue.charge(item[0], item[1], 1 + item[2] % 3)
    assert sorted(number for _, _, number in popped) == list(range(len(items)))
    for line in set(items):
        mine = [number for tenant, adapter, number in popped if (tenant, adapter) == line]
        assert mine == sorted(mine)


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from([None, "a"])), min_size=1, max_size=20), st.data())
def test_a_removed_item_never_comes_and_the_rest_does(items: list[tuple[str, str | None]], data: st.DataObject) -> None:
    queue = filled(items)
    gone = data.draw(st.sampled_from(list(queue)))
    assert queue.remove(gone)
    assert not queue.remove(gone)
    left = []
    while (item := queue.pop()) is not None:
        left.append(item)
    assert gone not in left
    assert len(left) == len(items) - 1


def test_what_steps_back_is_next_again_and_counters_of_the_gone_are_dropped() -> None:
    queue = filled([("one", "a"), ("one", "a")])
    first = queue.pop()
    assert first is not None
    queue.push(first, "one", "a", first=True)
    assert queue.pop() == first
    queue.pop()
    queue.charge("one", "a", 5)
    queue.forget(set())
    assert not queue._tenants
    assert not queue._adapters
    assert queue.pop() is None
