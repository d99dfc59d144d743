"""The recipe: one YAML file for every verb, typed, versioned, with no silent key.

`1e-4` is a number, an unknown key is an error that names the near ones, and a run's folder keeps the whole recipe, so a
resumed run can refuse a change nobody announced.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lorakit.core.layerwise import PROFILES
from lorakit.core.method import Method
from lorakit.core.registry import methods
from lorakit.core.spec import AdapterSpec, Override, Targets, fields_of, method_from_json
from lorakit.core.targets import parse_layers
from lorakit.errors import RecipeError, SpecError, did_you_mean, listing, looked_in, shown
from lorakit.training.explain import explain
from lorakit.training.yamltext import parse_yaml

VERSION = 1
MANY = 10**9
"""No count in a recipe is larger: a billion steps of a millisecond take eleven days."""
SEEDS = 2**32 - 1
"""The largest seed that every generator of random numbers takes; numpy's is the narrowest."""


class Section(BaseModel):
    """A part of the recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class DataSection(Section):
    """What to train on, and which of its tokens carry the loss."""

    train: str | None = None
    train_split: str | None = None
    validation: str | None = None
    validation_split: str | None = None
    format: Literal["auto", "text", "prompt+completion", "messages", "alpaca", "sharegpt", "classification"] = "auto"
    loss: Literal["completions", "all"] = "completions"
    max_length: int = Field(default=1024, ge=2, le=MANY)
    overlong: Literal["auto", "drop", "cut", "split", "error"] = "auto"
    packing: Literal["auto", "always", "never"] = "auto"
    share_prompts: Literal["auto", "always", "never"] = "auto"
    separator: str | None = None
    labels: tuple[str, ...] = ()


class QuantSection(Section):
    """How the base's linear layers are packed into 4 bits."""

    kind: Literal["nf4", "fp4"] = "nf4"
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    double_quant: bool = True
    principal: int = Field(default=0, ge=0, le=MANY)


class OverrideSection(Section):
    """Other method fields for some of the targets."""

    targets: str | tuple[str, ...] = "*"
    layers: str | int | tuple[int | str, ...] | None = None
    fields: dict[str, Any]


_BASELINES = {"full": "'*'", "bitfit": "biases", "norms": "norms", "heads": "heads"}
"""What people call training a part of the base, and the value of `train` that means it."""


def _blamed(error: SpecError, fields: dict[str, Any]) -> tuple[str, str]:
    """Return the field an error of a method is about (else `method`), and the rest of its words."""
    text = str(error)
    if unknown := [key for key in fields if f"has no field {key!r}" in text]:
        return unknown[0], text
    word, _, rest = text.partition(" ")
    if word in fields:
        return word, rest
    said = {key: value.get("name") if isinstance(value, dict) else value for key, value in fields.items()}
    return next((key for key, value in said.items() if isinstance(value, str) and repr(value) in text), "method"), text


