"""The learning rate `auto` of a model: the published formula, which planning knows, on the model's configuration."""

from __future__ import annotations

from typing import Any

from lorakit.inject.skeleton import size_of
from lorakit.planning.rates import LORA_FACTOR, published_rate


def auto_rate(config: Any, *, full: bool = False) -> float:
    """Return the learning rate for a model's configuration; 2e-4 for a family without a published fit.

    Full fine-tuning has a tenth of it: the fit is that of LoRA, whose best rate is about 10 times the full one's.
    """
    rate = published_rate(str(config.model_type), size_of(config, "hidden_size"))
    return rate / LORA_FACTOR if full else rate
