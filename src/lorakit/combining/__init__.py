"""Several adapters become one, as pure functions of values: sums, cuts, votes, and federated rounds."""

from __future__ import annotations

from lorakit.combining.combination import HOWS, Combined, combine, negate, truncate
from lorakit.combining.compress import STORED, Compressed, compress
from lorakit.combining.difference import Difference, Gap, difference
from lorakit.combining.federated import average_factors, stack
from lorakit.combining.how import How
from lorakit.combining.sparse import Dare, Ties
from lorakit.combining.sums import Concat, Factorwise, Linear, Svd

__all__ = [
    "HOWS",
    "STORED",
    "Combined",
    "Compressed",
    "Concat",
    "Dare",
    "Difference",
    "Factorwise",
    "Gap",
    "How",
    "Linear",
    "Svd",
    "Ties",
    "average_factors",
    "combine",
    "compress",
    "difference",
    "negate",
    "stack",
    "truncate",
]
