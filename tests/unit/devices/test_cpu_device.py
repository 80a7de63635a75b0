"""Rings in host memory, as their maker, their worker and other ranks hold them; and the CPU's names."""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ckpt_engine.devices import CpuDevice, SharedRing, cpu_uuid, make_device, worker_uuid
from ckpt_engine.devices.handles import SharedMemoryRing
from ckpt_engine.errors import ConfigError, HostMemoryError, ProtocolError
from ckpt_engine.settings import Settings, load_settings

NBYTES = 3 * mmap.PAGESIZE
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@pytest.fixture
def ring() -> Iterator[SharedRing]:
    made = SharedRing.create(NBYTES)
    yield made
    made.close()


def maps() -> list[str]:
    """The permissions of this process's maps of rings, such as `rw-s`."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[1] for line in lines if "memfd:ckpt-engine-ring" in line]


def descriptors() -> list[str]:
    """What this process's descriptors point to."""
    links = (Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd"))
    return sorted(os.readlink(link) for link in links if link.is_symlink())  # that of the listing is gone


def received(ring: SharedRing, *, writable: bool) -> SharedRing:
    """As another process gets it."""
    return SharedRing.open(os.dup(ring.descriptors()[0]), ring.nbytes, writable=writable)


# Sharing


def test_maker_and_worker_see_each_others_bytes(ring: SharedRing) -> None:
    worker = received(ring, writable=True)
    assert not worker.view(0, NBYTES).any()
    ring.view(5, 3).copy_(torch.tensor([1, 2, 3], dtype=torch.uint8))
    assert worker.view(4, 5).tolist() == [0, 1, 2, 3, 0]
    worker.view(NBYTES - 1, 1).fill_(9)
    assert ring.view(NBYTES - 2, 2).tolist() == [0, 9]
    worker.close()


def test_a_worker_may_change_a_tensor_in_place(ring: SharedRing) -> None:
    """Engines do; on a read-only map that would kill them."""
    worker = received(ring, writable=True)
    tensor = worker.view(0, 64).view(torch.float32).view(4, 4)
    tensor.fill_(2.0).mul_(3.0)
    assert ring.view(0, 4).view(torch.float32).item() == 6.0
    worker.close()


def test_the_worker_maps_it_read_write_and_other_ranks_read_only(ring: SharedRing) -> None:
    assert maps() == ["rw-s"]
    worker = received(ring, writable=True)
    assert maps() == ["rw-s"] * 2
    worker.close()
    other = received(ring, writable=False)
    assert sorted(maps()) == ["r--s", "rw-s"]
    ring.view(0, 1).fill_(7)
    assert other.view(0, 1).item() == 7
    other.close()


WRITES_READ_ONLY = """
import os, sys
from ckpt_engine.devices import SharedRing
made = SharedRing.create(4096)
other = SharedRing.open(os.dup(made.descriptors()[0]), 4096, writable=False)
print(other.view(0, 1).item(), flush=True)
other.view(0, 1).fill_(1)
print("it wrote", flush=True)
"""


def test_another_rank_that_writes_dies_of_it() -> None:
    """It must never change what all others read."""
    done = subprocess.run(
        [sys.executable, "-c", WRITES_READ_ONLY], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "0\n")


def test_views_are_bytes_of_the_ring_without_a_copy(ring: SharedRing) -> None:
    view = ring.view(100, 50)
    assert (view.dtype, view.shape) == (torch.uint8, (50,))
    assert view.data_ptr() == ring.view(0, NBYTES).data_ptr() + 100
    assert ring.view(NBYTES, 0).shape == ring.view(0, 0).shape == (0,)
    assert ring.handle() == SharedMemoryRing(nbytes=NBYTES)


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(-1, 1), (0, -1), (0, NBYTES + 1), (1, NBYTES), (NBYTES, 1), (NBYTES + 1, 0), (5, -5)],
)
def test_a_view_outside_the_ring_is_refused(ring: SharedRing, offset: int, nbytes: int) -> None:
    """A slice would be shorter in silence."""
    with pytest.raises(ValueError, match=f"not inside a ring of {NBYTES} bytes"):
        ring.view(offset, nbytes)


# Seals


@pytest.mark.parametrize("nbytes", [0, 1, NBYTES - 1, NBYTES + 1, 2**40])
def test_nobody_can_resize_a_ring(ring: SharedRing, nbytes: int) -> None:
    """A smaller file would kill all who touch the rest (SIGBUS)."""
    (fd,) = ring.descriptors()
    with pytest.raises(PermissionError):
        os.ftruncate(fd, nbytes)
    assert os.fstat(fd).st_size == NBYTES


def test_nobody_can_add_or_remove_a_seal(ring: SharedRing) -> None:
    (fd,) = ring.descriptors()
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == SIZE_SEALS
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_ring_has_no_name_and_is_not_inherited(ring: SharedRing) -> None:
    (fd,) = ring.descriptors()
    assert os.fstat(fd).st_nlink == 0
    assert not os.get_inheritable(fd)


