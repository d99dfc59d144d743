"""Serve token batches: shuffled blocks of the tales beside rows of freshly drawn exercises.

Every draw is a function of the seed and the step, so two runs with one seed see the same batches.
"""

import re
from collections import Counter
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .exercises import Exercise, Exercises


@dataclass(frozen=True)
class Encoded:
    """Token ids of one exercise with its EOS; `trained` marks the completion, `copied` the values from the prompt."""

    ids: list[int]
    trained: list[bool]
    copied: list[bool]


def encode(tokenizer: PreTrainedTokenizerBase, exercise: Exercise) -> Encoded:
    """Tokenize prompt and completion as one text, and mark tokens by their character offsets."""
    text = exercise.prompt + exercise.completion
    owner = np.zeros(len(text), dtype=np.int8)
    at = len(exercise.prompt)
    for piece, copied in exercise.pieces:
        owner[at : at + len(piece)] = 2 if copied else 1
        at += len(piece)
    batch = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    marks = [int(owner[start:end].max(initial=0)) for start, end in batch["offset_mapping"]]
    eos = tokenizer.eos_token_id
    return Encoded([*batch["input_ids"], eos], [m > 0 for m in marks] + [True], [m == 2 for m in marks] + [False])


def make_exercises(documents: list[str]) -> Exercises:
    """Take common words, sentences and passages with a recurring name from the training documents."""
    text = "\n".join(documents)
    counts = Counter(re.findall(r"(?<![A-Za-z'])[a-z]{3,10}(?![A-Za-z'])", text))
    words = sorted(word for word, count in counts.items() if count >= 12)
    sentences = [s for s in re.findall(r"[A-Z][^.!?\n\"]{20,110}\.", text) if 4 <= s.count(" ") <= 20]
    passages = []
    for document in documents:
        for start in range(0, len(document) - 600, 600):
            passage = document[document.find(" ", start) + 1 :][:600]
            names = Counter(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}", passage))
            if names:
                name = max(sorted(names), key=lambda n: (names[n], n))
                if len(re.findall(rf"\b{name}\b", passage)) >= 3:
                    passages.append(passage)
    return Exercises(words, sentences, passages)


@dataclass(frozen=True)
class Mix:
    """The share of exercise rows; from step `intensify`, echoes join them and copied tokens weigh `copy_weight`."""

    share: float
    copy_weight: float
    intensify: int


class Corpus:
    """Batches of `(rows, length)` ids, labels and loss weights; a fixed share of the rows are exercises."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, documents: list[str], exercises: Exercises, mix: Mix, seed: int
    ) -> None:
        self.tokenizer, self.exercises, self.mix, self.seed = tokenizer, exercises, mix, seed
        eos = tokenizer.eos_token_id
        encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
        self.documents = [torch.tensor([*ids, eos]) for ids in encoded]
        self.tokens = sum(map(len, self.documents))
        self.epoch, self.blocks, self.cursor = -1, torch.empty(0), 0
        self.exercise_tokens = self.tale_tokens = 0

    def _next_epoch(self, length: int) -> None:
        self.epoch += 1
        rng = torch.Generator().manual_seed(self.seed * 1000 + self.epoch)
        order = torch.randperm(len(self.documents), generator=rng).tolist()
        stream = torch.cat([self.documents[i] for i in order])
        offset = int(torch.randint(length, (1,), generator=rng))
        count = (len(stream) - offset - 1) // length
        blocks = stream[offset : offset + count * length + 1].unfold(0, length + 1, length)
        self.blocks, self.cursor = blocks[torch.randperm(count, generator=rng)], 0

    def batch(self, step: int, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, next-token labels and their weights; exercise prompts weigh nothing."""
        drilled = int(rows * self.mix.share * (step + 1)) - int(rows * self.mix.share * step)
        taken = []
        while len(taken) < rows - drilled:
            if self.cursor >= len(self.blocks) or self.blocks.shape[1] != length + 1:
                self._next_epoch(length)
            taken.append(self.blocks[self.cursor])
            self.cursor += 1
        tales = torch.stack(taken)
        self.tale_tokens += (rows - drilled) * length
        self.exercise_tokens += drilled * length
        drills = [self._drill_row(Random(f"{self.seed}/{step}/{row}"), length, step) for row in range(drilled)]
        ids = torch.cat([tales, *(row[0][None] for row in drills)])
        weights = torch.cat([torch.ones(tales.shape), *(row[1][None] for row in drills)])
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights[:, 1:].contiguous()

    def _drill_row(self, rng: Random, length: int, step: int) -> tuple[Tensor, Tensor]:
        ids: list[int] = []
        weights: list[float] = []
        intense = step >= self.mix.intensify
        heavy = self.mix.copy_weight if intense else 1.0
        while len(ids) < length + 1:
            made = encode(self.tokenizer, self.exercises.draw(rng, echoes=intense))
            ids += made.ids
            marks = zip(made.trained, made.copied, strict=True)
            weights += [(heavy if copied else 1.0) if trained else 0.0 for trained, copied in marks]
        return torch.tensor(ids[: length + 1]), torch.tensor(weights[: length + 1])
