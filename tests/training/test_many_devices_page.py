"""The page that plans a 70B says what the planner says."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest

from lorakit.planning.devices import OVERHEAD, device
from lorakit.planning.memory import Parts
from lorakit.planning.pace import from_throughput
from lorakit.planning.sharding import per_device, traffic
from lorakit.training.plan import undivided
from lorakit.training.planned import PlannedRun
from tests.training.test_planned import of_shape

ROOT = Path(__file__).parents[2]
NVLINK, NETWORK = 450e9, 50e9
"""Bytes a second that a device sends: NVLink 4 one way, and a card of 400 Gbit/s."""


@cache
def planned() -> PlannedRun:
    return of_shape(
        "llama-2-70b",
        "H100 80GB",
        count=8,
        strategy="fsdp",
        train={"checkpointing": True, "dtype": "bf16"},
    )


def row(devices: int, parallel: str, base: str) -> str:
    """One row of the page: gathering overlaps with computing, the sum of the gradients comes after."""
    found, way = planned(), "4 bits and checkpointing" if base == "nf4" else "checkpointing"
    step = found.ways[way].step
    stays = undivided(step.weights, found.divided, found.load.dtype, way)
    layer = (step.weights - stays) // 80
    strategy, among = ("fsdp", 8) if parallel == "hybrid" else (parallel, devices)
    held = per_device(step, among, strategy, layer=layer, undivided=stays).total + OVERHEAD
    gathered = 0 if parallel == "ddp" else traffic(Parts(weights=step.weights), among, "fsdp", undivided=stays)
    gradients = traffic(Parts(gradients=4 * found.counts.trainable_parameters), devices, "ddp")
    seconds = gathered / (NVLINK if among == 8 else NETWORK)
    computing = from_throughput(found.pace.flops_per_step, device("H100 80GB")).seconds
    whole = max(computing, seconds) + gradients / (NVLINK if devices == 8 else NETWORK)
    tokens = devices * found.load.rows * found.load.length / whole
    return (
        f"| {devices} | `{parallel}` | {base} | {held / 1e9:.1f} | {gathered / 1e9:.1f} | {seconds:.2f} | "
        f"{gradients / 1e9:.2f} | {whole:.2f} | {tokens:,.0f} |"
    )


ROWS = [
    (8, "fsdp", "bf16"), (8, "fsdp", "nf4"), (8, "ddp", "nf4"), (64, "fsdp", "bf16"), (64, "hybrid", "bf16"),
    (64, "ddp", "nf4"),
]  # fmt: skip


@pytest.mark.parametrize("wanted", ROWS, ids=str)
def test_the_page_has_the_planner_s_figures(wanted: tuple[int, str, str]) -> None:
    assert row(*wanted) in (ROOT / "docs" / "many-devices.md").read_text(encoding="utf-8").splitlines()


def test_the_sentences_beside_the_table_say_the_same() -> None:
    page, found = (ROOT / "docs" / "many-devices.md").read_text(encoding="utf-8"), planned()
    duration = from_throughput(found.pace.flops_per_step, device("H100 80GB"))
    assert f"({found.counts.trainable_parameters:,} parameters)" in page
    assert found.load.rows * found.load.length == 4096
    assert (
        f"{duration.seconds:.1f} s at 35 %, {duration.fastest:.1f} s at 50 %, {duration.slowest:.1f} s at 20 %" in page
    )
    assert found.fits[0].verdict == "fits with checkpointing"


def test_the_slurm_launcher_is_a_script_that_bash_reads() -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / "examples" / "slurm" / "train.sbatch")]).returncode == 0
