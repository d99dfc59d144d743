"""A method from outside, examples/hira.py: the laws, PEFT, recipes and files take it as one of the package's own."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.core import registry
from lorakit.core.method import Method
from lorakit.core.spec import AdapterSpec, Targets
from lorakit.errors import SpecError
from lorakit.inject.attach import adapters_named, attach
from lorakit.inject.merge import merge
from lorakit.persist import load
from tests.conftest import ROOT
from tests.law.cases import DENSE, KINDS, Net, dense, inputs, jitter, weight_of
from tests.methods.test_registry import SITES, expected
from tests.tolerances import assert_close
from tests.training.samples import pairs, save_base, write_rows

FILE = ROOT / "examples" / "hira.py"


@pytest.fixture
def hira(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Method]:
    """The example's class, registered for one test."""
    monkeypatch.setattr(registry, "_registered", {})
    cls: Callable[..., Method] = runpy.run_path(str(FILE))["HiRA"]
    return cls


def adapted(method: Method, kind: str) -> Net:
    """Return a one-layer model with the method attached, its tensors moved off the start."""
    model = Net(KINDS[kind].layer())
    attach(model, AdapterSpec(method, Targets("layer")))
    jitter(adapters_named(model, "default")[0])
    return model


def test_one_case_by_hand(hira: Callable[..., Method]) -> None:
    # W = [[1, 2], [3, 4]], A = [[1, -1]], B = [[2], [3]]: B A = [[2, -2], [3, -3]], dW = [[2, -4], [9, -12]]
    p = {"down": torch.tensor([[1.0, -1.0]]), "up": torch.tensor([[2.0], [3.0]])}
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert hira(1).delta(p, weight).tolist() == [[2.0, -4.0], [9.0, -12.0]]  # type: ignore[attr-defined]


def test_an_update_of_rank_one_factors_has_the_rank_of_the_weight(hira: Callable[..., Method]) -> None:
    p, weight = {"down": torch.rand(1, 6) + 1, "up": torch.rand(6, 1) + 1}, torch.randn(6, 6)
    assert int(torch.linalg.matrix_rank(hira(1).delta(p, weight))) == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [kind for kind in DENSE if kind != "module"])
def test_the_laws_hold_on_every_layer_kind(hira: Callable[..., Method], kind: str) -> None:
    model, x = Net(KINDS[kind].layer()), inputs(kind)
    before = model(x)
    attach(model, AdapterSpec(hira(2), Targets("layer")))
    assert torch.equal(model(x), before)
    adapter = adapters_named(model, "default")[0]
    jitter(adapter)
    y = model(x)
    assert not torch.allclose(y, before)
    assert_close(y, dense(model, x, weight_of(model) + adapter.delta(weight_of(model))))
    merge(model)
    assert_close(model(x), y)


def test_its_count_is_what_it_trains(hira: Callable[..., Method]) -> None:
    declared = hira(3).tensors(SITES["linear"]).values()
    assert sum(d.numel for d in declared) == expected(hira(3), SITES["linear"]) == 3 * (8 + 12)


@pytest.mark.parametrize("kind", ["linear", "transposed-linear", "embedding", "conv2d"])
def test_outputs_equal_peft_s(hira: Callable[..., Method], kind: str) -> None:
    from peft import HiraConfig, get_peft_model

    ours = adapted(hira(4), kind)
    mine = adapters_named(ours, "default")[0]
    bare: Any = Net(KINDS[kind].layer())
    bare.layer.load_state_dict({k: v for k, v in ours.layer.state_dict().items() if "adapters" not in k})
    config = HiraConfig(r=4, target_modules=["layer"], fan_in_fan_out=kind == "transposed-linear")
    theirs: Any = get_peft_model(bare, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "hira_" in name:
                values = mine.get_parameter("down" if "_A" in name else "up")
                parameter.copy_(values.reshape(parameter.shape))
    x = inputs(kind)
    assert_close(ours(x), theirs(x))


def test_a_recipe_names_it_trains_it_and_its_file_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    base, data, run = save_base(tmp_path / "base"), write_rows(tmp_path / "train.jsonl", pairs(16)), tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [str(FILE), data, "--base", str(base), "--output", str(run)])
    runpy.run_path(str(FILE), run_name="__main__")
    assert "loss" in capsys.readouterr().out
    trained = load(run / "adapter")
    assert trained.spec.name == "hira"
    assert any(update.tensors["up"].any() for update in trained.updates)


def test_a_rank_that_cannot_be_is_refused(hira: Callable[..., Method]) -> None:
    with pytest.raises(SpecError, match="rank must be a whole number of at least 1, not 0"):
        hira(0)


def test_an_installed_package_s_method_is_known_in_every_process(tmp_path: Path) -> None:
    script = (
        "from lorakit.core.registry import method, methods\n"
        "from lorakit.training.recipe import make_recipe\n"
        "print(make_recipe({'adapter': {'method': 'hira', 'rank': 4}}).adapter.build_method(), 'hira' in methods())"
    )
    bare = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert "unknown method 'hira'" in bare.stderr
    install(tmp_path, "hira = my_methods:HiRA")
    (tmp_path / "my_methods.py").write_text(FILE.read_text())
    known = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert known.stdout.strip() == "HiRA(rank=4) True", known.stderr


def test_an_installed_method_that_cannot_be_imported_is_named_and_hinders_no_other(tmp_path: Path) -> None:
    install(tmp_path, "hira = my_methods:HiRA")
    script = (
        "from lorakit.core.registry import method\n"
        "print(method('lora').name)\n"
        "try: method('hira')\n"
        "except Exception as e: print(e)"
    )
    told = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == [
        "lora",
        "the method 'hira' of my-methods (my_methods:HiRA) cannot be used: No module named 'my_methods'; "
        "mend my-methods or uninstall it",
    ]


def install(folder: Path, entry: str) -> None:
    """Write what pip leaves of a package with one entry point; python -c has `folder` on its path."""
    info = folder / "my_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lorakit.methods]\n{entry}\n")
