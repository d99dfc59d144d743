"""Prefix-embedding tuning, a baseline of the LoRA paper: trained word embeddings before and after the prompt.

`before` = l_p special tokens stand in front of the prompt and `after` = l_i of them behind it, between prompt and
answer; |Theta| = d (l_p + l_i) (arXiv 2106.09685, section 5.1; best on GPT-3: l_p 256, l_i 8, 3,244,032 parameters).
The first token of the answer is predicted from the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lorakit.context.start import FILLS, Around
from lorakit.core.method import Call, Start, Tensors
from lorakit.core.site import Decl, Role, Site


@dataclass(frozen=True)
class PrefixEmbedding(Around):
    """Put `before` trained embeddings in front of the prompt, and `after` behind it."""

    before: int = 32
    after: int = 8

    name: ClassVar[str] = "prefix-embedding"
    paper: ClassVar[str] = "arXiv 2106.09685, section 5.1 (PreEmbed)"
    formula: ClassVar[str] = "read [P; E(prompt); I; E(answer)], P (before, d), I (after, d)"
    count: ClassVar[str] = "m * (before + after)"
    where: ClassVar[Literal["input", "blocks", "cache"]] = "input"

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare d (l_p + l_i) parameters, those before the prompt first."""
        return {"embeddings": Decl((self.before + self.after, site.out), Role.TOKEN)}

    def init(self, p: Tensors, start: Start) -> None:
        """Start as embeddings of tokens, or normal like them; the first forward is not the base's."""
        FILLS[self.start](p["embeddings"], start)

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return `[P; I]`."""
        return p["embeddings"]
