"""The tensors of PEFT's format: which key an update's tensors have there, and which update a file's keys mean.

    an update's       base_model.model.<path>.<end>      the ends and shapes are the method's own (core/peft_form.py)
    shared by all     base_model.<name>                  VeRA's banks
    trained whole     base_model.model.<path>.weight     (.base_layer.weight beside an update)

An A of LoRA sees every input channel in PEFT, also under g groups, where ours sees its own group's: ours is PEFT's with
zeros elsewhere. A convolution's A has neither dilation nor a padding mode in PEFT, which would compute something else:
`PeftForm.forgets` refuses those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakit.core.method import Method
from lorakit.core.peft_form import PeftForm
from lorakit.core.state import Update
from lorakit.errors import AdapterFileError, SpecError

PREFIX = "base_model.model."
BANKS = "base_model."
_PARTS = r"(^|\.)(base_layer|original_module|token_adapter|(lora|hada|lokr|vera|ia3)_\w+)(\.|$)"


def updates_to_peft(updates: Sequence[Update]) -> dict[str, Tensor]:
    """Return the tensors of whole-layer updates of one method under PEFT's keys, shared ones once and whole."""
    found: dict[str, Tensor] = {}
    for update in updates:
        form, site = update.method.peft, update.site
        assert form is not None
        ends = form.embedding or form.keys if site.kind == "embedding" else form.keys
        written = form.write(update)
        if form.alone:
            return {ends[name]: t for name, t in written.items()}
        found.update({f"{PREFIX}{site.path}.{ends[name]}": t for name, t in written.items() if name in ends})
        for name, key in form.banks.items():  # what a narrower layer holds is the beginning of the widest one's
            if (bank := update.tensors[name]).numel() > found.get(key, bank[:0]).numel():
                found[key] = bank
    for update in updates:
        for name, key in (update.method.peft.banks if update.method.peft else {}).items():
            part = update.tensors[name]
            if not torch.equal(part, found[key][tuple(slice(n) for n in part.shape)]):
                raise AdapterFileError(f"{update.site.key}.{name} is no part of the one {key} PEFT has for all layers")
    return {f"{BANKS}{key}" if not key.startswith(BANKS) else key: t for key, t in found.items()}


def trained_to_peft(trained: Mapping[str, Tensor], adapted: set[str]) -> dict[str, Tensor]:
    """Return the base's own tensors under PEFT's keys; a layer that is adapted as well keeps them in `base_layer`."""
    keys: dict[str, Tensor] = {}
    for name, tensor in trained.items():
        path, _, leaf = name.rpartition(".")
        keys[f"{PREFIX}{path}.base_layer.{leaf}" if path in adapted else f"{PREFIX}{name}"] = tensor
    return keys


class Reading:
    """What the keys of a PEFT file say: an update's tensors by path, tensors trained whole by name, what is wrong."""

    def __init__(self, cls: type[Method], tensors: Mapping[str, Tensor]) -> None:
        assert cls.peft is not None
        self.form: PeftForm = cls.peft
        self.called = cls.__name__
        self.found: dict[str, dict[str, Tensor]] = {}
        self.embeddings: set[str] = set()
        self.banks: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}
        self.problems: list[str] = []
        ends = [(name, end, False) for name, end in self.form.keys.items()]
        ends += [(name, end, True) for name, end in self.form.embedding.items()]
        patterns = [(name, f".{end.partition('.')[0]}", _pattern(end), table) for name, end, table in ends]
        names, rest = {"default"}, {}
        for key, tensor in tensors.items():
            if bank := next(
                (n for n, end in self.form.banks.items() if re.fullmatch(rf"{BANKS}{end}(\.\w+)?", key)), ""
            ):
                self.banks[bank] = tensor
                continue
            if self.form.alone and key in self.form.keys.values():
                self.found[""] = {next(iter(self.form.keys)): tensor}
                continue
            if not key.startswith(PREFIX):
                self.problems.append(f"{key}: extra, not under {PREFIX}")
                continue
            hits = [(name, found, table) for name, stem, pattern, table in patterns
                    if stem in key and (found := pattern.fullmatch(key.removeprefix(PREFIX)))]  # fmt: skip
            if not hits:
                rest[key] = tensor
            elif ".base_layer" in f".{(path := hits[0][1]['path'])}":
                self.problems.append(f"{key}: extra, nested in base_layer (MultiheadAttention or target_parameters)")
            else:
                name, match, table = hits[0]
                names.add(match["adapter"] or "default")
                self.found.setdefault(path, {})[name] = tensor
                if table:
                    self.embeddings.add(path)
        for key, tensor in rest.items():
            self._whole(key, tensor, names)

    def _whole(self, key: str, tensor: Tensor, adapters: set[str]) -> None:
        """Take a tensor that is of no update: a module saved whole, or nothing that is known here."""
        name = key.removeprefix(PREFIX)
        marked = "|".join(map(re.escape, sorted(adapters)))
        name = re.sub(rf"\.modules_to_save(?:\.(?:{marked}))?\.", ".", name, count=1)
        if found := re.fullmatch(r"(.+)\.base_layer\.([^.]+)", name):
            name = f"{found[1]}.{found[2]}" if found[1] in self.found else name
        if re.search(_PARTS, name):
            self.problems.append(f"{key}: extra, not a tensor of a {self.called} adapter, shape {tuple(tensor.shape)}")
        else:
            self.trained[name] = tensor

    def update(self, path: str, method: Method) -> Update | None:
        """Return the update at `path`, or None with the reason added to `problems`."""
        own = self.found[path]
        needed = [name for name in self.form.keys if name not in self.form.optional]
        if missing := [name for name in needed if name not in own]:
            known = next(iter(own.values()))
            end = self.form.keys[missing[0]].removesuffix(".weight")
            self.problems.append(f"{path}.{end}: missing, its partner has shape {tuple(known.shape)}")
            return None
        if bare := [key for name, key in self.form.banks.items() if name not in self.banks]:
            self.problems.append(f"{BANKS}{bare[0]}: missing; save with save_projection=True")
            return None
        try:
            read = self.form.read(method, {**own, **self.banks}, path in self.embeddings)
        except SpecError as wrong:
            self.problems.append(f"{path}: {wrong}")
            return None
        return Update(read.site.at(path), read.method, read.tensors)


def _pattern(end: str) -> re.Pattern[str]:
    """Return the pattern of a key with this end: PEFT has put the adapter's name before `.weight`, or at the end."""
    stem, _, weight = end.partition(".")
    last = r"\.weight" if weight else r"(?:\.weight)?"
    return re.compile(rf"(?P<path>.+?)\.{stem}(?:\.(?!weight$)(?P<adapter>[^.]+))?{last}")
