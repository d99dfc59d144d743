"""The code books are the published ones, bit for bit."""

from __future__ import annotations

import pytest
import torch

from lorakit.hosts.codebooks import BOOKS, dynamic_map, fp4, nf4, pairs

functional = pytest.importorskip("bitsandbytes.functional")

PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""NF4 as in appendix E of arXiv 2305.14314."""


def test_nf4_rebuilt_from_its_definition_is_the_published_table() -> None:
    assert nf4().tolist() == PUBLISHED


@pytest.mark.parametrize("kind", BOOKS)
def test_the_books_are_those_of_bitsandbytes(kind: str) -> None:
    assert torch.equal(BOOKS[kind](), functional.get_4bit_type(kind, device="cpu"))


def test_the_dynamic_map_is_that_of_bitsandbytes() -> None:
    book = dynamic_map()
    assert torch.equal(book, functional.create_dynamic_map())
    assert book[0].item() == pytest.approx(-0.99296875)
    assert (book[127], book[-1]) == (0, 1)


def test_fp4_by_hand() -> None:
    assert (12 * fp4()).tolist() == pytest.approx(
        [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], abs=1e-6
    )


def test_a_byte_stands_for_two_values_the_high_half_first() -> None:
    both = pairs("nf4", torch.device("cpu")).view(torch.float32).view(256, 2)
    assert both[0x0F].tolist() == [-1.0, 1.0]
    assert both[0x7C].tolist() == [0.0, PUBLISHED[12]]


def test_a_table_made_while_a_model_is_loaded_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for book in (nf4, fp4, dynamic_map):
        wanted = book().clone()
        book.cache_clear()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            made = book()
        torch.set_default_dtype(torch.float32)
        assert torch.equal(made, wanted)
