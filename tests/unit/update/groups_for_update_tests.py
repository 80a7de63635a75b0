"""Groups of simulated ranks: broadcasts on streams, as nccl's, or through hosts, as gloo's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from device_for_update_tests import Operation, SimulatedDevice

from ckpt_engine.deadline import Deadline
from ckpt_engine.transport.collectives import Poll


class Broadcast:
    """One broadcast: the root's bytes once they are on their way, who has joined, who has them."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.data: torch.Tensor | None = None
        self.joined: set[int] = set()
        self.received: set[int] = set()


class Broadcasts:
    """A group's broadcasts: the n-th call of each member is the same.

    `eager`: a root goes on at once, instead of when all have its bytes.
    """

    def __init__(self, *, eager: bool) -> None:
        self.eager = eager
        self._all: list[Broadcast] = []
        self._counts: dict[int, int] = {}

    def next_of(self, rank: int, root: int) -> Broadcast:
        count = self._counts[rank] = self._counts.get(rank, 0) + 1
        if count > len(self._all):
            self._all.append(Broadcast(root))
        assert self._all[count - 1].root == root, "all members mean the same broadcast"
        return self._all[count - 1]


class Group:
    """A rank's place in a group."""

    def __init__(self, device: SimulatedDevice, broadcasts: Broadcasts, members: tuple[int, ...]) -> None:
        self._device = device
        self._broadcasts = broadcasts
        self._members = members

    def broadcast(self, tensor: torch.Tensor, root: int, deadline: Deadline, poll: Poll) -> None:
        self._take_part(tensor, self._broadcasts.next_of(self._device.rank, self._members[root]), poll)

    def _take_part(self, tensor: torch.Tensor, ours: Broadcast, poll: Poll) -> None:
        raise NotImplementedError

    def _root_may_go_on(self, ours: Broadcast) -> bool:
        return self._broadcasts.eager or len(ours.received) == len(self._members) - 1

    def close(self) -> None: ...


class StreamGroup(Group):
    """As nccl: a broadcast is enqueued, and takes place on the devices."""

    def _take_part(self, tensor: torch.Tensor, ours: Broadcast, poll: Poll) -> None:
        device = self._device
        device.current.enqueue(self._operation(tensor, ours))
        device.walk.pause("a turn after a broadcast was enqueued")

    def _operation(self, tensor: torch.Tensor, ours: Broadcast) -> Operation:
        device = self._device
        ours.joined.add(device.rank)
        if ours.root == device.rank:
            yield lambda: self._broadcasts.eager or len(ours.joined) == len(self._members)
            data = torch.empty_like(tensor)
            yield from device.operation(data, tensor, "a broadcast's root")
            ours.data = data
            yield lambda: self._root_may_go_on(ours)
            return
        # It may be written from the moment on when this one has joined.
        use = device.use(tensor, "joined a broadcast", writes=True)
        yield lambda: ours.data is not None
        use.end()
        assert ours.data is not None
        yield from device.operation(tensor, ours.data, "a broadcast")
        ours.received.add(device.rank)


class HostGroup(Group):
    """As gloo: while its caller waits, and polls."""

    def _take_part(self, tensor: torch.Tensor, ours: Broadcast, poll: Poll) -> None:
        device = self._device
        if ours.root == device.rank:
            data, stream = torch.empty_like(tensor), device.current
            device.copy(data, tensor)
            device.walk.pause("its copy to the host", lambda: stream.idle)
            ours.data = data
            self._wait(lambda: self._root_may_go_on(ours), poll)
        else:
            self._wait(lambda: ours.data is not None, poll)
            assert ours.data is not None
            device.copy(tensor, ours.data.clone())
            ours.received.add(device.rank)

    def _wait(self, done: Callable[[], bool], poll: Poll) -> None:
        while not done():
            self._device.walk.pause("the others in a broadcast", lambda: done() or self._device.has_mail())
            if self._device.has_mail():
                poll()
