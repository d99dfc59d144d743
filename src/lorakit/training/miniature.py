"""A small copy of a model, with values: for what only a forward can tell and no width changes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH = 8
"""Features of a head."""
HEADS = 4
"""Heads that one without any is as wide as."""


def miniature(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same code and settings, of two blocks and a few features a head, with random weights.

    Raises:
        LorakitError: a family whose sizes do not follow from its heads.
    """
    config: Any = copy.deepcopy(model.config)
    _shrink(config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: PreTrainedModel = type(model)._from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise LorakitError(f"no small copy of {type(model).__name__} could be built: {error}") from error
    made.train(False)
    return made


def _shrink(config: Any) -> None:
    """Make a configuration and those inside it small; one without heads gets the width of `HEADS`."""
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            _shrink(inner)
    heads = getattr(config, "num_attention_heads", None) or HEADS
    sizes = {"num_hidden_layers": 2, "hidden_size": heads * WIDTH, "intermediate_size": 4 * WIDTH, "vocab_size": 64}
    if getattr(config, "head_dim", None):
        sizes["head_dim"] = WIDTH
    for name, value in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    if vars(config).get("layer_types"):
        config.layer_types = [*config.layer_types[:1], *config.layer_types[-1:]]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
