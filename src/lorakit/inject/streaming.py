"""Fold an adapter into weights that come one at a time, and go when they are merged.

The model is empty: on the meta device, for its layers and their names. A layer whose weight comes is filled, merged by
the same sum as in memory, proved, and emptied again; beside the adapter nothing else is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.core.adapters import Adapted, Adapters
from lorakit.core.state import AdapterState, Base
from lorakit.errors import MergeError
from lorakit.inject.attach import attach, fitted
from lorakit.inject.bases import check_base
from lorakit.inject.ledger import parameters_of
from lorakit.inject.merge import MergeReport, Tally, merged_weight, not_a_weight, shared_weights, tied_weights
from lorakit.inject.proof import prove
from lorakit.inject.sites import sites


@dataclass(frozen=True)
class Proven:
    """The largest difference of a merged layer from the adapted one on random inputs, and the layer.

    It is a share of the layer's largest output.
    """

    difference: float = 0.0
    layer: str = ""


class StreamedMerge:
    """An adapter on an empty model, which gives back what is to be written of a base, one tensor at a time.

    problems: what speaks against the merge, a line `layer: why` each; to be asked before anything else.
    layers: the parameters that adapted layers keep their weight in, and the path of the layer.
    whole: the values of parameters the adapter trained whole, by every name these have.
    proven: how far a merged layer was from the adapted one at most, so far.
    """

    def __init__(self, model: nn.Module, state: AdapterState) -> None:
        """Put the adapter on a model of the meta device.

        Raises:
            AdapterFileError: an adapter for another model.
            AttachError: modules that are adapted and trained whole.
        """
        updates, named = fitted(state, sites(model)), parameters_of(model)
        attach(model, state)
        adapted = {path: cast(nn.Module, m) for path, m in model.named_modules() if isinstance(m, Adapted)}
        acting = {path: {name for name, _ in cast(Adapters, m.adapters).named()} for path, m in adapted.items()}
        tied = [f"{line}; merge in memory with untie=True" for line in tied_weights(adapted, shared_weights(model))]
        self.problems = not_a_weight(adapted, acting) + tied
        self.layers = {f"{path}.weight": path for path in adapted if f"{path}.weight" in named}
        values = {id(named[name]): value for name, value in state.trained.items()}
        self.whole = {name: values[id(parameter)] for name, parameter in named.items() if id(parameter) in values}
        self._modules, self._base = adapted, state.base
        self._values = {update.site.key: update.tensors for update in updates}
        self._tally, self._rng = Tally(), torch.Generator().manual_seed(0)
        self.proven = Proven()

    @property
    def known_by(self) -> list[str]:
        """Return the layers whose weights the adapter knows its base by."""
        return list(self._base.probes)

    def check_base(self, name: str, weights: Mapping[str, tuple[float, ...]]) -> None:
        """Raise `AdapterFileError` where the probes of a base's weights, by layer, are not those of the adapter's."""
        check_base(self._base, Base(name, weights))

    def trained(self, name: str, dtype: torch.dtype, before: Tensor | None = None) -> Tensor:
        """Return the value of a parameter in `whole`, in the dtype to write; `before` is the base's, if it has it.

        Raises:
            MergeError: NaN or infinity.
        """
        kept = self.whole[name].detach().to(dtype)
        if bad := int((~kept.isfinite()).sum()):
            raise MergeError(
                f"{name}: it was trained whole, and {bad:,} of its {kept.numel():,} values are NaN or infinite in "
                f"{dtype}; check the adapter, or merge in a wider dtype"
            )
        if before is not None:
            self._tally.compare(before, self.whole[name].detach().float(), kept)
        return kept

    @torch.no_grad()
    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """Return the merged weight of a parameter in `layers`, as the layer keeps it; `tensor` is overwritten.

        Raises:
            MergeError: NaN or infinity, or a layer that merged does not do what it did with its adapter.
        """
        path = self.layers[name]
        module = self._modules[path]
        adapters = cast(Adapters, module.adapters)
        store, wide = adapters.host.store, tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        with self._filled(module, wide):
            here = merged_weight(path, module, adapters.weights, tensor.dtype)
            difference = prove(path, module, here, self._rng)
            self._tally.add(store.read(module), here.total, here.kept)
        with _holding(module, {"weight": tensor}):
            store.write(module, here.kept)
        if not self.proven.layer or difference > self.proven.difference:
            self.proven = Proven(difference, path)
        return tensor

    def report(self) -> MergeReport:
        """Return what the layers merged so far changed, and what rounding took from it."""
        return self._tally.report()

    @contextmanager
    def _filled(self, module: nn.Module, weight: Tensor) -> Iterator[None]:
        """Give a layer its weight, and its updates their tensors, for a while.

        The bias stays out of the sum and of the proof. A constant that the layer multiplies by can be any number to a
        law that is linear in W; here it is 1.
        """
        constants = {
            name: torch.ones_like(buffer, device=weight.device) for name, buffer in module.named_buffers(recurse=False)
        }
        without_bias = {name: None for name in ("bias",) if name in module._parameters}
        with ExitStack() as stack:
            stack.enter_context(_holding(module, {"weight": weight, **without_bias, **constants}))
            for _, adapter in cast(Adapters, module.adapters).named():
                own, values = adapter.tensors(), self._values[adapter.site.key]
                stack.enter_context(_holding(adapter, {k: values[k].detach().to(own[k].dtype) for k in own}))
            yield


@contextmanager
def _holding(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Put tensors in the place of a module's parameters and buffers of those names, for a while."""
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    for name, tensor in tensors.items():
        if name in buffers:
            module._buffers[name] = tensor
        else:
            module._parameters[name] = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
    try:
        yield
    finally:
        module._parameters.update(parameters)
        module._buffers.update(buffers)
