"""Device memory: files below /dev/shm, which other processes can map, and counters of their readers."""

from __future__ import annotations

import contextlib
import os
import struct
import weakref
from pathlib import Path

import torch

SHARED = Path("/dev/shm")
KEY_NBYTES = 65
"""Of an IPC handle, behind a byte for its version and one for its kind."""
HEADER_NBYTES = 64
"""What torch puts in front of a shared file's contents."""
COUNTER_COUNT = 10000


def machine() -> str:
    return f"fake-npu-{os.environ.get('FAKE_NPU_MACHINE', 'lone')}"


def total_nbytes() -> int:
    return int(os.environ.get("FAKE_NPU_MEMORY", 1 << 30))


def used_nbytes(device: int) -> int:
    """What all processes that are there have allocated on the device (the machine's own number)."""
    used = 0
    for file in SHARED.glob(f"{machine()}-{device}-*"):
        with contextlib.suppress(FileNotFoundError):
            used += file.stat().st_size if Path(f"/proc/{file.name.split('-')[-2]}").exists() else 0
    return used


class _Segment:
    """An allocation; alive as long as a tensor refers to it."""

    def __init__(self, path: Path, nbytes: int, *, received: bool) -> None:
        self.path = path
        self.nbytes = nbytes
        self.received = received
        self.storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=nbytes)
        self.counters: list[int] = []

    def bytes(self) -> torch.Tensor:
        tensor = torch.empty(0, dtype=torch.uint8).set_(self.storage)
        _SEGMENTS[self.storage.data_ptr()] = self
        tensor.segment = self  # until an NpuTensor holds it
        return tensor


_SEGMENTS: weakref.WeakValueDictionary[int, _Segment] = weakref.WeakValueDictionary()
_RECEIVED: weakref.WeakValueDictionary[tuple[bytes, int], _Segment] = weakref.WeakValueDictionary()
_LIMBO: list[tuple[Path, list[int]]] = []
_made = 0


def segment_of(raw: torch.Tensor) -> _Segment | None:
    return _SEGMENTS.get(raw.untyped_storage().data_ptr())


def allocate(device: int, nbytes: int) -> torch.Tensor:
    """Raises RuntimeError, as torch_npu does: out of memory."""
    global _made
    if nbytes > total_nbytes() - used_nbytes(device):
        raise RuntimeError(f"NPU out of memory. Tried to allocate {nbytes} bytes (NPU {device})")
    _made += 1
    path = SHARED / f"{machine()}-{device}-{os.getpid()}-{_made}"
    with path.open("wb") as file:
        file.truncate(max(nbytes, 1))
    segment = _Segment(path, max(nbytes, 1), received=False)
    weakref.finalize(segment, _freed, path, segment.counters)
    return segment.bytes()


def _freed(path: Path, counters: list[int]) -> None:
    _LIMBO.append((path, counters))
    collect()


def collect() -> None:
    """Gives back what no reader is counted for."""
    kept = []
    for path, counters in _LIMBO:
        if any(_counter(offset) > 0 for offset in counters):
            kept.append((path, counters))
        else:
            path.unlink(missing_ok=True)
    _LIMBO[:] = kept


def _counter_file() -> Path:
    path = SHARED / f"{machine()}-counters-{os.getpid()}"
    if not path.exists():
        path.write_bytes(bytes(HEADER_NBYTES + 8 * COUNTER_COUNT))
        weakref.finalize(collect, path.unlink, missing_ok=True)
    return path


_counters_used = 0


def _counter(offset: int) -> int:
    """Unsigned, as torch_npu reads it: one release too many makes it huge."""
    data = _counter_file().read_bytes()
    return int(struct.unpack_from("=Q", data, HEADER_NBYTES + 8 * offset)[0])


def _add(file: Path, offset: int, change: int) -> None:
    with file.open("r+b") as counters:
        counters.seek(HEADER_NBYTES + 8 * offset)
        value = struct.unpack("=q", counters.read(8))[0]
        counters.seek(HEADER_NBYTES + 8 * offset)
        counters.write(struct.pack("=q", value + change))


def release_counter(counter: bytes, offset: int, /) -> None:
    """Best effort: the exporter may be gone."""
    assert isinstance(counter, bytes)
    assert isinstance(offset, int)
    file = SHARED / counter.decode().lstrip("/")
    if file.exists():
        _add(file, offset, -1)


def share(raw: torch.Tensor, device: int) -> tuple[int, bytes, int, int, bytes, int, bytes, bool]:
    """The 8 fields of `_share_npu_`."""
    global _counters_used
    segment = segment_of(raw)
    assert segment is not None, "only what was allocated can be exported"
    if segment.received:
        raise RuntimeError(
            "Supported to send NPU tensor received from another process; other is not currently supported. "
            "Consider cloning before sending."
        )
    offset, _counters_used = _counters_used, _counters_used + 1
    segment.counters.append(offset)
    _add(_counter_file(), offset, 1)
    key = segment.path.name.encode().ljust(KEY_NBYTES, b"\0")
    assert len(key) == KEY_NBYTES
    counter = f"/{_counter_file().name}".encode()
    return device, b"\1c" + key, raw.untyped_storage().nbytes(), 0, counter, offset, bytes(64), False


def map_shared(
    device: int,
    handle: bytes,
    size_bytes: int,
    offset_bytes: int,
    counter: bytes,
    counter_offset: int,
    event: bytes,
    event_sync: bool,
) -> torch.Tensor:
    """`_new_shared_npu`, with its checks of types. The same handle, still alive here, is mapped once."""
    kinds = (int, bytes, int, int, bytes, int, bytes, bool)
    values = (device, handle, size_bytes, offset_bytes, counter, counter_offset, event, event_sync)
    assert all(type(value) is kind for value, kind in zip(values, kinds, strict=True)), values
    known = _RECEIVED.get((handle, offset_bytes))
    if known is not None:
        release_counter(counter, counter_offset)
        return known.bytes()
    path = SHARED / handle[2:].rstrip(b"\0").decode()
    if not path.exists():
        raise RuntimeError(f"aclrtIpcMemImportByKey failed: no allocation {path.name}, error code is 507899")
    segment = _Segment(path, size_bytes, received=True)
    _RECEIVED[handle, offset_bytes] = segment
    weakref.finalize(segment, release_counter, counter, counter_offset)
    return segment.bytes()
