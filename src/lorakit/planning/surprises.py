"""What a method would do at the chosen layers that its user may not expect: said before the run, refused nowhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lorakit.core.method import Static
from lorakit.core.site import Role
from lorakit.core.targets import Match


def surprises(matches: Sequence[Match], dtype: torch.dtype, head_width: int | None) -> tuple[str, ...]:
    """Return what to know of these updates, a line each.

    Args:
        matches: what `resolve` found.
        dtype: of the base.
        head_width: values of one attention head, None where the model does not tell.
    """
    return (*_rounded_gains(matches, dtype), *(_no_heads(matches, head_width) if head_width else ()))


def _rounded_gains(matches: Sequence[Match], dtype: torch.dtype) -> Iterator[str]:
    """Say of factors beside 16-bit outputs that those near 1 do nothing: each product is rounded to where it was."""
    names = {match.method.name for match in matches if isinstance(match.method, Static)
             and {decl.role for decl in match.method.tensors(match.site).values()} == {Role.GAIN}}  # fmt: skip
    if names and dtype.itemsize == 2:
        step = torch.finfo(dtype).eps
        yield (
            f"{' and '.join(sorted(names))} multiplies by factors that begin at 1, and outputs in 16 bits are rounded "
            f"to {step:.2g} of themselves: factors nearer to 1 than half of that do nothing, in PEFT too; use "
            "dtype: fp32, or a higher lr"
        )


def _no_heads(matches: Sequence[Match], width: int) -> Iterator[str]:
    """Say of an update by heads where it divides a layer into parts that are no heads of the model."""
    odd: dict[int, list[str]] = {}
    for match in matches:
        if heads := getattr(match.method, "heads", 0):
            divided = match.site.out if getattr(match.method, "side", "up") == "up" else match.site.in_
            if divided != heads * width:
                odd.setdefault(divided // heads, []).append(match.site.key)
    for part, paths in odd.items():
        yield (
            f"{len(paths)} layers, such as {paths[0]}, are divided into parts of {part} values, and a head of this "
            f"model has {width}: give them their own number of heads by an override, or exclude them"
        )
