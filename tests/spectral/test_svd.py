"""The triplets of an update: those of its dW, at every kind of layer and for every method that has one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.core.init import by_group
from lorakit.core.method import LowRank
from lorakit.core.site import Site
from lorakit.core.state import Update
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, state
from lorakit.methods.dora import DoRA
from lorakit.methods.ia3 import IA3
from lorakit.methods.krona import KronA
from lorakit.methods.lora import LoRA
from lorakit.methods.mixture import Mixture
from lorakit.spectral.svd import Svd, matrix_view, singular_values, svd
from tests.law.cases import METHODS, STATIC, net, weight_of
from tests.tolerances import assert_close


@pytest.mark.parametrize(("kind", "name"), STATIC)
def test_the_triplets_are_those_of_dw(kind: str, name: str) -> None:
    model = net(kind, name)
    (update,), weight = state(model, "n0").updates, weight_of(model)
    delta = matrix_view(update.site, adapters_named(model, "n0")[0].delta(weight)).detach()
    found = svd(update, weight)
    assert_close(found.u @ found.s.diag() @ found.vh, delta, dtype=torch.float32)
    assert_close(found.s, torch.linalg.svdvals(delta)[: len(found.s)], dtype=torch.float32)
    assert_close(singular_values(update, weight), found.s)
    for basis in (found.u.T, found.vh):
        assert_close(basis @ basis.T, torch.eye(len(found.s), dtype=basis.dtype))
    if isinstance(METHODS[name], LowRank):
        assert found.s.dtype == torch.float64, "factors are never multiplied out in fp32"
        assert torch.equal(svd(update).s, found.s), "and need no weight"


def test_by_hand() -> None:
    # s B A = 2 (3 e1) (4 e2)^T: one singular value, 24
    p = {"down": torch.tensor([[0.0, 4.0, 0.0]]), "up": torch.tensor([[3.0], [0.0]])}
    found = svd(Update(Site("layer", 2, 3), LoRA(1, 2.0), p))
    assert_close(found.s, torch.tensor([24.0], dtype=torch.float64))
    assert (found.u.shape, found.vh.shape, found.rank) == ((2, 1), (1, 3), 1)


def test_the_scale_is_not_rounded_to_the_factors_dtype() -> None:
    p = {"down": torch.randn(3, 12).bfloat16(), "up": torch.randn(8, 3).bfloat16()}
    found = svd(Update(Site("layer", 8, 12), LoRA(3, 7.0), p))
    assert_close(found.s, torch.linalg.svdvals(7 / 3 * p["up"].double() @ p["down"].double())[:3])


def test_groups_lie_on_the_diagonal_of_the_matrix() -> None:
    site = Site("conv", 4, 3, (2,), kind="conv1d", groups=2)
    weight = torch.randn(4, 3, 2)
    seen = matrix_view(site, weight)
    assert seen.shape == (4, 12)
    assert torch.equal(torch.stack([seen[:2, :6], seen[2:, 6:]]), by_group(site, weight))
    assert not seen[:2, 6:].any()
    assert not seen[2:, :6].any()
    assert torch.equal(matrix_view(Site("conv", 4, 3, (2,), kind="conv1d"), weight), weight.flatten(1))


def test_only_directions_that_act_can_be_asked_for() -> None:
    p = {"down": torch.randn(4, 9), "up": torch.randn(8, 4)}
    p["up"][:, 2:] = 0.0
    found = svd(Update(Site("layer", 8, 9), LoRA(4), p))
    assert (len(found.s), found.rank) == (4, 2)
    u, vh = found.leading(2)
    assert (u.shape, vh.shape) == ((8, 2), (2, 9))
    for wrong in (0, 3):
        with pytest.raises(SpecError, match=f"{wrong} directions were asked for, and 2 act"):
            found.leading(wrong)


def test_the_rank_is_counted_in_the_precision_of_the_values() -> None:
    def rank(dtype: torch.dtype) -> int:
        return Svd(
            torch.eye(8, 2, dtype=dtype), torch.tensor([1.0, 1e-8], dtype=dtype), torch.eye(2, 9, dtype=dtype)
        ).rank

    assert (rank(torch.float32), rank(torch.float64)) == (1, 2)


def fresh(method: LoRA | DoRA | IA3 | KronA) -> Update:
    site = Site("layer", 8, 12)
    return Update(site, method, {name: torch.rand(d.shape) for name, d in method.tensors(site).items()})


@pytest.mark.parametrize("method", [DoRA(LoRA(2)), IA3()])
def test_a_change_that_depends_on_the_weight_asks_for_it(method: DoRA | IA3) -> None:
    for of in (svd, singular_values):
        with pytest.raises(SpecError, match=f"the change that {method.name} makes depends on the weight; give the"):
            of(fresh(method))

    update, weight = fresh(method), torch.randn(8, 12).bfloat16()
    assert_close(singular_values(update, weight), singular_values(update, weight.float()))
    assert singular_values(update, weight.double()).dtype == torch.float32, "as wide as the update's own tensors"


def test_a_dense_change_that_does_not_depend_on_the_weight_needs_none() -> None:
    # a Kronecker product has the products of its factors' singular values
    update = fresh(KronA(a1=2, a2=3))
    sigma = [torch.linalg.svdvals(t) for t in update.tensors.values()]
    products = torch.outer(*sigma).flatten().sort(descending=True).values
    scale = singular_values(update)[0] / products[0]
    assert_close(singular_values(update)[: len(products)], scale * products)


def test_what_is_no_change_of_a_weight_is_refused_by_its_type() -> None:
    site, method = Site("layer", 8, 12), Mixture(2, 2)
    tensors: dict[str, Tensor] = {name: torch.zeros(d.shape) for name, d in method.tensors(site).items()}
    with pytest.raises(SpecError, match="mixture depends on the input, so there is no dW"):
        svd(Update(site, method, tensors))
