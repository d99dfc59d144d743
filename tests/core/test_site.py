"""A site under another path is the same site."""

from __future__ import annotations

from dataclasses import fields, replace

from lorakit.core.site import Site


def test_a_site_at_another_path_differs_in_nothing_else() -> None:
    site = Site("a", 6, 4, (3,), (2, 8), "conv1d", 2, 12, True, frozenset({"dilation"}))
    assert all(getattr(site, f.name) != f.default for f in fields(Site)), "a field at its default could be lost"
    moved = site.at("b.c")
    wanted = replace(site, path="b.c")
    assert {f.name: getattr(moved, f.name) for f in fields(Site)} == {
        f.name: getattr(wanted, f.name) for f in fields(Site)
    }
    assert (moved, hash(moved), site.path) == (wanted, hash(wanted), "a")
