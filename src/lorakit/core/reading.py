"""A model that reads more than its input: virtual positions go in before its first block and come off after its last.

The mixin stands in front of the stack of blocks (`model` of a Llama, `transformer` of a GPT-2, `bert` of a BERT), below
whatever head there is. What it gives back has the length of the input, so heads, losses, labels, pooling and `generate`
see the model they know; docs/adr/0004 has the reasons. A cache remembers what was put into it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.core.adapters import Adapted, Adapter
from lorakit.core.fronts import Front, base_class
from lorakit.core.layout import Layout, row_ends, row_starts
from lorakit.core.lazy import need
from lorakit.core.method import Context
from lorakit.core.site import Site
from lorakit.errors import AttachError, DataError

MARK = "_lorakit_read"


@dataclass(frozen=True, eq=False)
class Mark:
    """What a cache was filled with: the adapter's name, and where its virtual positions lie."""

    name: str | None = None
    layout: Layout = field(default_factory=lambda: Layout(0, 0))


@dataclass(eq=False)
class Overwrite:
    """What each block shall read at the virtual positions: `values (blocks, t, d)` at `slots (batch, columns)`."""

    values: Tensor
    slots: Tensor
    place: dict[nn.Module, int]
    seen: set[int] = field(default_factory=set)

    def put(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return `hidden (batch, columns, d)` with this block's vectors in their slots (-1 is none)."""
        index = self.place[block]
        self.seen.add(index)
        vectors = self.values[index].to(hidden.dtype)[self.slots.clamp(min=0)]
        return torch.where((self.slots >= 0)[..., None], vectors, hidden)

    def check(self, model: nn.Module, method: Context) -> None:
        """Raise `AttachError` unless every block was asked."""
        if silent := len(self.place) - len(self.seen):
            raise AttachError(
                f"{type(model).__name__} passes nothing on to {silent} of its {len(self.place)} blocks, so "
                f"{method.name} cannot act there; use prefix-embedding instead"
            )


class Overwritten(Front):
    """Mixin in front of a block: what it reads at some columns is replaced by what the call says."""

    outer, renames = True, False

    def forward(
        self, hidden_states: Tensor, *args: Any, lorakit_overwrite: Overwrite | None = None, **kwargs: Any
    ) -> Any:
        """Return the block's output for the overwritten input."""
        if lorakit_overwrite is not None:
            hidden_states = lorakit_overwrite.put(cast(nn.Module, self), hidden_states)
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


class Reading(Adapted):
    """Mixin in front of a stack of blocks: it reads virtual positions beside its input."""

    renames = False
    told_ends: Tensor | None = None
    """The `prompt_ends` of the next call, for heads that pass on no argument they do not know (inject/context.py)."""

    def forward(self, *args: Any, prompt_ends: Tensor | None = None, **kwargs: Any) -> Any:
        """Return the model's output at the columns of the input.

        `prompt_ends (batch,)` is the column where each row's prompt ends, for virtual positions after the prompt; by
        default the whole row is the prompt, as it is in `generate`.
        """
        names = _parameters(base_class(cast(nn.Module, self))) if args else ()
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        acting = [(name, adapter) for name, adapter in self.adapters.named() if name in self.adapters.weights]
        assert len(acting) < 2, "use() and attach() refuse two"
        name, adapter = acting[0] if acting else (None, None)
        past = given.get("past_key_values")
        length = 0 if past is None else int(past.get_seq_length())
        mark: Mark = getattr(past, MARK, Mark()) if length else Mark(name)
        if mark.name != name:
            raise AttachError(
                f"this cache was filled {_with(mark.name)}, and the model now reads {_with(name)}; start a new cache"
            )
        if adapter is None:
            return self._base(given)
        if length:
            return self._base(_going_on(given, mark.layout, self._causal()))
        return self._begin(given, str(name), adapter, self.told_ends if prompt_ends is None else prompt_ends)

    def _begin(self, given: dict[str, Any], name: str, adapter: Adapter, ends: Tensor | None) -> Any:
        """Put the virtual positions in, run the model, take them off."""
        model, method, causal = cast(Any, self), cast(Context, adapter.method), self._causal()
        tokens, n = _tokens(given), _tokens(given).shape[1]
        _check(model, method, given, n)
        # In training rows are padded on the right, and looking would hold up a device.
        starts = None if model.training else row_starts(given.get("attention_mask"))
        if method.where == "cache":
            _refuse_far(model, method, starts, n)
            starts = None
        layout = _layout(method, given, tokens, starts, ends,
                         must_say=causal and (model.training or not _caches(given, model)))  # fmt: skip
        table = model.get_input_embeddings().weight
        values: Tensor = adapter(self, table, table)
        if self.adapters.witness is not None:
            self.adapters.witness(adapter)
        as_dict = given.pop("return_dict", None)
        given.update(return_dict=True, **_moved(given, layout, n, causal, grown=method.where != "cache"))
        if method.where == "cache":
            _put_in_cache(given, model.config, values, adapter.site, causal)
        else:
            _put_in_row(given, model, values, layout)
        if (past := given.get("past_key_values")) is not None:
            setattr(past, MARK, Mark(name, layout))
        output = self._base(given)
        if (overwrite := given.get("lorakit_overwrite")) is not None:
            overwrite.check(model, method)
        if method.where != "cache":
            _cut(model, output, layout, causal)
        self._remember(given, output, Mark(name, layout))
        as_dict = getattr(model.config, "return_dict", True) if as_dict is None else as_dict
        return output if as_dict else output.to_tuple()

    def _base(self, given: dict[str, Any]) -> Any:
        """Return what the model itself makes of the arguments, past the forward that adds terms to a tensor."""
        return super(Adapted, self).forward(**given)  # type: ignore[misc]

    def _remember(self, given: dict[str, Any], output: Any, mark: Mark) -> None:
        """Mark the cache that comes back, or take away one that nobody asked for."""
        kept = getattr(output, "past_key_values", None)
        if kept is not None and _caches(given, self):
            setattr(kept, MARK, mark)
        elif kept is not None:
            output.past_key_values = None

    def _causal(self) -> bool:
        """Return whether a position sees only those before it."""
        modules = cast(nn.Module, self).modules()
        return bool(next((m.is_causal for m in modules if hasattr(m, "is_causal")), True))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the stack of blocks of a transformer: the list that is as long as its configuration says."""
    config: Any = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return list(next(lists, nn.ModuleList()))


def room_of(model: Any) -> int | None:
    """Return how many positions a reader has, or None where it has as many as it is given.

    RoBERTa's table begins with rows that no token gets: those up to that of the padding.
    """
    room: int | None = getattr(model.config, "max_position_embeddings", None)
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if isinstance(table, nn.Embedding) and table.padding_idx is not None:
        return table.num_embeddings - table.padding_idx - 1
    return room


def fronts_of(model: nn.Module) -> list[tuple[nn.Module, type[Front]]]:
    """Return what goes in front of a model and of its blocks."""
    return [(model, Reading), *((block, Overwritten) for block in blocks_of(model))]


def _check(model: Any, method: Context, given: dict[str, Any], n: int) -> None:
    """Refuse an input the virtual positions have no place in."""
    taken, room = sum(method.lengths()), room_of(model)
    if room is not None and n + taken > room:
        raise DataError(
            f"a row of {n} tokens and the {taken} virtual positions of {method.name} exceed the model's {room} "
            f"positions; shorten rows to {max(room - taken, 0)} tokens"
        )
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    _check_mask(given)
    if mask is None and positions is not None and bool((positions[:, 1:] <= positions[:, :-1]).any()):
        raise DataError(
            f"this row packs several examples, and {method.name} puts its virtual positions at the start of a row, "
            "where only the first example would see them; set data.packing: never"
        )
    checkpointed = model.training and any(getattr(block, "gradient_checkpointing", False) for block in blocks_of(model))
    if method.where == "cache" and checkpointed:
        raise AttachError(
            f"{method.name} acts through the cache, which gradient checkpointing switches off; set "
            "train.checkpointing: false (model.activation_checkpointing_disable()), or use prefix-layer"
        )


def _check_mask(given: dict[str, Any]) -> None:
    mask, past = given.get("attention_mask"), given.get("past_key_values")
    if getattr(past, "is_compileable", False) or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
        raise AttachError(
            "virtual positions need an attention mask of shape (batch, length) and a cache that grows; "
            "generate without cache_implementation"
        )


def _going_on(given: dict[str, Any], layout: Layout, causal: bool) -> dict[str, Any]:
    """Return the arguments of a step that finds the virtual positions in its cache."""
    tokens = _tokens(given)
    _check_mask(given)
    if layout.after and tokens.shape[1] > 1:
        raise AttachError(
            f"{tokens.shape[1]} tokens follow the virtual positions that end the prompt; give the whole prompt at "
            "once, without prefill_chunk_size and without an assistant model"
        )
    return given | _moved(given, layout, tokens.shape[1], causal, grown=False)


def _moved(given: dict[str, Any], layout: Layout, n: int, causal: bool, *, grown: bool) -> dict[str, Any]:
    """Return mask, positions and token types moved by the virtual positions; what is absent is the model's own choice.

    `grown` says whether this call's row holds the virtual positions; else its cache does.
    """
    moved: dict[str, Any] = {}
    mask, positions, types = (given.get(key) for key in ("attention_mask", "position_ids", "token_type_ids"))
    if mask is not None:
        moved["attention_mask"] = layout.mask(mask)
        if positions is None and causal:  # padding on the left has no position
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -n:]
    if positions is not None:
        moved["position_ids"] = layout.positions(positions) if grown else positions + layout.total
    if types is not None and grown:
        moved["token_type_ids"] = layout.spread(types.new_zeros(len(types), layout.total), types)
    return moved


def window_of(config: Any) -> int | None:
    """Return how many columns back attention reaches at most in some block, or None where it reaches all."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((w for w in found if isinstance(w, int) and w > 0), default=None)


def counts_columns(config: Any, columns: int) -> bool:
    """Return whether attention over so many columns depends on how many lie between two tokens, padding included."""
    window = window_of(config)
    return config.get_text_config().model_type == "mpt" or (window is not None and window < columns)


def _refuse_far(model: Any, method: Context, starts: Tensor | None, n: int) -> None:
    """Refuse padding between a cache's virtual positions and a row's first token, where columns are counted."""
    if starts is not None and counts_columns(model.config, n + sum(method.lengths())):
        raise DataError(
            f"{method.name} stands in front of a row's padding on the left, and {type(model).__name__} attends by "
            "columns, which would count the padding; give rows of one length, or use prompt-tuning"
        )


def _layout(
    method: Context, given: dict[str, Any], tokens: Tensor, starts: Tensor | None, ends: Tensor | None, *,
    must_say: bool,
) -> Layout:  # fmt: skip
    """Return where the virtual positions of a method stand in these rows."""
    before, after = method.lengths()
    if not after:
        return Layout(before, after, starts=starts)
    if ends is None and must_say:
        raise DataError(
            f"{method.name} has {after} virtual positions after the prompt; say where each row's prompt ends: "
            "model(..., prompt_ends=...), a (batch,) tensor of columns (where the head does not pass it on: with "
            "lorakit.inject.context.telling_ends(model, ends))"
        )
    ends = row_ends(given.get("attention_mask"), tokens) if ends is None else ends.to(tokens.device)
    if ends.shape != tokens.shape[:1]:
        raise DataError(f"prompt_ends has shape {tuple(ends.shape)}, expected one column a row: ({len(tokens)},)")
    return Layout(before, after, ends, starts)


def _put_in_row(given: dict[str, Any], model: nn.Module, values: Tensor, layout: Layout) -> None:
    """Lengthen the row of embeddings; vectors of their own for each block go along with the call."""
    reader: Any = model
    ids, embeds = given.pop("input_ids", None), given.get("inputs_embeds")
    embeds = reader.get_input_embeddings()(ids) if embeds is None else embeds
    batch, n = embeds.shape[:2]
    at_input = values if values.dim() == 2 else values.new_zeros(values.shape[1:])
    given["inputs_embeds"] = layout.spread(at_input.to(embeds.dtype).expand(batch, -1, -1), embeds)
    if values.dim() == 3:
        slots = torch.arange(layout.total, device=embeds.device).expand(batch, -1)
        slots = layout.spread(slots, slots.new_full((batch, n), -1))
        given["lorakit_overwrite"] = Overwrite(values, slots, {block: i for i, block in enumerate(blocks_of(model))})


def _put_in_cache(given: dict[str, Any], config: Any, prefix: Tensor, site: Site, causal: bool) -> None:
    """Fill the cache (a new one if there is none) with `prefix (t, blocks * 2 * heads * width)` for each row."""
    batch, n = _tokens(given).shape[:2]
    past = given.get("past_key_values")
    past = need("transformers", "train").DynamicCache(config=config) if past is None else past
    by_block = prefix.view(len(prefix), site.in_, 2, *site.kernel).permute(1, 2, 3, 0, 4)
    for index, pair in enumerate(by_block):
        keys, values = (part.expand(batch, -1, -1, -1) for part in pair)  # (batch, heads, t, width)
        past.update(keys, values, index)
    given["past_key_values"] = past
    if given.get("attention_mask") is None and not causal:  # an encoder reads the number of keys off the mask
        given["attention_mask"] = torch.ones(batch, n + len(prefix), dtype=torch.long, device=prefix.device)


def _cut(model: Any, output: Any, layout: Layout, causal: bool) -> None:
    """Give the output the columns of the input; what the model pooled is pooled again, from the row's first token."""
    output.last_hidden_state = layout.cut(output.last_hidden_state, causal)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(h if h is None else layout.cut(h, causal) for h in output.hidden_states)
    if getattr(output, "pooler_output", None) is not None:
        output.pooler_output = model.pooler(output.last_hidden_state)


def _tokens(given: dict[str, Any]) -> Tensor:
    """Return the token ids `(batch, n)`, or the embeddings `(batch, n, d)` given in their place."""
    tokens: Tensor = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
    return tokens


def _caches(given: dict[str, Any], model: Any) -> bool:
    """Return whether this call shall give back a cache."""
    asked = given.get("use_cache")
    return bool(getattr(model.config, "use_cache", True) if asked is None else asked)


def _with(name: str | None) -> str:
    return "without virtual positions" if name is None else f"with those of adapter {name!r}"


def _parameters(cls: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of the arguments of a model's forward, in order."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]
