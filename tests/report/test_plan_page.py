"""The page of a plan: all its numbers, well-formed, loading nothing, and harmless whatever the names in it are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

import pytest

from lorakit.data.report import DataReport
from lorakit.planning.advice import Advice
from lorakit.planning.fitting import Fit
from lorakit.planning.lint import Finding
from lorakit.planning.memory import Forecast, Parts
from lorakit.planning.pace import Bill, Duration
from lorakit.report.html import tag
from lorakit.report.plan import DATA, PARTS, WAYS, plan_page, verdicts
from lorakit.training.limits import Limits
from lorakit.training.plan import plan as planned
from lorakit.training.planned import Where
from lorakit.training.recipe import make_recipe

GB = 10**9
PLAIN = Forecast(
    load=Parts(weights=10 * GB),
    step=Parts(10 * GB, 1 * GB, 2 * GB, 3 * GB, 16 * GB, 4 * GB, 3 * GB, 1 * GB),
    evaluation=Parts(weights=10 * GB, adapters=1 * GB, logits=2 * GB),
)
SMALL = Forecast(step=Parts(10 * GB, 1 * GB, 2 * GB, 3 * GB, 1 * GB, 4 * GB, 3 * GB, 1 * GB))


def module(path: str, parameters: int = 1000, **values: Any) -> dict[str, Any]:
    return {"path": path, "kind": "linear", "shape": [30, 20], "rank": 4, "parameters": parameters, "pattern": "q",
            "method": "lora", **values}  # fmt: skip


def values(**changes: Any) -> dict[str, Any]:
    """Return a plan with every part there is."""
    report = DataReport("rows.jsonl", "prompt+completion", 2400, 2390, 122_413, 47_587, 73, 512, duplicates=7,
                        separator_used="\n", packs=243, packing_efficiency=0.984)  # fmt: skip
    return {
        "model": "a/model",
        "dtype": "bf16",
        "quant": None,
        "method": "lora",
        "trainable_parameters": 4_194_304,
        "total_parameters": 6_738_415_616,
        "percent": 0.0622446,
        "adapter_bytes": 16_777_216,
        "modules": [module("layers.0.q"), module("layers.1.q", 1500), module("layers.1.k", rank=None), module("head")],
        "trained_whole": [{"name": f"norm.{i}", "parameters": 4096, "pattern": "norm"} for i in range(8)],
        "patterns": {"q": 3, "k": 1},
        "batch": {"rows": 4, "length": 1024, "packed": True},
        "memory": PLAIN.to_json(),
        "ways": {"plain": PLAIN.to_json(), "4 bits": SMALL.to_json(), "checkpointing": SMALL.to_json()},
        "fits": [
            Fit("small", "does not fit", 30 * GB, 20 * GB).to_json(),
            Fit("middle", "fits with checkpointing", 30 * GB, 40 * GB).to_json(),
            Fit("large", "fits", 40 * GB, 80 * GB).to_json(),
        ],
        "largest": {"large": asdict(Limits(12, 8192))},
        "pace": {"flops_per_step": 108_818_902_024_192, "steps": 31, "tokens": 124_416, "cache_bytes": 0,
                 "times": {"large": {"duration": asdict(Duration(185.0, 100.0, 3723.0, "35% of 312 TFLOP/s, assumed")),
                                     "bill": asdict(Bill(0.25, 0.08, None))}}},
        "own": "plain",
        "where": asdict(Where(("small", "middle", "large"))),
        "data": {"train": report.to_json()},
        "advice": [asdict(Advice("rank", "16", "it holds the data", "a paper, doi 10.1/2"))],
        "findings": [asdict(Finding("vLLM", "rank 24", "no such rank", "take 32", "vllm/lora.py"))],
        "warnings": ["'c_proj' catches two roles:\n  - attention\n  - mlp"],
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the values of a real plan of the bundled base, on one device and with some data."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f" {i}."}) + "\n" for i in range(9)))
    recipe = make_recipe({"model": "lorakit/tales", "data": {"train": str(file)}, "train": {"dtype": "bf16"}})
    return planned(recipe, Where(("A100 40GB",), watts=300.0, price_per_hour=2.0)).to_json()


def parsed(page: str) -> ElementTree.Element:
    """Return the page's tree; a page that is not well-formed raises."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def text_of(plan: dict[str, Any]) -> str:
    """Return the words of the page's body, with single spaces."""
    body = parsed(plan_page(plan)).find("body")
    assert body is not None
    return " ".join(" ".join(body.itertext()).split())


