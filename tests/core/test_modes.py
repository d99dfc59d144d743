"""A model held in a mode for a while: every part of it gets its own back."""

from __future__ import annotations

import pytest
from torch import nn

from lorakit.core.modes import evaluating, in_mode


def test_each_part_gets_its_own_mode_back_whatever_happens() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(0.5)))
    model[1].eval()  # a norm that was frozen on purpose
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), in_mode(model, training=True):
        assert all(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before
