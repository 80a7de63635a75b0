"""`vllm_nccl` with vLLM's own StatelessProcessGroup, PyNcclCommunicator and wrapper of nccl. Only the C
library below them, and what torch asks of a CUDA device, stand in for what is not here."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import PeerLost, UpdateTimeout
from ckpt_engine.transport import vllm_groups
from ckpt_engine.transport.collectives import Collectives, make_group

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
SECONDS = 60.0
STREAM = 1000
"""A rank's stream is this, and the index of its device."""


class Devices:
    """CUDA devices, whose memory is the host's; a thread has one as its current one."""

    def __init__(self) -> None:
        self.current = threading.local()

    def device(self, kind: str, index: int) -> torch.device:
        assert kind == "cuda"
        self.current.made = index
        return torch.device("cpu")

    def set_device(self, device: torch.device) -> None:
        self.current.index = self.current.made

    def current_stream(self, device: torch.device | None = None) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=STREAM + self.current.index, synchronize=lambda: None)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    from vllm.distributed.device_communicators import pynccl

    devices = Devices()
    cuda = SimpleNamespace(set_device=devices.set_device, current_stream=devices.current_stream)
    monkeypatch.setattr(vllm_groups, "torch", SimpleNamespace(device=devices.device, cuda=cuda))
    monkeypatch.setattr(pynccl, "current_stream", devices.current_stream)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: contextlib.nullcontext())
    return devices


@pytest.fixture
def wire(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401 - imports vLLM
    from tests.engines.vllm.nccl_wire import NCCLLibrary, Wire

    wire = Wire()
    monkeypatch.setattr(NCCLLibrary, "__init__", lambda library, path=None: wire.load(library))
    return wire


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


def member(
    store: TCPStore, name: str, place: int, size: int, device: int = 0, seconds: float = SECONDS
) -> Collectives:
    deadline = Deadline.after(seconds)
    return make_group("vllm_nccl", store, name, place, size, device, deadline, poll=lambda: None)


def broadcast(group: Collectives, tensor: torch.Tensor, root: int) -> None:
    group.broadcast(tensor, root, Deadline.after(SECONDS), lambda: None)


def on_device(devices: Devices, rank: int) -> None:
    """As a parameter server's thread, which has its device before its groups."""
    devices.set_device(devices.device("cuda", rank))


def all_do(run: Callable[[int], Any], count: int) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_all_ranks_and_some_of_them_in_another_order(wire: Any, devices: Devices, store: TCPStore) -> None:  # noqa: ANN401
    """Two groups at a time: members are counted within their group, each on its own device and stream."""
    ranks_of = {"all": (0, 1, 2), "some": (2, 1)}
    rounds = 5

    def rank(number: int) -> dict[str, list[torch.Tensor]]:
        on_device(devices, number)
        joined = {
            name: member(store, name, ranks.index(number), len(ranks), number)
            for name, ranks in ranks_of.items()
            if number in ranks
        }
        held: dict[str, list[torch.Tensor]] = {name: [] for name in joined}
        for turn in range(rounds):
            for name, group in joined.items():
                held[name].append(torch.full((1000 + turn,), 16 * turn + number, dtype=torch.uint8))
                broadcast(group, held[name][-1], turn % len(ranks_of[name]))
        # Only enqueued: others may not be there yet.
        with wire.changed:
            assert wire.changed.wait_for(lambda: wire.moved(rounds * len(ranks_of)), SECONDS)
        for group in joined.values():
            group.close()
        return held

    for number, held in enumerate(all_do(rank, 3)):
        for name, tensors in held.items():
            ranks = ranks_of[name]
            for turn, tensor in enumerate(tensors):
                assert set(tensor.tolist()) == {16 * turn + ranks[turn % len(ranks)]}, (number, name)
    assert not dist.is_initialized()
    groups = {group for group, _ in wire.place_of.values()}
    assert len(groups) == 2
    assert wire.aborted() == wire.place_of.keys()
    streams = {call[0]: call[3] for call in wire.calls if call[0] != "abort"}
    for handle, (group, place) in wire.place_of.items():
        size = sum(of == group for of, _ in wire.place_of.values())
        assert streams[handle] == STREAM + ranks_of["all" if size == 3 else "some"][place]


def test_a_member_that_is_killed_releases_nobody_until_the_others_end_the_group(
    wire: Any,  # noqa: ANN401
    devices: Devices,
    store: TCPStore,
) -> None:
    """Its broadcast never happens. The survivor's `close` aborts the communicator, which ends what waits on
    the device, and the ranks that are left make another group."""
    joined = threading.Barrier(2)

    def rank(number: int) -> int | None:
        on_device(devices, number)
        group = member(store, "all", number, 2, number)
        joined.wait(SECONDS)
        if number == 1:
            return None  # and is gone, without a word
        (mine,) = [handle for handle, (_, place) in wire.place_of.items() if place == 0]
        tensor = torch.zeros(10, dtype=torch.uint8)
        broadcast(group, tensor, 1)
        assert not wire.moved(1)
        group.close()
        return mine

    mine, _ = all_do(rank, 2)
    assert wire.aborted() == {mine}

    def survivor(number: int) -> int:
        on_device(devices, 2 * number)
        group = member(store, "after", number, 2, 2 * number)
        tensor = torch.full((10,), number, dtype=torch.uint8)
        broadcast(group, tensor, 1)
        with wire.changed:
            assert wire.changed.wait_for(lambda: wire.moved(1), SECONDS)
        group.close()
        return int(tensor.sum())

    assert all_do(survivor, 2) == [10, 10]


def test_a_member_that_never_tells_the_id(wire: Any, devices: Devices, store: TCPStore) -> None:  # noqa: ANN401
    on_device(devices, 1)
    with pytest.raises((UpdateTimeout, PeerLost)):
        member(store, "incomplete", 1, 2, seconds=2)
    assert wire.place_of == {}


def test_a_communicator_that_comes_after_all_is_ended(wire: Any, devices: Devices, store: TCPStore) -> None:  # noqa: ANN401
    """nccl cannot be told to stop waiting for the last member; what it then makes is nobody's."""
    on_device(devices, 0)
    with pytest.raises(UpdateTimeout, match="did not form a group"):
        member(store, "late", 0, 2, seconds=2)
    assert wire.aborted() == set()
    on_device(devices, 1)
    late = member(store, "late", 1, 2, 1)
    with wire.changed:
        assert wire.changed.wait_for(lambda: wire.aborted() == {1}, SECONDS)
    late.close()
    assert wire.aborted() == {1, 2}


def test_what_nccl_refuses_is_a_lost_peer(wire: Any, devices: Devices, store: TCPStore) -> None:  # noqa: ANN401
    def rank(number: int) -> None:
        on_device(devices, number)
        group = member(store, "all", number, 2, number)
        wire.fails = True
        with pytest.raises(PeerLost, match="could not be enqueued: NCCL error: refused by the test"):
            broadcast(group, torch.zeros(10, dtype=torch.uint8), 0)
        group.close()

    all_do(rank, 2)
    assert len(wire.aborted()) == 2


def test_without_nccls_library_the_group_says_so(devices: Devices, store: TCPStore) -> None:
    """vLLM itself only calls its communicator disabled, whose broadcasts would do nothing."""
    on_device(devices, 0)
    with pytest.raises(PeerLost, match="vLLM found no nccl library"):
        member(store, "all", 0, 2)
