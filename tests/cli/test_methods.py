"""`lorakit methods`, and the page of the documentation that says the same: docs/methods.md is what the registry says.

To write the tables anew: `python -m tests.cli.test_methods docs/methods.md`
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from lorakit.cli.methods import describe, describe_init
from lorakit.core.registry import inits, methods

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
SHORT = {"transposed-linear": "conv1d of GPT-2"}
WEIGHTS = {"linear", "transposed-linear", "embedding", "conv1d", "conv2d", "conv3d"}


def tables() -> list[str]:
    """Return the two tables of the page, as Markdown."""
    rows = [
        "| method | update | parameters at an (m, n) weight | layers | merges | PEFT | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for cls in methods().values():
        one = describe(cls)
        kinds = "all" if set(one["kinds"]) == WEIGHTS else ", ".join(SHORT.get(kind, kind) for kind in one["kinds"])
        merges, peft = "yes" if one["mergeable"] else "no", one["peft"] or ""
        cells = (f"`{one['name']}`", code(one["formula"]), code(one["parameters"]), kinds, merges, peft, one["paper"])
        rows.append("| " + " | ".join(cells) + " |")
    starts = ["| `init` | where the pair starts | measures first | paper |", "|---|---|---|---|"]
    for init in inits().values():
        one = describe_init(init)
        starts.append(f"| `{one['name']}` | {one['what']} | {one['needs'] or ''} | {one['paper']} |")
    return ["\n".join(rows), "\n".join(starts)]


def code(text: str) -> str:
    """Return a formula as code; a bar would end the cell."""
    return "`" + text.replace("|", "\\|") + "`"


def rewritten(page: str) -> str:
    """Return the page with its tables as the registry has them."""
    new = iter(tables())
    return re.sub(r"(?m)(?:^\|.*\n)+", lambda old: next(new) + "\n", page)


def test_the_page_says_what_the_registry_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == rewritten(page), "python -m tests.cli.test_methods docs/methods.md writes the tables anew"


def test_the_list_names_every_method_and_initialisation() -> None:
    from tests.cli.conftest import answer, invoke

    said = answer("methods")
    assert [one["name"] for one in said["methods"]] == list(methods())
    assert [one["name"] for one in said["inits"]] == list(inits())
    lora = next(one for one in said["methods"] if one["name"] == "lora")
    assert (lora["parameters"], lora["mergeable"], lora["servable"], lora["peft"]) == (
        "rank * (m + n)",
        True,
        True,
        "LORA",
    )
    shown = invoke("methods").stdout
    assert all(re.search(rf"^{re.escape(name)} ", shown, re.MULTILINE) for name in (*methods(), *inits()))


def test_one_method_is_explained_with_its_fields_and_a_misspelt_one_has_near_misses() -> None:
    from tests.cli.conftest import answer, invoke

    assert answer("methods", "dora")["fields"]["inner"]["name"] == "lora"
    assert answer("methods", "pissa")["starts_at_zero"] is False
    assert re.search(r"^  rank +16$", invoke("methods", "lora").stdout, re.MULTILINE)
    wrong = invoke("methods", "doar")
    assert (wrong.exit_code, wrong.stderr) == (
        2,
        "error: unknown method 'doar'; did you mean 'dora'?; lorakit methods lists them all\n",
    )


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
