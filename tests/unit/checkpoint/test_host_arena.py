"""Host arenas: memory that can be viewed, populated, refused, and never dangles."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_files_for_tests import is_mapped

from ckpt_engine.checkpoint import HostArena, arena
from ckpt_engine.errors import CheckpointError, ConfigError, HostMemoryError
from ckpt_engine.host_memory import available_host_memory

PAGE = mmap.PAGESIZE


def test_views_share_the_memory() -> None:
    held = HostArena(3 * PAGE + 5, threads=2)
    assert held.address % PAGE == 0
    assert held.nbytes == 3 * PAGE + 5
    view = held.view(7, 10)
    assert view.dtype == torch.uint8
    assert view.shape == (10,)
    assert view.data_ptr() == held.address + 7
    assert not view.any()
    held.memory(7, 3)[:] = b"abc"
    assert view[:4].tolist() == [*b"abc", 0]
    view.fill_(1)
    assert bytes(held.memory(6, 3)) == b"\0\1\1"
    assert held.view(held.nbytes, 0).shape == held.view(3, 0).shape == (0,)


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, 11), (10, 1), (5, -1), (11, 0)])
def test_out_of_bounds(offset: int, nbytes: int) -> None:
    held = HostArena(10)
    for use in (held.view, held.memory, held.populate):
        with pytest.raises(ConfigError, match="not inside an arena of 10 bytes"):
            use(offset, nbytes)


def test_memory_goes_with_the_last_view() -> None:
    held = HostArena(32 * 1024**2)
    address = held.address + 16 * 1024**2  # the middle: what reuses the hole first takes its ends
    view = held.view(0, 16)
    bfloat16 = view.view(torch.bfloat16)
    held.close()
    held.close()
    del view
    assert is_mapped(address)
    bfloat16.fill_(2)  # still ours
    del bfloat16
    assert not is_mapped(address)
    assert held.closed
    for use in (held.view, held.memory, held.populate):
        with pytest.raises(CheckpointError, match="closed"):
            use(0, 1)


def test_zero_bytes() -> None:
    held = HostArena(0)
    assert (held.address, held.nbytes) == (0, 0)
    held.populate()
    assert held.view(0, 0).shape == (0,)
    assert len(held.memory(0, 0)) == 0
    held.close()


@pytest.mark.parametrize("huge_pages", [None, True, False])
def test_populate_makes_pages_and_keeps_contents(huge_pages: bool | None) -> None:
    nbytes = 40 * 1024**2
    held = HostArena(nbytes, threads=3, huge_pages=huge_pages)
    held.memory(5, 1)[0] = 9
    before = resident_nbytes()
    held.populate(3, nbytes - 3)
    assert resident_nbytes() - before > 0.7 * nbytes
    assert held.memory(5, 1)[0] == 9


def resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_populate_where_the_kernel_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    code = errno.EINVAL
    monkeypatch.setattr(arena, "_libc", SimpleNamespace(madvise=lambda *_: -1))
    monkeypatch.setattr(arena.ctypes, "get_errno", lambda: code)
    held = HostArena(PAGE)
    held.populate(0, PAGE)
    code = errno.ENOMEM
    with pytest.raises(HostMemoryError, match="cannot populate"):
        held.populate(0, PAGE)


def test_populate_releases_the_gil() -> None:
    held = HostArena(256 * 1024**2, huge_pages=False)
    ticks, done = 0, threading.Event()

    def populate() -> None:
        held.populate()
        done.set()

    thread = threading.Thread(target=populate)
    thread.start()
    while not done.wait(0.001):
        ticks += 1
    thread.join()
    assert ticks > 2


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="-1 bytes"):
        HostArena(-1)
    with pytest.raises(ConfigError, match="threads=0"):
        HostArena(1, threads=0)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostMemoryError, match=rf"{2**62} bytes .* are needed, \d+ bytes .* are available"):
        HostArena(2**62)
    monkeypatch.setattr(arena, "available_host_memory", lambda: 1000)
    HostArena(1000)
    with pytest.raises(HostMemoryError, match=r"1001 bytes .* are needed, 1000 bytes .* are available"):
        HostArena(1001)


def test_address_space_limit() -> None:
    """What MemAvailable does not know of."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 1024**2, hard))
    try:
        with pytest.raises(HostMemoryError, match="Cannot allocate memory"):
            HostArena(1024**3, huge_pages=False)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fake_host(root: Path, *, available_kib: int, cgroup: str | None = None) -> tuple[Path, Path]:
    proc, cgroups = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroups.mkdir()
    (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {available_kib} kB\nHugePages_Total: 0\n")
    if cgroup is not None:
        (proc / "self/cgroup").write_text(f"1:cpu:/x\n0::{cgroup}\n")
    return proc, cgroups


def limit(directory: Path, maximum: str, current: int, stat: str = "") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{maximum}\n")
    (directory / "memory.current").write_text(f"{current}\n")
    (directory / "memory.stat").write_text(stat)


def test_available_memory(tmp_path: Path) -> None:
    assert available_host_memory() > 0
    assert available_host_memory(*fake_host(tmp_path / "a", available_kib=4)) == 4096
    assert available_host_memory(tmp_path, tmp_path) > 2**60  # nothing readable limits nothing

    host = fake_host(tmp_path / "b", available_kib=4, cgroup="/job/step")
    limit(host[1] / "job/step", "max", 500)
    assert available_host_memory(*host) == 4096
    limit(host[1] / "job", "3000", 1000)  # that of the parent counts as well
    assert available_host_memory(*host) == 2000
    limit(host[1] / "job", "3000", 2900, "anon 500\ninactive_file 2000\nactive_file 300\nfile 2300\n")
    assert available_host_memory(*host) == 2400  # the page cache is given up
    limit(host[1] / "job/step", "100", 500)
    assert available_host_memory(*host) == 0

    # A container that sees the host's path, but mounts only its own cgroup.
    host = fake_host(tmp_path / "c", available_kib=4, cgroup="/docker/123")
    limit(host[1], "2000", 500)
    assert available_host_memory(*host) == 1500


def test_huge_pages_are_probed_once_and_only_for_large_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool | None] = []
    real = arena._map

    def spy(nbytes: int, huge_pages: bool | None) -> mmap.mmap:
        asked.append(huge_pages)
        return real(nbytes, huge_pages)

    monkeypatch.setattr(arena, "_map", spy)
    arena._huge_pages_are_faster.cache_clear()
    HostArena(PAGE)
    assert asked == [None]
    HostArena(256 * 1024**2)
    assert sorted(asked[1:5], key=bool) == [False, False, True, True]  # the probe
    assert asked[5] is arena._huge_pages_are_faster()
    HostArena(256 * 1024**2)
    HostArena(256 * 1024**2, huge_pages=True)
    assert asked[6:] == [asked[5], True]


def test_pages_are_made_on_the_cpus_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.sched_getaffinity(0)
    one = frozenset([max(mine)])
    seen: list[tuple[str, set[int]]] = []
    real = arena._populate

    def populate(*arguments: Any) -> None:  # noqa: ANN401
        seen.append((threading.current_thread().name, os.sched_getaffinity(0)))
        real(*arguments)

    monkeypatch.setattr(arena, "_populate", populate)
    held = HostArena(3 * arena.PIECE_NBYTES + 5, threads=2, cpus=one)
    held.populate()
    assert {frozenset(cpus) for _, cpus in seen} == {one}
    assert len(seen) == 4
    held.populate(0, 1)  # a small part too
    assert seen[-1][1] == one
    assert all(name.startswith("ckpt-populate") for name, _ in seen)
    assert os.sched_getaffinity(0) == mine
    held.close()


def test_cpus_that_were_taken_away_only_warn(caplog: pytest.LogCaptureFixture) -> None:
    held = HostArena(arena.PIECE_NBYTES, cpus=frozenset([4095]))
    held.populate()
    assert "cannot run on the CPUs of the device's NUMA node" in caplog.text
    held.view(0, 1).fill_(1)
    held.close()
