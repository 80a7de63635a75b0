"""The NPU's device and rings on the stand-in. Run by test_npu_on_the_stand_in.py, in a process with NPUs."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Any, ClassVar

import msgspec
import pytest
import torch
from ckpt_engine_ascend import identity
from ckpt_engine_ascend.findings import find
from torch.multiprocessing import reductions
from vllm_ascend.distributed.device_communicators import pyhccl

from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import (
    detect_device,
    device_count,
    draining,
    make_device,
    map_ring,
    npu,
    worker_uuid,
)
from ckpt_engine.devices.handles import NpuRing, RingHandle
from ckpt_engine.devices.npu import ServerRing, WorkerRing
from ckpt_engine.errors import ConfigError, DeviceError, PeerLost, ProtocolError
from ckpt_engine.findings import Finding, Level
from ckpt_engine.settings import load_settings
from ckpt_engine.transport import mooncake_store, rdma
from ckpt_engine.transport.collectives import Collectives, make_group
from ckpt_engine.transport.verbs import RdmaDevice
from ckpt_engine.update.p2p_ends import P2PEnds
from tests.engines.ascend.conftest import FAKE_NPU_SMI, IP

NBYTES = 1 << 20
NPU = npu.load()


def free(index: int = 0) -> int:
    return int(NPU.mem_get_info(index)[0])


@pytest.fixture(autouse=True)
def nothing_stays_taken() -> Iterator[None]:
    before = [free(0), free(1)]
    yield
    NPU.synchronize()
    NPU.ipc_collect()
    assert [free(0), free(1)] == before


def fill(ring: ServerRing, value: int) -> None:
    ring.view(0, NBYTES).copy_(torch.full((NBYTES,), value, dtype=torch.uint8))


def test_a_ring_crosses_as_plain_fields_and_lies_on_the_workers_own_index() -> None:
    ring = ServerRing(0, NBYTES, 3)
    fill(ring, 7)
    sent = msgspec.msgpack.encode(ring.handle())
    handle = msgspec.msgpack.decode(sent, type=RingHandle)
    assert isinstance(handle, NpuRing)
    mapped = map_ring(handle, [], 1)
    assert mapped.own_events() == ()
    ring.accept_events(())
    view = mapped.view(100, 50)
    assert view.device == torch.device("npu", 1)
    assert view.cpu().tolist() == [7] * 50
    del view
    mapped.close()
    mapped.close()
    ring.close()
    ring.close()


def test_the_fields_are_torch_npus_with_the_device_at_index_6(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_npu.multiprocessing.reductions as theirs

    ring = ServerRing(0, NBYTES, 1)
    handle = ring.handle()
    exported = reductions.reduce_tensor(ring.view(0, NBYTES))[1]
    torch.UntypedStorage._release_ipc_counter_npu(*exported[11:13])  # type: ignore[attr-defined]
    given: list[Any] = []
    monkeypatch.setattr(theirs, "rebuild_npu_tensor", lambda *fields: given.append(fields) or torch.empty(0))
    WorkerRing(1, handle).close()
    monkeypatch.undo()
    ring.close()
    (fields,) = given
    assert len(fields) == len(exported) == 15
    assert (fields[6], exported[6]) == (1, 0)
    assert [type(field) for field in fields] == [type(field) for field in exported]
    same = [place for place in range(15) if place not in (6, 12)]
    assert [fields[place] for place in same] == [exported[place] for place in same]


def test_a_ring_that_nobody_mapped_is_freed() -> None:
    ring = ServerRing(0, NBYTES, 1)
    ring.handle()
    ring.close()


def test_what_is_freed_goes_back_to_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_npu keeps what other processes have let go, and what was freed, until it is told not to."""
    asked: list[tuple[str, int]] = []
    for name in ("ipc_collect", "empty_cache"):
        real = getattr(NPU, name)
        monkeypatch.setattr(NPU, name, lambda name=name, real=real: (asked.append((name, free())), real())[1])
    before = free()
    ring = ServerRing(0, NBYTES, 1)
    ring.handle()
    assert free() < before
    asked.clear()
    ring.close()
    assert asked == [("ipc_collect", before), ("empty_cache", before)]
    monkeypatch.setenv("CKPT_ENGINE_DEVICE_UUID", "NPU-mine")
    device = make_device("npu", load_settings(), 0)
    asked.clear()
    assert device.free_memory() == before
    assert asked == [("empty_cache", before)]
    asked.clear()
    device.collect()
    assert [name for name, _ in asked] == ["ipc_collect", "empty_cache"]