# Nothing is left


def test_a_closed_ring_leaves_no_map_and_no_descriptor() -> None:
    before = descriptors()
    for _ in range(3):
        made = SharedRing.create(NBYTES)
        opened = [received(made, writable=True), received(made, writable=False)]
        assert len(maps()) == 3
        for ring in (*opened, made, made, *opened):
            ring.close()
        assert maps() == []
        assert descriptors() == before
    with pytest.raises(ValueError, match="the ring is closed"):
        made.view(0, 1)


def test_a_kept_view_stays_readable_and_takes_the_map_with_it(ring: SharedRing) -> None:
    """An engine that kept a tensor too long must not crash."""
    worker = received(ring, writable=True)
    ring.view(0, 4).fill_(5)
    kept = worker.view(0, 4).view(torch.int16)
    worker.close()
    assert kept.tolist() == [0x0505, 0x0505]
    assert len(maps()) == 2
    del kept
    assert len(maps()) == 1


def test_a_rings_memory_is_taken_when_it_is_written() -> None:
    before = os.sysconf("SC_PAGESIZE") * int(Path("/proc/self/statm").read_text().split()[2])
    ring = SharedRing.create(512 * 1024**2)
    after = os.sysconf("SC_PAGESIZE") * int(Path("/proc/self/statm").read_text().split()[2])
    assert after - before < 64 * 1024**2
    ring.close()


def test_an_empty_ring_can_be_made_and_received() -> None:
    ring = SharedRing.create(0)
    other = received(ring, writable=True)
    assert ring.view(0, 0).shape == other.view(0, 0).shape == (0,)
    with pytest.raises(ValueError, match="not inside a ring of 0 bytes"):
        other.view(0, 1)
    other.close()
    ring.close()
    assert maps() == []


# What is not a ring


def memfd(nbytes: int, seals: int) -> int:
    fd = os.memfd_create("another", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def half_sealed(seals: int) -> Callable[[Path], int]:
    return lambda _: memfd(NBYTES, seals)


def regular_file(directory: Path) -> int:
    path = directory / "file"
    path.write_bytes(bytes(NBYTES))
    return os.open(path, os.O_RDWR)


def unsealable_memfd(_: Path) -> int:
    fd = os.memfd_create("another", os.MFD_CLOEXEC)
    os.ftruncate(fd, NBYTES)
    return fd


def read_only_descriptor(_: Path) -> int:
    fd = memfd(NBYTES, SIZE_SEALS)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return again


def one_of(pair: tuple[int, int]) -> int:
    os.close(pair[1])
    return pair[0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (regular_file, "is not a memfd"),
        (lambda _: os.open("/dev/zero", os.O_RDWR), "is not a memfd"),
        (lambda path: os.open(path, os.O_RDONLY | os.O_DIRECTORY), "is not a memfd"),
        (lambda _: one_of(os.pipe()), "is not a memfd"),
        (lambda _: socket.socket().detach(), "is not a memfd"),
        (lambda _: os.eventfd(0), "is not a memfd"),
        (unsealable_memfd, "sealed against resizing"),
        (half_sealed(0), "sealed against resizing"),
        (half_sealed(fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW), "sealed against resizing"),
        (half_sealed(fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL), "sealed against resizing"),
        (half_sealed(fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL), "sealed against resizing"),
        (lambda _: memfd(NBYTES - 1, SIZE_SEALS), f"not a memfd of {NBYTES} bytes"),
        (lambda _: memfd(NBYTES + 1, SIZE_SEALS), f"not a memfd of {NBYTES} bytes"),
        (lambda _: memfd(0, SIZE_SEALS), f"not a memfd of {NBYTES} bytes"),
        (half_sealed(SIZE_SEALS | fcntl.F_SEAL_WRITE), "cannot be mapped"),
        (read_only_descriptor, "cannot be mapped"),
    ],
)
def test_what_is_not_a_ring_is_refused_and_closed(
    tmp_path: Path, make: Callable[[Path], int], text: str
) -> None:
    before = descriptors()
    fd = make(tmp_path)
    assert descriptors() != before
    with pytest.raises(ProtocolError, match=text):
        SharedRing.open(fd, NBYTES, writable=True)
    assert descriptors() == before
    assert maps() == []


@pytest.mark.parametrize("nbytes", [-1, 0, 1, NBYTES - 1, NBYTES + 1, 2**62, 2**64])
def test_a_handle_of_another_size_is_refused(ring: SharedRing, nbytes: int) -> None:
    with pytest.raises(ProtocolError, match=f"not a memfd of {nbytes} bytes"):
        SharedRing.open(os.dup(ring.descriptors()[0]), nbytes, writable=False)


