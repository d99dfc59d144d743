"""The rules of the house, read from the source without importing it.

A design that only lives in a document drifts. `violations(root)` parses every file of a package tree and lists
what breaks the levels, the owners of heavy packages, or the page size. It takes the root as an argument, so the
tests can show it a small tree with one fault planted and see that fault named.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "lorakit"
LINES = 400

# Imports point down. The shop window sees every room below the command line; `__version__` is for everybody.
LEVELS: dict[str, float] = {
    "errors": 0,
    "core": 1,
    **dict.fromkeys(("methods", "hosts", "inits", "context", "kernels"), 2),
    **dict.fromkeys(("inject", "planning", "persist", "combining", "spectral", "data"), 3),
    **dict.fromkeys(("training", "serving", "report", "search"), 4),
    "__init__": 4.5,
    **dict.fromkeys(("cli", "studio"), 5),
    "__main__": 6,
}
BEHIND_REGISTRY = ("methods", "hosts")  # level 3 and up reach these through the registry
PACKERS = ("training/quantised.py", "training/quantizer.py")  # but these make layers in 4 bits, no choice among rows
REGISTRY = "core/registry.py"  # and it alone may look up, when asked

# Slow to import or optional, so they wait inside the function that needs them.
HEAVY = frozenset(
    (
        "accelerate bitsandbytes click datasets fastapi huggingface_hub jinja2 loralib matplotlib optuna pandas peft "
        "prometheus_client pyarrow rich sacrebleu scipy sentence_transformers sklearn starlette tensorboard "
        "tokenizers transformers typer uvicorn wandb"
    ).split()
)
AT_THE_TOP = {"training": HEAVY, "cli": frozenset({"typer", "click", "rich"})}  # rooms whose purpose is the package
OWNERS = {
    "bitsandbytes": ("hosts/bnb.py", "hosts/bnb_kernels.py", "training/optimizers.py"),  # layers, kernels, optimizers
    "matplotlib": ("report/plots.py",),
    **dict.fromkeys(("fastapi", "uvicorn", "starlette"), ("serving/http/", "studio/")),
}
TRAINER = frozenset("Trainer Seq2SeqTrainer TrainerCallback TrainerControl TrainerState TrainingArguments".split())
IMPORTERS = frozenset({"need", "import_module"})  # calls that import the module named by their first argument


@dataclass(frozen=True)
class Source:
    """One file of the package: where it stands and what it says."""

    path: str  # posix, relative to the package
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The folder, or the stem of a file that stands beside the folders."""
        return self.path.split("/")[0].removesuffix(".py")

    @property
    def module(self) -> list[str]:
        """The dotted name of the package this file's relative imports start from, in parts."""
        return [PACKAGE, *self.path.split("/")[:-1]]


@dataclass(frozen=True)
class Import:
    """One name brought in: `module` and, for a from-import, `name`; `top` when it runs as the file is imported."""

    line: int
    module: str
    name: str | None
    top: bool

    @property
    def package(self) -> str:
        return self.module.split(".")[0]

    @property
    def room(self) -> str | None:
        """The room of the package this import reaches, `__init__` for the shop window, None for a foreign package."""
        if self.package != PACKAGE:
            return None
        _, *below = self.module.split(".")
        if below:
            return below[0]
        return self.name if self.name in LEVELS else "__init__"


def violations(root: Path) -> list[str]:
    """Return every broken rule under the package folder `root`, as `path:line: what and why`, sorted by path."""
    found = []
    for file in sorted(root.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        source = Source(file.relative_to(root).as_posix(), text, ast.parse(text))
        found += [f"{source.path}:{line}: {what}" for rule in RULES for line, what in rule(source)]
    return found


def has_a_place(source: Source) -> Iterator[tuple[int, str]]:
    if source.room not in LEVELS:
        yield 1, f"'{source.room}' has no level; give it one in the design and in LEVELS"


def opens_with_its_reason(source: Source) -> Iterator[tuple[int, str]]:
    if not ast.get_docstring(source.tree):
        yield 1, "no docstring; open with two to six lines: what this file is and why it exists"


def fits_on_a_few_pages(source: Source) -> Iterator[tuple[int, str]]:
    if (lines := len(source.text.splitlines())) > LINES:
        yield lines, f"{lines} lines; {LINES} is the ceiling, longer means two ideas"


def imports_point_down(source: Source) -> Iterator[tuple[int, str]]:
    here = source.room
    for item in imports(source):
        there = item.room
        if there is None or there == here or (there == "__init__" and item.name == "__version__"):
            continue
        if source.path == REGISTRY and there in BEHIND_REGISTRY and not item.top:
            continue
        if here not in LEVELS or there not in LEVELS:
            if there not in LEVELS:
                yield item.line, f"imports '{there}', which has no level"
        elif LEVELS[there] > LEVELS[here]:
            yield item.line, f"'{here}' imports up, from '{there}'"
        elif LEVELS[there] == LEVELS[here]:
            yield item.line, f"'{here}' imports its sibling '{there}'; siblings are strangers"
        elif there in BEHIND_REGISTRY and LEVELS[here] >= 3 and here != "__init__" and source.path not in PACKERS:
            yield item.line, f"'{here}' reaches '{there}' directly; go through core.registry"


def heavy_packages_wait(source: Source) -> Iterator[tuple[int, str]]:
    allowed = AT_THE_TOP.get(source.room, frozenset())
    for item in imports(source):
        if item.top and item.package in HEAVY - allowed:
            yield item.line, f"imports {item.package} while being imported; move it into the function that needs it"


def heavy_packages_have_owners(source: Source) -> Iterator[tuple[int, str]]:
    for item in imports(source):
        owners = OWNERS.get(item.package)
        if owners and not any(source.path.startswith(owner) for owner in owners):
            yield item.line, f"names {item.package}, which only {' and '.join(owners)} may"


def trainer_stays_in_train(source: Source) -> Iterator[tuple[int, str]]:
    if source.room == "training":
        return
    for item in imports(source):
        if item.package == "transformers" and (item.name in TRAINER or "trainer" in item.module):
            yield item.line, "names transformers' Trainer, which only training/ may"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in TRAINER:
            yield node.lineno, "names transformers' Trainer, which only training/ may"


def only_the_command_line_prints(source: Source) -> Iterator[tuple[int, str]]:
    if source.room == "cli":
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno, "prints; return the value or log it, print only in cli/"


RULES = (
    has_a_place,
    opens_with_its_reason,
    fits_on_a_few_pages,
    imports_point_down,
    heavy_packages_wait,
    heavy_packages_have_owners,
    trainer_stays_in_train,
    only_the_command_line_prints,
)


def imports(source: Source) -> Iterator[Import]:
    """Yield every import of the file, relative ones resolved, `need("package")` and type-only ones included."""
    yield from _walk(source.tree.body, source.module, top=True)


def _walk(nodes: list[ast.stmt] | list[ast.AST], here: list[str], top: bool) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, None, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(node.lineno, module, alias.name, top) for alias in node.names)
        elif isinstance(node, ast.Call) and (name := _imported_by_call(node)):
            yield Import(node.lineno, name, None, top)
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            yield from _walk(list(node.body), here, top=False)
            yield from _walk(list(node.orelse), here, top)
            continue
        runs_later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(list(ast.iter_child_nodes(node)), here, top and not runs_later)


def _imported_by_call(call: ast.Call) -> str | None:
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    first = call.args[0] if call.args else None
    if called in IMPORTERS and isinstance(first, ast.Constant) and isinstance(first.value, str):
        return first.value
    return None


def _is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", "")) == "TYPE_CHECKING"
