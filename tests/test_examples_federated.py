"""The federated example: what clients send becomes what the server says it is, with Flower and without."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from examples.federated import (
    Job,
    aggregated,
    apart,
    beginning,
    local_round,
    packed,
    score,
    shared_out,
    simulate,
    unpacked,
)
from lorakit.combining import difference
from lorakit.core.state import AdapterState
from tests.training import samples

ROWS = [{"text": " ".join(["good" if i % 2 else "bad"] * (1 + i % 3)), "label": i % 2} for i in range(40)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two clients of ranks 2 and 3 on a random encoder."""
    return Job(str(samples.save_encoder(tmp_path_factory.mktemp("base") / "bert")), (2, 3), rounds=2, skew=5.0)


def write(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def learned(job: Job, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterState]:
    """What two clients learned in the first round."""
    folder = tmp_path_factory.mktemp("clients")
    known, found = beginning(job), []
    for i, part in enumerate(shared_out(ROWS, job)):
        rows = write(folder / f"{i}.jsonl", list(map(dict, part)))
        (folder / f"{i}").mkdir()
        found.append(local_round(job, known, rows, job.ranks[i], 1, folder / f"{i}"))
    return found


def test_rows_are_shared_out_and_none_twice(job: Job) -> None:
    parts = shared_out([{**row, "i": i} for i, row in enumerate(ROWS)], job)
    assert sorted(row["i"] for part in parts for row in part) == list(range(len(ROWS)))
    assert len({len(part) for part in parts}) > 1


def test_stacking_is_the_weighted_sum_and_averaging_is_not(job: Job, learned: list[AdapterState]) -> None:
    assert [len(adapter.updates[0].tensors["down"]) for adapter in learned] == [2, 3]
    shares = [0.25, 0.75]
    known = beginning(job)
    stacked, exact = aggregated("stack", known, learned, shares)
    averaged, off = aggregated("average", known, learned, shares)
    assert exact < 1e-6 < off
    assert apart(job, learned, shares) < 1e-5
    head = "classifier.weight"
    wanted = 0.25 * learned[0].trained[head] + 0.75 * learned[1].trained[head]
    torch.testing.assert_close(stacked.trained[head], wanted)
    torch.testing.assert_close(averaged.trained[head], wanted)


def test_a_second_round_goes_on_from_the_first(job: Job, learned: list[AdapterState], tmp_path: Path) -> None:
    known, _ = aggregated("stack", beginning(job), learned, [0.5, 0.5])
    again, _ = aggregated("stack", known, learned, [0.5, 0.5])
    whole = difference(known, again).total
    assert whole.second == pytest.approx(2 * whole.first, rel=1e-4), "twice the same change is twice as much"
    rows = write(tmp_path / "rows.jsonl", [dict(row) for row in ROWS])
    (tmp_path / "more").mkdir()
    more = local_round(job, again, rows, 2, 1, tmp_path / "more")
    assert 0.0 <= score(job, aggregated("stack", again, [more], [1.0])[0], rows) <= 1.0


def test_an_adapter_travels_as_its_file(learned: list[AdapterState]) -> None:
    arrived = unpacked(packed(learned[0]))
    assert difference(arrived, learned[0]).same
    assert arrived.spec == learned[0].spec


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Flower and Ray, about each other
@pytest.mark.skipif(find_spec("flwr") is None, reason="pip install 'flwr[simulation]' to let Flower run the rounds")
def test_flower_runs_the_rounds(job: Job, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.jsonl", list(map(dict, part))) for i, part in enumerate(shared_out(ROWS, job))]
    for name in ("validation", "test"):
        write(tmp_path / f"{name}.jsonl", [dict(row) for row in ROWS])
    found: dict[str, object] = {"rounds": []}
    simulate(job, "stack", tmp_path, files, found)
    rounds = found["rounds"]
    assert isinstance(rounds, list)
    assert len(rounds) == 2
    assert all(one["error_of_the_mean"] < 1e-6 for one in rounds)