def rows_of(root: ElementTree.Element, title: str) -> dict[str, ElementTree.Element]:
    """Return the lines of the charts of one section, by their names."""
    (found,) = [s for s in root.iter("section") if s.findtext("h2") == title]
    lines = [line for line in found.iter("div") if line.get("class") == "row"]
    return {"".join(line[0].itertext()): line for line in lines}


def widths(line: ElementTree.Element) -> list[tuple[str | None, float]]:
    """Return the class and the width in percent of each piece of a bar."""
    styles = [(piece.get("class"), piece.get("style", "")) for piece in line[1]]
    return [(kind, float(style.removeprefix("width:").removesuffix("%"))) for kind, style in styles]


def test_a_real_plan_has_its_page(real: dict[str, Any]) -> None:
    text = text_of(real)
    assert real["data"]
    assert real["pace"]["times"]
    for number in (real["trainable_parameters"], real["total_parameters"], real["pace"]["steps"]):
        assert f"{number:,}" in text
    for phase in real["memory"].values():
        for count in phase.values():
            assert not count or f"{count:,}" in text
    for m in real["modules"]:
        assert m["path"] in text
    for line in real["advice"]:
        assert all(" ".join(said.split()) in text for said in line.values())
    assert real["data"]["train"]["source"] in text
    assert {field for report in real["data"].values() for field in report} == set(DATA)
    assert set(real["ways"]) == set(WAYS)
    assert {*PARTS, "total"} == set(real["memory"]["step"])


def test_the_page_of_an_object_read_back_is_the_same(real: dict[str, Any]) -> None:
    assert plan_page(json.loads(json.dumps(real))) == plan_page(real)


def test_the_opening_says_what_is_trained() -> None:
    text = text_of(values(quant="nf4"))
    assert (
        "6,738,415,616 parameters, bf16 packed into nf4, trained by lora in batches of 4 x 1,024 tokens, packed" in text
    )
    for said in ("4,194,304", "0.06224 %", "16.8 MB", "40.0 GB"):
        assert said in text


def test_full_fine_tuning_is_trained_by_no_method() -> None:
    assert "trained whole in batches" in text_of(values(method="none", modules=[], patterns={}))


def test_bars_of_phases_are_stacked_on_one_scale() -> None:
    lines = rows_of(parsed(plan_page(values())), "Memory, phase by phase")
    assert list(lines) == ["load", "step", "evaluation"]  # not the phases the run does not have
    assert widths(lines["load"]) == [("weights", 25.0)]  # 10 of the step's 40 GB
    assert widths(lines["step"]) == list(zip(PARTS, (25, 2.5, 5, 7.5, 40, 10, 7.5, 2.5), strict=True))
    assert lines["step"][1].get("aria-label", "").startswith("weights 10.0 GB, adapters 1.0 GB, gradients 2.0 GB")
    assert lines["step"][2].text == "40.0 GB"


def test_every_part_that_is_drawn_has_a_colour_of_its_own() -> None:
    page = plan_page(values())
    colours = {part: re.findall(rf"^\.{part} {{ background: (#\w+); }}$", page, re.MULTILINE) for part in PARTS}
    assert all(len(found) == 1 for found in colours.values()), colours
    assert len({found[0] for found in colours.values()}) == len(PARTS)
    (key, _) = [
        [item.text or item[0].tail for item in ul] for ul in parsed(page).iter("ul") if ul.get("class") == "legend"
    ]
    assert key == list(PARTS)


def test_ways_stand_in_one_order_and_the_recipes_own_is_marked() -> None:
    lines = rows_of(parsed(plan_page(values(memory=SMALL.to_json()))), "Ways to run a step")
    assert list(lines) == ["plain", "with checkpointing", "in 4 bits"]
    said = {name: line[2].text for name, line in lines.items()}
    assert said == {"plain": "40.0 GB", "with checkpointing": "25.0 GB, this recipe", "in 4 bits": "25.0 GB"}
    assert widths(lines["in 4 bits"])[0] == ("weights", 25.0)


