"""What every test stands on: no network, fixed seeds, and tensor shapes checked while the tests run.

Environment variables are set before anything is imported, because the Hugging Face libraries read them once.
LORAKIT_NO_TYPECHECK=1 runs the tests without the shape checks, as production does.
"""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from tests.shape_checks import check_shapes

ROOT = Path(__file__).parents[1]
LONGEST = frozenset({"test_docs.py", "test_processes.py", "test_resume.py"})
"""Files with tests of half a minute and more."""

if os.environ.get("LORAKIT_NO_TYPECHECK") != "1":
    check_shapes(
        "lorakit.core", "lorakit.methods", "lorakit.hosts", "lorakit.inits", "lorakit.spectral", "lorakit.combining"
    )

# Time limits belong to pytest; a fixed sequence makes a red run red again.
hypothesis.settings.register_profile("lorakit", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("lorakit")


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> None:
    """Spare the collector what is imported by now: the Trainer collects at every start, and that is most of a test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def torch_defaults() -> Iterator[None]:
    """Give the next test the global switches as this one found them."""
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of study data that lives beside the repository, `../shared/data`; skips where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the study data in ../shared/data, beside the repository")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
