"""Build any Hugging Face model without its weights, on the meta device, where a 175B shape costs no memory.

A configuration is read as strictly as a plan needs it: transformers fills what a file leaves out with the sizes of the
family's first model, and a plan of those would be a plan of another model. So a size that is missing, or no number, is
an error that names the file and the key.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.core.jsontext import JsonFault, parse_json
from lorakit.core.lazy import need
from lorakit.errors import LorakitError, SpecError, did_you_mean, few, listing, looked_in, shown

CONFIG = "config.json"
SIZES = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size d_ff "
    "ffn_dim encoder_layers decoder_layers encoder_attention_heads decoder_attention_heads encoder_ffn_dim "
    "decoder_ffn_dim num_local_experts num_experts moe_intermediate_size max_position_embeddings type_vocab_size "
    "image_size patch_size num_channels num_mel_bins max_source_positions max_target_positions"
).split()
"""Fields that decide the shape of a weight. A family asks for those it has, by its own names (`n_embd`), and has a
number of its own for; one whose number is None follows from others and may be left out."""
_POSITIONS, _ROTARY = "max_position_embeddings", "rope_parameters"  # rotary families have no table of positions

_TASKS = {
    "causal-lm": ("AutoModelForCausalLM",),
    "classification": (
        "AutoModelForSequenceClassification",
        "AutoModelForImageClassification",
        "AutoModelForAudioClassification",
    ),
}
_USUAL = (
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForImageClassification",
    "AutoModelForCTC",
    "AutoModel",
)
"""What a family's model is for, first come, first served: encoders can be made causal, and are not meant to be."""
_ONE_STACK, _TWO_STACKS, _READERS = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM"