def test_a_kept_ring_is_exported_anew_for_each_worker() -> None:
    """Counted down twice, torch_npu would never free it; and exports of one tensor pile up on each other."""
    ring = ServerRing(0, NBYTES, 1)
    seen = set()
    for value in range(3):
        handle = ring.handle()
        seen.add((handle.counter, handle.counter_offset))
        fill(ring, value)
        assert len(ring._bytes.segment.counters) == 1  # type: ignore[union-attr]
        mapped = WorkerRing(0, handle)
        assert mapped.view(0, 4).cpu().tolist() == [value] * 4
        mapped.close()
    assert len(seen) == 3
    assert free() < NPU.mem_get_info(1)[0]
    ring.close()


def test_a_bucket_is_ready_once_it_was_copied() -> None:
    ring = ServerRing(0, NBYTES, 2)
    source = torch.full((NBYTES,), 9, dtype=torch.uint8).to("npu:0")
    NPU.synchronize()
    stream = NPU.Stream(0)
    with NPU.stream(stream):
        ring.view(0, NBYTES).copy_(source)
        ring.mark_ready(0)
    assert not ring.is_ready(0)
    while not ring.is_ready(0):
        pass
    assert ring.view(0, 1).cpu().item() == 9
    ring.close()


def test_a_bucket_is_given_back_once_it_was_read() -> None:
    ring = ServerRing(0, NBYTES, 1)
    fill(ring, 3)
    mapped = WorkerRing(0, ring.handle())
    weight = torch.zeros(NBYTES, dtype=torch.uint8, device="npu:0")
    weight.copy_(mapped.view(0, NBYTES))
    assert not NPU.current_stream().query()
    mapped.mark_given_back(0)
    assert NPU.current_stream().query()
    fill(ring, 4)
    assert weight.cpu().unique().tolist() == [3]
    mapped.close()
    ring.close()


def test_a_ring_that_is_still_read_stays_mapped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(draining, "DRAIN_SECONDS", 0.01)
    ring = ServerRing(0, NBYTES, 1)
    mapped = WorkerRing(0, ring.handle())
    done = False
    stream = NPU.Stream(0)
    with NPU.stream(stream):
        stream.enqueue(lambda: done)
        mapped.close()
    assert "restart the engine" in caplog.text
    assert len(npu._STILL_READ) == 1
    done = True
    stream.synchronize()
    npu._STILL_READ.clear()
    ring.close()


def test_an_error_of_the_device_does_not_keep_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> bool:
        raise RuntimeError("HCCL communicator was aborted")

    ring = ServerRing(0, NBYTES, 1)
    staging = npu.NpuStaging(0, NBYTES)
    for thing in (staging, ring):
        NPU.current_stream().enqueue(fail)
        thing.close()
    assert caplog.text.count("HCCL communicator was aborted") == 2


def test_a_staging_buffer_is_emptied_before_it_is_filled_again() -> None:
    staging = npu.NpuStaging(0, 4)
    target = torch.zeros(8, dtype=torch.uint8, device="npu:0")
    NPU.synchronize()
    copies, broadcasts = NPU.Stream(0), NPU.Stream(0)
    for value in (1, 2):
        source = torch.full((4,), value, dtype=torch.uint8)
        with NPU.stream(copies):
            staging.fill().copy_(source)
            staging.mark_filled()
        with NPU.stream(broadcasts):
            target[(value - 1) * 4 : value * 4].copy_(staging.empty())
            staging.mark_emptied()
    broadcasts.synchronize()
    assert target.cpu().tolist() == [1] * 4 + [2] * 4
    staging.close()


def test_expandable_segments_are_refused_on_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "max_split_size_mb:64, expandable_segments: True")
    monkeypatch.setenv("CKPT_ENGINE_DEVICE_UUID", "NPU-mine")
    for make in (lambda: ServerRing(0, NBYTES, 1), lambda: make_device("npu", load_settings(), 0)):
        with pytest.raises(ConfigError, match="PYTORCH_NPU_ALLOC_CONF=expandable_segments:False"):
            make()
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:False")
    ServerRing(0, NBYTES, 1).close()


