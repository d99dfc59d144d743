"""Prompt tuning: trained vectors in front of the input's embeddings, and nothing else.

`[P; E(x)]` with `prompt (tokens, d)` = P_e of arXiv 2104.08691, section 2. The vectors are read in the place of the
first tokens, so they take their positions and what the model adds to every embedding. They start as embeddings of
tokens (the paper's better start), normal with the vocabulary's own mean and deviation, or as a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from lorakit.context.start import FILLS, check_choice, fill_from_ids
from lorakit.core.checks import check_whole
from lorakit.core.method import Call, Context, Start, Tensors
from lorakit.core.peft_form import PeftForm, prompt_embeddings
from lorakit.core.site import Decl, Role, Site
from lorakit.errors import SpecError


@dataclass(frozen=True)
class PromptTuning(Context):
    """Put `tokens` trained vectors in front of the input's embeddings.

    `text` is where they start, its `ids` repeated or cut to `tokens`; without one they start by `start`.
    """

    tokens: int = 16
    start: Literal["vocabulary", "normal"] = "vocabulary"
    text: str = ""
    ids: tuple[int, ...] = ()

    name: ClassVar[str] = "prompt-tuning"
    paper: ClassVar[str] = "arXiv 2104.08691"
    formula: ClassVar[str] = "read [P; E(x)], P (tokens, d)"
    count: ClassVar[str] = "tokens * m"
    where: ClassVar[Literal["input", "blocks", "cache"]] = "input"
    peft: ClassVar[PeftForm | None] = prompt_embeddings(
        "PROMPT_TUNING", "prompt", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
        "tokenizer_kwargs",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_whole("tokens", self.tokens)
        check_choice("start", self.start, FILLS)
        if not isinstance(self.text, str):
            raise SpecError(f"text must be words, not {self.text!r}")
        for one in self.ids:
            check_whole("ids", one, 0, hint="; it is the id of a token")
        if (self.text or self.ids) and self.start != "vocabulary":
            raise SpecError(f"a prompt starts from its text or by start: {self.start}; leave one out")

    def lengths(self) -> tuple[int, int]:
        """Return `(tokens, 0)`."""
        return self.tokens, 0

    def check(self, site: Site) -> None:
        """Raise `SpecError` for a text whose token ids nobody has written down."""
        super().check(site)
        if self.text and not self.ids:
            raise SpecError(
                f"{self.name} starts from a text, and a model has no tokenizer: attach method.tokenized(encode), "
                "where encode turns a text into token ids, or give the ids"
            )

    def tensors(self, site: Site) -> dict[str, Decl]:
        """Declare tokens * d parameters."""
        return {"prompt": Decl((self.tokens, site.out), Role.TOKEN)}

    def tokenized(self, encode: Callable[[str], Sequence[int]]) -> PromptTuning:
        """Return this method with the token ids of its text in `ids`; without a text, as it is."""
        if not self.text or self.ids:
            return self
        if not (ids := tuple(encode(self.text))):
            raise SpecError(f"the text {self.text!r} has no token to start from")
        return replace(self, ids=ids)

    def init(self, p: Tensors, start: Start) -> None:
        """Start from the text's embeddings, or as `start` says; the first forward is not the base's."""
        if self.ids:
            fill_from_ids(p["prompt"], self.ids, start)
        else:
            FILLS[self.start](p["prompt"], start)

    def branch(self, p: Tensors, call: Call) -> Tensor:
        """Return P."""
        return p["prompt"]
