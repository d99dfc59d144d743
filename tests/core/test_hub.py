"""A hub that cannot be reached is not waited for."""

from __future__ import annotations

import subprocess
import sys

import pytest
from huggingface_hub import constants

from lorakit.core import hub


@pytest.mark.parametrize("reachable", [True, False])
def test_offline_is_set_for_the_look_up_alone(reachable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub, "_reachable", lambda address: bool(asked.append(address)) or reachable)
    with hub.hub_at_hand():
        assert constants.HF_HUB_OFFLINE is not reachable
    assert constants.HF_HUB_OFFLINE is False
    assert asked == [constants.ENDPOINT]


def test_what_is_offline_already_and_what_has_a_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_reachable", lambda address: pytest.fail("was asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub.hub_at_hand():
        assert constants.HF_HUB_OFFLINE is True
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    with hub.hub_at_hand():
        assert constants.HF_HUB_OFFLINE is False


def test_a_place_where_nobody_listens_is_not_reachable() -> None:
    assert not hub._reachable("http://127.0.0.1:9")


def test_it_works_before_anything_of_the_hub_is_imported() -> None:
    code = "from lorakit.core.hub import hub_at_hand\nwith hub_at_hand(): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
