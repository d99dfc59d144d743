"""A name leads to one digest, the same for the same user, and never to the base by accident."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.errors import RequestError, ServingError, UnknownAdapterError
from lorakit.serving.shelf.names import KEPT, Names, Resolved, Target

A, B, C = ("a1" * 32, "b2" * 32, "c3" * 32)
in_one_folder = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def names(tmp_path: Path) -> Names:
    """Return `support` (A, before it B), `support@prod` (A), and `support@ab`, 90 % A and 10 % B."""
    made = Names(tmp_path / "names.json", bases=("llama", "meta/llama-1b"))
    for name, target in (("support", B), ("support", A), ("support@prod", "support"), ("support@old", B)):
        made.point(name, target)
    made.point("support@ab", {"support@prod": 0.9, "support@old": 0.1})
    return made


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("llama", Resolved(None, "llama")),
        ("meta/llama-1b", Resolved(None, "meta/llama-1b")),
        ("support", Resolved(A, "support")),
        ("llama:support", Resolved(A, "support")),
        ("meta/llama-1b:support@prod", Resolved(A, "support@prod")),
        ("support@prod", Resolved(A, "support@prod")),
        ("support@a1a1a1a1", Resolved(A, "support")),
        (f"support@{B}", Resolved(B, "support")),
        (B, Resolved(B, B)),
        (f"llama:{A}", Resolved(A, A)),
        ("b2b2b2b2b2", Resolved(B, B)),
    ],
)
def test_each_form_of_a_model_is_understood(names: Names, model: str, found: Resolved) -> None:
    assert names.resolve(model) == found
    assert Names(names.path, names.bases).resolve(model) == found


@pytest.mark.parametrize(
    "model",
    [
        "", "suport", "support@", "support@prd", "support@c3c3c3c3", "support@a1a1a1a", "a1a1a1a", C, "llama:", "lama",
        "llama:llama", "mistral:support", "other@a1a1a1a1", "support:support", "support@prod@ab", "../x", "LLAMA", " ",
        "@a1a1a1a1z",
    ],
)  # fmt: skip
def test_what_is_not_known_is_an_error_and_never_the_base(names: Names, model: str) -> None:
    with pytest.raises(UnknownAdapterError, match="is not served here"):
        names.resolve(model, "user")


def test_an_unknown_model_names_the_nearest(names: Names, tmp_path: Path) -> None:
    with pytest.raises(UnknownAdapterError, match=r"'suport' is not served here; did you mean 'support'"):
        names.resolve("suport")
    with pytest.raises(UnknownAdapterError, match=r"'xyz' is not served here$"):
        Names(tmp_path / "none.json").resolve("xyz")


def test_the_beginning_of_two_digests_asks_for_more(names: Names) -> None:
    names.point("other", A[:20] + "0" * 44)
    assert names.resolve("support@a1a1a1a1").digest == A
    with pytest.raises(UnknownAdapterError, match="a1a1a1a1 begins 2 digests; give more digits"):
        names.resolve("a1a1a1a1")


@in_one_folder
@given(model=st.text(max_size=12), user=st.none() | st.text(max_size=5))
def test_any_text_is_resolved_or_unknown(names: Names, model: str, user: str | None) -> None:
    try:
        found = names.resolve(model, user, "request")
    except UnknownAdapterError:
        assert model not in names.bases
    else:
        assert (found.digest is None) == (model in names.bases)


weights = st.dictionaries(st.sampled_from(["support@prod", "support@old", A, C]), st.floats(0.01, 100), min_size=1)


@in_one_folder
@given(arms=weights, user=st.text(max_size=9), request=st.text(min_size=1, max_size=9))
def test_a_user_keeps_an_arm(names: Names, arms: dict[str, float], user: str, request: str) -> None:
    names.point("support@ab", arms)
    first = names.resolve("support@ab", user, request)
    assert first.arm in arms
    assert names.resolve("support@ab", user, request if not user else "another") == first
    doubled = {arm: weight * 2 for arm, weight in reversed(arms.items())}
    names.point("support@ab", doubled)
    assert names.resolve("support@ab", user, request) == first


@in_one_folder
@given(arms=weights)
def test_the_shares_of_arms_are_their_weights(names: Names, arms: dict[str, float]) -> None:
    names.point("support@ab", arms)
    count, whole = 1000, sum(arms.values())
    drawn = Counter(names.resolve("support@ab", f"user-{n}").arm for n in range(count))
    asked = Counter(names.resolve("support@ab", None, f"request-{n}").arm for n in range(count))
    for arm, weight in arms.items():
        share = weight / whole
        spread = 5 * (share * (1 - share) / count) ** 0.5 + 1e-9  # five standard errors of a fair draw
        assert abs(drawn[arm] / count - share) <= spread + 1 / count
        assert abs(asked[arm] / count - share) <= spread + 1 / count


@in_one_folder
@given(before=weights, after=weights)
def test_a_change_of_weights_moves_users_only_to_arms_that_grew(
    names: Names, before: dict[str, float], after: dict[str, float]
) -> None:
    users = [f"user-{n}" for n in range(200)]
    names.point("support@ab", before)
    was = {user: names.resolve("support@ab", user).arm or "" for user in users}
    names.point("support@ab", after)
    for user, old in was.items():
        new = names.resolve("support@ab", user).arm or ""
        grew = after[new] * before.get(old, 0.0) >= before.get(new, 0.0) * after.get(old, 0.0)
        assert new == old or grew  # relative to the arm that was left


def test_ten_percent_more_for_an_arm_moves_ten_percent(names: Names) -> None:
    users = [f"user-{n}" for n in range(2000)]
    was = [names.resolve("support@ab", user).arm for user in users]
    names.point("support@ab", {"support@prod": 0.8, "support@old": 0.2})
    moved = [(old, new) for old, user in zip(was, users, strict=True)
             if (new := names.resolve("support@ab", user).arm) != old]  # fmt: skip
    assert set(moved) == {("support@prod", "support@old")}
    assert 0.07 < len(moved) / len(users) < 0.13


def test_an_arm_needs_someone_to_draw_it_by(names: Names) -> None:
    with pytest.raises(RequestError, match="support@ab is shared out between support@prod, support@old; say the user"):
        names.resolve("support@ab")
    found = names.resolve("support@ab", "", "request-1")
    assert found == names.resolve("support@ab", None, "request-1")
    assert found.digest == {"support@prod": A, "support@old": B}[found.arm or ""]


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("", A, "'' is no name"),
        ("a/../b", A, "is no name"),
        ("-a", A, "is no name"),
        ("a b", A, "is no name"),
        ("a:b", A, "is no name"),
        ("größe", A, "is no name"),
        ("a@b@c", A, "is no name"),
        ("a@", A, "is no name"),
        ("a/", A, "is no name"),
        ("a\n", A, "is no name"),
        ("a" * 129, A, "is no name"),
        ("a@" + "b" * 127, A, "is no name"),
        ("deadbeef", A, "deadbeef would be taken for a digest"),
        ("a@deadbeef", A, "deadbeef would be taken for a digest"),
        ("llama", A, "llama is the base itself"),
        ("new", "support", "new is a name and points to a digest, not to 'support'"),
        ("new", {A: 1.0}, "new is a name and points to a digest"),
        ("new@ab", {}, "new@ab has no arms"),
        ("new@ab", {A: 0.0}, f"weight of {A} is 0.0; give a number above 0"),
        ("new@ab", {A: float("nan")}, "is nan; give a number"),
        ("new@ab", {A: True}, "is True; give a number"),
        ("new@ab", {A: 1.0, "support@ab": 1.0}, "support@ab has arms and is itself an arm of new@ab"),
        ("support@prod", "support@prod", "support@prod -> support@prod goes in a circle"),
        ("support@prod", "support@ab", "goes in a circle"),
    ],
)
def test_a_pointer_that_cannot_be_is_refused(names: Names, name: str, target: Target, message: str) -> None:
    before = names.path.read_bytes()
    with pytest.raises(RequestError) as refused:
        names.point(name, target)
    assert message in str(refused.value)
    assert names.path.read_bytes() == before
    assert names.resolve("support@prod").digest == A


def test_arms_of_arms_are_refused_from_either_side(names: Names) -> None:
    names.point("support@new", "support@ab")
    names.point("x@one", A)
    names.point("x@ab", {"x@one": 1})
    with pytest.raises(RequestError, match="has arms and is itself an arm"):
        names.point("x@one", "support@new")


def test_a_target_that_is_not_there_names_the_nearest(names: Names) -> None:
    for target in ("support@prd", {"support@prd": 1.0}):
        with pytest.raises(UnknownAdapterError, match="'support@prd' is no digest and no name here; did you mean"):
            names.point("support@new", target)


def test_a_rollback_flips_back_and_forth_and_is_remembered(names: Names) -> None:
    assert names.rollback("support") == B
    assert names.resolve("support@prod").digest == B
    assert names.rollback("support") == A
    assert [turn.target for turn in names.history("support")] == [A, B, A, B]
    names.point("support", A)
    assert len(names.history("support")) == 4
    for count in range(30):
        names.point("support", (A, B, C)[count % 3])
    assert len(names.history("support")) == KEPT
    assert Names(names.path).history("support") == names.history("support")
    with pytest.raises(RequestError, match="support@prod had no target before this one"):
        names.rollback("support@prod")
    with pytest.raises(UnknownAdapterError, match="'suport' is not a name or alias here; did you mean 'support'"):
        names.rollback("suport")


def test_a_pointer_goes_once_nothing_leans_on_it(names: Names) -> None:
    with pytest.raises(RequestError, match="support@prod points to support; point it elsewhere or delete it first"):
        names.delete("support")
    names.point("support@prod", B)
    names.delete("support")
    with pytest.raises(UnknownAdapterError):
        names.resolve("support")
    with pytest.raises(UnknownAdapterError, match="target 'support' is no digest and no name here"):
        names.rollback("support@prod")
    assert names.digests() == {B}
    with pytest.raises(UnknownAdapterError):
        names.delete("support")


def test_a_pointer_tells_where_it_leads(names: Names) -> None:
    assert names.digests("support@ab") == {A, B}
    assert names.digests("support") == {A}
    assert names.pointers()["support@ab"] == {"support@prod": 0.9, "support@old": 0.1}
    with pytest.raises(UnknownAdapterError):
        names.digests("none")


def test_a_person_can_read_the_file(names: Names) -> None:
    found = json.loads(names.path.read_text())
    assert found["version"] == 1
    assert [turn["target"] for turn in found["pointers"]["support"]] == [A, B]
    assert list(found["pointers"]) == sorted(found["pointers"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: "{", "Expecting property name"),
        (lambda v: "", "Expecting value"),
        (lambda v: "[]", "it: expected an object"),
        (lambda v: v | {"version": 2}, "version: expected 1, which this lorakit reads, found 2"),
        (lambda v: v | {"extra": 1}, "extra: unknown key"),
        (lambda v: v | {"pointers": {"support": []}}, r"pointers\.support: expected at least one target"),
        (
            lambda v: v | {"pointers": {"s": [{"at": "x", "target": 3}]}},
            r"pointers\.s\[0\]\.target: expected an object",
        ),
        (lambda v: v | {"pointers": {"s": [{"at": "x", "target": "t"}]}}, "s is a name and points to a digest"),
        (lambda v: v | {"pointers": {"llama": [{"at": "x", "target": A}]}}, "llama is the base itself"),
    ],
)
def test_a_corrupt_file_says_what_to_do(names: Names, change: Any, message: str) -> None:
    made = change(json.loads(names.path.read_text()))
    names.path.write_text(made if isinstance(made, str) else json.dumps(made))
    with pytest.raises(ServingError, match=rf"names\.json cannot be used: .*{message}.*; repair it by hand, or move"):
        Names(names.path, names.bases)


def test_a_failed_write_leaves_names_as_they_were(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(ServingError, match="No space left on device; the names are as they were"):
                names.point("support", C)
    assert names.resolve("support").digest == A
    assert sorted(p.name for p in names.path.parent.iterdir()) == [".names.json.lock", "names.json"]


def test_threads_lose_no_turn_and_readers_see_whole_ones(names: Names) -> None:
    def turn(number: int) -> Any:
        names.point(f"new-{number % 4}@{number}", {A: 1, B: 1})
        return names.resolve(f"new-{number % 4}@{number}", "user").digest

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(turn, range(40))) <= {A, B}
    assert len(Names(names.path, names.bases).pointers()) == 44


def test_another_process_is_not_written_over(names: Names) -> None:
    Names(names.path, names.bases).point("theirs", C)
    names.point("mine", C)
    assert {"theirs", "mine"} <= set(Names(names.path, names.bases).pointers())
    names.path.unlink()
    names.point("again", C)
    assert {"theirs", "mine", "again"} <= set(Names(names.path, names.bases).pointers())


def test_what_another_server_turns_is_seen_and_a_corrupt_file_is_not(names: Names) -> None:
    other = Names(names.path, names.bases)
    names.point("theirs", A)
    assert other.resolve("theirs").digest == A
    names.point("theirs", B)
    assert other.pointers()["theirs"] == B
    names.rollback("theirs")
    assert other.digests("theirs") == {A}
    names.path.write_text("{")
    assert other.resolve("theirs").digest == A


def test_a_kill_in_the_middle_leaves_the_old_file_or_the_new(names: Names) -> None:
    code = f"""
import os, signal
from pathlib import Path
from lorakit.serving.shelf.names import Names
names = Names(Path({str(names.path)!r}), ("llama",))
real, left = os.fsync, 5
def dies(handle):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = dies
for count in range(9):
    names.point("killed", ({A!r}, {B!r})[count % 2])
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    again = Names(names.path, names.bases)
    assert len(again.history("killed")) == 5
    again.point("killed", C)
    assert sorted(p.name for p in names.path.parent.iterdir()) == [".names.json.lock", "names.json"]