def test_an_engines_worker_may_have_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-ascend sets them; a worker exports nothing."""
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("CKPT_ENGINE_DEVICE_UUID", "NPU-mine")
    assert worker_uuid(0, "npu") == worker_uuid(1) == "NPU-mine"


def test_memory_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(DeviceError, match="NPU out of memory"):
        ServerRing(0, 1 << 40, 1)


def test_another_form_of_export_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def rebuild_something() -> None: ...

    ring = ServerRing(0, NBYTES, 1)
    monkeypatch.setattr(reductions, "reduce_tensor", lambda tensor: (rebuild_something, (1, 2)))
    with pytest.raises(DeviceError, match=r"2 fields for rebuild_something.*torch_npu"):
        ring.handle()
    ring.close()


@pytest.mark.parametrize(
    "change",
    [
        {"storage_nbytes": 10},
        {"storage_offset": -1},
        {"counter_offset": -1},
        {"nbytes": -1},
        {"memory": b""},
        {"memory": bytes(5000)},
        {"counter": b""},
    ],
)
def test_fields_that_contradict_each_other_are_refused(change: dict[str, object]) -> None:
    ring = ServerRing(0, NBYTES, 1)
    with pytest.raises(ProtocolError, match="contradict"):
        WorkerRing(0, msgspec.structs.replace(ring.handle(), **change))
    ring.close()


def test_an_allocation_that_is_not_there_is_an_error_that_says_what_to_share() -> None:
    ring = ServerRing(0, NBYTES, 1)
    handle = ring.handle()
    ring.close()
    with pytest.raises(DeviceError, match=r"507899.*one /dev/shm"):
        WorkerRing(0, handle)


def test_a_worker_needs_its_index_and_no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = ServerRing(0, NBYTES, 1)
    with pytest.raises(ConfigError, match="device_id"):
        map_ring(ring.handle(), [], None)
    with pytest.raises(ProtocolError, match="events"):
        ring.accept_events([b"event"])
    ring.close()


def test_the_device_is_found_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert detect_device(None) == detect_device("npu") == "npu"
    assert device_count("npu") == 2
    monkeypatch.setenv("CKPT_ENGINE_DEVICE_UUID", "NPU-mine")
    device = make_device(None, load_settings(), 1)
    assert (device.type, device.index, device.uuid(), device.collectives) == ("npu", 1, "NPU-mine", "hccl")
    assert device.free_memory() == free(1)
    assert device.pinner is None
    with pytest.raises(ConfigError, match=r"npu:2 is not there: this process sees 2"):
        make_device("npu", load_settings(), 2)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="finds no Ascend NPU"):
        detect_device("npu")
    assert detect_device(None) == "cpu"


def test_ranks_of_one_device_know_that_they_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever keys the operator gave them: hccl refuses two ranks on one device."""
    pools = []
    for key, index in (("NPU-a", 0), ("NPU-b", 0), ("NPU-c", 1)):
        monkeypatch.setenv("CKPT_ENGINE_DEVICE_UUID", key)
        pools.append(make_device("npu", load_settings(), index).memory_pool())
    assert pools[0] == pools[1] != pools[2]


class Mooncake:
    """Its engine; `made`: what each was asked for, and on which NPU."""

    made: ClassVar[list[tuple[tuple[str, ...], int]]] = []

    def initialize(self, *arguments: str) -> int:
        self.made.append((arguments, NPU.current_device()))
        return 0

    def get_rpc_port(self) -> int:
        return 1


