"""Prefix-layer tuning, a baseline of the LoRA paper: trained activations before and after the prompt in every layer.

What each of the L blocks reads at the special positions is trained: the embedding layer's output before the first
block, and the activations after each block, which "are simply replaced by trainable ones"; |Theta| = L d (l_p + l_i)
(arXiv 2106.09685, section 5.1, whose Table 15 prints somewhat larger counts than this formula gives). After the last
block nothing is replaced: no block would read it, and the answer's first token is predicted from there. Replacing cuts
the gradient to earlier layers at these positions. Keys and values follow from the vectors by the base's own weights,
which tells this from `prefix-tuning`, where they are trained themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lorakit.context.start import FILLS, Around
from lorakit.core.method import Call, Start, Tensors
from lorakit.core.site import Decl, Role, Site


@dataclass(frozen=True)
class PrefixLayer(Around):
    """Let every block read `before` trained vectors in front of the prompt, and `after` behind it."""

    name: ClassVar[str] = "prefix-layer"
    paper: ClassVar[str] = "arXiv 2106.09685, section 5.1 (PreLayer)"
    formula: ClassVar[str] = "block i reads [P_i; h_i(prompt); I_i; h_i(answer)], P_i (before, d), I_i (after, d)"
    count: ClassVar[str] = "n * m * (before + after)"
    where: ClassVar[Literal["input", "blocks", "cache"]] = "blocks"

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare L d (l_p + l_i) parameters, those before the prompt first."""
        return {"activations": Decl((site.in_, self.before + self.after, site.out), Role.TOKEN)}

    def init(self, p: Tensors, start: Start) -> None:
        """Start as embeddings of tokens in every layer, or normal like them; the first forward is not the base's."""
        FILLS[self.start](p["activations"], start)

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return what each block reads, `(L, l_p + l_i, d)`."""
        return p["activations"]
