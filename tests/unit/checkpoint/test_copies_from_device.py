"""Copies from a device: enqueued on a stream of their own, awaited before anything is believed.

There is no device here: CPU tensors, with a module in the place of torch.cuda that keeps the order of calls.
tests/gpu has the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from checkpoint_files_for_tests import random_tensor

from ckpt_engine.checkpoint import HostArena, tensor_copies
from ckpt_engine.checkpoint.tensor_copies import Copy, copy_from_device, copy_tasks, cut_copies


class FakeDevice:
    """`log`: what was enqueued, recorded and awaited, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current: list[Stream] = []

    def Stream(self, device: torch.device) -> Stream:
        self.log.append(f"stream on {device}")
        return Stream(self)

    def Event(self, *, blocking: bool) -> Event:
        assert blocking  # a thread that waits must not spin
        return Event(self)

    def stream(self, stream: Stream) -> AbstractContextManager[None]:
        @contextmanager
        def current() -> Iterator[None]:
            self.current.append(stream)
            try:
                yield
            finally:
                self.current.pop()

        return current()


class Event:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def synchronize(self) -> None:
        self._device.log.append("wait")


class Stream:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def record_event(self, event: Event) -> Event:
        self._device.log.append("record")
        return event

    def synchronize(self) -> None:
        self._device.log.append("end")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(torch, "get_device_module", lambda _: fake)
    real = Copy.enqueue

    def enqueue(self: Copy, arena: HostArena) -> None:
        assert fake.current, "not on the stream"
        real(self, arena)
        fake.log.append("copy")

    monkeypatch.setattr(Copy, "enqueue", enqueue)
    return fake


def filled(count: int) -> tuple[HostArena, torch.Tensor, list[Copy]]:
    """An arena for `count` copies of 16 MiB, none of them contiguous."""
    nbytes = tensor_copies.PIECE_NBYTES
    tensor = random_tensor("uint8", (count, 2 * nbytes))[:, ::2]
    arena = HostArena(count * nbytes)
    arena.populate()
    return arena, tensor, list(cut_copies(tensor, 0))


def test_batches_are_awaited_two_behind(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_copies, "_BATCH_NBYTES", 2 * tensor_copies.PIECE_NBYTES)
    arena, tensor, copies = filled(5)
    done: list[int] = []
    copy_from_device(copies, arena, done.append)
    assert device.log == [
        *("stream on cpu", "copy", "copy", "record", "copy", "copy", "record", "wait", "copy", "record"),
        *("wait", "wait", "end"),
    ]
    assert done == [2 * tensor_copies.PIECE_NBYTES] * 2 + [tensor_copies.PIECE_NBYTES]
    assert torch.equal(arena.view(0, arena.nbytes).view(tensor.shape), tensor)


def test_a_failure_leaves_no_copy_at_work(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    arena, _, copies = filled(3)

    def fail(_: int) -> None:
        raise RuntimeError("enough")

    monkeypatch.setattr(tensor_copies, "_BATCH_NBYTES", 1)
    with pytest.raises(RuntimeError, match="enough"):
        copy_from_device(copies, arena, fail)
    assert device.log[-2:] == ["wait", "end"]
    assert device.log.count("copy") == 2


def test_a_device_s_copies_are_one_task_before_the_cpu_s(monkeypatch: pytest.MonkeyPatch) -> None:
    arena, _, copies = filled(4)
    of_device = copies[:3]
    identities = {id(copy) for copy in of_device}
    where = property(lambda self: torch.device("cuda:0") if id(self) in identities else None)
    monkeypatch.setattr(Copy, "device", where)
    calls: list[object] = []
    monkeypatch.setattr(tensor_copies, "copy_from_device", lambda part, *_: calls.append(part))
    first, second = copy_tasks(copies, arena, calls.append)
    first()
    assert [id(copy) for copy in calls[0]] == [id(copy) for copy in of_device]  # type: ignore[attr-defined]
    second()
    assert calls[1:] == [tensor_copies.PIECE_NBYTES]