def test_whatever_thread_makes_mooncakes_engine_does_so_on_its_own_npu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new thread is on NPU 0. Nor does P2P need the host's RDMA devices, too few here to be shared out."""
    names = [f"mlx5_{number}" for number in range(3)]
    found = [RdmaDevice(name=name, active_ports=(1,)) for name in names]
    monkeypatch.setattr(rdma, "list_devices", lambda: found)
    monkeypatch.setenv("CKPT_ENGINE_DEVICE_UUID", "NPU-mine")
    monkeypatch.delenv("MC_FORCE_TCP", raising=False)
    module = ModuleType("mooncake.engine")
    module.TransferEngine = Mooncake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mooncake", ModuleType("mooncake"))
    monkeypatch.setitem(sys.modules, "mooncake.engine", module)
    monkeypatch.setattr(mooncake_store, "_transport_of", lambda *_: "ascend_direct")
    device = make_device("npu", load_settings(), 1)
    ends = P2PEnds(load_settings(), device, gpu_count=8, local_rank=1, host_ip="127.0.0.1")
    assert ends.rdma_device() == ""
    threads = [threading.Thread(target=use) for use in (ends.reading.store, ends._make_store)]
    for thread in threads:
        thread.start()
        thread.join()
    assert Mooncake.made == [(("127.0.0.1", "P2PHANDSHAKE", "ascend_direct", ""), 1)] * 2

    def read() -> None:
        before = NPU.current_device()
        ends.reading.make_current()
        seen.append((before, NPU.current_device()))

    seen: list[tuple[int, int]] = []
    reader = threading.Thread(target=read)
    reader.start()
    reader.join()
    assert seen == [(0, 1)]
    ends.close()


def test_the_doctor_tells_each_npus_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{FAKE_NPU_SMI}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CKPT_ENGINE_HOST_ID", IP)

    def doctor(scenario: str) -> dict[str, Finding]:
        monkeypatch.setattr(identity, "_NUMBERS", {})
        monkeypatch.setenv("FAKE_NPU_SMI_SCENARIO", scenario)
        return {finding.subject: finding for finding in find(load_settings(), os.environ)}

    found = doctor("a2_privileged_hostpid")
    assert found["torch_npu"].message == "sees 2 NPUs"
    assert [found[f"npu {index}"].message for index in (0, 1)] == [f"NPU-{IP}-0", f"NPU-{IP}-1"]
    found = doctor("no_permission")
    for index in (0, 1):
        assert found[f"npu {index}"].level is Level.ERROR
        assert "ret is -8002" in found[f"npu {index}"].message
        assert "CKPT_ENGINE_DEVICE_UUID" in found[f"npu {index}"].message
    # No logic ids: found by its pid, once the doctor has used the NPU.
    monkeypatch.setattr(identity, "sees_own_pids", lambda: True)
    monkeypatch.setenv("FAKE_PID__395864", str(os.getpid()))
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0")
    assert doctor("a5")["npu 0"].message == f"NPU-{IP}-0"
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")
    assert "sees no NPU" in doctor("a5")["torch_npu"].message


@pytest.mark.parametrize("value", [None, "", "0", "-1", "soon"])
def test_a_group_that_cannot_be_aborted_needs_an_end(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.setenv("CKPT_ENGINE_DEVICE_UUID", "NPU-mine")
    monkeypatch.setenv("CKPT_ENGINE_CUSTOM_DIST", "vllm_hccl")
    if value is not None:
        monkeypatch.setenv("HCCL_EXEC_TIMEOUT", value)
    with pytest.raises(ConfigError, match="needs HCCL_EXEC_TIMEOUT"):
        make_device("npu", load_settings(), 0)
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "60")
    assert make_device("npu", load_settings(), 0).collectives == "vllm_hccl"
    with pytest.raises(ConfigError, match="is for NPUs"):
        make_device("cpu", load_settings(), 0)


def test_a_communicator_that_would_do_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-ascend's does, without a word, where it cannot load hccl."""
    monkeypatch.setenv("FAKE_NO_HCCL_LIBRARY", "1")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    with pytest.raises(ConfigError, match="HCCL_SO_PATH"):
        make_group("vllm_hccl", store, "members", 0, 2, 0, Deadline.after(30), lambda: None)


def members(store: torch.distributed.Store, *polls: Callable[[], object]) -> list[Future[Collectives]]:
    """A group's members, each in a thread of its own, on NPUs 0 and 1."""
    with ThreadPoolExecutor() as pool:
        return [
            pool.submit(make_group, "vllm_hccl", store, "members", place, 2, place, Deadline.after(30), poll)
            for place, poll in enumerate(polls)
        ]


