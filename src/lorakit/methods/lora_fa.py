"""LoRA-FA: LoRA with A frozen at its random start, so that a layer keeps r values of each token for backward, not `in`.

`dW = s B A` with `s` as in LoRA, B alone trained (arXiv 2308.03303). Its released optimizer corrects the gradient
to the one whose step comes nearest to a step of W: with `dL/dB = s G A^T`, `min ||s g A - G||_F` has the solution
`g = dL/dB (A A^T)^-1 / s^2`, and a step moves W along G projected on the rows of A, whatever the scale. Here that is
`precondition`, in the gradient's own precision; PEFT's optimizer rounds it to bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from lorakit.core.method import WEIGHT_KINDS, Start, Tensors, down_up
from lorakit.core.peft_form import PeftForm
from lorakit.core.site import Decl, Site
from lorakit.methods.lora import LoRA, Scaled

RIDGE = 1e-8
"""Added to the diagonal of A A^T, as the released optimizer does; a random A never needs it."""


@dataclass(frozen=True)
class LoRAFA(Scaled):
    """Add `s B A` with A frozen; an embedding is left out, for its input is no activation to save."""

    name: ClassVar[str] = "lora-fa"
    paper: ClassVar[str] = "arXiv 2308.03303 (LoRA-FA)"
    formula: ClassVar[str] = "dW = s B A, s = alpha / rank (stabilised: alpha / sqrt(rank)), A frozen"
    count: ClassVar[str] = "rank * m"
    kinds: ClassVar[frozenset[str]] = WEIGHT_KINDS - {"embedding"}
    peft: ClassVar[PeftForm | None] = replace(LoRA.peft, plain=False) if LoRA.peft else None  # to PEFT it is a LoRA

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare LoRA's pair, of which r out parameters are trained."""
        pair = down_up(self.rank, site)
        return {**pair, "down": replace(pair["down"], trainable=False)}

    def init(self, p: Tensors, start: Start) -> None:
        """Start at dW = 0: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0."""
        nn.init.kaiming_uniform_(p["down"].flatten(1), a=math.sqrt(5), generator=start.rng)
        nn.init.zeros_(p["up"])

    def precondition(self, p: Tensors) -> None:
        """Replace the gradient of B by `dL/dB (A A^T)^-1 / s^2`; with groups, in each group's own block."""
        gradient, per_group = p["up"].grad, p["up"].shape[1]
        if gradient is not None:
            down = p["down"].reshape(-1, per_group, p["down"][0].numel())
            gram = down @ down.mT + RIDGE * torch.eye(per_group, dtype=down.dtype, device=down.device)
            inverse = torch.linalg.inv_ex(gram).inverse / self.scale**2  # inv_ex: no wait for the device
            gradient.copy_((gradient.reshape(len(down), -1, per_group) @ inverse).reshape(gradient.shape))