def test_a_device_is_a_bar_of_its_limit_with_a_verdict_in_words() -> None:
    lines = rows_of(parsed(plan_page(values())), "Devices")
    small, middle, large = lines.values()
    assert list(lines) == ["small ✗ does not fit", "middle ◐ fits with checkpointing", "large ✓ fits"]
    assert widths(small) == [("not", 66.67), ("over", 33.33)]  # 20 and 10 of 30 GB
    assert widths(middle) == [("partly", 75.0)]
    assert widths(large) == [("fits", 50.0)]
    assert small[2].text == "30.0 GB of 20.0 GB (18.6 GiB), 10.0 GB too much"  # 20e9 / 2^30 = 18.63
    assert large[2].text == "40.0 GB of 80.0 GB (74.5 GiB), 40.0 GB left"
    assert "largest on large, as the recipe is: 12 rows of 1,024 tokens, or one row of 8,192" in text_of(values())


def test_the_largest_batch_is_that_of_the_way_that_fits() -> None:
    most = {
        "large": asdict(Limits(1, 8192, "4 bits and checkpointing")),
        "small": asdict(Limits(0, 0, "checkpointing")),
    }
    text = text_of(values(largest=most))
    assert "largest on large, in 4 bits with checkpointing: 1 row of 1,024 tokens, or one row of 8,192" in text
    assert "on small not even one short row fits with checkpointing" in text


def test_time_work_and_cost_are_said_where_they_are_known() -> None:
    text = text_of(values())
    assert "a step 109 TFLOP steps 31 tokens, with padding 124,416 on large about 3:05 (1:40 to 1:02:03)" in text
    assert ", 0.25 kWh, 0.08 for energy: 35% of 312 TFLOP/s, assumed" in text
    assert "for the devices" not in text
    assert "no time on small, middle: no throughput is known in bf16" in text
    nothing = {"flops_per_step": 2 * GB, "steps": None, "tokens": None, "times": {}, "cache_bytes": 0}
    assert "Work and time a step 2 GFLOP Data" in text_of(values(pace=nothing))
    kept = {**nothing, "cache_bytes": 3 * GB, "cache_flops": 4 * GB}
    assert "a step 2 GFLOP on disk for train.cache_frozen 3.0 GB once for it 4 GFLOP" in text_of(values(pace=kept))
    by_formula = text_of(values(pace={**kept, "cache_flops": 0}))
    assert "on disk for train.cache_frozen" in by_formula
    assert "once for it" not in by_formula


def test_the_data_report_says_what_is_not_nothing() -> None:
    text = text_of(values())
    assert "rows read 2,400 rows kept 2,390 tokens 122,413 tokens that are trained on 47,587" in text
    assert r"rows that repeat an earlier one 7 between prompt and completion '\n' rows once packed 243" in text
    assert "98.4%" in text
    assert DATA["cut"] not in text


def test_modules_of_one_name_shape_rank_and_pattern_are_one_row() -> None:
    text = text_of(values())
    assert "q 30 x 20 4 2 2,500 q" in text
    assert "k 30 x 20 1 1,000 q" in text
    assert "head 30 x 20 4 1 1,000 q" in text
    assert "Modules by pattern: q 3, k 1" in text
    assert "All 4 modules" in text
    assert "layers.1.q linear 30 x 20 4 1,500 q lora" in text
    assert "trained whole: norm.5, 4,096" in text
    assert "norm.6" not in text
    assert "And 2 more parameters" in text


def test_warnings_and_findings_come_before_the_memory() -> None:
    text = text_of(values())
    start = text.index("Look at this first")
    assert start < text.index("'c_proj' catches two roles: - attention - mlp") < text.index("Memory, phase by phase")
    assert "vLLM : rank 24: no such rank; take 32. vllm/lora.py" in text[start : text.index("Memory, phase by phase")]


def test_other_plans_stand_beside_this_one() -> None:
    other = values(method="dora", memory=SMALL.to_json(), trainable_parameters=5_000_000)
    page = plan_page(values(compared={"other.yaml": other}))
    assert "other.yaml dora 4 5,000,000 0.0622 % 16.8 MB 25.0 GB" in " ".join(" ".join(parsed(page).itertext()).split())
    text = " ".join(" ".join(parsed(page).itertext()).split())
    assert "smallest step: other.yaml, 25.0 GB, 15.0 GB (38%) less than this plan" in text
    assert "adapter's file: the same, 16.8 MB" in text
    assert "middle: this plan fits with checkpointing, other.yaml fits with checkpointing" in text
    lines = rows_of(parsed(page), "Compared")
    assert list(lines) == ["this plan", "other.yaml"]
    assert sum(share for _, share in widths(lines["other.yaml"])) == pytest.approx(62.5)  # 25 of 40 GB