@pytest.fixture
def store() -> torch.distributed.Store:
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = Deadline.after(30)
    while not condition():
        assert not deadline.passed
        time.sleep(0.01)


def test_a_group_that_is_closed_is_destroyed(
    store: torch.distributed.Store, caplog: pytest.LogCaptureFixture
) -> None:
    """On its own NPU, in whatever thread, and when nothing is left to be done by it. Once."""
    groups = [member.result() for member in members(store, lambda: None, lambda: None)]
    assert len(pyhccl._alive) == 2
    for place, group in enumerate(groups):
        tensor = torch.full((4,), place, dtype=torch.uint8).to(f"npu:{place}")
        with NPU.stream(NPU.Stream(place)):
            group.broadcast(tensor, 0, Deadline.after(30), lambda: None)
    closing = [threading.Thread(target=group.close) for group in groups]
    for thread in closing:
        thread.start()
    wait_for(lambda: not pyhccl._alive)
    for thread in closing:
        thread.join()
    groups[0].close()
    assert "HCCL error" not in caplog.text


def test_a_group_that_nobody_waits_for_any_more_is_destroyed(store: torch.distributed.Store) -> None:
    """One member has given up while the others were still to come; they come, and hccl makes it after all."""

    def give_up() -> None:
        raise KeyError("another rank failed")

    with pytest.raises(KeyError):
        make_group("vllm_hccl", store, "members", 0, 2, 0, Deadline.after(30), give_up)
    other = make_group("vllm_hccl", store, "members", 1, 2, 1, Deadline.after(30), lambda: None)
    wait_for(lambda: len(pyhccl._alive) == 1)
    other.close()
    wait_for(lambda: not pyhccl._alive)


def test_a_communicator_whose_making_fails_is_destroyed(
    store: torch.distributed.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HCCL_FAILS", "1")
    for member in members(store, lambda: None, lambda: None):
        with pytest.raises(PeerLost, match="the first collective failed"):
            member.result()
    assert not pyhccl._alive


def test_an_end_that_asserts_does_not_hide_why_there_is_no_communicator(
    store: torch.distributed.Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As `close` of vllm-ascend's next releases does, of one that was never made."""

    def fail(communicator: object, group: object, device: object) -> None:
        raise RuntimeError("HCCL error: port 16666 is in use")

    def close(communicator: object) -> None:
        raise AssertionError

    monkeypatch.setattr(pyhccl.PyHcclCommunicator, "__init__", fail)
    monkeypatch.setattr(pyhccl.PyHcclCommunicator, "close", close, raising=False)
    with pytest.raises(PeerLost, match="port 16666 is in use"):
        make_group("vllm_hccl", store, "members", 0, 2, 0, Deadline.after(30), lambda: None)
    assert "while a communicator ended: AssertionError" in caplog.text


def test_a_communicator_that_cannot_be_destroyed_is_told(
    store: torch.distributed.Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does an error of the device keep it: that is how a broadcast ends whose root is gone."""

    def fail(*_: object) -> None:
        raise RuntimeError("HCCL error: internal")

    groups = [member.result() for member in members(store, lambda: None, lambda: None)]
    NPU.current_stream().enqueue(fail)
    groups[0].close()
    assert "before a communicator ends: HCCL error: internal" in caplog.text
    assert len(pyhccl._alive) == 1
    monkeypatch.setattr(pyhccl.HCCLLibrary, "hcclCommDestroy", fail)
    groups[1].close()
    assert "while a communicator ended: HCCL error: internal" in caplog.text
    pyhccl._alive.clear()


def test_a_communicator_that_can_end_itself_does(store: torch.distributed.Store) -> None:
    """vllm-ascend's next releases have `close`."""
    ended = []
    groups = [member.result() for member in members(store, lambda: None, lambda: None)]
    for place, group in enumerate(groups):
        group._group.close = lambda place=place: ended.append(place)  # type: ignore[attr-defined]
        group.close()
    assert ended == [0, 1]
    pyhccl._alive.clear()


def test_without_vllm_ascend_its_groups_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_ascend.distributed.device_communicators.pyhccl", None)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    with pytest.raises(ConfigError, match="needs vllm and vllm-ascend"):
        make_group("vllm_hccl", store, "members", 0, 2, 0, Deadline.after(30), lambda: None)