def _words(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _layers(value: str | int | tuple[int | str, ...] | None) -> str | None:
    """Return layers as the target language writes them: `[0, 3, "8-11"]` -> `0,3,8-11`."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else None if value is None else str(value)


class AdapterSection(BaseModel):
    """The method with its own fields, and where it goes; keys the section does not know are the method's."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str = "lora"
    targets: str | tuple[str, ...] = "all-linear"
    exclude: str | tuple[str, ...] = ()
    layers: str | int | tuple[int | str, ...] | None = None
    train: str | tuple[str, ...] = ()
    dropout: float = Field(default=0.0, ge=0, lt=1)
    overrides: tuple[OverrideSection, ...] = ()
    layerwise: Literal["low", "middle", "high"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _starts_from_what_the_method_s_authors_chose(cls, given: Any) -> Any:
        """Write the method's own targets and what it trains beside itself where the recipe names none."""
        name = given.get("method") if isinstance(given, dict) else None
        method = methods().get(name) if isinstance(name, str) else None
        return given if method is None else {"targets": method.targets, "train": method.train, **given}

    @model_validator(mode="after")
    def _makes_sense_without_a_model(self) -> AdapterSection:
        if problems := self._problems():
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> list[str]:
        """Return `key: what` for everything that no base could make right."""
        fields = [{**(self.__pydantic_extra__ or {})}, *(override.fields for override in self.overrides)]
        if huge := [f"{key}: expected at most {MANY}, given {shown(value)}" for each in fields
                    for key, value in each.items() if isinstance(value, int) and abs(value) > MANY]:  # fmt: skip
            return huge
        found, extra, method = [], fields[0], None
        while True:
            section = self.model_copy()
            object.__setattr__(section, "__pydantic_extra__", extra)
            try:
                method = section.build_method()
                break
            except SpecError as error:
                key, what = _blamed(error, extra)
                found.append(f"{key}: {what}")
                if extra.pop(key, None) is None:
                    return found
        for place, override in enumerate(self.overrides):
            try:
                changed = Override(Targets(_words(override.targets)), tuple(sorted(override.fields.items())))
                AdapterSpec(method, train=("*",), overrides=(changed,))
            except SpecError as error:
                told = str(error).removeprefix(f"override of {'/'.join(_words(override.targets))}: ")
                found.append(f"overrides[{place}]: {told}")
        try:
            Targets(_words(self.targets), _words(self.exclude))
        except SpecError as error:
            found.append(f"targets: {str(error).removeprefix('targets ')}")
        for text in filter(None, (_layers(self.layers), *(_layers(override.layers) for override in self.overrides))):
            try:
                parse_layers(text, 10_000)
            except ValueError as error:
                if "lies outside this model" not in str(error):
                    found.append(f"layers: {str(error).removeprefix('layers ')}")
        return found

    def build_method(self) -> Method | None:
        """Return the method with its fields (`none` is none), or raise `SpecError` naming a field it has not."""
        extra = dict(self.__pydantic_extra__ or {})
        if self.method == "none":
            if extra:
                raise SpecError(f"method none has no field {next(iter(extra))!r}: only what `train` names is trained")
            return None
        if self.method in _BASELINES:
            raise SpecError(f"method {self.method!r} is written method: none, train: {_BASELINES[self.method]}")
        known = fields_of(methods()[self.method]) if extra and self.method in methods() else {}
        if written := [name for name in extra if name in known and known[name].metadata.get("written")]:
            raise SpecError(f"{written[0]} is what a run writes into its adapter; leave it out")
        try:
            return method_from_json({"name": self.method, **extra})
        except SpecError as error:
            own = [name for name in type(self).model_fields if name != "method"]
            unhinted = "has no field" in str(error) and "did you mean" not in str(error)
            hints = [did_you_mean(key, own) for key in extra if unhinted]
            raise SpecError(f"{error}{next((h for h in hints if h), '')}") from None

    def spec(self, *, seed: int, heads: tuple[str, ...] = (), depth: int | None = None) -> AdapterSpec:
        """Return the adapter spec; `heads` are trained whole as well, `depth` scales the layer-wise preset."""
        method = self.build_method()
        overrides = [
            Override(Targets(_words(o.targets), (), _layers(o.layers)), tuple(sorted(o.fields.items())))
            for o in self.overrides
        ]
        if self.layerwise is not None:
            if method is None:
                raise SpecError("the layer-wise preset sets ranks, and method none has none; remove `layerwise`")
            assert depth is not None
            overrides = [*PROFILES[self.layerwise].overrides(method, depth), *overrides]
        train = tuple(dict.fromkeys((*_words(self.train), *heads)))
        targets = Targets(_words(self.targets), _words(self.exclude), _layers(self.layers))
        return AdapterSpec(method, targets, train, self.dropout, tuple(overrides), seed)


class TrainSection(Section):
    """How long and how fast; every default is a measured or published one (docs/recipe.md)."""

    epochs: float = Field(default=1.0, gt=0, le=1e6, allow_inf_nan=False)
    steps: int | None = Field(default=None, ge=1, le=MANY)
    lr: float | Literal["auto"] = "auto"
    up_ratio: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, lt=1, allow_inf_nan=False)
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    batch_tokens: int | None = Field(default=None, ge=1, le=MANY)
    batch_size: int | None = Field(default=None, ge=1, le=MANY)
    accumulation: int = Field(default=1, ge=1, le=MANY)
    group_by_length: bool | Literal["auto"] = "auto"
    evaluate_every: int | None = Field(default=None, ge=1, le=MANY)
    save_every: int | None = Field(default=None, ge=1, le=MANY)
    keep: int = Field(default=2, ge=1, le=MANY)
    patience: int | None = Field(default=None, ge=1, le=MANY)
    checkpointing: bool | Annotated[float, Field(gt=0, le=MANY)] = False
    compile: bool = False
    offload_activations: bool = False
    fused: bool = True
    cache_frozen: bool = False
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    parallel: Literal["ddp", "fsdp", "hybrid"] = "ddp"
    seed: int = Field(default=0, ge=0, le=SEEDS)
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @field_validator("lr")
    @classmethod
    def _is_a_rate(cls, lr: float | str) -> float | str:
        """Field(gt=0) would complain twice: of the number, and that it is not the word `auto`."""
        if isinstance(lr, float) and not 0 < lr < math.inf:
            raise ValueError("must be a finite number above 0, or auto")
        return lr

    @field_validator("checkpointing")
    @classmethod
    def _is_a_share_or_a_number_of_blocks(cls, some: bool | float) -> bool | float:
        if some > 1 and some != int(some):
            raise ValueError("must be true, false, a share of the blocks below 1, or a whole number of them")
        return some

    @model_validator(mode="after")
    def _compiled_blocks_keep_their_activations(self) -> TrainSection:
        if self.compile and self.offload_activations:
            raise ValueError("compile: what compiled blocks keep cannot be moved; set compile or offload_activations")
        if self.compile and self.cache_frozen:
            raise ValueError("compile: compiled blocks cannot be left out of a forward; set compile or cache_frozen")
        return self

    @model_validator(mode="after")
    def _one_unit_of_batch(self) -> TrainSection:
        if self.batch_tokens is not None and self.batch_size is not None:
            raise ValueError("give batch_tokens or batch_size, not both")
        return self


class Recipe(Section):
    """A whole run, from the base to the output folder."""

    version: Literal[1] = 1
    model: str = "lorakit/tales"
    task: Literal["auto", "causal-lm", "classification"] = "auto"
    data: DataSection = DataSection()
    adapter: AdapterSection = AdapterSection()
    train: TrainSection = TrainSection()
    quant: QuantSection | None = None
    output: str = "runs/first"

    @field_validator("quant", mode="before")
    @classmethod
    def _a_kind_is_enough(cls, given: Any) -> Any:
        return None if given == "none" else {"kind": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _patience_has_something_to_wait_for(self) -> Recipe:
        if self.train.patience is not None and self.data.train is not None and self.data.validation is None:
            raise ValueError(
                "train.patience counts evaluations, and there are none: name data.validation, or leave it out"
            )
        return self

    @field_validator("output")
    @classmethod
    def _names_a_folder(cls, output: str) -> str:
        if not output.strip():
            raise ValueError("must name a folder, such as runs/first")
        return output

    def differences(self, other: Recipe) -> list[str]:
        """Return `train.lr: 0.0001 -> 0.001` for every value `other` changes."""
        mine, theirs = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        keys = sorted(mine.keys() | theirs.keys())
        return [f"{k}: {mine.get(k)!r} -> {theirs.get(k)!r}" for k in keys if mine.get(k) != theirs.get(k)]

    def to_yaml(self) -> str:
        """Return the recipe with every key written out; `load_recipe` reads it back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, changes: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe file, with dotted `changes` (`train.lr=1e-3`) on top.

    Raises:
        RecipeError: no such file, not YAML, or values that do not fit, all of them with their keys.
    """
    file = Path(path)
    raw = _read(file)
    if not isinstance(raw, dict | None):
        raise RecipeError(f"{file} must hold keys such as `model:` and `data:`, not a {type(raw).__name__}")
    return make_recipe(changed(raw or {}, changes or {}), str(file), changes or {})


def make_recipe(values: dict[str, Any], source: str = "the recipe", changes: Collection[str] = ()) -> Recipe:
    """Return the recipe of plain values, or raise `RecipeError` listing everything wrong with them.

    `changes` are the keys among them that were set on the command line, which the error says.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = explain(error, values, _SECTIONS, changes)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RecipeError(f"{source} has {count}:\n{listing(problems)}") from None


def scalar(text: str) -> Any:
    """Return the value a `key=value` flag of the command line means, by the recipe's own YAML."""
    return text if text == "*" else parse_yaml(text)  # to YAML a star begins an alias


def _read(file: Path) -> Any:
    """Return the YAML in a file, with the file's name on every fault."""
    try:
        return parse_yaml(file.read_bytes().decode("utf-8-sig"))
    except RecipeError as error:
        raise RecipeError(f"{file} {error}") from None
    except OSError as error:
        beside = [p.name for p in file.parent.glob("*.y*ml")] if isinstance(error, FileNotFoundError) else []
        near = did_you_mean(file.name, beside)
        raise RecipeError(f"cannot read the recipe {file}: {error.strerror}{near}{looked_in(file)}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecipeError(f"{file} line {line}: not UTF-8 text; convert the file to UTF-8") from None


def changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's plain values with dotted changes on top."""
    result = {k: dict(v) if isinstance(v, dict) else v for k, v in raw.items() if v is not None}
    if isinstance(kind := result.get("quant"), str) and any(key.startswith("quant.") for key in changes):
        result["quant"] = {"kind": kind}  # the short form of the section
    for key, value in changes.items():
        section, _, rest = key.partition(".")
        if not rest:
            result[section] = value
        elif isinstance(inner := result.setdefault(section, {}), dict):
            inner[rest] = value
        else:
            raise RecipeError(f"cannot set {key}: {section} is {inner!r}, not a section")
    return result


_SECTIONS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "data": DataSection,
    "adapter": AdapterSection,
    "train": TrainSection,
}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}
