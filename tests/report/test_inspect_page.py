"""The page of an inspection: all its numbers, well-formed, loading nothing, and only what was asked for."""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec
from lorakit.core.state import AdapterState, Update
from lorakit.methods.lora import LoRA
from lorakit.report.inspect import findings, forecast, held, inspect_page, kinds, met
from lorakit.spectral.inspection import inspect

PATHS = [f"model.layers.{i}.{name}" for i in range(3) for name in ("q_proj", "<b>down")]
KNOWN = {"adapter": "runs/<one>", "base": None, "against": None, "method": "lora", "parameters": 1234, "bytes": 4936,
         "update_parameters": 1234, "trained_whole": []}  # fmt: skip


def adapter(seed: int, dead: str = "") -> AdapterState:
    """Return random LoRAs of rank 3 on weights (12, 16), one of them 0 if asked."""
    rng = torch.Generator().manual_seed(seed)
    method = LoRA(3, 3.0)
    updates = []
    for path in PATHS:
        p = {"down": torch.randn(3, 16, generator=rng), "up": torch.randn(12, 3, generator=rng)}
        updates.append(Update(Site(path, 12, 16), method, {**p, "up": p["up"] * (path != dead)}))
    return AdapterState(AdapterSpec(method), tuple(updates))


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    """Everything that can be known of two adapters."""
    base = {path: torch.randn(12, 16, generator=torch.Generator().manual_seed(5)) for path in PATHS}
    found = inspect(adapter(0, dead=PATHS[2]), base, adapter(1), count_intruders=True).to_json()
    return {**KNOWN, "base": "a/base", "against": "other", "trained_whole": ["head"], **found}


@pytest.fixture(scope="module")
def bare() -> dict[str, Any]:
    """What is known of an adapter alone."""
    return {**KNOWN, **inspect(adapter(0)).to_json()}


def parsed(page: str) -> ElementTree.Element:
    """Return the page's tree; a page that is not well-formed raises."""
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def words(root: ElementTree.Element) -> str:
    return " ".join(" ".join(root.itertext()).split())


def titles(root: ElementTree.Element) -> list[str]:
    return [section.findtext("h2") or "" for section in root.iter("section")]


def test_the_page_has_every_module_and_every_number_of_its_tables(full: dict[str, Any]) -> None:
    root = parsed(inspect_page(full))
    text = words(root)
    for path in PATHS:
        assert path in text
    for row in (*kinds(full), *held(full), *met(full)):
        assert all(cell in text for cell in row)
    for line in findings(full):
        assert " ".join(line.split()) in text
    assert "runs/<one>" in text, "escaped, not taken for markup"
    assert "and 1 tensors of the base trained whole" in text
    pictures = root.findall(".//{http://www.w3.org/2000/svg}svg")
    assert len(pictures) == 2 * 4, "dW, its energy, W and what is alike, for two kinds of module"
    said = [svg.findtext(".//{http://purl.org/dc/elements/1.1/}title") for svg in pictures]
    assert set(said) == {"q_proj", "<b>down"}


def test_only_what_was_asked_for_has_a_section(full: dict[str, Any], bare: dict[str, Any]) -> None:
    always = ["By kind of module", "Rank used", "Spectra", "Every module"]
    assert [title for title in titles(parsed(inspect_page(bare))) if title != "Look at this first"] == always
    asked = set(titles(parsed(inspect_page(full)))) - set(always)
    assert asked == {"Look at this first", "Beside the weights", "Beside other"}


def test_nothing_is_loaded_and_nothing_runs(full: dict[str, Any]) -> None:
    page = inspect_page(full)
    assert "<script" not in page.lower()
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page)
    assert not re.findall(r"url\((?!#)", page)
    assert "#010203" not in page, "drawings have the ink of the page"


def test_the_page_of_an_object_read_back_is_the_same(full: dict[str, Any]) -> None:
    assert inspect_page(json.loads(json.dumps(full))) == inspect_page(full)


def test_the_findings_name_what_is_dead_and_what_the_other_does(full: dict[str, Any]) -> None:
    lines = findings(full)
    assert lines[0] == f"1 of 6 updates are exactly 0, so they do nothing: {PATHS[2]}"
    assert any("directions hold 90% of each update's energy" in line for line in lines)
    assert lines[-1] == forecast(full)
    told = [module["interference"]["forecast"] for module in full["modules"] if module["interference"]]
    assert len(told) == 5
    said = {"disturb": "disturb each other", "disturbs": "disturb it", "disturbed": "are disturbed by it"}
    assert all(f"{told.count(word)} {words}" in lines[-1] for word, words in said.items() if word in told)
    assert set(told) & said.keys()


def test_by_hand() -> None:
    """dW = diag(3, 4) in the corner: energy 16/25 and 9/25, so 0.9 needs both, |dW| = 5."""
    p = {"down": torch.eye(2, 16), "up": torch.zeros(12, 2).index_put((torch.arange(2), torch.arange(2)),
         torch.tensor([3.0, 4.0]))}  # fmt: skip
    state = AdapterState(AdapterSpec(LoRA(2, 2.0)), (Update(Site("model.layers.0.q", 12, 16), LoRA(2, 2.0), p),))
    found = {**KNOWN, **inspect(state, {"model.layers.0.q": torch.full((12, 16), 1.0)}).to_json()}
    ((name, layers, rank, needs, _, norm, ratio, *_),) = kinds(found)
    assert (name, layers, rank, needs, norm) == ("q", "1", "2", "2", "5")
    assert ratio == f"{5 / 192**0.5:.2%}"
