"""The learning rate `auto`: a published fit where there is one, a middle value of the field elsewhere.

"LoRA Without Regret" (doi 10.64434/tml.20250929) found the best rate nearly independent of the rank when
`alpha / r` scales the update, and tinker-cookbook (hyperparam_utils.py) published the fit with the width as its only
variable: `lr = 5e-5 * 10 * (2000 / hidden) ** p`, where 10 is LoRA's factor over full fine-tuning.
"""

from __future__ import annotations

FULL_RATE, LORA_FACTOR, WIDTH = 5e-5, 10.0, 2000.0
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
ELSE = 2e-4
SHORT_FACTOR, SHORT_STEPS = 15.0, 100
"""LoRA's factor over full fine-tuning in runs of fewer steps than that (LoRA Without Regret)."""


def fitted_family(model_type: str) -> str | None:
    """Return the family of the published fit that a model type such as `qwen3` belongs to, or None."""
    return next((family for family in EXPONENTS if model_type.startswith(family)), None)


def published_rate(model_type: str, hidden: int | None) -> float:
    """Return the learning rate for a model type of width `hidden`; 2e-4 where there is no fit, or no width."""
    family = fitted_family(model_type)
    if family is None or hidden is None:
        return ELSE
    rate: float = FULL_RATE * LORA_FACTOR * (WIDTH / hidden) ** EXPONENTS[family]
    return rate
