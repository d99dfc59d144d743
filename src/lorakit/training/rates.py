"""The learning rate `auto`: a published fit where there is one, a middle value of the field elsewhere.

"LoRA Without Regret" (doi 10.64434/tml.20250929) found the best rate nearly independent of the rank when
`alpha / r` scales the update, and tinker-cookbook (hyperparam_utils.py) published the fit with the width as its only
variable: `lr = 5e-5 * 10 * (2000 / hidden) ** p`, where 10 is LoRA's factor over full fine-tuning.
"""

from __future__ import annotations

from typing import Any

FULL_RATE, LORA_FACTOR, WIDTH = 5e-5, 10.0, 2000.0
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
ELSE = 2e-4


def auto_rate(config: Any) -> float:
    """Return the learning rate for a model's configuration; 2e-4 for a family without a published fit."""
    family = next((name for name in EXPONENTS if str(config.model_type).startswith(name)), None)
    if family is None:
        return ELSE
    rate: float = FULL_RATE * LORA_FACTOR * (WIDTH / int(config.hidden_size)) ** EXPONENTS[family]
    return rate
