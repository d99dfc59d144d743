"""Where vectors that a model reads stand and start, and what their numbers may be: what methods of this room share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.core.checks import check_whole
from lorakit.core.method import Context, Start
from lorakit.errors import SpecError


def check_choice(name: str, value: Any, known: Mapping[str, Any] | Sequence[str]) -> None:
    """Raise `SpecError` unless `value` is one of the known words."""
    if value not in known:
        raise SpecError(f"{name} must be one of {', '.join(known)}, not {value!r}")


@torch.no_grad()
def fill_from_vocabulary(vectors: Tensor, start: Start) -> None:
    """Fill `vectors (..., d)` with embeddings of tokens drawn from the whole vocabulary."""
    ids = torch.randint(len(start.weight), vectors.shape[:-1], generator=start.rng)
    vectors.copy_(start.weight[ids.to(start.weight.device)])


@torch.no_grad()
def fill_normal(vectors: Tensor, start: Start) -> None:
    """Fill `vectors (..., d)` from a normal distribution with mean and deviation of the vocabulary's embeddings."""
    table = start.weight.float()
    vectors.normal_(float(table.mean()), float(table.std()), generator=start.rng)


@torch.no_grad()
def fill_from_ids(vectors: Tensor, ids: Sequence[int], start: Start) -> None:
    """Fill `vectors (t, d)` with the embeddings of `ids`, repeated or cut to t."""
    chosen = torch.tensor([ids[i % len(ids)] for i in range(len(vectors))], device=start.weight.device)
    vectors.copy_(start.weight[chosen])


FILLS = {"vocabulary": fill_from_vocabulary, "normal": fill_normal}


@dataclass(frozen=True)
class Around(Context):
    """What the LoRA paper's two baselines share: l_p vectors in front of the prompt, and l_i behind it."""

    before: int = 8
    after: int = 8
    start: Literal["vocabulary", "normal"] = "vocabulary"

    def __post_init__(self) -> None:
        check_whole("before", self.before, 0)
        check_whole("after", self.after, 0)
        if self.before + self.after < 1:
            raise SpecError("before and after are both 0, so nothing would be read; give at least one a position")
        check_choice("start", self.start, FILLS)

    def lengths(self) -> tuple[int, int]:
        """Return `(before, after)`."""
        return self.before, self.after
