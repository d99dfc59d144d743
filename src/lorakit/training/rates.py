"""The learning rate `auto` of a model: the published formula, which planning knows, on the model's configuration."""

from __future__ import annotations

from typing import Any

from lorakit.planning.rates import ELSE, LORA_FACTOR, fitted_family, published_rate


def auto_rate(config: Any, *, full: bool = False) -> float:
    """Return the learning rate for a model's configuration; 2e-4 for a family without a published fit.

    Full fine-tuning has a tenth of it: the fit is that of LoRA, whose best rate is about 10 times the full one's.
    """
    model_type, part = str(config.model_type), LORA_FACTOR if full else 1.0
    if fitted_family(model_type) is None:
        return ELSE / part  # whose width may have any name
    return published_rate(model_type, int(config.hidden_size)) / part
