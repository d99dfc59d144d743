"""The published fit, against numbers worked out by hand and the source's own figures."""

from __future__ import annotations

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from lorakit.training.rates import auto_rate


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (LlamaConfig(hidden_size=2000, num_attention_heads=10), 5e-4),  # the width of the fit: 5e-5 * 10
        (
            LlamaConfig(hidden_size=4096),
            2.857e-4,
        ),  # ln(2000/4096) = -.71684, * .781 = -.55985, exp = .57129; 8B: 2.9e-4
        (LlamaConfig(hidden_size=2048), 4.908e-4),  # 1B: 4.9e-4
        (LlamaConfig(hidden_size=8192), 1.663e-4),  # 70B: 1.7e-4
        (Qwen3Config(hidden_size=4096), 4.730e-4),  # -.71684 * .0775 = -.055555, exp = .94596; 8B: 4.7e-4
        (Qwen2Config(hidden_size=2000, num_attention_heads=10), 5e-4),
        (GPT2Config(), 2e-4),
        (BertConfig(), 2e-4),
    ],
)
def test_the_rate_is_the_published_one(config: object, rate: float) -> None:
    assert auto_rate(config) == pytest.approx(rate, rel=5e-4)


def test_full_fine_tuning_has_a_tenth() -> None:
    assert auto_rate(LlamaConfig(hidden_size=4096), full=True) == pytest.approx(2.86e-5, rel=5e-3)
