"""The attention of rows in which examples share their prompt: a tree of one fork a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("sdpa", "eager")
"""Attention backends that take a mask of any form."""


def tree_mask(positions: Tensor, branches: Tensor) -> Tensor:
    """Return which token `(batch, 1, query, key)` sees which: its branch and what that grew out of, up to itself.

    A group of examples begins where a position is 0. Only integers are kept beside the tokens; the square is made for
    one batch at a time, where the model is.
    """
    group = (positions == 0).cumsum(-1)
    sees = (group[:, :, None] == group[:, None, :]).tril_()
    sees &= (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    return sees[:, None]


def seen(model: Any, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a model's inputs with the mask that their `branches` mean, in the form its attention backend takes."""
    if "branches" not in inputs:
        return inputs
    rest = {name: tensor for name, tensor in inputs.items() if name != "branches"}
    mask = tree_mask(inputs["position_ids"], inputs["branches"])
    whole = getattr(model, "module", model)
    if whole.config._attn_implementation == "eager":  # which adds its mask
        dtype = whole.get_input_embeddings().weight.dtype
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return {**rest, "attention_mask": mask}