def test_a_ring_larger_than_the_free_memory_is_refused() -> None:
    before = descriptors()
    with pytest.raises(
        HostMemoryError, match=rf"a ring of {2**60} bytes does not fit: \d+ bytes are available"
    ):
        SharedRing.create(2**60)
    assert descriptors() == before


@contextmanager
def limited(kind: int, nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def room_for(nbytes: int) -> int:
    """A limit of the address space that lets it grow by so much."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE + nbytes


def test_a_ring_that_cannot_be_mapped_leaves_no_descriptor() -> None:
    """What the free memory does not tell: a limit of the address space."""
    before = descriptors()
    with (
        limited(resource.RLIMIT_AS, room_for(64 * 1024**2)),
        pytest.raises(HostMemoryError, match=rf"a ring of {512 * 1024**2} bytes .*Cannot allocate memory"),
    ):
        SharedRing.create(512 * 1024**2)
    assert descriptors() == before


def test_a_ring_longer_than_a_file_may_be_leaves_no_descriptor() -> None:
    before = descriptors()
    with (
        limited(resource.RLIMIT_FSIZE, NBYTES - 1),
        pytest.raises(HostMemoryError, match=rf"a ring of {NBYTES} bytes cannot be made: .*File too large"),
    ):
        SharedRing.create(NBYTES)
    assert descriptors() == before


def test_a_worker_that_cannot_map_the_ring_says_so_and_closes_it() -> None:
    before = descriptors()
    made = SharedRing.create(512 * 1024**2)
    fd = os.dup(made.descriptors()[0])
    with (
        limited(resource.RLIMIT_AS, room_for(64 * 1024**2)),
        pytest.raises(HostMemoryError, match=r"cannot be mapped: .*Cannot allocate memory"),
    ):
        SharedRing.open(fd, made.nbytes, writable=True)
    made.close()
    assert descriptors() == before


# Names


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("HOST_ID", "DEVICE_UUID", "CPU_DEVICES"):
        monkeypatch.delenv(f"CKPT_ENGINE_{name}", raising=False)
    return monkeypatch


def test_both_sides_name_a_cpu_by_host_and_index(environment: pytest.MonkeyPatch) -> None:
    assert cpu_uuid(load_settings(), 3) == f"CPU-{socket.gethostname()}-3"
    environment.setenv("CKPT_ENGINE_HOST_ID", "left")
    assert cpu_uuid(load_settings(), 3) == make_device("cpu", load_settings(), 3).uuid() == "CPU-left-3"


def test_an_engines_own_numbering_is_mapped_to_the_hosts(environment: pytest.MonkeyPatch) -> None:
    """As CUDA_VISIBLE_DEVICES does; a parameter server counts the host's devices itself."""
    environment.setenv("CKPT_ENGINE_HOST_ID", "h")
    environment.setenv("CKPT_ENGINE_CPU_DEVICES", "4, 2,7")
    assert [cpu_uuid(load_settings(), index) for index in range(3)] == ["CPU-h-4", "CPU-h-2", "CPU-h-7"]
    assert CpuDevice(load_settings(), 1).uuid() == "CPU-h-1"
    for index in (3, -1):
        with pytest.raises(ConfigError, match=f"lists 3 devices, but this process asks for number {index}"):
            cpu_uuid(load_settings(), index)


@pytest.mark.parametrize("devices", ["", "a", "1,", "1,1", "-1", "0-3", "1.0"])
def test_a_list_of_devices_that_is_none_is_refused(environment: pytest.MonkeyPatch, devices: str) -> None:
    environment.setenv("CKPT_ENGINE_CPU_DEVICES", devices)
    with pytest.raises(ConfigError, match=r"CKPT_ENGINE_CPU_DEVICES=.*give distinct indices from 0 up"):
        cpu_uuid(load_settings(), 0)


def test_a_given_uuid_wins_on_both_sides(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("CKPT_ENGINE_HOST_ID", "h")
    environment.setenv("CKPT_ENGINE_CPU_DEVICES", "nonsense")
    environment.setenv("CKPT_ENGINE_DEVICE_UUID", "my-device")
    assert cpu_uuid(load_settings(), 0) == CpuDevice(load_settings(), 5).uuid() == "my-device"


def test_the_cpu_says_what_it_is() -> None:
    device = CpuDevice(Settings(), 0)
    assert device.type == "cpu"
    assert device.free_memory() > 0
    source, target = torch.arange(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
    device.copy(target, source)
    assert torch.equal(target, source)


def test_a_worker_has_the_key_of_its_parameter_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_ENGINE_HOST_ID", "h")
    server_side = make_device("cpu", load_settings(), 3).uuid()
    monkeypatch.setenv("CKPT_ENGINE_CPU_DEVICES", "2,3")  # the engine's side
    assert worker_uuid(1, "cpu") == server_side == "CPU-h-3"
    with pytest.raises(ConfigError, match="lists 2 devices"):
        worker_uuid(2, "cpu")
