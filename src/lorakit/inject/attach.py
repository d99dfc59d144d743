"""Attach an adapter to a model, by swapping the class of each target layer in place, and take it off again.

All or nothing: every check runs before the first layer changes, so a refused adapter leaves the model as it was. The
base's keys, parameters and `isinstance` stay, its checkpoint still loads, and `detach` restores classes, gradient flags
and the values of modules that were trained whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.adapters import Adapted, Adapter, Adapters, attached, swap_in, swap_out
from lorakit.core.hollow import is_hollow
from lorakit.core.init import init_of, shared_out
from lorakit.core.method import Method
from lorakit.core.peft_form import settle
from lorakit.core.registry import host_at
from lorakit.core.site import Site, Skeleton
from lorakit.core.spec import AdapterSpec
from lorakit.core.state import AdapterState, Update, check_tensors, expect_adapter
from lorakit.core.targets import adapted_and_whole, parameters_named, resolve
from lorakit.errors import AdapterFileError, AttachError, SpecError, did_you_mean, listing
from lorakit.inject.bases import base_of, check_base, known_weights, refuse_divided
from lorakit.inject.context import refuse_context
from lorakit.inject.ledger import Ledger, ledger_of, parameters_of
from lorakit.inject.sites import sites
from lorakit.inject.skeleton import ties_of
from lorakit.inject.together import resting


@dataclass(frozen=True)
class Handle:
    """What `attach` returns: the adapter's name, where it sits, and its trainable parameters."""

    model: nn.Module
    name: str
    paths: tuple[str, ...]

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters of this adapter, modules trained whole included while it is active.

        Raises:
            AttachError: it was detached.
        """
        ledger_of(self.model).require(self.name)
        layers = adapters_named(self.model, self.name)
        own = list(dict.fromkeys(p for a in layers for p in a.parameters() if p.requires_grad))
        base = parameters_of(self.model)
        whole = [base[key] for key in ledger_of(self.model).trained[self.name]]
        return own + [p for p in whole if p.requires_grad]

    def read_by_state(self) -> list[nn.Parameter]:
        """Return the parameters that `state` reads, which must be whole then: the adapter's, and some of the base's.

        They are what to gather where something else (DeepSpeed's ZeRO-3, `fully_shard`) has divided the model.

        Raises:
            AttachError: it was detached.
        """
        return [*self.parameters(), *known_weights(self.model).values()]

    def __repr__(self) -> str:
        """Return one line: name, layers, parameters."""
        count = sum(p.numel() for p in self.parameters())
        return f"Handle({self.name!r}: {len(self.paths)} updates, {count:,} trainable parameters)"


def attach(
    model: nn.Module,
    what: AdapterSpec | AdapterState,
    name: str = "default",
    *,
    evidence: Mapping[str, Tensor] | None = None,
) -> Handle:
    """Add an adapter to `model` in place, active with weight 1, the base frozen.

    Args:
        model: any `nn.Module` with layers of a known kind.
        what: a spec for a fresh adapter (the first forward equals the base's), or the state of a trained one.
        name: what `use`, `merge`, `state` and `detach` will call it.
        evidence: what was measured at each site, by its key, for an initialisation that asks for it.

    Raises:
        TargetError: a pattern matched nothing, or matched what cannot be adapted.
        SpecError: a method or rank that does not fit a site, an initialisation without the evidence it asks for; a path
            instead of an adapter.
        AttachError: a name in use, a layer whose forward was patched.
        AdapterFileError: a state whose tensors, paths or base do not fit this model.
    """
    ledger = ledger_of(model)
    _check_name(name, ledger)
    skeleton = sites(model)
    if isinstance(what, AdapterSpec):
        spec, tensors, values = what, {}, {}
        placed = [(m.site, m.method) for m in resolve(spec, skeleton)]
    else:
        expect_adapter(what)
        spec, values = what.spec, dict(what.trained)
        updates = fitted(what, skeleton)
        _refuse_tied_copies(model, what.apart)
        check_tensors(updates)
        check_base(what.base, base_of(model))
        placed = [(u.site, u.method) for u in updates]
        tensors = {u.site.key: u.tensors for u in updates}
    trained = _trained_whole(model, spec, skeleton)
    brought = _distinct(model, values) if values else trained
    if both := adapted_and_whole([site.path for site, _ in placed], trained, ties_of(model)):
        raise AttachError(both)
    ledger.refuse_shared(name, brought)
    modules = dict(model.named_modules())
    _refuse_patched({site.path: modules[site.path] for site, _ in placed})
    refuse_context(model, placed)
    if isinstance(what, AdapterSpec):
        _check_evidence(modules, placed, evidence or {})
        placed = shared_out(placed, evidence or {})
    held: dict[str, nn.Parameter] = {}
    made: list[Adapter] = []
    for site, method in placed:
        module = modules[site.path]
        host = host_at(site, module)
        made.append(adapter := Adapter(method, site, host, host.store.like(module), spec.dropout, held))
        if site.key in tensors:
            _copy(adapter, dict(tensors[site.key]))
        else:
            read = partial(weight_at, module, site)
            adapter.init(read, _generator(spec.seed, site.key), (evidence or {}).get(site.key))
    ledger.freeze(model)
    for adapter in made:
        _place(modules[adapter.site.path], adapter, name)
    ledger.add(model, name, spec, brought, values, trainable=trained)
    return Handle(model, name, tuple(site.key for site, _ in placed))


def detach(model: nn.Module, name: str = "default") -> None:
    """Take an adapter off, restoring what `attach` changed; the last one off leaves the bare base.

    Raises:
        AttachError: no adapter of that name.
    """
    ledger = ledger_of(model)
    ledger.require(name)
    for module in list(model.modules()):
        if isinstance(module, Adapted):
            adapters = module.adapters
            for key in [k for k in adapters.by_name if k.split("@")[0] == name]:
                del adapters.by_name[key]
            adapters.weights.pop(name, None)
            if not adapters.by_name:
                _swap_out(cast(nn.Module, module))
    ledger.remove(model, name)


def state(model: nn.Module, name: str = "default", *, live: bool = False) -> AdapterState:
    """Return a copy of an adapter as a value: spec, tensors, modules trained whole, and what base it sits on.

    With `live` its tensors are the model's own, which change when it trains: enough to write them to a file.

    Raises:
        AttachError: no adapter of that name; tensors that are divided among processes (`Handle.read_by_state`).
    """
    ledger = ledger_of(model)
    ledger.require(name)
    named, own = parameters_of(model), [(adapter, adapter.tensors()) for adapter in adapters_named(model, name)]
    learned = {f"{adapter.site.key}.{key}": tensor for adapter, tensors in own for key, tensor in tensors.items()}
    refuse_divided(learned | {key: named[key] for key in ledger.trained[name]})
    taken: dict[int, Tensor] = {}

    def take(tensor: Tensor) -> Tensor:
        if id(tensor) not in taken:
            taken[id(tensor)] = tensor.detach() if live else tensor.detach().clone()
        return taken[id(tensor)]

    updates = tuple(
        Update(adapter.site, adapter.method, {key: take(tensor) for key, tensor in tensors.items()})
        for adapter, tensors in own
    )
    trained = {key: take(value) for key, value in ledger.trained_values(model, name).items()}
    return AdapterState(ledger.specs[name], updates, trained, base_of(model))


def adapters_named(model: nn.Module, name: str) -> list[Adapter]:
    """Return the adapters of one name, in the model's order."""
    return [adapter for key, adapter in attached(model) if key == name]


def _check_name(name: str, ledger: Ledger) -> None:
    if not name or any(c in name for c in ".@/ "):
        raise AttachError(f"adapter name {name!r} must be non-empty and without '.', '@', '/' or spaces")
    if name in ledger.specs:
        raise AttachError(f"an adapter named {name!r} is attached already; detach it first or give another name")


def fitted(given: AdapterState, skeleton: Skeleton) -> tuple[Update, ...]:
    """Return the state's updates on this model's own sites, or list the paths it does not have.

    Raises:
        AdapterFileError: a path that is not here, a layer with a bias for an update without one.
    """
    by_path = {**skeleton.by_path, **skeleton.blocks}
    if skeleton.reader is not None and any(u.site.kind == "model" for u in given.updates):
        by_path[skeleton.reader.path] = skeleton.reader
        given = replace(given, updates=tuple(_on_reader(u, skeleton.reader.path) for u in given.updates))
    missing = [u.site.path for u in given.updates if u.site.path not in by_path]
    if missing:
        whose = given.base.name or "another model"
        if len(missing) == len(given.updates):
            raise AdapterFileError(
                f"the adapter was made for {whose}, and this model has none of its {len(missing)} layers, such as "
                f"{missing[0]}; give its own base"
            )
        near = listing([f"{path}{did_you_mean(path, by_path)}" for path in missing])
        raise AdapterFileError(
            f"the adapter was made for {whose}: {len(missing)} of its {len(given.updates)} layers are not here:\n{near}"
        )
    here = [by_path[u.site.path] for u in given.updates]
    if biased := [s.path for u, s in zip(given.updates, here, strict=True) if u.site.bias is False and s.bias]:
        raise AdapterFileError(
            "these layers have a bias, and the adapter is for layers without one (PEFT's IA3 multiplies the bias "
            f"of an output too, which no change of the weight equals):\n{listing(biased)}"
        )
    return settle(
        given.updates,
        [s if u.site.rows is None else s.slice(*u.site.rows) for u, s in zip(given.updates, here, strict=True)],
    )


def _on_reader(update: Update, path: str) -> Update:
    """Return an update of what a model reads at its reader, where the file does not tell the path."""
    unknown = update.site.kind == "model" and not update.site.in_
    return replace(update, site=update.site.at(path)) if unknown else update


def _trained_whole(model: nn.Module, spec: AdapterSpec, skeleton: Skeleton) -> list[str]:
    """Return the names of the base's parameters that `spec.train` means, each tied one once."""
    named = {key: p for key, p in parameters_of(model).items() if ".adapters.by_name." not in f".{key}"}
    meant = {
        key for keys in parameters_named(spec.train, named, skeleton, spec.targets.layers).values() for key in keys
    }
    if packed := [key for key in meant if not named[key].is_floating_point()]:
        raise AttachError(
            "these weights are packed into 4 bits, and cannot be trained whole; name other modules in `train`, or load "
            f"the base without `quant`:\n{listing(sorted(packed))}"
        )
    first = {id(named[key]): key for key in reversed(named) if key in meant}
    return [key for key in named if first.get(id(named[key])) == key]


def _distinct(model: nn.Module, values: dict[str, Tensor]) -> list[str]:
    """Return the names of the base's parameters a state brings values for, each tied one once, or list the misfits."""
    named = parameters_of(model)
    problems = [f"{key}: not in this model{did_you_mean(key, named)}" for key in values if key not in named]
    problems += [
        f"{key}: shape {tuple(v.shape)}, this model has {tuple(named[key].shape)}"
        for key, v in values.items()
        if key in named and named[key].shape != v.shape
    ]
    if problems:
        raise AdapterFileError(f"modules saved whole do not fit this model:\n{listing(problems)}")
    return list({id(named[key]): key for key in reversed(values)}.values())[::-1]


def _refuse_tied_copies(model: nn.Module, apart: Sequence[str]) -> None:
    """Raise `AdapterFileError` for values that PEFT kept apart, where this model has one weight for several names."""
    named = parameters_of(model) if apart else {}
    for name in apart:
        if others := [key for key, p in named.items() if p is named.get(name) and key != name]:
            raise AdapterFileError(
                f"{name}: PEFT trained a copy of its own, and in this model it is tied to {', '.join(others)}, which "
                "would change too; load a base that has them apart (tie_word_embeddings: false in its config.json, the "
                "weight saved under both names)"
            )


def _refuse_patched(modules: dict[str, nn.Module]) -> None:
    """Guard 1: a forward set on the instance would be called instead of the adapted one; accelerate's is re-hooked."""
    patched = [p for p, m in modules.items() if "forward" in vars(m) and not hasattr(m, "_hf_hook")]
    if patched:
        raise AttachError(
            "something replaced `forward` on these layers, so an adapter there would never be called; "
            f"attach before that, or undo it:\n{listing(patched)}"
        )


def _check_evidence(
    modules: Mapping[str, nn.Module], placed: list[tuple[Site, Method]], evidence: Mapping[str, Tensor]
) -> None:
    """Raise `SpecError` naming the sites whose start needs evidence that is missing or does not fit."""
    problems: dict[str, list[str]] = {}
    for site, method in placed:
        init = init_of(method)
        if init is None or init.needs is None or is_hollow(weight := weight_at(modules[site.path], site)):
            continue
        try:
            init.check_evidence(site, weight, evidence.get(site.key))
        except SpecError as problem:
            problems.setdefault(str(problem), []).append(site.key)
    if problems:
        lines = [f"{', '.join(at[:3])}{', ...' * (len(at) > 3)}: {what}" for what, at in problems.items()]
        count = sum(map(len, problems.values()))
        raise SpecError(f"{count} of {len(placed)} updates cannot start:\n{listing(lines)}")


def _place(module: nn.Module, adapter: Adapter, name: str) -> None:
    hook = _unhook(module)
    layer: Adapters = swap_in(module, adapter.host)
    rows = adapter.site.rows
    layer.by_name[name if rows is None else f"{name}@{rows[0]}-{rows[1]}"] = adapter.train(module.training)
    layer.weights[name] = 1.0
    layer.fast = resting(module)
    _rehook(module, hook)


def _swap_out(module: nn.Module) -> None:
    hook = _unhook(module)
    swap_out(module)
    _rehook(module, hook)


def _unhook(module: nn.Module) -> Any:
    """Take accelerate's hook off a layer (it keeps a bound copy of the old class's forward) and return it."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module)
        vars(module).pop("forward", None)  # it leaves the old class's forward bound to the instance
    return hook


def _rehook(module: nn.Module, hook: Any) -> None:
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, hook)


def weight_at(module: nn.Module, site: Site) -> Tensor:
    """Return the canonical weight of a site, its own rows of a fused one; it may share the module's memory."""
    refuse_divided(dict(module.named_parameters(recurse=False)))
    weight = host_at(site, module).store.read(module).detach()
    return weight if site.rows is None else weight[site.rows[0] : site.rows[1]]


@torch.no_grad()
def _copy(adapter: Adapter, values: dict[str, Tensor]) -> None:
    for key, own in adapter.tensors().items():
        own.copy_(values[key])


def _generator(seed: int, key: str) -> torch.Generator:
    """Return the generator of one site: its start depends on the seed and its path alone, not on its neighbours."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))  # torch's CPU generator takes 32 bits
