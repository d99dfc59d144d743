"""What a method would do at the chosen layers that its user may not expect: said before the run, refused nowhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch

from lorakit.core.method import Static
from lorakit.core.site import Role, Skeleton
from lorakit.core.sublayers import attention_out, mlp
from lorakit.core.targets import Match
from lorakit.errors import TargetError


def surprises(
    matches: Sequence[Match], skeleton: Skeleton, dtype: torch.dtype, head_width: int | None
) -> tuple[str, ...]:
    """Return what to know of these updates, a line each.

    Args:
        matches: what `resolve` found.
        skeleton: of the base.
        dtype: of the base.
        head_width: values of one attention head, None where the model does not tell.
    """
    by_heads = [match for match in matches if getattr(match.method, "heads", 0)]
    misplaced = _misplaced_heads(by_heads, skeleton) if by_heads else ()
    return (*_rounded_gains(matches, dtype), *misplaced, *(_no_heads(by_heads, head_width) if head_width else ()))


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


def _misplaced_heads(matches: Sequence[Match], skeleton: Skeleton) -> Iterator[str]:
    """Say of an update by heads where the layer has none, or has them at its inputs."""
    outside, outs = {site.path for site in mlp(skeleton)}, set[str]()
    with suppress(TargetError):  # a model that does not tell its output projections
        outs = {site.path for site in attention_out(skeleton)}
    if apart := [match.site.key for match in matches if match.site.path in outside]:
        yield (
            f"{len(apart)} layers, such as {apart[0]}, lie outside of attention, where there are no heads: exclude "
            "them, or target attention"
        )
    if wrong := [m.site.key for m in matches if m.site.path in outs and getattr(m.method, "side", "up") == "up"]:
        yield (
            f"{len(wrong)} layers, such as {wrong[0]}, read the heads and write none: give them side: down by an "
            "override, or exclude them"
        )


def _no_heads(matches: Sequence[Match], width: int) -> Iterator[str]:
    """Say of an update by heads where it divides a layer into parts that are no heads of the model."""
    odd: dict[int, list[str]] = {}
    for match in matches:
        heads = vars(match.method)["heads"]
        divided = match.site.out if getattr(match.method, "side", "up") == "up" else match.site.in_
        if divided != heads * width:
            odd.setdefault(divided // heads, []).append(match.site.key)
    for part, paths in odd.items():
        yield (
            f"{len(paths)} layers, such as {paths[0]}, are divided into parts of {part} values, and a head of this "
            f"model has {width}: give them their own number of heads by an override, or exclude them"
        )