def on_meta(config: Any, task: str | None = None) -> nn.Module:
    """Return the model of a Hugging Face configuration on the meta device, in fp32, ready for `sites` and `attach`.

    Args:
        config: a transformers configuration, as `config_of` returns it.
        task: `classification` is a model with such a head, `causal-lm` one that continues text, where the family is
            no encoder with a decoder and has one; None, and what is left, is the class that `architectures` names, or
            else what the family is usually for.

    Raises:
        SpecError: a task or a family that transformers has no model for, sizes that do not fit each other.
    """
    transformers = need("transformers", "train")
    build = _builder(transformers, config, task)
    try:
        with _silent(transformers), torch.device("meta"):
            model: nn.Module = build(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:
        name = getattr(config, "_name_or_path", "") or "the configuration"
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise SpecError(
            f"{name}: no {config.model_type} can be built of these sizes ({reason}); mend the field it names, or get "
            f"{CONFIG} again from where the model came from"
        ) from error
    model.train(False)
    return model


def config_of(place_or_mapping: str | Path | Mapping[str, Any]) -> Any:
    """Return the transformers configuration of a directory with `config.json`, of such a file, or of its fields.

    Nothing else is read: no weight, no code that a repository brings along, no hub.

    Raises:
        LorakitError: nothing there, or a directory that holds no `config.json`.
        SpecError: broken JSON; a `model_type` that is missing or that this transformers does not know; sizes that are
            missing or no numbers, all of them at once.
    """
    if isinstance(place_or_mapping, Mapping):
        place, fields = "the configuration", copy.deepcopy(dict(place_or_mapping))
    else:
        file = _file(Path(place_or_mapping).expanduser())
        place, fields = str(file), _fields(file)
        fields["_name_or_path"] = str(place_or_mapping)
    transformers = need("transformers", "train")
    cls = _config_class(transformers, place, fields)
    if problems := list(_wrong_sizes(cls, fields)):
        raise SpecError(
            f"{place} does not give the sizes of a {fields['model_type']}; correct it, or get it again from where the "
            f"model came from:\n{listing(problems)}"
        )
    try:
        with _silent(transformers):
            return cls.from_dict(fields)
    except Exception as error:  # transformers' checks raise what they like
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise SpecError(
            f"{place} is no configuration of a {fields['model_type']} ({reason}); mend that field"
        ) from error


def size_of(config: Any, name: str) -> int | None:
    """Return a size by transformers' name for it, of the part that reads text where there are several; None without."""
    try:
        text = config.get_text_config()
    except (AttributeError, ValueError):  # no configuration of transformers, or one with several parts that read text
        text = config
    for one in (text, config):
        value: Any = getattr(one, name, None)
        if _is_number(value):
            return int(value)
    return None


def head_width(config: Any) -> int | None:
    """Return the values of one attention head, or None where a configuration does not tell."""
    hidden, heads = size_of(config, "hidden_size"), size_of(config, "num_attention_heads")
    return size_of(config, "head_dim") or (hidden // heads if hidden and heads else None)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of a bare base by every name it has: a tied one has two."""
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def ties_of(model: nn.Module) -> dict[str, str]:
    """Return, for each further name of a tied parameter, its first: `lm_head.weight` -> `transformer.wte.weight`."""
    first: dict[int, str] = {}
    named = [(name, first.setdefault(id(p), name)) for name, p in model.named_parameters(remove_duplicate=False)]
    return {name: own for name, own in named if name != own}


def _builder(transformers: Any, config: Any, task: str | None) -> Any:
    """Return what makes the model: the class's own `_from_config`, or an Auto class's `from_config`."""
    if task is not None and task not in _TASKS:
        raise SpecError(f"unknown task {task!r}{did_you_mean(task, _TASKS)}; one of {', '.join(_TASKS)}")
    for name in _TASKS.get(task or "", ()):
        if _fits(transformers, name, config):
            return getattr(transformers, name).from_config
    if task == "classification":
        raise SpecError(f"transformers has no classifier of model type {config.model_type!r}; use task causal-lm")
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and getattr(cls, "config_class", None) is type(config):
            return cls._from_config  # type: ignore[attr-defined]
    for name in _USUAL:
        if _fits(transformers, name, config):
            return getattr(transformers, name).from_config
    raise SpecError(f"transformers {transformers.__version__} has no model of type {config.model_type!r}; upgrade it")


def _fits(transformers: Any, auto: str, config: Any) -> bool:
    """Return whether an Auto class has a model of this configuration, and is what the configuration says it is."""
    both, decoder = getattr(config, "is_encoder_decoder", False), getattr(config, "is_decoder", False)
    if auto == (_ONE_STACK if both else _TWO_STACKS) or (auto == _READERS and decoder):
        return False
    return type(config) in getattr(transformers, auto)._model_mapping


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Keep transformers from remarks on token ids and decoders, which say nothing of a shape."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _file(place: Path) -> Path:
    """Return the configuration file a path means."""
    if not place.exists():
        raise LorakitError(f"there is no {place}{looked_in(place)}")
    if not place.is_dir():
        return place
    if not (place / CONFIG).is_file():
        found = sorted(p.name for p in place.iterdir())
        holds = few(found, 6)
        adapter = "; it is an adapter: give the model it was trained on" if "adapter_config.json" in found else ""
        raise LorakitError(f"{place} has no {CONFIG}, it {f'holds {holds}' if found else 'is empty'}{adapter}")
    return place / CONFIG


def _fields(file: Path) -> dict[str, Any]:
    """Return the JSON object in a configuration file."""
    try:
        data = file.read_bytes()
    except OSError as failed:
        raise LorakitError(f"{file} could not be read: {failed.strerror or failed}") from failed
    try:
        fields = parse_json(data)
    except JsonFault as bad:
        how = f"is truncated or not JSON: {bad}" if data.strip() else "is empty"
        raise SpecError(f"{file} {how}; correct it there, or get the file again") from bad
    if not isinstance(fields, dict):
        raise SpecError(f"{file} holds a JSON {type(fields).__name__}, expected an object of a model's sizes")
    return fields


def _config_class(transformers: Any, place: str, fields: Mapping[str, Any]) -> Any:
    """Return the configuration class of a `model_type`, or raise `SpecError` with what the field should say."""
    known, kind = transformers.CONFIG_MAPPING, fields.get("model_type")
    if kind in (None, ""):
        named = next((c for n in _architectures(fields) if (c := getattr(transformers, n, None)) is not None), None)
        own = getattr(getattr(named, "config_class", None), "model_type", None)
        hint = f'its architectures say "model_type": "{own}"' if own else 'add it, for example "model_type": "llama"'
        if "peft_type" in fields:
            hint = "it is an adapter's: give the config.json of the model it was trained on"
        raise SpecError(f"{place} has no model_type, so nobody knows which family it is; {hint}")
    if not isinstance(kind, str) or kind not in known:
        near = did_you_mean(kind, known.keys()) if isinstance(kind, str) else ""
        code = "; the code its auto_map names is not run here" if "auto_map" in fields else ""
        raise SpecError(
            f"{place}: model_type {shown(kind)} is none that transformers {transformers.__version__} knows{near}{code}"
            "; correct it, upgrade transformers, or plan with the nearest family of the same sizes"
        )
    return known[kind]


def _architectures(fields: Mapping[str, Any]) -> list[str]:
    names = fields.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _wrong_sizes(cls: Any, fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with each size, as `key: what`; a configuration inside this one is not looked at."""
    for key in dict.fromkeys(cls.attribute_map.get(size, size) for size in SIZES):
        default = getattr(cls, key, None)
        names = (key, *(alias for alias, own in cls.attribute_map.items() if own == key))
        name = next((name for name in names if name in fields), None)
        if name is None:
            if _is_number(default) and not (key == _POSITIONS and hasattr(cls, _ROTARY)):
                near = did_you_mean(key, fields.keys() - set(dir(cls)))
                yield f'{key}: missing{near}; write "{key}": {default} if it is of that size'
        elif not _is_number(value := fields[name]):
            if not (isinstance(value, list | dict) or (value is None and default is None)):
                yield f"{name}: {shown(value)} is no whole number"
        elif value < 1 and value != default:
            yield f"{name}: {shown(value)} is less than 1"


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
