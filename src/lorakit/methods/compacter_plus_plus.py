"""Compacter++: Compacter behind the MLP of every block alone (arXiv 2106.04647), for half its values.

`h <- h + f(h W_down + b1) W_up + b2` with each W a sum of Kronecker products (compacter.py). The package `adapters` 1.3
lets it read the MLP's output after it was added to the stream; here, as in Compacter, it reads the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorakit.methods.compacter import TwoKroneckerSums


@dataclass(frozen=True)
class CompacterPlusPlus(TwoKroneckerSums):
    """Put a bottleneck of Kronecker products behind the MLP alone, and train the norms."""

    name: ClassVar[str] = "compacter++"
    targets: ClassVar[Sequence[str]] = "mlp-out"
    train: ClassVar[Sequence[str]] = "norms"
