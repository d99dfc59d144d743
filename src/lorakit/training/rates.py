"""The learning rate `auto` of a model: the published formula, which planning knows, on the model's configuration."""

from __future__ import annotations

from typing import Any

from lorakit.planning.rates import ELSE, fitted_family, published_rate


def auto_rate(config: Any) -> float:
    """Return the learning rate for a model's configuration; 2e-4 for a family without a published fit."""
    model_type = str(config.model_type)
    if fitted_family(model_type) is None:
        return ELSE  # whose width may have any name
    return published_rate(model_type, int(config.hidden_size))
