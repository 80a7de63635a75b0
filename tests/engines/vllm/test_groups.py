"""vLLM's stateless groups under ckpt-engine's broadcasts, beside a default group that others own."""

from __future__ import annotations

import ctypes
import json
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import PeerLost, UpdateTimeout
from ckpt_engine.transport.collectives import Collectives, make_group
from ckpt_engine.transport.vllm_groups import id_only_group
from tests.integration.conftest import torchrun
from tests.integration.test_groups import SCENARIOS, SIZE
from tests.support import groups
from tests.support.worker import digest

SECONDS = 60.0


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


def member(store: TCPStore, name: str, place: int, size: int, seconds: float = SECONDS) -> Collectives:
    return make_group("vllm_gloo", store, name, place, size, 0, Deadline.after(seconds), poll=lambda: None)


def test_broadcasts_in_two_groups_at_a_time(store: TCPStore) -> None:
    """All ranks, and two of them in another order: members are counted within their group."""
    groups = {"all": (0, 1, 2), "some": (2, 1)}

    def rank(number: int) -> list[int]:
        joined = {
            name: member(store, name, ranks.index(number), len(ranks))
            for name, ranks in groups.items()
            if number in ranks
        }
        found = []
        for name, group in joined.items():
            root = len(groups[name]) - 1
            tensor = torch.full((1000,), number, dtype=torch.uint8)
            group.broadcast(tensor, root, Deadline.after(SECONDS), lambda: None)
            assert len(set(tensor.tolist())) == 1
            found.append(int(tensor[0]))
        for group in joined.values():
            group.close()
        return found

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(rank, range(3))) == [[2], [2, 1], [2, 1]]
    assert not dist.is_initialized()


def test_a_member_that_never_comes(store: TCPStore) -> None:
    with pytest.raises((UpdateTimeout, PeerLost)):
        member(store, "incomplete", 0, 2, seconds=2)


def test_a_member_that_leaves_a_broadcast_releases_the_others(store: TCPStore) -> None:
    joined = threading.Barrier(2)

    def leave() -> None:
        group = member(store, "left", 1, 2)
        joined.wait(SECONDS)
        group.close()

    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(leave)
        group = member(store, "left", 0, 2)
        joined.wait(SECONDS)
        with pytest.raises(PeerLost, match="a broadcast broke"):
            group.broadcast(torch.zeros(10), 1, Deadline.after(SECONDS), lambda: None)
        leaving.result(SECONDS)
    group.close()


def test_an_nccl_id_goes_as_its_bytes(store: TCPStore) -> None:
    """What vLLM's communicator asks of its group, and all of it; nothing is pickled."""
    from vllm.distributed.device_communicators.pynccl_wrapper import ncclUniqueId
    from vllm.distributed.utils import StatelessProcessGroup

    own = PrefixStore("ids", store)
    sent = ncclUniqueId.from_buffer_copy(bytes(range(ctypes.sizeof(ncclUniqueId))))
    assert id_only_group(StatelessProcessGroup, own, 0, 2).broadcast_obj(sent, src=0) is sent
    received = id_only_group(StatelessProcessGroup, own, 1, 2).broadcast_obj(ncclUniqueId(), src=0)
    assert isinstance(received, ncclUniqueId)
    assert bytes(received) == bytes(sent) == own.get("id")


def test_updates_of_processes_that_own_the_default_group(tmp_path: Path) -> None:
    """All ranks, and subsets of them; each is a host of its own, so that a group carries every bucket."""
    with tempfile.TemporaryDirectory(prefix="ce-", dir="/tmp") as sockets:
        torchrun(
            SIZE,
            "tests.support.groups",
            str(tmp_path),
            timeout=240,
            CKPT_ENGINE_CUSTOM_DIST="vllm_gloo",
            CKPT_ENGINE_SLOT_MIB="1",
            CKPT_ENGINE_SOCKET_DIR=sockets,
            GLOO_SOCKET_IFNAME="lo",
        )
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(SIZE)]
    for scenario, name, _, updated, _ in SCENARIOS:
        expected = {key: digest(tensor) for key, tensor in groups.checkpoint(name, SIZE).items()}
        for rank, seen in enumerate(ranks):
            assert seen[scenario]["error"] is None, (scenario, rank)
            assert seen[scenario]["default"] == sum(range(1, SIZE + 1))
            assert all(made.startswith("vllm_gloo-") for made in seen[scenario]["made"])
            if rank in updated:
                assert expected.items() <= seen[scenario]["held"].items()
    assert all(len(seen["first"]["made"]) == 1 for seen in ranks)
    assert all("injected in bucket 2" in seen["fails"]["error"] for seen in ranks)
