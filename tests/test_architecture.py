"""The house keeps its rules, and the checker that says so has seen each of them broken."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lorakit
from tests.architecture import HEAVY, LEVELS, LINES, violations

ROOT = Path(__file__).parents[1] / "src" / "lorakit"
REASON = '"""A reason."""\n'


def plant(root: Path, path: str, text: str) -> list[str]:
    """Write one file into an otherwise faultless package and return what the checker says."""
    for name in ("__init__.py", "errors.py", "core/site.py", "methods/lora.py", "training/trainer.py"):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(REASON)
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return violations(root)


def test_the_house_keeps_its_rules() -> None:
    found = violations(ROOT)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        # imports point down
        ("errors.py", "from lorakit.core import site", "'errors' imports up, from 'core'"),
        ("core/host.py", "from lorakit.methods.lora import Lora", "'core' imports up, from 'methods'"),
        ("core/host.py", "from ..methods import lora", "'core' imports up, from 'methods'"),
        ("core/host.py", "from .. import methods", "'core' imports up, from 'methods'"),
        ("core/host.py", "import lorakit.training.trainer", "'core' imports up, from 'training'"),
        ("core/host.py", "def f():\n    from lorakit import inject", "'core' imports up, from 'inject'"),
        ("core/host.py", "if TYPE_CHECKING:\n    from lorakit import inject", "'core' imports up, from 'inject'"),
        ("core/host.py", "need('lorakit.inject.attach', 'train')", "'core' imports up, from 'inject'"),
        ("core/host.py", "def f():\n    need('lorakit.methods', '')", "'core' imports up, from 'methods'"),
        ("core/registry.py", "import_module('lorakit.methods')", "'core' imports up, from 'methods'"),
        ("core/registry.py", "def f():\n    import lorakit.inject", "'core' imports up, from 'inject'"),
        ("persist/peft.py", "from lorakit import attach", "'persist' imports up, from '__init__'"),
        ("persist/peft.py", "import lorakit", "'persist' imports up, from '__init__'"),
        ("training/trainer.py", "from lorakit.cli import main", "'training' imports up, from 'cli'"),
        ("__init__.py", "from lorakit.cli import main", "'__init__' imports up, from 'cli'"),
        # siblings are strangers
        ("methods/dora.py", "from lorakit.hosts.ops import Linear", "'methods' imports its sibling 'hosts'"),
        ("inject/merge.py", "from lorakit.persist import native", "'inject' imports its sibling 'persist'"),
        ("serving/batching/bank.py", "from ...training import trainer", "'serving' imports its sibling 'training'"),
        ("studio/app.py", "from lorakit.cli import main", "'studio' imports its sibling 'cli'"),
        # the registry stands between
        ("inject/attach.py", "from lorakit.methods.lora import Lora", "'inject' reaches 'methods' directly"),
        ("training/trainer.py", "from lorakit import hosts", "'training' reaches 'hosts' directly"),
        ("cli/train.py", "def f():\n    import lorakit.methods.lora", "'cli' reaches 'methods' directly"),
        # every room has a level
        ("helpers/misc.py", "x = 1", "'helpers' has no level"),
        ("core/host.py", "from lorakit.helpers.misc import x", "imports 'helpers', which has no level"),
        # heavy packages wait, and have owners
        ("persist/hub.py", "import transformers", "imports transformers while being imported"),
        ("persist/hub.py", "from peft.utils import x", "imports peft while being imported"),
        ("persist/hub.py", "class A:\n    import datasets", "imports datasets while being imported"),
        ("persist/hub.py", "try:\n    import rich\nexcept ImportError:\n    pass", "imports rich while being imported"),
        ("persist/hub.py", "peft = need('peft', 'dev')", "imports peft while being imported"),
        ("persist/hub.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import peft", "imports peft while being imported"),
        ("data/show.py", "import typer", "imports typer while being imported"),
        ("cli/train.py", "import transformers", "imports transformers while being imported"),
        ("report/plots.py", "import matplotlib.pyplot", "imports matplotlib while being imported"),
        ("training/curve.py", "def f():\n    import matplotlib", "names matplotlib, which only report/plots.py may"),
        ("persist/q.py", "def f():\n    need('bitsandbytes', 'quant')", "names bitsandbytes, which only hosts/bnb.py"),
        (
            "serving/batching/engine.py",
            "def f():\n    import fastapi",
            "names fastapi, which only serving/http/ and studio/ may",
        ),
        # transformers' Trainer
        ("data/rows.py", "def f():\n    from transformers import Trainer", "names transformers' Trainer"),
        ("search/run.py", "def f():\n    import transformers.trainer_utils", "names transformers' Trainer"),
        ("search/run.py", "def f(t):\n    return t.TrainingArguments()", "names transformers' Trainer"),
        # a page with a reason, and no bare print
        ("core/host.py", "print(1)", "prints; return the value or log it"),
        ("core/host.py", "def f():\n    if x:\n        print(1)", "prints; return the value or log it"),
        ("core/host.py", "\n" * LINES, f"{LINES + 1} lines; {LINES} is the ceiling"),
    ],
)
def test_a_planted_fault_is_named(tmp_path: Path, path: str, line: str, complaint: str) -> None:
    found = plant(tmp_path, path, REASON + line)
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:"), found
    assert complaint in found[0]


@pytest.mark.parametrize("text", ["", "import torch\n", '"""  """\n', "# a comment is no reason\n"])
def test_a_file_without_its_reason_is_named(tmp_path: Path, text: str) -> None:
    found = plant(tmp_path, "core/host.py", text)
    assert len(found) == 1
    assert "core/host.py:1: no docstring" in found[0]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("core/host.py", "from lorakit.errors import SpecError\nfrom .site import Site\nimport torch"),
        ("core/registry.py", "def f():\n    return importlib.import_module('lorakit.methods')"),
        ("methods/dora.py", "from . import lora\nfrom .lora import Lora\nfrom ..core import site"),
        ("inject/attach.py", "from lorakit.core.registry import methods\nfrom lorakit.kernels import lora"),
        ("training/trainer.py", "from transformers import Trainer\nimport accelerate\nfrom lorakit import inject"),
        ("training/trainer.py", "class Ours(transformers.Trainer):\n    pass"),
        ("persist/hub.py", "def f():\n    import peft"),
        ("persist/hub.py", "async def f():\n    need('transformers', 'train')"),
        ("persist/hub.py", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("persist/hub.py", "if typing.TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("persist/card.py", "from lorakit import __version__"),
        ("hosts/bnb.py", "def f():\n    need('bitsandbytes', 'quant')"),
        ("report/plots.py", "def f():\n    import matplotlib.pyplot"),
        ("studio/app.py", "def f():\n    import fastapi"),
        ("cli/__init__.py", "import typer\nfrom lorakit import attach\nprint(1)"),
        ("cli/train.py", "def f():\n    from lorakit.training.trainer import train"),
        (
            "__init__.py",
            "if TYPE_CHECKING:\n    from .methods.lora import Lora\n    from .training.trainer import train",
        ),
        ("__main__.py", "from lorakit.cli import main"),
        ("core/host.py", "\n" * (LINES - 1)),
    ],
)
def test_what_the_design_allows_passes(tmp_path: Path, path: str, line: str) -> None:
    assert plant(tmp_path, path, REASON + line) == []


def test_no_room_has_the_name_of_a_public_verb() -> None:
    # Python would bind the folder over the verb, depending on what was imported first (docs/adr/0002).
    assert not set(lorakit.__all__) & set(LEVELS)


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    found = plant(tmp_path, "core/host.py", "import peft\nprint(1)\nfrom lorakit import inject")
    assert [item.split(":")[1] for item in found] == ["1", "3", "1", "2"], found


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=60)


def test_importing_lorakit_is_instant_and_leaves_torch_alone() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import lorakit; seconds = time.perf_counter() - start;"
        "print(seconds, *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    runs = [python("-c", code).stdout.split() for _ in range(5)]
    assert not {"torch", "numpy", *HEAVY} & set(runs[0])
    # The minimum: whatever else the machine does only ever adds time.
    assert min(float(seconds) for seconds, *_ in runs) < 0.050


def test_help_answers_before_one_wonders() -> None:
    command = Path(sys.executable).with_name("lorakit")
    assert command.exists(), f"{command} is missing; run scripts/setup"
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        answer = subprocess.run(
            [command, "--help"], capture_output=True, text=True, timeout=60, env={**os.environ, "NO_COLOR": "1"}
        )
        seconds.append(time.perf_counter() - start)
        assert answer.returncode == 0, answer.stderr
        assert "quickstart" in answer.stdout
        if seconds[-1] < 0.3:  # one quick answer proves it can; the others met a busy machine
            return
    pytest.fail(f"lorakit --help took {min(seconds):.2f} s at best; see python -X importtime -m lorakit.cli")
