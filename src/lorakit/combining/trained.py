"""Tensors of the base that adapters trained whole: a head, the norms, every bias.

They are values, not changes. The weighted sum of their changes from the base's W0 is `W0 + sum_i w_i (T_i - W0)`, which
is the weighted mean `sum_i w_i T_i` where the weights of the adapters that trained it sum to 1, and else needs W0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakit.core.state import AdapterState
from lorakit.errors import CombineError, grouped, listing

ROUNDING = 1e-6
"""How far from 1 weights may sum, as 1/3 thrice in fp32 does."""


def combined_whole(
    states: Sequence[AdapterState], weights: Sequence[float], base: Mapping[str, Tensor], averages: bool
) -> dict[str, Tensor]:
    """Return `W0 + sum_i w_i (T_i - W0)` of every tensor that an adapter trained whole, by name.

    With `averages` the weights are divided by the number of adapters that trained the tensor. Sums are taken in fp64
    and rounded to the dtype the values are kept in.

    Raises:
        CombineError: shapes that differ, or weights that do not sum to 1 where W0 is not in `base`; all of them.
    """
    found: dict[str, list[tuple[float, Tensor]]] = {}
    for state, weight in zip(states, weights, strict=True):
        for name, tensor in state.trained.items() if weight else ():
            found.setdefault(name, []).append((weight, tensor))
    made, problems = {}, []
    for name, parts in found.items():
        try:
            made[name] = _mean(parts, base.get(name), averages)
        except CombineError as problem:
            problems.append(f"{name}: {problem}")
    if problems:
        raise CombineError(f"{len(problems)} tensor(s) trained whole do not combine:\n{listing(grouped(problems))}")
    return made


def leans_on_base(states: Sequence[AdapterState], weights: Sequence[float], averages: bool) -> bool:
    """Return whether a tensor trained whole has weights that do not sum to 1, so that the base's own value is asked."""
    shares: dict[str, list[float]] = {}
    for state, weight in zip(states, weights, strict=True):
        for name in state.trained if weight else ():
            shares.setdefault(name, []).append(weight)
    sums = (sum(own) / (len(own) if averages else 1) for own in shares.values())
    return any(abs(total - 1) > ROUNDING for total in sums)


def _mean(parts: Sequence[tuple[float, Tensor]], start: Tensor | None, averages: bool) -> Tensor:
    shapes = {tuple(tensor.shape) for _, tensor in parts} | ({tuple(start.shape)} if start is not None else set())
    if len(shapes) > 1:
        raise CombineError(f"shapes {' and '.join(map(str, sorted(shapes)))}")
    shares = [weight / len(parts) if averages else weight for weight, _ in parts]
    rest = 1 - sum(shares)
    if abs(rest) > ROUNDING and start is None:
        raise CombineError(
            f"the weights of the adapters that trained it sum to {sum(shares):g}, and without the base's own value "
            "only a mean is defined: give weights that sum to 1, or base={name: value}, or leave it out, "
            "replace(state, trained={})"
        )
    first = parts[0][1]
    total = torch.zeros(first.shape, dtype=torch.float64)
    for share, (_, tensor) in zip(shares, parts, strict=True):
        total += share * tensor.detach().cpu().double()
    if start is not None:
        total += rest * start.detach().cpu().double()
    dtype = first.dtype
    for _, tensor in parts:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return total.to(first.device, dtype)
