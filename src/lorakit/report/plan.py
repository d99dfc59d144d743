"""The page of `lorakit plan`: what a run will train, hold and take, on one page to keep or to send around.

It draws the plain values of `--json` and works nothing out but sums, so the page, the object and the terminal agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorakit import __version__
from lorakit.core.site import layer_of
from lorakit.errors import few
from lorakit.planning.devices import OVERHEAD
from lorakit.planning.fitting import TOO_SMALL, VERDICTS
from lorakit.report.html import (
    NOTHING,
    Bar,
    Html,
    items,
    join,
    legend,
    note,
    page,
    row,
    section,
    stacked,
    table,
    tag,
    width,
)
from lorakit.report.words import amount, duration, operations, size

Values = Mapping[str, Any]

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "temporaries", "overhead")
WAYS = {
    "plain": "plain",
    "checkpointing": "with checkpointing",
    "4 bits": "in 4 bits",
    "4 bits and checkpointing": "with both",
}
FEW = 6
"""Parameters trained whole that are named before the rest is only counted."""
GROUPED = ("module", "weight", "rank", "times", "trains", "pattern")
"""The columns of `grouped`."""
EACH = ("module", "kind", "weight", "rank", "trains", "pattern", "method")
"""The columns of `each`."""
COMPARED = ("", "method", "modules", "trains", "share", "file", "step")
"""The columns of `compared`."""
DATA = {
    "source": "file",
    "format": "format",
    "rows": "rows read",
    "kept": "rows kept",
    "tokens": "tokens",
    "trained_tokens": "tokens that are trained on",
    "longest": "longest row, in tokens",
    "max_length": "longest that is allowed",
    "dropped_overlong": "rows dropped, too long",
    "cut": "rows cut off, too long",
    "split": "rows split, too long",
    "tokens_lost": "tokens lost by that",
    "duplicates": "rows that repeat an earlier one",
    "empty_completions": "rows with an empty completion",
    "special_tokens": "rows with special tokens in their text",
    "special_names": "these special tokens",
    "label_rows": "rows of each label",
    "separator_used": "between prompt and completion",
    "packs": "rows once packed",
    "row_length": "room of such a row, in tokens",
    "packing_efficiency": "share of their room that is filled",
    "tokens_shared": "tokens less by shared prompts",
}
"""What is said of each field of a data report, in this order."""


def plan_page(plan: Mapping[str, Any]) -> str:
    """Return the HTML page of a plan, complete in itself: no script, nothing from elsewhere.

    Args:
        plan: the values of `PlannedRun.to_json()`; under "compared", where present, those of others by name. What
            is empty has no section.
    """
    return page(
        f"Plan: {plan['model']}",
        _opening(plan),
        section("Look at this first", _warnings(plan)),
        section("Compared", *_compared(plan)),
        section("Memory, phase by phase", *_memory(plan)),
        section("Ways to run a step", *_ways(plan)),
        section("Devices", *_devices(plan)),
        section("Work and time", _work(plan)),
        section("Data", _data(plan["data"])),
        section("What is trained", *_modules(plan)),
        section("Advice", _advice(plan)),
        tag("footer", f"lorakit {__version__}. GB are 10^9 bytes, GiB are 2^30 bytes."),
    )


def _opening(plan: Values) -> Html:
    kind = f" packed into {plan['quant']}" if plan["quant"] else ""
    how = "trained whole" if plan["method"] == "none" else f"trained by {plan['method']}"
    batch = plan["batch"]
    packed = ", packed" if batch["packed"] else ""
    tiles = {
        "trained": f"{plan['trainable_parameters']:,}",
        "of all parameters": f"{plan['percent']:.4g} %",
        "the adapter's file": size(plan["adapter_bytes"]),
        "the most a step holds": size(plan["memory"]["step"]["total"]),
    }
    return tag(
        "header",
        tag("h1", plan["model"]),
        tag("p", f"{plan['total_parameters']:,} parameters, {plan['dtype']}{kind}, {how} in "
            f"batches of {batch['rows']:,} x {batch['length']:,} tokens{packed}."),
        tag("dl", *(tag("div", tag("dt", what), tag("dd", value)) for what, value in tiles.items()), class_="tiles"),
    )  # fmt: skip


def _warnings(plan: Values) -> Html:
    texts = list(plan["warnings"]) + [
        join(tag("strong", one["tool"]), f": {one['what']}: {one['why']}; {one['remedy']}. ",
             tag("small", one["source"]))
        for one in plan["findings"]
    ]  # fmt: skip
    return items(texts, "warnings")


def _compared(plan: Values) -> Iterator[Html]:
    if not plan.get("compared"):
        return
    all_of_them: dict[str, Values] = {"this plan": plan, **plan["compared"]}
    yield table(COMPARED, compared(all_of_them), numbers=range(2, 7))
    yield items(verdicts(all_of_them))
    bars = [_bar(name, one["memory"]["step"]) for name, one in all_of_them.items()]
    yield from _drawn("What a step holds of each", bars)


def _memory(plan: Values) -> Iterator[Html]:
    phases = {name: parts for name, parts in plan["memory"].items() if parts["total"]}
    yield from _drawn("What one device holds at the peak of each phase", [_bar(*phase) for phase in phases.items()])
    rows = [
        (part, *(_exact(phases[name][part]) for name in phases))
        for part in (*PARTS, "total")
        if any(phases[name][part] for name in phases)
    ]
    yield table(("", *phases), rows, numbers=range(1, len(phases) + 1), class_="exact")


def _ways(plan: Values) -> Iterator[Html]:
    ways = {name: plan["ways"][name] for name in WAYS if name in plan["ways"]}
    own = next((name for name, forecast in ways.items() if forecast == plan["memory"]), None)
    bars = [_bar(WAYS[name], forecast["step"], own == name) for name, forecast in ways.items()]
    yield from _drawn("What a step holds", bars)


def _bar(name: str, parts: Values, own: bool = False) -> Bar:
    return name, {part: parts[part] for part in PARTS}, ", this recipe" if own else ""


def _drawn(title: str, bars: list[Bar]) -> Iterator[Html]:
    """Yield a chart of bars on one scale, and which colour is what."""
    if drawn := stacked(bars):
        used = [part for part in PARTS if any(parts[part] for _, parts, _ in bars)]
        yield tag("figure", tag("figcaption", title), drawn, legend(used))


def _exact(count: int) -> Html:
    return join(size(count), " ", tag("small", f"{count:,}")) if count else NOTHING


def _devices(plan: Values) -> Iterator[Html]:
    if not plan["fits"]:
        return
    yield tag("div", *map(_device, plan["fits"]), class_="bars devices")
    yield from (tag("p", line) for line in largest(plan))
    yield note(
        "A whole bar is what the device has; filled is what the first way that fits needs on each device, or the "
        f"nearest to fitting. {size(OVERHEAD)} that a device needs itself is counted."
    )


def _device(fit: Values) -> Html:
    needed, limit = fit["needed"], fit["limit"]
    kind = "not" if fit["verdict"] == TOO_SMALL else "fits" if fit["verdict"] == VERDICTS["plain"] else "partly"
    room = max(needed, limit)
    filled = [tag("span", class_=kind, style=width(min(needed, limit) / room))]
    if needed > limit:
        filled.append(tag("span", class_="over", style=width((needed - limit) / room)))
    mark = {"fits": "✓", "partly": "◐", "not": "✗"}[kind]
    left = f"{size(limit - needed)} left" if needed <= limit else f"{size(needed - limit)} too much"
    numbers = f"{size(needed)} of {size(limit)} ({limit / 2**30:.1f} GiB), {left}"
    drawing = tag("div", *filled, class_="track", role="img", aria_label=numbers)
    verdict = tag("strong", f"{mark} {fit['verdict']}", class_=kind)
    return row(join(tag("span", fit["device"]), " ", verdict), drawing, numbers)


def _work(plan: Values) -> Html:
    pace = plan["pace"]
    facts = {"a step": operations(pace["flops_per_step"])}
    if pace["steps"] is not None:
        facts["steps"] = f"{pace['steps']:,}"
    if pace["tokens"] is not None:
        facts["tokens, with padding"] = f"{pace['tokens']:,}"
    if pace["cache_bytes"]:
        facts["on disk for train.cache_frozen"] = size(pace["cache_bytes"])
        if pace["cache_flops"]:  # by formula it stays in the steps
            facts["once for it"] = operations(pace["cache_flops"])
    return join(_facts(facts), *(tag("p", line) for line in times(plan)))


def _facts(facts: Mapping[str, str]) -> Html:
    pairs = (tag("div", tag("dt", what), tag("dd", value)) for what, value in facts.items())
    return tag("dl", *pairs, class_="facts")


def _data(reports: Mapping[str, Values]) -> Html:
    rows = [
        (said, *(_datum(field, report[field]) for report in reports.values()))
        for field, said in DATA.items()
        if any(report[field] for report in reports.values())
    ]
    return table(("", *reports), rows, class_="data")


def _datum(field: str, value: Any) -> str:
    if value is None:
        return ""
    if field == "packing_efficiency":
        return f"{value:.1%}"
    if field == "separator_used":
        return repr(value)
    if field == "label_rows":
        return few([f"{name!r} {rows:,}" for name, rows in value.items()], 10)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _modules(plan: Values) -> Iterator[Html]:
    modules = plan["modules"]
    yield table(GROUPED, grouped(modules), numbers=(2, 3, 4), class_="modules")
    if len(plan["patterns"]) > 1:
        yield note("Modules by pattern: " + ", ".join(f"{name} {hits:,}" for name, hits in plan["patterns"].items()))
    whole = plan["trained_whole"]
    yield items(f"trained whole: {one['name']}, {one['parameters']:,}" for one in whole[:FEW])
    if len(whole) > FEW:
        yield note(f"And {len(whole) - FEW} more parameters of the base are trained whole.")
    if modules:
        listed = table(EACH, each(modules), numbers=(3, 4), class_="modules")
        yield tag("details", tag("summary", f"All {len(modules):,} modules"), listed)


def each(modules: Sequence[Values]) -> list[tuple[str, ...]]:
    """Return a row for each module."""
    return [
        (m["path"], m["kind"], _shape(m), _rank(m), f"{m['parameters']:,}", m["pattern"], m["method"]) for m in modules
    ]


def compared(plans: Mapping[str, Values]) -> list[tuple[str, ...]]:
    """Return a row for each plan by its name."""
    return [
        (name, one["method"], f"{len(one['modules']):,}", f"{one['trainable_parameters']:,}",
         f"{one['percent']:.3g} %", size(one["adapter_bytes"]), size(one["memory"]["step"]["total"]))
        for name, one in plans.items()
    ]  # fmt: skip


def verdicts(plans: Mapping[str, Values]) -> list[str]:
    """Return what a comparison comes to: whose step and which adapter is the smallest, and what fits on which device.

    Of devices that nobody named only those are said on which the verdicts differ.
    """
    lines = [
        _least(plans, "step", {name: one["memory"]["step"]["total"] for name, one in plans.items()}),
        _least(plans, "adapter's file", {name: one["adapter_bytes"] for name, one in plans.items()}),
    ]
    by_device: dict[str, dict[str, str]] = {}
    for name, one in plans.items():
        for fit in one["fits"]:
            by_device.setdefault(fit["device"], {})[name] = fit["verdict"]
    asked = any(one["where"]["devices"] for one in plans.values())
    differing = {device: said for device, said in by_device.items() if asked or len(set(said.values())) > 1}
    told = [f"{device}: " + ", ".join(f"{n} {v}" for n, v in said.items()) for device, said in differing.items()]
    return lines + (told or ["on every common device the verdicts are the same"])


def _least(plans: Mapping[str, Values], what: str, sizes: Mapping[str, int]) -> str:
    """Return whose size is the smallest, and how much smaller than the largest."""
    low, high = min(sizes, key=lambda name: sizes[name]), max(sizes, key=lambda name: sizes[name])
    if sizes[low] == sizes[high]:
        return f"{what}: the same, {size(sizes[low])}"
    least = sizes[high] - sizes[low]
    return f"smallest {what}: {low}, {size(sizes[low])}, {size(least)} ({least / sizes[high]:.0%}) less than {high}"


def largest(plan: Values) -> list[str]:
    """Return the largest batch and context on each device that was named, and how the step is run then."""
    lines = []
    for name, most in plan["largest"].items():
        how = "as the recipe is" if most["way"] == plan["own"] else VERDICTS[most["way"]].removeprefix("fits").strip()
        if not most["rows"] and not most["length"]:
            lines.append(f"on {name} not even one short row fits {how}")
            continue
        rows = "1 row" if most["rows"] == 1 else f"{most['rows']:,} rows"
        length = plan["batch"]["length"]
        lines.append(
            f"largest on {name}, {how or 'plain'}: {rows} of {length:,} tokens, or one row of {most['length']:,}"
        )
    return lines


def times(plan: Values) -> list[str]:
    """Return how long the run takes on each device, with its price, and which of those that were named have no time."""
    pace, lines = plan["pace"], []
    for name, one in pace["times"].items():
        took, bill = one["duration"], one["bill"]
        said = {"kWh": bill["kwh"], "for energy": bill["energy_price"], "for the devices": bill["hire"]}
        cost = "".join(f", {amount(value)} {what}" for what, value in said.items() if value is not None)
        between = f"{duration(took['fastest'])} to {duration(took['slowest'])}"
        lines.append(f"on {name} about {duration(took['seconds'])} ({between}){cost}: {took['reason']}")
    where = plan["where"]
    priced = any(where[name] is not None for name in ("watts", "price_per_kwh", "price_per_hour"))
    if priced and not pace["times"]:
        rows = ["rows to train on (data.train)"] if pace["steps"] is None else []
        speed = [] if where["devices"] else ["a device of known speed (--device, or --calibrate on it)"]
        of = " and ".join([*rows, *speed]) or "a device of known speed"
        lines.append(f"no energy and no price: they follow from the time, which asks for {of}")
    named = [fit["device"] for fit in plan["fits"]] if plan["where"]["devices"] and pace["steps"] is not None else []
    unknown = [name for name in named if name not in pace["times"]]
    if unknown and pace["times"].keys() <= set(named):  # else it was measured
        lines.append(f"no time on {', '.join(unknown)}: no throughput is known in {plan['dtype']}; --calibrate there")
    return lines


def grouped(modules: Sequence[Values]) -> list[tuple[str, ...]]:
    """Return a row for each kind of module: those of one name, shape, rank and pattern in all layers."""
    times: Counter[tuple[str, ...]] = Counter()
    numbers: Counter[tuple[str, ...]] = Counter()
    for m in modules:
        place = layer_of(m["path"])
        name = m["path"] if place is None else m["path"].partition(f"{place[0]}.{place[1]}.")[2] or place[0]
        key = (name, _shape(m), _rank(m), m["pattern"])
        times[key] += 1
        numbers[key] += m["parameters"]
    return [
        (name, shape, rank, f"{times[key]:,}", f"{numbers[key]:,}", pattern)
        for key in times
        for name, shape, rank, pattern in [key]
    ]


def _shape(module: Values) -> str:
    return " x ".join(map(str, module["shape"]))


def _rank(module: Values) -> str:
    return "" if module["rank"] is None else str(module["rank"])


def _advice(plan: Values) -> Html:
    rows = [(line["topic"], line["value"], line["reason"], line["source"]) for line in plan["advice"]]
    return table(("about", "advice", "because", "source"), rows, class_="prose")