def test_of_common_devices_those_are_said_on_which_verdicts_differ() -> None:
    plans = {"one": values(where=asdict(Where())), "two": values(where=asdict(Where()))}
    assert verdicts(plans)[2:] == ["on every common device the verdicts are the same"]
    plans["two"]["fits"] = [*plans["one"]["fits"][:1], Fit("middle", "fits", 20 * GB, 40 * GB).to_json()]
    assert verdicts(plans)[2:] == ["middle: one fits with checkpointing, two fits"]


EMPTY: dict[str, dict[str, Any]] = {
    "Look at this first": {"warnings": [], "findings": []},
    "Compared": {"compared": {}},
    "Memory, phase by phase": {"memory": Forecast().to_json()},
    "Ways to run a step": {"ways": {}},
    "Devices": {"fits": [], "largest": {}},
    "Data": {"data": {}},
    "What is trained": {"modules": [], "trained_whole": [], "patterns": {}},
    "Advice": {"advice": []},
}


@pytest.mark.parametrize(("title", "changes"), EMPTY.items(), ids=list(EMPTY))
def test_what_is_missing_leaves_no_empty_section(title: str, changes: dict[str, Any]) -> None:
    def titles(plan: dict[str, Any]) -> list[str | None]:
        return [section.findtext("h2") for section in parsed(plan_page(plan)).iter("section")]

    full = titles(values(compared={"other": values()}))
    assert full.count(title) == 1
    assert titles(values(compared={"other": values()}) | changes) == [name for name in full if name != title]
    for element in parsed(plan_page(values(**changes))).iter():
        if element.tag in ("section", "table", "tbody", "ul", "dl", "figure", "details"):
            assert len(element), f"an empty {element.tag}"


def test_nothing_is_loaded_from_anywhere() -> None:
    sources = Advice("rank", "16", "see http://example.org/rank", "https://example.org/paper")
    page = plan_page(values(advice=[asdict(sources)]))
    assert "https://example.org/paper" in page  # a source is text
    for element in parsed(page).iter():
        assert element.tag not in ("script", "link", "img", "iframe", "object", "embed", "a", "base", "form")
        assert not {"src", "href", "srcset", "action", "data", "poster"} & set(element.attrib)
        assert not any(name.startswith("on") for name in element.attrib)
        assert "url(" not in element.get("style", "")
    style = parsed(page).findtext("head/style") or ""
    assert "@media (prefers-color-scheme: dark)" in style
    assert not re.search(r"url\(|@import|@font-face|https?:", style)
    assert """content="default-src 'none'; img-src data:; style-src 'unsafe-inline'\"""" in page


HOSTILE = "</style><script>alert(1)</script><img src=x onerror='a()'>\"' style=\"x\" & \x1b[31m \ud800"
NAMED = ("data", "largest", "patterns", "compared", "times")
"""Parts whose keys are names somebody chose."""


def with_text(found: Any, change: Callable[[str], str], named: bool = False) -> Any:
    """Return plain values with every text changed, names that are keys included."""
    if isinstance(found, dict):
        return {change(key) if named else key: with_text(inner, change, key in NAMED) for key, inner in found.items()}
    if isinstance(found, list):
        return [with_text(inner, change) for inner in found]
    return change(found) if isinstance(found, str) else found


def test_no_text_of_a_plan_can_be_markup() -> None:
    plan = values(compared={"other": values()}, quant="nf4")
    tame = parsed(plan_page(with_text(plan, lambda text: f"tame {text}")))
    wild_page = plan_page(with_text(plan, lambda text: f"{HOSTILE} {text}"))
    wild = parsed(wild_page)
    assert [element.tag for element in wild.iter()] == [element.tag for element in tame.iter()]
    assert [sorted(element.attrib) for element in wild.iter()] == [sorted(element.attrib) for element in tame.iter()]
    assert "".join(wild.itertext()).count("<script>alert(1)</script>") == "".join(tame.itertext()).count("tame ")
    assert "\x1b" not in wild_page
    assert wild_page.encode()  # half a character cannot be written


def test_a_model_named_script_is_harmless() -> None:
    page = plan_page(values(model="<script>alert('x')</script>"))
    assert "<script" not in page
    assert "<h1>&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;</h1>" in page
    assert "<title>Plan: &lt;script&gt;" in page


def test_only_what_a_tag_made_is_markup() -> None:
    inner = tag("b", "1 < 2")
    assert tag("p", inner, " & ", class_="a", title='"', lang=None) == (
        '<p class="a" title="&quot;"><b>1 &lt; 2</b> &amp; </p>'
    )
