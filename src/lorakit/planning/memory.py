"""What a phase of a run keeps in memory, part by part, in bytes.

What can be counted is counted exactly from sizes: weights in any dtype or packed, what is trained, its gradients and
moments. Activations, logits and temporaries are best measured on the model's own code; the published formulas here are
for shapes nobody can load, and a check on the measured. GB below are 10^9 bytes.

lorakit keeps what it trains in fp32, adapters and parameters trained whole alike, with gradients and moments in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, fields
from math import ceil
from typing import Any

from lorakit.errors import SpecError, did_you_mean

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number, by dtype."""
STORES = ("dense", "int8", "nf4")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")
NARROW_FROM = 4096
"""Tensors of fewer numbers keep 32-bit moments in 8-bit optimizers (bitsandbytes' min_8bit_size)."""
_NESTED = 256  # block maxima that share one fp32 when they are quantised too
_STATE_BLOCK = 256  # moments that share one fp32
_MAPS = 2 * 256 * 4  # what 8 bits mean, for both moments; once for all tensors


@dataclass(frozen=True)
class Parts:
    """Bytes of one phase, or of one moment of it, by what they are for.

    `adapters` are the trained tensors, those of the base that are trained whole among them where they were rehearsed;
    `activations` what the forward left for the backward; `logits` what is as wide as the vocabulary; `temporaries` all
    else that is alive; `overhead` what a device needs itself.
    """

    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    temporaries: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return sum(astuple(self))

    def __add__(self, other: Parts) -> Parts:
        """Return both, part by part."""
        return Parts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Parts:
        """Return every part `factor` times, rounded up to whole bytes."""
        return Parts(*(ceil(part * factor) for part in astuple(self)))

    def to_json(self) -> dict[str, int]:
        """Return the parts and their total as plain values."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Forecast:
    """The peak of each phase; a phase the run does not have is empty."""

    load: Parts = Parts()
    step: Parts = Parts()
    evaluation: Parts = Parts()
    checkpoint: Parts = Parts()
    merge: Parts = Parts()

    @property
    def phases(self) -> dict[str, Parts]:
        """Return the phases by name, in the order of a run."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def peak(self) -> str:
        """Return the name of the phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    def map(self, change: Callable[[Parts], Parts]) -> Forecast:
        """Return the forecast with every phase changed."""
        return Forecast(**{name: change(parts) for name, parts in self.phases.items()})

    def to_json(self) -> dict[str, Any]:
        """Return the phases as plain values."""
        return {name: parts.to_json() for name, parts in self.phases.items()}


def weight_bytes(
    dense: int,
    packed: Iterable[tuple[int, int]] = (),
    *,
    dtype: str = "bf16",
    store: str = "dense",
    double_quant: bool = True,
    block: int = 64,
) -> int:
    """Return the bytes of a base: `dense` numbers that always stay in `dtype`, and linear weights kept in `store`.

    Args:
        dense: embeddings, output layer, norms and biases; in lorakit they stay as they are, elsewhere they are often
            cast to fp32, which costs `2 * dense` more.
        packed: `(out, in)` of each linear weight.
        store: "dense", "int8" (a byte a weight, fp32 a row: arXiv 2208.07339) or "nf4" (see `nf4_bytes`).

    Raises:
        SpecError: an unknown dtype or store.
    """
    width = WIDTHS[_one_of(dtype, WIDTHS, "dtype")]
    _one_of(store, STORES, "store")
    total = dense * width
    for out, in_ in packed:
        if store == "nf4":
            total += nf4_bytes(out * in_, double_quant, block)
        else:
            total += out * in_ * width if store == "dense" else out * in_ + 4 * out
    return total


def nf4_bytes(numel: int, double_quant: bool = True, block: int = 64) -> int:
    """Return the bytes of one weight in 4 bits with its block maxima (arXiv 2305.14314, section 3).

    `4 + 32/block` bits a weight; with double quantisation `4 + 8/block + 32/(256 block)`, 4.127 for blocks of 64, and
    one fp32 mean. The code books, 64 bytes (1,088 double quantised), are shared and not counted.
    """
    blocks = ceil(numel / block)
    state = blocks + 4 * ceil(blocks / _NESTED) + 4 if double_quant else 4 * blocks
    return ceil(numel / 2) + state


def optimizer_bytes(sizes: Iterable[int], optimizer: str = "adamw") -> int:
    """Return the bytes of both moments of tensors of these sizes.

    8 bytes a number; in 8 bits 2, two fp32 for every 256, and one pair of maps, with tensors under 4,096 numbers as
    before. Pages hold the same bytes, but may leave the device when it is full. The count of steps is left out.

    Raises:
        SpecError: an optimizer lorakit does not have.
    """
    sizes = list(sizes)
    if not _one_of(optimizer, OPTIMIZERS, "optimizer").endswith("8bit"):
        return 8 * sum(sizes)
    narrow = [size for size in sizes if size >= NARROW_FROM]
    wide = 8 * (sum(sizes) - sum(narrow))
    return wide + sum(2 * size + 8 * ceil(size / _STATE_BLOCK) for size in narrow) + (_MAPS if narrow else 0)


def trained_parts(sizes: Iterable[int], optimizer: str = "adamw", whole: bool = False) -> Parts:
    """Return what lorakit keeps for trained tensors of these sizes: fp32 values, fp32 gradients, moments.

    With AdamW 16 bytes a number. `whole`: they are the base's own parameters, widened to fp32, so they count as weights
    and not as adapters; `autocast_bytes` come on top of them in a 16-bit run.
    """
    sizes = list(sizes)
    count = sum(sizes)
    values = Parts(weights=4 * count) if whole else Parts(adapters=4 * count)
    return values + Parts(gradients=4 * count, optimizer=optimizer_bytes(sizes, optimizer))


def autocast_bytes(count: int) -> int:
    """Return the bytes of 16-bit copies that autocast keeps, until the backward, of fp32 matrices it multiplies by."""
    return 2 * count


def mixed_precision_parts(count: int, master: bool = True) -> Parts:
    """Return the published convention for full fine-tuning in 16 bits, not what lorakit does: 16 or 12 bytes a number.

    16-bit weights and gradients with two fp32 moments are 12 (QLoRA's 780 GB for 65B, arXiv 2305.14314); with an fp32
    master copy, counted as the optimizer's, 16 (arXiv 1910.02054, section 3.1).
    """
    return Parts(weights=2 * count, gradients=2 * count, optimizer=(12 if master else 8) * count)


def activations_by_formula(
    *,
    layers: int,
    hidden: int,
    sequence: int,
    batch: int = 1,
    heads: int = 0,
    kv: int | None = None,
    intermediate: int | None = None,
    checkpointing: bool = False,
    tensor_parallel: int = 1,
) -> int:
    """Return the bytes of 16-bit activations saved for the backward, by a published closed formula.

        s b h (10 + (24 + 5 a s / h) / t)     a layer (arXiv 2205.05198, table 2), without `heads` no attention matrix
        s b (12 h + 4 kv + 8 i)               the same with RMSNorm, SwiGLU, no dropout, no attention matrix,
                                              where `intermediate` is given
        2 s b h                               with full checkpointing: the input of each layer; while one is worked out
                                              again, its own activations come on top: the formula for `layers=1`

    Both are for full fine-tuning: frozen layers save less, adapters with dropout more.

    Args:
        heads: `a`, for attention that keeps its (s, s) matrix; 0 for attention that does not.
        kv: width of the keys, and of the values, all their heads together; `hidden` if not given.
        intermediate: `i`, the inner width of a gated feed-forward.
    """
    tokens = sequence * batch
    if checkpointing:
        return 2 * tokens * hidden * layers
    if intermediate is not None:
        return tokens * (12 * hidden + 4 * (hidden if kv is None else kv) + 8 * intermediate) * layers
    scores = 5 * heads * sequence * tokens
    return ceil((tokens * hidden * (10 * tensor_parallel + 24) + scores) / tensor_parallel) * layers


def logits_by_formula(sequence: int, batch: int, vocabulary: int, copies: int = 2, dtype: str = "bf16") -> int:
    """Return the bytes of the output layer's logits: one copy in `dtype` and `copies` in fp32.

    A plain cross-entropy has two in fp32 at once, the logits and their gradient (or their log-softmax).
    """
    return sequence * batch * vocabulary * (WIDTHS[_one_of(dtype, WIDTHS, "dtype")] + 4 * copies)


def _one_of(word: str, known: Iterable[str], what: str) -> str:
    """Return `word`, or raise `SpecError` where it is not one of the known."""
    known = list(known)
    if word not in known:
        raise SpecError(f"unknown {what} {word!r}{did_you_mean(word, known)}; known are {', '.join(known)}")
    return word
