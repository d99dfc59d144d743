"""The model card says what the adapter is, and never replaces one a person wrote."""

from __future__ import annotations

from pathlib import Path

from lorakit.persist import save
from lorakit.persist.card import card
from tests.persist.samples import adapter, slices


def test_the_card_says_what_on_what_with_how_many_parameters() -> None:
    text = card(adapter())
    for line in (
        "base_model: some/base",
        "| method | lora (rank 4, alpha 8.0, stabilised False) |",
        "| except | alpha 3.0, rank 2 at q in layers 1 |",
        "| targets | q |",
        "| parameters | 66 in the updates, 15 trained whole |",  # 4 (5 + 6) + 2 (5 + 6), 3 * 5
        "PeftModel.from_pretrained",
        "lorakit.load",
    ):
        assert line in text
    assert "unnamed" in card(slices())


def test_a_card_of_ours_is_renewed_and_a_person_s_is_left(tmp_path: Path) -> None:
    save(adapter(), tmp_path)
    save(slices(), tmp_path)
    assert (tmp_path / "README.md").read_text() == card(slices())
    (tmp_path / "README.md").write_text("my notes")
    save(adapter(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "my notes"
