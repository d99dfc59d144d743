from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lorakit.errors import AdapterFileError
from lorakit.serving.batching import workers
from lorakit.serving.batching.engine import SlotEngine
from lorakit.serving.batching.workers import release_workers
from tests.serving.adapters import folder_of
from tests.serving.models import made

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists() or workers._library() is None, reason="counts GNU's OpenMP threads in /proc"
)


@pytest.fixture
def three() -> Iterator[ThreadPoolExecutor]:
    """A thread that computes with two workers beside itself."""
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(3,)) as thread:
        thread.submit(int).result()
        yield thread
    torch.set_num_threads(before)


def threads() -> int:
    """Return how many threads this process has, once those of earlier tests have gone."""
    before = 0
    while (now := len(os.listdir("/proc/self/task"))) != before:
        before = now
        time.sleep(0.05)
    return now


def compute() -> float:
    """Compute what is worth several threads."""
    return float((torch.ones(1 << 20) * 2).sum())


def test_a_thread_s_workers_go_and_come_again(three: ThreadPoolExecutor) -> None:
    few = threads()
    for _ in range(2):
        assert three.submit(compute).result() == 2 << 20
        assert threads() == few + 2
        assert three.submit(release_workers).result()
        assert threads() == few


def test_who_builds_an_engine_or_loads_leaves_no_workers_behind(three: ThreadPoolExecutor, tmp_path: Path) -> None:
    model, few = made("llama", torch.float32), threads()
    three.submit(compute).result()
    engine = three.submit(SlotEngine, model, slots=2).result()
    assert threads() == few + 1, "the engine's own, which has not computed yet"
    three.submit(compute).result()
    with pytest.raises(AdapterFileError, match="do not fit"):
        three.submit(engine.load, "a" * 64, folder_of(tmp_path)).result()
    assert threads() == few + 1
    engine.close()
