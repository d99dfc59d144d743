"""The quickstart's task, made here: a record of facts becomes a sentence that tells them all.

    hero: Mira | kind: fox | home: the old mill | loves: honey | fears: thunder | tale:
    -> Mira the fox lives by the old mill, loves honey but fears thunder.

Nothing is downloaded and the answer can be checked by a rule: is every fact in the sentence? The held-out records are
new by construction: training never pairs their hero with their kind, nor their love with their fear.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "held-out", "strangers"]

HEROES = (
    "Mira Anna Tom Hans Greta Heidi Peter Clara Jack Molly Ned Rose Ivan Olga Karl Nora Otto Lena Hugo Elsa Finn Marta "
    "Oscar Ruth Paul Vera Felix Ida Simon Tilly Bruno Daisy Emil Flora Gus Hilda Jonas Kate Leo Mabel Nils Polly Rolf "
    "Sophie Toby Ursula Victor Wanda"
).split()
STRANGERS = "Agnes Boris Cora Edgar Frida Gilbert Jasper Linus Minna Pippa Silas Zelda".split()
"""Heroes whose names no training record holds."""
KINDS = (
    "fox wolf bear hare hen cat dog goat horse mouse frog goose swan raven lion badger donkey sparrow miller tailor "
    "shepherd fisherman sailor woodcutter giant dwarf witch knight piper baker"
).split()
HOMES = tuple(
    f"the {look} {place}"
    for look in "old little white green dark quiet silver broken great golden".split()
    for place in "mill forest river castle bridge garden well tower hill lake meadow orchard cottage barn".split()
)
LOVES = (
    "honey|apples|music|cheese|songs|cherries|dancing|riddles|warm bread|roses|stories|butter|fresh milk|plums|pearls|"
    "silver bells|hot soup|ripe pears|ribbons|kittens|feathers|sweet cakes|nuts|clear water|candles|games|red shoes|"
    "pictures|sunshine|sleep"
).split("|")
FEARS = (
    "thunder|ghosts|fire|dark nights|deep water|hunters|snakes|cold winds|spiders|storms|robbers|dragons|soldiers|ice|"
    "black dogs|strangers|loud drums|snow|the sea|thieves|high walls|lightning|wasps|magic|big waves|the moon|fog|"
    "thorns|rats|long roads"
).split("|")
_EVERY = 5  # one pair in five is kept for the held-out records


@dataclass(frozen=True)
class Fable:
    """Facts about a hero, some of them None, and the way (0, 1 or 2) the reference tells them."""

    hero: str
    kind: str
    home: str | None
    loves: str | None
    fears: str | None
    style: int

    @property
    def facts(self) -> dict[str, str]:
        """Return the facts there are, by their key in the record."""
        every = {"hero": self.hero, "kind": self.kind, "home": self.home, "loves": self.loves, "fears": self.fears}
        return {key: value for key, value in every.items() if value is not None}

    @property
    def prompt(self) -> str:
        """Return the record as the model reads it."""
        return " | ".join([*(f"{key}: {value}" for key, value in self.facts.items()), "tale:"])

    def tellings(self) -> tuple[str, str, str]:
        """Return every sentence that counts as well told, one a style."""
        return _plainly(self), _once(self), _gently(self)

    @property
    def row(self) -> dict[str, str]:
        """Return the training row; the completion begins with the space that follows the colon."""
        return {"prompt": self.prompt, "completion": f" {self.tellings()[self.style]}"}


def fables(split: Split, count: int, seed: int = 0) -> list[Fable]:
    """Draw `count` different records.

    `train` holds no record of the other two; `held-out` combines known values as training never does; `strangers` does
    the same with heroes whose names training never holds.
    """
    rng, found = Random(f"{split}/{seed}"), dict[str, Fable]()
    while len(found) < count:
        fable = _draw(rng, split)
        found.setdefault(fable.prompt, fable)
    return list(found.values())


def missing(sentence: str, fable: Fable) -> list[str]:
    """Return the keys of the facts a sentence does not tell; a record repeated as a record tells none."""
    if re.search(r"\||\b(hero|kind|home|loves|fears|tale):", sentence):
        return list(fable.facts)
    return [key for key, value in fable.facts.items() if not re.search(rf"\b{re.escape(value)}\b", sentence)]


def score(sentences: Sequence[str], told: Sequence[Fable]) -> float:
    """Return the share of sentences that tell every fact of their record."""
    return sum(not missing(s, fable) for s, fable in zip(sentences, told, strict=True)) / len(told)


def _draw(rng: Random, split: Split) -> Fable:
    while True:
        hero = rng.choice(STRANGERS if split == "strangers" else HEROES)
        kind, home, loves, fears = (rng.choice(values) for values in (KINDS, HOMES, LOVES, FEARS))
        known = hero in HEROES and (HEROES.index(hero) + KINDS.index(kind)) % _EVERY != 0
        usual = (LOVES.index(loves) + FEARS.index(fears)) % _EVERY != 0
        if known != usual or usual != (split == "train"):
            continue
        keep = [rng.random() < 0.75 for _ in range(3)]
        if any(keep):
            kept = [value if k else None for value, k in zip((home, loves, fears), keep, strict=True)]
            return Fable(hero, kind, kept[0], kept[1], kept[2], style=rng.randrange(3))


def _plainly(fable: Fable) -> str:
    """`Mira the fox lives by the old mill, loves honey but fears thunder.`"""
    said = [f"lives by {fable.home}"] if fable.home else []
    said += [f"loves {fable.loves}"] if fable.loves else []
    rest = f"fears {fable.fears}" if fable.fears else said.pop()
    link = "" if not said else " but " if fable.fears and fable.loves else " and "
    return f"{fable.hero} the {fable.kind} {', '.join(said)}{link}{rest}."


def _once(fable: Fable) -> str:
    """`By the old mill there once lived a fox named Mira, who loved honey but feared thunder.`"""
    start = f"By {fable.home} there" if fable.home else "There"
    said = [f"loved {fable.loves}"] if fable.loves else []
    said += [f"feared {fable.fears}"] if fable.fears else []
    who = f", who {' but '.join(said)}" if said else ""
    return f"{start} once lived a {fable.kind} named {fable.hero}{who}."


def _gently(fable: Fable) -> str:
    """`Mira was a fox from the old mill, fond of honey but afraid of thunder.`"""
    said = [f"fond of {fable.loves}"] if fable.loves else []
    said += [f"afraid of {fable.fears}"] if fable.fears else []
    home = f" from {fable.home}" if fable.home else ""
    return f"{fable.hero} was a {fable.kind}{home}{', ' if said else ''}{' but '.join(said)}."
