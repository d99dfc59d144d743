"""Generate exercises in copying: lists to repeat, records to tell in a sentence, values to look up, names to recall.

Five million parameters and a few million words of prose teach hardly any copying, and an adapter that must carry names
from its input to its output needs it. Many names and values are invented from syllables, so they span several tokens
and cannot be memorised. Records use neither pipes nor colons, and none of the keys of the quickstart or the E2E data.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Piece = tuple[str, bool]  # text, and whether it is copied from the prompt
ONSETS = (
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k kr l m n p pl pr qu r s sh sk sl sn st str t th tr v w y z".split()
)
VOWELS = "a e i o u a e i o ai ea ee oo ou ia".split()
CODAS = ["", "", "", *"b ck d g l ll m n nd ng nt p r rk rn s sk ss st t th x".split()]
ANSWER = ("\n", "\n=> ", "\nTold: ", "\nIn words: ", "\n\n", "\nAnswer: ", " => ")

# domain: opening clause, then key: clauses that tell its value
RECORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "ship": {
        "captain": ("is commanded by {}", "has {} for its captain", "obeys {}"),
        "cargo": ("carries {}", "is laden with {}"),
        "port": ("sails for {}", "is bound for {}"),
        "mast": ("has a mast of {}", "bears a mast of {}"),
        "crew": ("has a crew of {}", "is manned by {}"),
    },
    "inn": {
        "landlord": ("is kept by {}", "belongs to {}"),
        "street": ("stands in {}", "is found in {}"),
        "soup": ("is famous for its {} soup", "serves {} soup"),
        "beds": ("has {} beds", "offers {} beds"),
        "bill": ("asks {} a night", "costs {} a night"),
    },
    "book": {
        "author": ("was written by {}", "is the work of {}"),
        "subject": ("tells of {}", "is about {}"),
        "year": ("was printed in {}", "first appeared in {}"),
        "cover": ("is bound in {}", "is covered in {}"),
        "pages": ("has {} pages", "runs to {} pages"),
    },
    "soldier": {
        "rank": ("serves as {}", "holds the rank of {}"),
        "army": ("fights for {}", "marches with {}"),
        "sword": ("carries a sword called {}", "wears the sword {}"),
        "horse": ("rides {}", "sits upon {}"),
        "wound": ("was hurt at {}", "was wounded at {}"),
    },
    "machine": {
        "maker": ("was built by {}", "comes from the workshop of {}"),
        "fuel": ("burns {}", "runs on {}"),
        "weight": ("weighs {}", "has a weight of {}"),
        "output": ("makes {}", "turns out {}"),
        "colour": ("is painted {}", "is {} all over"),
    },
    "song": {
        "singer": ("is sung by {}", "was first sung by {}"),
        "tune": ("goes to the tune of {}", "has the tune of {}"),
        "verses": ("has {} verses", "runs to {} verses"),
        "mood": ("sounds {}", "is rather {}"),
    },
    "town": {
        "mayor": ("is governed by {}", "has {} for its mayor"),
        "river": ("lies on the river {}", "is washed by the {}"),
        "trade": ("lives by {}", "is known for {}"),
        "gates": ("has {} gates", "is entered by {} gates"),
        "founder": ("was founded by {}", "owes its walls to {}"),
    },
    "lesson": {
        "teacher": ("is given by {}", "is taught by {}"),
        "room": ("is held in {}", "takes place in {}"),
        "hour": ("begins at {}", "starts at {}"),
        "pupil": ("is attended by {}", "is taken by {}"),
        "matter": ("treats of {}", "deals with {}"),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Exercise:
    """A prompt and its completion in pieces; the copied pieces are what the exact-copy rate looks at."""

    kind: str
    prompt: str
    pieces: tuple[Piece, ...]

    @property
    def completion(self) -> str:
        """The completion as one text."""
        return "".join(text for text, _ in self.pieces)


class Exercises:
    """Draw exercises; `words` and `sentences` come from the training books."""

    def __init__(self, words: list[str], sentences: list[str], passages: list[str]) -> None:
        self.words, self.sentences, self.passages = words, sentences, passages
        self.kinds: dict[str, tuple[int, Callable[[Random], Exercise]]] = {
            "repeat": (3, self.repeat),
            "record": (8, self.record),
            "lookup": (3, self.lookup),
            "pairs": (2, self.pairs),
            "fill": (2, self.fill),
            "recall": (3, self.recall),
            "copy": (2, self.copy),
            "rename": (3, self.rename),
            "echo": (14, self.echo),
        }

    def draw(self, rng: Random, kind: str | None = None, echoes: bool = True) -> Exercise:
        """Draw one exercise, of a given kind or by the weights."""
        names = [name for name in self.kinds if echoes or name != "echo"]
        kind = kind or rng.choices(names, [self.kinds[name][0] for name in names])[0]
        return self.kinds[kind][1](rng)

    # values

    def coin(self, rng: Random) -> str:
        """An invented word of one to three syllables."""
        count = rng.choices((1, 2, 3), (2, 5, 2))[0]
        return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(count))

    def name(self, rng: Random) -> str:
        """A name: one or two capitalised words, invented or found in the books; now and then with a particle."""
        count = rng.choice((1, 1, 1, 2, 2))
        words = [self.coin(rng) if rng.random() < 0.55 else rng.choice(self.words) for _ in range(count)]
        if rng.random() < 0.1:
            words.insert(rng.randrange(len(words) + 1), rng.choice(("The", "of", "Saint", "Old", "New", "Little")))
        return " ".join(word if word == "of" else word.capitalize() for word in words).removeprefix("of ")

    def number(self, rng: Random) -> str:
        """A number, a range or a price."""
        low = rng.choice((rng.randrange(2, 20), rng.randrange(20, 100), rng.randrange(100, 2000)))
        bare = "{0}", "{0}", "{0}-{1}", "£{0}", "${0}"
        form = rng.choice((*bare, "{0} miles", "less than {0}", "more than £{0}", "{0} out of {1}"))
        return form.format(low, low + rng.randrange(1, 30))

    def value(self, rng: Random) -> str:
        """Anything a record can hold."""
        pick = rng.random()
        if pick < 0.4:
            return self.name(rng)
        if pick < 0.55:
            return self.number(rng)
        if pick < 0.85:
            return " ".join(rng.choice(self.words) for _ in range(rng.choice((1, 1, 2, 3))))
        return self.coin(rng)

    # kinds of exercise

    def asked(self, rng: Random, kind: str, prompt: str, pieces: list[Piece]) -> Exercise:
        """Join question and answer: sometimes as a chat, else by one of several marks."""
        if rng.random() < 0.25:
            return Exercise(kind, f"User: {prompt}\nAssistant:", ((" ", False), *pieces))
        mark = rng.choice(ANSWER)
        space = [(" ", False)] if mark.endswith(" ") else []
        return Exercise(kind, prompt + mark.rstrip(" "), (*space, *pieces))

    def repeat(self, rng: Random) -> Exercise:
        """Say a list again, whole, or its first or last part."""
        items = [rng.choice((self.name, self.coin, self.value))(rng) for _ in range(rng.randrange(2, 8))]
        comma = rng.choice((", ", " ", "; ", " and ", "\n"))
        way = rng.choice(("Repeat", "Say again", "Once more", "Write down", "The first of", "The last of"))
        answer = {"The first of": items[0], "The last of": items[-1]}.get(way, comma.join(items))
        return self.asked(rng, "repeat", f"{way}: {comma.join(items)}", [(answer, True)])

    def facts(self, rng: Random) -> tuple[str, str, list[tuple[str, str, str]]]:
        """A domain, a title and (key, clause, value) triples; a third of them with any words as keys."""
        if rng.random() < 0.35:
            keys = rng.sample(self.words, rng.randrange(1, 6))
            clauses = [rng.choice(("has {} for its " + k, "shows {} as " + k, "takes {} as its " + k)) for k in keys]
            told = [(key, clause, self.value(rng)) for key, clause in zip(keys, clauses, strict=True)]
            return rng.choice(self.words), self.name(rng), told
        domain = rng.choice(list(RECORDS))
        keys = rng.sample(list(RECORDS[domain]), rng.randrange(1, len(RECORDS[domain]) + 1))
        return domain, self.name(rng), [(k, rng.choice(RECORDS[domain][k]), self.value(rng)) for k in keys]

    def written(self, rng: Random, rows: list[tuple[str, str]]) -> str:
        """Write a record in one of many forms, none with pipes or colons."""
        form = rng.choice(("{} = {}", "{}={}", "{}[{}]", "{} ({})", "{} -> {}", "{} - {}", "the {} is {}", "<{}> {}"))
        return rng.choice(("; ", "\n", ", ", " / ", " & ", " * ")).join(form.format(*row) for row in rows)

    def record(self, rng: Random) -> Exercise:
        """Tell a record in one or two sentences."""
        domain, title, facts = self.facts(rng)
        rows = [(domain, title), *((key, value) for key, _, value in facts)]
        prompt = self.written(rng, rows if rng.random() < 0.6 else rng.sample(rows, len(rows)))
        if rng.random() < 0.5:
            facts = rng.sample(facts, len(facts))
        opening = rng.choice((f"The {domain} ", f"There is a {domain} called ", ""))
        pieces: list[Piece] = [(opening, False), (title, True)]
        if opening.startswith("There"):
            pieces.append((" which", False))
        split = rng.randrange(1, len(facts)) if len(facts) > 2 and rng.random() < 0.6 else len(facts)
        for place, (_, clause, value) in enumerate(facts):
            if place == split:
                pieces.append((". It ", False))
            elif place:
                pieces.append((" and " if place + 1 in (split, len(facts)) else ", ", False))
            else:
                pieces.append((" ", False))
            before, after = clause.split("{}")
            pieces += [(before, False), (value, True), (after, False)]
        return self.asked(rng, "record", prompt, [*pieces, (".", False)])

    def lookup(self, rng: Random) -> Exercise:
        """Answer with one value of a record."""
        domain, title, facts = self.facts(rng)
        rows = [(domain, title), *((key, value) for key, _, value in facts)]
        key, value = rng.choice(rows)
        ask = rng.choice(("What is the {}?", "Which {}?", "{}?", "Give the {}.", "The {} is what?")).format(key)
        record = self.written(rng, rng.sample(rows, len(rows)))
        prompt = f"{record}\n{ask}" if rng.random() < 0.7 else f"{ask}\n{record}"
        return self.asked(rng, "lookup", prompt, [(value, True)])

    def pairs(self, rng: Random) -> Exercise:
        """Recall the partner of a name."""
        rows = [(self.name(rng), self.value(rng)) for _ in range(rng.randrange(2, 6))]
        form = rng.choice(("{} -> {}", "{} has {}", "{} wants {}", "{} gave {}", "{} ~ {}"))
        left, right = rng.choice(rows)
        head = form.rsplit(" ", 1)[0].format(left)
        told = ". ".join(form.format(*row) for row in rows)
        return Exercise("pairs", f"{told}.\n{head}", ((" ", False), (right, True)))

    def fill(self, rng: Random) -> Exercise:
        """Put given words into the gaps of a sentence from the books."""
        words = rng.choice(self.sentences).split(" ")
        places = sorted(rng.sample(range(len(words)), min(len(words), rng.randrange(1, 4))))
        values = {place: self.name(rng) for place in places}
        gaps = [f"_{places.index(i) + 1}" if i in values else word for i, word in enumerate(words)]
        given = rng.choice((", ", "; ", "\n")).join(f"_{n + 1} = {values[p]}" for n, p in enumerate(places))
        done = " ".join(values.get(i, word) for i, word in enumerate(words))
        return self.asked(rng, "fill", f"{given}\n{' '.join(gaps)}", [(done, True)])

    def recall(self, rng: Random) -> Exercise:
        """Answer who did what after a few sentences about invented people."""
        deeds = ("went to {}", "lost {}", "bought {}", "dreamed of {}", "sang about {}", "asked for {}", "wrote to {}")
        people = [(self.name(rng), rng.choice(deeds).format(self.value(rng))) for _ in range(rng.randrange(1, 5))]
        who, deed = rng.choice(people)
        tale = rng.choice((". ", ".\n")).join(f"{name} {act}" for name, act in people) + "."
        if rng.random() < 0.4:
            return self.asked(rng, "recall", f"{tale}\nWhat of {who}?", [(f"{who} {deed}", True), (".", False)])
        return self.asked(rng, "recall", f"{tale}\nWho {deed}?", [(who, True)])

    def echo(self, rng: Random) -> Exercise:
        """Say a meaningless sequence over and over: the plainest lesson in copying."""
        sources = (lambda: rng.choice(self.words), lambda: self.coin(rng), lambda: self.name(rng))
        said = "".join(" " + rng.choice(sources)() for _ in range(rng.choice((2, 4, 8, 12, 20))))
        return Exercise("echo", said, ((said * rng.randrange(1, 4), True),))

    def copy(self, rng: Random) -> Exercise:
        """Copy a sentence of the books."""
        sentence = rng.choice(self.sentences)
        return self.asked(rng, "copy", rng.choice(("Copy: ", "", "Read aloud: ")) + sentence, [(sentence, True)])

    def rename(self, rng: Random) -> Exercise:
        """Read on in a passage of the books whose recurring name has been replaced by an invented one."""
        passage = rng.choice(self.passages)
        found = re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}", passage)
        name, new = max(set(found), key=lambda n: (found.count(n), n)), self.name(rng)
        parts = re.split(rf"\b{name}\b", passage)
        pieces = [(parts[0] + new + parts[1], False)]
        for part in parts[2:]:
            pieces += [(new, True), (part, False)]
        return Exercise("rename", "", tuple(piece for piece in pieces if piece[0]))
