"""Devices: the memory programs find, throughput that follows from units and clocks, and names as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import DeviceError, SpecError
from lorakit.planning.devices import DEVICES, GIB, OVERHEAD, device

ON_THE_BOX = dict(
    zip(
        "RTX 3060|RTX 3090|RTX 4090|RTX 5090|T4|L4|L40S|A10|A100 40GB|A100 80GB|H100 80GB|H200 141GB|B200|MI300X".split(
            "|"
        ),
        (12, 24, 24, 32, 16, 24, 48, 24, 40, 80, 80, 141, 180, 192),
        strict=True,
    )
)

# Multiprocessors, FLOP a cycle of each in 16 bits (dense, sums in fp32) and in fp32, and the clock of either in GHz.
UNITS = {
    "RTX 3060": (28, 512, 256, 1.777, 1.777),
    "RTX 3090": (82, 512, 256, 1.695, 1.695),
    "RTX 4090": (128, 512, 256, 2.520, 2.520),
    "RTX 5090": (170, 512, 256, 2.407, 2.407),
    "T4": (40, 1024, 128, 1.590, 1.590),
    "L4": (60, 1024, 256, 2.040, 2.040),
    "L40S": (142, 1024, 256, 2.490, 2.520),
    "A10": (72, 1024, 256, 1.695, 1.695),
    "A100 40GB": (108, 2048, 128, 1.410, 1.410),
    "A100 80GB": (108, 2048, 128, 1.410, 1.410),
    "H100 80GB": (132, 4096, 256, 1.830, 1.980),
    "H200 141GB": (132, 4096, 256, 1.830, 1.980),
    "B200": (148, 8192, 256, 1.860, 1.980),
    "MI300X": (304, 2048, 256, 2.100, 2.100),
}


def test_every_device_has_the_gib_its_box_names_less_a_sixteenth_at_most() -> None:
    # error correction inside the memory takes a sixteenth of a T4, L4, A10 or L40S, and the driver a little of its own
    assert {row.name for row in DEVICES} == set(ON_THE_BOX)
    for row in DEVICES:
        share = row.memory / (ON_THE_BOX[row.name] * GIB)
        assert 0.9370 < share <= 1.0, row.name


def test_an_a100_of_40_gb_has_40_gib() -> None:
    assert device("A100 40GB").memory == 42_949_672_960
    assert device("A100 40GB").memory_gib == 40.0
    assert device("A100 80GB").memory == 85_899_345_920


@pytest.mark.parametrize("name", list(ON_THE_BOX))
def test_throughput_is_units_times_work_a_cycle_times_clock(name: str) -> None:
    # makers round; the L4's sheet is 3.5 % below what its boost clock would give, which 72 W do not keep up
    row, (units, half, single, tensor_clock, clock) = device(name), UNITS[name]
    allowed = 0.035 if name == "L4" else 0.006
    assert row.fp16 == pytest.approx(units * half * tensor_clock * 1e9, rel=allowed)
    assert row.fp32 == pytest.approx(units * single * clock * 1e9, rel=allowed)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("Tesla T4", "T4"),
        ("l40s", "L40S"),
        ("a10", "A10"),
        ("A100-40", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("h200", "H200 141GB"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_device_is_found_as_its_maker_torch_or_a_user_writes_it(written: str, name: str) -> None:
    assert device(written).name == name


def test_an_unknown_name_lists_those_that_are_known() -> None:
    with pytest.raises(DeviceError, match="no device 'rtx 4080' is known; did you mean 'RTX 4090'") as caught:
        device("rtx 4080")
    for row in DEVICES:
        assert row.name in str(caught.value)
    assert '"36 GiB"' in str(caught.value)


@pytest.mark.parametrize("name", ["", "NVIDIA", "H100 PCIe", "RTX 4090 Laptop"])
def test_a_name_that_is_no_device_of_the_table_is_not_guessed(name: str) -> None:
    with pytest.raises(DeviceError, match="no device"):
        device(name)


def test_a_name_that_fits_two_devices_asks_which() -> None:
    with pytest.raises(DeviceError, match="'A100' may be A100 40GB or A100 80GB; say which"):
        device("A100")


def test_an_amount_of_memory_is_a_device_and_gb_are_not_gib() -> None:
    assert device("36 GiB").memory == 38_654_705_664
    assert device("36 GB").memory == 36_000_000_000
    assert device("1.5GiB").memory == 1_610_612_736
    with pytest.raises(SpecError, match="36 GiB: no throughput is known in bf16; measure a few steps"):
        device("36 GiB").peak("bf16")


def test_a_dtype_without_units_says_which_to_use() -> None:
    assert device("T4").peak("fp16") == 65e12
    with pytest.raises(SpecError, match="T4: no throughput is known in bf16; use fp16 or fp32"):
        device("T4").peak("bf16")
    with pytest.raises(SpecError, match="'int8' is no dtype"):
        device("T4").peak("int8")


def test_overhead_covers_what_the_driver_keeps_the_context_and_the_workspaces() -> None:
    kept = (40_960 - 40_441) * 2**20
    assert kept + 300 * 10**6 + 40 * 2**20 <= OVERHEAD <= 1.2 * (kept + 300 * 10**6 + 40 * 2**20)


def test_json_has_plain_values() -> None:
    assert device("T4").to_json() == {
        "name": "T4",
        "memory": 16_106_127_360,
        "bf16": None,
        "fp16": 65e12,
        "fp32": 8.1e12,
        "bandwidth": 320e9,
    }


def test_the_page_about_devices_has_the_same_numbers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "plan-memory.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    printed = {row[0]: [float(cell.replace(",", "")) for cell in row[1:5]] for row in cells if row[0] in ON_THE_BOX}
    table = {
        row.name: [row.memory / 2**20, (row.fp16 or 0) / 1e12, (row.fp32 or 0) / 1e12, (row.bandwidth or 0) / 1e9]
        for row in DEVICES
    }
    assert set(printed) == set(table)
    for name, numbers in table.items():
        assert printed[name] == pytest.approx(numbers), name
