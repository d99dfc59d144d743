"""Measure what an initialisation wants to know of a model before its adapter is attached.

    inputs     the second moment X^T X of what a layer reads (EVA)
    gradients  the mean gradient of a layer's weight (LoRA-GA)
    weight     a copy of the dense weight (LoftQ, gathered before the base is quantised)

The model is left as it was: it runs in evaluation mode, so no dropout and no random number, with hooks and everything
frozen for the time being. A weight need not be able to have a gradient: op is linear in W, so the gradient of any
weight, a quantised one too, follows from the layer's input and the gradient of its output.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.host import Host
from lorakit.core.init import Need, init_of
from lorakit.core.modes import evaluating
from lorakit.core.registry import host_at
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec
from lorakit.core.targets import resolve
from lorakit.errors import SpecError, listing
from lorakit.inject.attach import weight_at
from lorakit.inject.sites import sites

IGNORE = -100
"""The label of a token that carries no loss, as torch and transformers have it."""


def needs(spec: AdapterSpec) -> bool:
    """Return whether any initialisation of a spec asks for evidence."""
    methods = [] if spec.method is None else [spec.method, *(spec.method_with(o) for o in spec.overrides)]
    return any(init.needs is not None for method in methods if (init := init_of(method)) is not None)


def sites_that_need(model: nn.Module, spec: AdapterSpec, need: Need) -> list[Site]:
    """Return the sites of `spec` whose start asks for one kind of evidence."""
    found = resolve(spec, sites(model))
    return [m.site for m in found if (init := init_of(m.method)) is not None and init.needs == need]


def gather(
    model: nn.Module,
    spec: AdapterSpec,
    batches: Iterable[Any] = (),
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Mapping[str, Tensor]:
    """Return what the initialisations of `spec` ask for, by the key of each site, for `attach(..., evidence=...)`.

    Memory beside the model, in fp32 on the CPU: n x n values for each site of EVA, m x n for each of LoRA-GA or LoftQ,
    (m, n) the weight. On the model's device there is one layer's gradient or moment at a time, and for gradients what
    the backward keeps, which is about that of training with every layer adapted.

    Args:
        model: the base; adapters attached to it already take part.
        spec: what will be attached.
        batches: a few batches, each the keyword arguments of the model (a mapping) or its input (a tensor). Tokens
            whose label is -100, or without labels those the attention mask hides, do not count as inputs; in an
            encoder the mask alone tells. LoftQ needs no batch.
        weights: the dense weights by the key of each site, for LoftQ on a model that is quantised already; it may read
            them one by one. Without it they are the model's own.
        loss: runs the model on a batch, `(model, batch)`, and returns the mean loss, for gradients; by default what
            the model gives back as `.loss`.

    Raises:
        SpecError: no batch where one is needed, a model that gives no loss, or layers that no batch reached.
    """
    modules = dict(model.named_modules())
    found = [(m.site, init.needs) for m in resolve(spec, sites(model)) if (init := init_of(m.method)) and init.needs]
    probes = [
        _Probe(site, host_at(site, modules[site.path]), modules[site.path]) for site, need in found if need != "weight"
    ]
    need_of = {site.key: need for site, need in found}
    backward = "gradients" in need_of.values()
    two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    count = 0
    if probes:
        with _resting(model), _hooked(probes, need_of), torch.set_grad_enabled(backward):
            for batch in batches:
                count += 1
                for probe in probes:
                    probe.counted = _counted(batch, encoder=two and "decoder" not in probe.site.path)
                if backward:
                    torch.autograd.backward((loss or _own_loss)(model, batch))
                else:
                    (loss or _run)(model, batch)
        if missed := [probe.site.key for probe in probes if probe.total is None]:
            raise SpecError(
                f"{count} batch(es) measured, and none reached these layers; give more batches, or exclude the "
                f"layers:\n{listing(missed)}"
            )
    measured = {probe.site.key: probe.result(need_of[probe.site.key], count) for probe in probes}
    if weights is None:
        read = {s.key: weight_at(modules[s.path], s) for s, need in found if need == "weight"}
        weights = {key: weight.to("cpu", torch.float32, copy=True) for key, weight in read.items()}
    return ChainMap(measured, weights)  # type: ignore[arg-type]  # nothing is written through it


@dataclass
class _Probe:
    """What is added up at one site: in fp32, on the CPU."""

    site: Site
    host: Host
    module: nn.Module
    total: Tensor | None = None
    counted: tuple[Tensor, ...] = field(default=(), repr=False)
    """Which tokens count, of the rows that its inputs may be."""

    def add(self, values: Tensor) -> None:
        values = values.to("cpu", torch.float32)
        self.total = values if self.total is None else self.total.add_(values)

    def result(self, need: str | None, count: int) -> Tensor:
        assert self.total is not None
        return self.total / count if need == "gradients" else self.total

    @torch.no_grad()
    def read_inputs(self, module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        """Add the second moment of what each output reads: for a convolution the patches, group by group."""
        site, x = self.site, _input(args, kwargs)
        if site.kernel:
            eye = torch.eye(site.fan_in, dtype=x.dtype, device=x.device).reshape(site.fan_in, site.in_, *site.kernel)
            x = self.host.op.apply(module, x, eye.repeat(site.groups, *[1] * (eye.dim() - 1)))
            x = x.movedim(self.host.op.axis, -1)
        elif (kept := next((one for one in self.counted if one.shape == x.shape[:-1]), None)) is not None:
            x = x[kept.to(x.device)]
        rows = x.reshape(-1, site.groups, site.fan_in).transpose(0, 1).float()
        moment = rows.mT @ rows
        self.add(moment[0] if site.groups == 1 else moment)

    def read_gradients(self, module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor:
        """Add the gradient of the weight when the backward comes by, and see to it that it does."""
        x, rows, axis = _input(args, kwargs).detach(), self.site.rows, self.host.op.axis
        if not y.requires_grad:
            y = y.detach().requires_grad_().clone()  # everything before is frozen; a clone may be changed in place

        def backward(grad: Tensor) -> None:
            own = grad if rows is None else grad.narrow(axis, rows[0], rows[1] - rows[0])
            zero = torch.zeros(self.site.shape, dtype=y.dtype, device=y.device, requires_grad=True)
            with torch.enable_grad():
                (values,) = torch.autograd.grad(self.host.op.apply(module, x, zero), zero, own.to(y.dtype))
            self.add(values)

        y.register_hook(backward)  # type: ignore[no-untyped-call]
        return y


@contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    """Hold the model in evaluation mode with everything frozen, and give back its modes and flags."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _hooked(probes: list[_Probe], need_of: Mapping[str, str | None]) -> Iterator[None]:
    hooks = [
        p.module.register_forward_hook(
            p.read_gradients if need_of[p.site.key] == "gradients" else p.read_inputs, with_kwargs=True
        )
        for p in probes
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _run(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    loss = getattr(_run(model, batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise SpecError("the model gave no loss to take gradients of; put labels into the batches, or give loss=")
    return loss


def _counted(batch: Any, *, encoder: bool) -> tuple[Tensor, ...]:
    """Return which tokens `(batch, length)` count, or nothing where nothing says so: then all do.

    Labels are of the tokens that a decoder reads; what its layers read of an encoder has the encoder's mask.
    """
    given: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
    labels, mask = given.get("labels"), given.get("attention_mask")
    of_labels = (labels != IGNORE,) if isinstance(labels, Tensor) and labels.dim() == 2 and not encoder else ()
    return (*of_labels, mask.bool()) if isinstance(mask, Tensor) else of_labels


def _input(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
