"""HiRA, a method from outside lorakit: one file, and every layer kind, file and recipe knows it.

    python examples/hira.py train.jsonl [--base lorakit/tales] [--output runs/hira]

`dW = W * (B A)`, entry by entry (HiRA, ICLR 2025, openreview TwJrTz9cRS): a product of low rank, but since it
scales the frozen weight, the update may have a rank up to the weight's own. There is no alpha.
"""

import argparse
import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lorakit import train
from lorakit.core.method import Dense
from lorakit.core.registry import register
from lorakit.core.site import Decl, Role
from lorakit.errors import SpecError
from lorakit.training.recipe import make_recipe


@register
@dataclass(frozen=True)
class HiRA(Dense):
    """Scale each entry of the weight by one plus a trained low-rank product."""

    rank: int = 32

    name: ClassVar[str] = "hira"
    paper: ClassVar[str] = "openreview TwJrTz9cRS (ICLR 2025)"
    formula: ClassVar[str] = "dW = W * (B A)"
    count: ClassVar[str] = "rank * (m + n)"

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise SpecError(f"rank must be a whole number of at least 1, not {self.rank!r}")

    def tensors(self, site):
        return {
            "down": Decl((self.rank, site.in_, *site.kernel), Role.DOWN),
            "up": Decl((site.out, self.rank), Role.UP),
        }

    def init(self, p, start):
        """Start at dW = 0: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0."""
        nn.init.kaiming_uniform_(p["down"].flatten(1), a=math.sqrt(5), generator=start.rng)
        nn.init.zeros_(p["up"])

    def delta(self, p, weight):
        return weight * (p["up"] @ p["down"].flatten(1)).reshape(weight.shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--base", default="lorakit/tales")
    parser.add_argument("--output", default="runs/hira")
    given = parser.parse_args()
    adapter = {"method": "hira", "rank": 8}  # a recipe's words: `register` made the name known
    recipe = {"model": given.base, "data": {"train": given.data}, "adapter": adapter, "output": given.output}
    print(train(make_recipe(recipe)))
