"""The kernel in C gives the plain loop's numbers, and torch stands in wherever it cannot be had."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorakit.kernels import compiled, grouped
from tests.tolerances import assert_close

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, and nothing compiled before or after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_ready", None)
    compiled._library.cache_clear()
    yield
    compiled._library.cache_clear()


def libraries(cache: Path) -> list[Path]:
    """Return what was compiled into a cache."""
    return sorted(cache.glob("lorakit/kernels/*"))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("n", "rank", "wide", "inputs", "outputs"),
    [(1, 1, 1, 1, 1), (6, 3, 8, 9, 7), (16, 8, 8, 256, 688), (5, 0, 4, 8, 8), (16, 64, 64, 96, 130), (0, 4, 4, 8, 8)],
)
def test_rows_equal_the_loop(n: int, rank: int, wide: int, inputs: int, outputs: int, threads: int) -> None:
    assert compiled.prepare()
    down, up = torch.randn(n, wide, inputs)[:, :rank], torch.randn(n, wide, outputs)[:, :rank]
    x, y = torch.randn(1, n, inputs), torch.randn(1, n, outputs)
    wanted = grouped.each_row(y[0], x[0], [(d, u, 1.0) for d, u in zip(down, up, strict=True)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert compiled.rows(y, x, down, up)
    finally:
        torch.set_num_threads(before)
    assert_close(y[0], wanted)


@needs_compiler
def test_one_number_by_hand() -> None:
    assert compiled.prepare()
    y = torch.tensor([[1.0, 2.0]])
    assert compiled.rows(y, torch.tensor([[2.0, 3.0]]), torch.tensor([[[1.0, 10.0]]]), torch.tensor([[[0.5, -1.0]]]))
    assert y.tolist() == [[1 + 32 * 0.5, 2 - 32]]


@needs_compiler
def test_what_it_is_not_for_is_left_alone() -> None:
    def case(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [torch.ones(shape, dtype=dtype) for shape in ((4, 6), (4, 5), (4, 2, 5), (4, 2, 6))]

    y, x, down, up = case()
    assert not compiled.rows(y, x, down, up), "nobody asked for it yet"
    assert compiled.prepare()
    others = [case(torch.float64), case(torch.bfloat16)]
    others += [
        [y, torch.ones(5, 4).T, down, up],
        [torch.ones(6, 4).T, x, down, up],
        [y, x, down, torch.ones(4, 6, 2).mT],
    ]
    others += [[y, x[:3], down, up], [y[:3], x, down, up]]
    for one in others:
        before = one[0].clone()
        assert not compiled.rows(*one)
        assert torch.equal(one[0], before)
    grouped.rows(*others[0])
    assert others[0][0].eq(11).all()


@needs_compiler
def test_it_is_compiled_once_into_the_user_s_cache(tmp_path: Path) -> None:
    assert compiled.prepare()
    (made,) = libraries(tmp_path)
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    stamp = made.stat().st_mtime_ns
    compiled._library.cache_clear()
    assert compiled.prepare()
    assert [one.stat().st_mtime_ns for one in libraries(tmp_path)] == [stamp]


@needs_compiler
@pytest.mark.parametrize("kept", [0, 4096, -1])
def test_a_damaged_library_is_compiled_anew_and_never_loaded(kept: int, tmp_path: Path) -> None:
    assert compiled.prepare()
    (made,) = libraries(tmp_path)
    whole = made.read_bytes()
    other = tmp_path / "damaged"  # a file of its own: the first is loaded
    other.write_bytes(whole[:kept])
    other.replace(made)
    compiled._library.cache_clear()
    assert compiled.prepare()
    assert made.read_bytes() == whole


@needs_compiler
@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("int lorakit_row;", "undefined symbol: lorakit_rows"),
        ("no C", "returned non-zero exit status"),
        (None, "other numbers than torch's"),
    ],
)
def test_a_source_that_does_not_do_it_leaves_it_to_torch(
    source: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "wrong.c"
    file.write_text(source or compiled.SOURCE.read_text().replace("thin[3] * e[j]", "thin[3] * c[j]"))
    monkeypatch.setattr(compiled, "SOURCE", file)
    with caplog.at_level("INFO"):
        assert not compiled.prepare()
    assert why in caplog.text
    y = torch.tensor([[1.0]])
    grouped.rows(y, torch.tensor([[2.0]]), torch.tensor([[[3.0]]]), torch.tensor([[[4.0]]]))
    assert y.item() == 25


@pytest.mark.parametrize("how", ["no compiler", "asked not to", "no place"])
def test_without_a_compiler_or_a_place_torch_does_it(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif how == "asked not to":
        monkeypatch.setenv("LORAKIT_KERNELS", "torch")
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not compiled.prepare()
    assert libraries(tmp_path) == []
