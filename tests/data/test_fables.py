"""The quickstart's task: held-out records are new by construction, and the score cannot be earned by repeating."""

from __future__ import annotations

import itertools

import pytest

from lorakit.data.fables import FEARS, HEROES, HOMES, KINDS, LOVES, STRANGERS, Fable, fables, missing, score

MIRA = Fable("Mira", "fox", "the old mill", "honey", "thunder", style=0)


def test_a_record_and_its_three_tellings_read_as_written_by_hand() -> None:
    assert MIRA.prompt == "hero: Mira | kind: fox | home: the old mill | loves: honey | fears: thunder | tale:"
    assert MIRA.tellings() == (
        "Mira the fox lives by the old mill, loves honey but fears thunder.",
        "By the old mill there once lived a fox named Mira, who loved honey but feared thunder.",
        "Mira was a fox from the old mill, fond of honey but afraid of thunder.",
    )
    assert MIRA.row["completion"] == " " + MIRA.tellings()[0]


@pytest.mark.parametrize("kept", [k for k in itertools.product((True, False), repeat=3) if any(k)])
def test_every_telling_tells_exactly_the_facts_there_are(kept: tuple[bool, bool, bool]) -> None:
    home, loves, fears = (v if k else None for v, k in zip(("the old mill", "honey", "fog"), kept, strict=True))
    fable = Fable("Mira", "hen", home, loves, fears, style=0)
    for sentence in fable.tellings():
        assert missing(sentence, fable) == []
        assert missing(sentence, MIRA) == [
            "kind", *(key for key, k in zip(("home", "loves"), kept[:2], strict=True) if not k), "fears",
        ]  # fmt: skip
        assert sentence[-1] == "."
        assert "  " not in sentence


def test_a_record_repeated_tells_nothing() -> None:
    assert missing(MIRA.prompt, MIRA) == list(MIRA.facts)
    assert missing("Mira | fox | the old mill | honey | thunder", MIRA) == list(MIRA.facts)
    assert missing("hero: Mira, a fox by the old mill, honey, thunder", MIRA) == list(MIRA.facts)


def test_a_fact_counts_as_a_whole_word() -> None:
    assert missing("Miranda the foxes lives by the old mills, loves honeycomb but fears thunderbolts.", MIRA) == list(
        MIRA.facts
    )


def test_the_score_is_the_share_of_complete_sentences() -> None:
    told = MIRA.tellings()[1]
    assert score([told, told.replace("honey", "milk"), told, ""], [MIRA] * 4) == 0.5


def test_the_held_out_records_share_no_pair_with_training() -> None:
    learned, held = fables("train", 3000), fables("held-out", 300)
    assert not {(f.hero, f.kind) for f in learned} & {(f.hero, f.kind) for f in held}
    both = {(f.loves, f.fears) for f in learned if f.loves and f.fears}
    assert not both & {(f.loves, f.fears) for f in held if f.loves and f.fears}
    assert not {f.prompt for f in learned} & {f.prompt for f in held}


def test_every_value_of_a_held_out_record_has_been_learned() -> None:
    learned = {(key, value) for f in fables("train", 2400) for key, value in f.facts.items()}
    known = {(key, value) for f in fables("held-out", 200) for key, value in f.facts.items()}
    assert known <= learned


def test_strangers_are_never_learned() -> None:
    assert not set(STRANGERS) & set(HEROES)
    assert {f.hero for f in fables("strangers", 200)} == set(STRANGERS)
    assert not {f.hero for f in fables("train", 3000)} & set(STRANGERS)


def test_a_seed_means_the_same_records() -> None:
    assert fables("train", 50, seed=3) == fables("train", 50, seed=3)
    assert fables("train", 50, seed=3) != fables("train", 50, seed=4)
    assert len({f.prompt for f in fables("held-out", 400)}) == 400


def test_every_kind_takes_the_article_a() -> None:
    assert not [kind for kind in KINDS if kind[0] in "aeiou"]


def test_no_value_hides_in_another() -> None:
    # else a sentence could earn one fact by telling another
    values = [*HEROES, *STRANGERS, *KINDS, *HOMES, *LOVES, *FEARS]
    assert len(set(values)) == len(values)
    groups = (HEROES + STRANGERS, KINDS, HOMES, LOVES, FEARS)
    for mine, others in itertools.permutations(groups, 2):
        text = " | ".join(others)
        assert not [value for value in mine if f" {value} " in f" {text} ".replace("|", " ")]
