"""The plain loop is the oracle: what the Trainer adds may not change a single loss."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from lorakit import AdapterSpec, LoRA
from lorakit.training.events import read_events
from lorakit.training.run import train
from tests.conftest import ROOT
from tests.training.samples import recipe_of

plain_loop = runpy.run_path(str(ROOT / "examples" / "plain_loop.py"))


@pytest.mark.parametrize("up_ratio", [1.0, 16.0])
def test_the_trainer_has_the_loss_curve_of_the_plain_loop(base: Path, tmp_path: Path, up_ratio: float) -> None:
    recipe = recipe_of(base, tmp_path, train__epochs=2.5, train__batch_size=10, train__up_ratio=up_ratio)
    train(recipe)
    ours = [event["loss"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "step"]
    plain = plain_loop["losses"](
        str(base),
        recipe.data.train,
        AdapterSpec(LoRA(rank=4, alpha=8)),
        steps=13,
        batch=10,
        lr=5e-3,
        up_ratio=up_ratio,
    )
    assert ours == pytest.approx(plain, rel=1e-5)  # one sum of logs in fp32, taken in two orders
    assert ours[-1] < ours[0] - 0.02


def test_a_file_that_is_not_there_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["plain_loop.py", "absent.jsonl"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "examples" / "plain_loop.py"), run_name="__main__")
    assert "error: absent.jsonl: no such file or folder" in capsys.readouterr().err


def test_the_plain_loop_fits_on_one_screen() -> None:
    assert len((ROOT / "examples" / "plain_loop.py").read_text().splitlines()) <= 65
