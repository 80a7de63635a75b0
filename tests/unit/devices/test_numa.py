"""NUMA nodes of devices, from trees that are like sysfs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckpt_engine import devices
from ckpt_engine.devices import cuda, findings
from ckpt_engine.devices.numa import NumaPlace, numa_place, parse_list
from ckpt_engine.findings import Level
from ckpt_engine.settings import Settings

GPU = "0000:1B:00.0"
ALL = frozenset(range(64))


def tree(root: Path, *, online: str = "0-1", node: str = "1", cpulist: str = "16-31,48-63") -> Path:
    device = root / "bus/pci/devices" / GPU.lower()
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    for number, cpus in enumerate(["0-15,32-47", cpulist]):
        of_node = root / f"devices/system/node/node{number}"
        of_node.mkdir(parents=True)
        (of_node / "cpulist").write_text(f"{cpus}\n")
    (root / "devices/system/node/online").write_text(f"{online}\n")
    return root


def test_the_device_s_node_and_its_allowed_cpus(tmp_path: Path) -> None:
    sysfs = tree(tmp_path)
    assert numa_place(GPU, sysfs, ALL) == NumaPlace(1, frozenset([*range(16, 32), *range(48, 64)]))
    # A container's share.
    assert numa_place(GPU, sysfs, frozenset(range(20))) == NumaPlace(1, frozenset(range(16, 20)))
    none = numa_place(GPU, sysfs, frozenset(range(8)))
    assert none == NumaPlace(1, frozenset())
    assert str(none) == "NUMA node 1, of whose CPUs 0 are allowed here"


def test_allowed_is_what_the_system_says(tmp_path: Path) -> None:
    place = numa_place(GPU, tree(tmp_path, cpulist="0-4095"))
    assert place is not None
    assert place.cpus == os.sched_getaffinity(0)


@pytest.mark.parametrize(
    "how", [{"online": "0"}, {"online": ""}, {"node": "-1"}, {"node": ""}, {"node": "one"}], ids=str
)
def test_nothing_is_known(tmp_path: Path, how: dict[str, str]) -> None:
    assert numa_place(GPU, tree(tmp_path, **how), ALL) is None


def test_nothing_is_there(tmp_path: Path) -> None:
    assert numa_place(GPU, tmp_path, ALL) is None
    assert numa_place("0000:99:00.0", tree(tmp_path), ALL) is None


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", []),
        ("0", [0]),
        ("0-3,8", [0, 1, 2, 3, 8]),
        ("0-1,4-5", [0, 1, 4, 5]),
        ("5-3", []),
        ("a-b", []),
        ("1,-", []),
    ],
)
def test_lists(text: str, numbers: list[int]) -> None:
    assert parse_list(text) == frozenset(numbers)


@pytest.mark.parametrize(
    ("cpus", "on", "level", "says"),
    [
        ({1, 2}, True, Level.OK, "of whose CPUs 2 are allowed here: there host arenas are made"),
        ({1, 2}, False, Level.OK, "CKPT_ENGINE_NUMA is off"),
        (set(), True, Level.WARNING, "of whose CPUs 0 are allowed here: host arenas lie on another node"),
    ],
)
def test_what_doctor_says(
    monkeypatch: pytest.MonkeyPatch, cpus: set[int], on: bool, level: Level, says: str
) -> None:
    monkeypatch.setattr(findings, "detect_device", lambda _: "cuda")
    monkeypatch.setattr(findings, "device_count", lambda _: 1)
    monkeypatch.setattr(cuda, "cuda_uuid", lambda *_: "GPU-1")
    monkeypatch.setattr(findings, "numa_place_of", lambda *_: NumaPlace(3, frozenset(cpus)))
    *_, last = findings.find(Settings(numa=on), {})
    assert (last.subject, last.level) == ("cuda 0", level)
    assert last.message.startswith("is on NUMA node 3")
    assert says in last.message
    assert bool(last.remedy) == (level is Level.WARNING)


def test_the_address_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        devices, "pci_addresses", lambda kind: ["0000:01:00.0", GPU] if kind == "cuda" else []
    )
    monkeypatch.setattr(devices, "numa_place", asked.append)
    assert devices.numa_place_of("cuda", 1) is None
    assert devices.numa_place_of("cuda", 2) is None
    assert devices.numa_place_of("cpu", 0) is None
    assert asked == [GPU]
