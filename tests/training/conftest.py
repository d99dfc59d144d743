"""Random bases, built once: no test changes a saved one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import samples


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte tokenizer."""
    return samples.save_base(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT without a head."""
    return samples.save_encoder(tmp_path_factory.mktemp("bases") / "bert")
