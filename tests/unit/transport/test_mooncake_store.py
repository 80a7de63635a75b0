"""The store: on a stand-in for every failure, and on mooncake itself, over TCP, between two processes."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import ClassVar

import pytest
import torch

from ckpt_engine.errors import P2PError, P2PUnavailable
from ckpt_engine.settings import load_settings
from ckpt_engine.transport import mooncake_store
from ckpt_engine.transport.mooncake_environment import prepare_environment, wanted_transport
from ckpt_engine.transport.mooncake_store import MooncakeStore, describe
from ckpt_engine.transport.p2p import P2PStore, Piece, Read, make_p2p_store
from ckpt_engine.transport.verbs import RdmaDevice
from tests.support.fake_mooncake import FakeEngine, FakeNetwork

LIMIT = 60.0
SEED = 20271127
MiB = 1024 * 1024

OWNER = """
import ctypes, mmap, sys
from ckpt_engine.settings import load_settings
from ckpt_engine.transport.p2p import make_p2p_store
nbytes = {nbytes}
memory = mmap.mmap(-1, nbytes)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
ctypes.memset(address, 7, nbytes)
store = make_p2p_store(load_settings(), {ip!r}, "cpu", [])
store.register(address, nbytes)
print(store.address, address, flush=True)
sys.stdin.read()
"""

READER = """
import time, torch
from ckpt_engine.settings import load_settings
from ckpt_engine.transport.p2p import Piece, make_p2p_store
here = torch.zeros({nbytes}, dtype=torch.uint8)
store = make_p2p_store(load_settings(), {ip!r}, "cpu", [])
store.register(here.data_ptr(), {nbytes})
read = store.start_read({peer!r}, [Piece(local=here.data_ptr(), remote={remote}, nbytes={nbytes})])
while not read.poll():
    time.sleep(0.001)
print(store.transport, bool(torch.all(here == 7)))
"""


def tensor(nbytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED + nbytes)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def drive(read: Read, seconds: float = LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not read.poll():
        assert time.monotonic() < deadline, "the read does not end"
        time.sleep(0.001)


# On the stand-in


class Pair:
    """A store that serves `there`, and one that reads into `here`."""

    def __init__(self) -> None:
        self.network = FakeNetwork()
        self.engines: dict[str, FakeEngine] = {}
        self.there, self.here = tensor(1000), torch.zeros(1000, dtype=torch.uint8)
        self.owner = self.store("10.0.0.1:1")
        self.reader = self.store("10.0.0.2:1")
        self.owner.register(self.there.data_ptr(), 1000)
        self.reader.register(self.here.data_ptr(), 1000)

    def store(self, address: str) -> MooncakeStore:
        self.engines[address] = self.network.engine(address)
        return MooncakeStore(self.engines[address], address, "tcp")

    def piece(self, start: int = 0, nbytes: int = 1000) -> Piece:
        return Piece(local=self.here.data_ptr() + start, remote=self.there.data_ptr() + start, nbytes=nbytes)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.setattr(mooncake_store, "PIECE_NBYTES", 64)
    return Pair()


def test_pieces_are_cut_read_and_asked_for_only_once(pair: Pair) -> None:
    read = pair.reader.start_read(pair.owner.address, [pair.piece(0, 100), pair.piece(300, 700)])
    assert not read.poll()
    drive(read)
    assert read.poll()  # the stand-in raises where an id that ended is asked again
    expected = pair.there.clone()
    expected[100:300] = 0
    assert torch.equal(pair.here, expected)


def test_nothing_to_read_is_there_at_once(pair: Pair) -> None:
    assert pair.reader.start_read(pair.owner.address, []).poll()
    assert pair.reader.start_read(pair.owner.address, [pair.piece(0, 0)]).poll()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_peer_that_dies_fails_the_read_again_and_again(pair: Pair, when: str) -> None:
    engine = pair.engines[pair.owner.address]
    engine.alive = when != "before"
    read = pair.reader.start_read(pair.owner.address, [pair.piece()])
    engine.alive = False
    for _ in range(3):
        with pytest.raises(
            P2PError, match=r"a read of 1000 bytes from 10.0.0.1:1 over tcp failed: it is gone"
        ):
            drive(read)


def test_memory_that_the_peer_does_not_have_fails_the_read(pair: Pair) -> None:
    beyond = Piece(local=pair.here.data_ptr(), remote=pair.there.data_ptr() + 999, nbytes=2)
    with pytest.raises(P2PError, match="has not that memory"):
        drive(pair.reader.start_read(pair.owner.address, [beyond]))
    drive(pair.reader.start_read(pair.owner.address, [pair.piece()]))  # the store is as good as before
    pair.owner.unregister(pair.there.data_ptr())
    with pytest.raises(P2PError, match="has not that memory"):
        drive(pair.reader.start_read(pair.owner.address, [pair.piece()]))


@pytest.mark.parametrize(("shift", "nbytes"), [(-1, 10), (991, 10), (1000, 1), (5000, 1)])
def test_bytes_land_only_in_registered_memory(pair: Pair, shift: int, nbytes: int) -> None:
    """TCP would write them anywhere."""
    stray = Piece(local=pair.here.data_ptr() + shift, remote=pair.there.data_ptr(), nbytes=nbytes)
    with pytest.raises(P2PError, match=f"{nbytes} bytes at 0x[0-9a-f]+ are not registered here"):
        pair.reader.start_read(pair.owner.address, [pair.piece(), stray])


def test_registering_twice_is_refused_and_unregistering_twice_is_not(pair: Pair) -> None:
    with pytest.raises(P2PError, match="some of it is registered already"):
        pair.owner.register(pair.there.data_ptr() + 10, 10)
    pair.owner.unregister(pair.there.data_ptr())
    pair.owner.unregister(pair.there.data_ptr())
    pair.owner.register(pair.there.data_ptr() + 10, 10)


def test_after_a_failed_read_bytes_come_until_the_store_is_closed(pair: Pair) -> None:
    """The contract at the head of `p2p`."""
    owner, reader = pair.engines[pair.owner.address], pair.engines.pop(pair.reader.address)
    owner.stopped = True
    read = pair.reader.start_read(pair.owner.address, [pair.piece(0, 60)])
    with pytest.raises(P2PError, match="Bytes of it may still come until the store is closed"):
        drive(read)
    assert not pair.here.any()
    assert reader.bytes_come_late() == 1
    assert torch.equal(pair.here[:60], pair.there[:60])
    gone = weakref.ref(reader)
    del reader
    pair.network.engines.clear()
    pair.reader.close()
    gc.collect()
    assert gone() is None  # nobody keeps the engine, not even the read
    with pytest.raises(P2PError, match="failed"):
        read.poll()


def test_a_closed_store_says_so(pair: Pair) -> None:
    read = pair.reader.start_read(pair.owner.address, [pair.piece()])
    pair.reader.close()
    pair.reader.close()
    for use in (
        read.poll,
        lambda: pair.reader.register(1, 1),
        lambda: pair.reader.unregister(1),
        lambda: pair.reader.start_read(pair.owner.address, []),
    ):
        with pytest.raises(P2PError, match=r"the P2P store 10.0.0.2:1 is closed"):
            use()


# What it asks of mooncake


@pytest.fixture
def no_mooncake_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("MC_", "FI_")):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    monkeypatch.setattr(os, "environ", before)


@pytest.mark.parametrize(
    ("device_type", "devices", "efa", "transport"),
    [
        ("cuda", [], [], "tcp"),
        ("cuda", ["mlx5_0"], [], "rdma"),
        ("cpu", ["rdmap0s1", "rdmap0s2"], ["rdmap0s1", "rdmap0s2", "x"], "efa"),
        ("npu", [], [], "ascend_direct"),
        ("npu", ["mlx5_0"], [], "ascend_direct"),
    ],
)
def test_the_transport_follows_from_the_devices(
    no_mooncake_variables: None, device_type: str, devices: list[str], efa: list[str], transport: str
) -> None:
    assert wanted_transport(device_type, devices, efa) == transport


@pytest.mark.parametrize(
    ("device_type", "devices", "asked"),
    [
        ("cuda", ["mlx5_0"], "rdma"),
        ("cuda", ["mlx5_0"], "tcp"),
        ("cpu", [], "tcp"),
        ("cuda", ["rdmap0s1"], "efa"),
        ("npu", [], "ascend_direct"),
    ],
)
def test_a_transport_is_asked_for(
    no_mooncake_variables: None, device_type: str, devices: list[str], asked: str
) -> None:
    assert wanted_transport(device_type, devices, ["rdmap0s1"], asked) == asked


@pytest.mark.parametrize(
    ("device_type", "devices", "asked", "found"),
    [
        ("cuda", [], "rdma", "tcp here: the devices are no RDMA devices of a cuda host"),
        ("cuda", ["mlx5_0"], "efa", "rdma here: the devices are mlx5_0"),
        ("cuda", ["rdmap0s1"], "rdma", "efa here"),
        ("cuda", ["mlx5_0"], "ascend_direct", "rdma here"),
        ("npu", ["mlx5_0"], "rdma", "ascend_direct here"),
        ("npu", [], "tcp", "ascend_direct here"),
    ],
)
def test_a_transport_that_cannot_be_had_is_an_error(
    no_mooncake_variables: None, device_type: str, devices: list[str], asked: str, found: str
) -> None:
    with pytest.raises(P2PUnavailable, match=f"CKPT_ENGINE_P2P_TRANSPORT={asked}.*over {found}"):
        wanted_transport(device_type, devices, ["rdmap0s1"], asked)


def test_rdma_that_is_asked_for_where_tcp_is_forced(no_mooncake_variables: None) -> None:
    os.environ["MC_FORCE_TCP"] = "1"
    with pytest.raises(P2PUnavailable, match="over tcp here: MC_FORCE_TCP is set"):
        wanted_transport("cuda", ["mlx5_0"], [], "rdma")


@pytest.mark.parametrize("asked", ["rdma", "efa", "ascend_direct"])
def test_a_store_over_another_transport_than_asked_for_is_not_made(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this host, which has TCP only."""
    monkeypatch.setenv("CKPT_ENGINE_P2P_TRANSPORT", asked)
    with pytest.raises(P2PUnavailable, match=f"CKPT_ENGINE_P2P_TRANSPORT={asked}"):
        make_p2p_store(load_settings(), "127.0.0.1", "cpu", [])


def test_devices_of_two_kinds_are_refused(no_mooncake_variables: None) -> None:
    with pytest.raises(P2PUnavailable, match="some are EFA and some are not"):
        wanted_transport("cuda", ["mlx5_0", "rdmap0s1"], ["rdmap0s1"])


@pytest.mark.parametrize(
    ("transport", "name", "value"),
    [
        ("tcp", "MC_FORCE_TCP", "1"),
        ("rdma", "MC_FORCE_HCA", "1"),
        ("efa", "FI_EFA_ENABLE_SHM_TRANSFER", "0"),
        ("tcp", "MC_TCP_PROGRESS_TIMEOUT_SEC", "7"),
        ("tcp", "MC_TCP_STATUS_TIMEOUT_SEC", "7"),
        ("tcp", "MC_TRANSFER_TIMEOUT", "14"),
    ],
)
def test_what_is_set_for_mooncake(
    no_mooncake_variables: None, transport: str, name: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_environment(transport, 7, ipv6=False)
    assert os.environ[name] == value
    assert "MC_USE_IPV6" not in os.environ
    os.environ[name] = "25"  # a user's is kept
    prepare_environment(transport, 7, ipv6=True)
    assert os.environ[name] == "25"
    assert os.environ["MC_USE_IPV6"] == "1"
    assert ("should be below" in caplog.text) == (name == "MC_TCP_STATUS_TIMEOUT_SEC")


def test_what_a_user_forces(no_mooncake_variables: None) -> None:
    os.environ["MC_FORCE_TCP"] = "1"
    assert wanted_transport("cuda", ["mlx5_0"], []) == "tcp"
    with pytest.raises(P2PUnavailable, match="MC_FORCE_TCP is set, which forces another transport"):
        prepare_environment("ascend_direct", 30, ipv6=False)
    os.environ["MC_FORCE_HCA"] = "1"
    with pytest.raises(P2PUnavailable, match="MC_FORCE_HCA is set, which forces another transport than tcp"):
        prepare_environment("tcp", 30, ipv6=False)


# mooncake itself


@pytest.fixture
def stores() -> Iterator[Callable[..., P2PStore]]:
    pytest.importorskip("mooncake.engine", reason="mooncake is not installed, or libibverbs is missing")
    made: list[P2PStore] = []

    def start(ip: str = "127.0.0.1") -> P2PStore:
        made.append(make_p2p_store(load_settings(), ip, "cpu", []))
        return made[-1]

    yield start
    for store in made:
        store.close()


def test_the_engine_itself_says_what_it_uses(stores: Callable[..., P2PStore]) -> None:
    store = stores()
    assert store.transport == "tcp"
    memory = tensor(4096)
    store.register(memory.data_ptr(), 4096)
    found = describe("127.0.0.1", int(store.address.rpartition(":")[2]))
    assert found["protocol"] == "tcp"
    assert [(one["addr"], one["length"]) for one in found["buffers"]] == [(memory.data_ptr(), 4096)]


def test_another_transport_than_the_wanted_one_is_an_error(
    stores: Callable[..., P2PStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel without Ascend takes TCP, whatever it is told; and says nothing of it."""
    monkeypatch.delenv("MC_FORCE_TCP", raising=False)
    with pytest.raises(
        P2PUnavailable,
        match=r"should go over ascend_direct, but mooncake takes tcp here: .* mooncake-transfer-engine-npu$",
    ):
        make_p2p_store(load_settings(), "127.0.0.1", "npu", [])


class NpuEngine:
    """mooncake's as its wheel for NPUs has it; answers peers with a description of `protocol`."""

    asked: ClassVar[list[tuple[str, ...]]] = []
    protocol: ClassVar[str] = ""

    def initialize(self, *arguments: str) -> int:
        self.asked.append(arguments)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.peer = threading.Thread(target=self.answer)
        self.peer.start()
        return 0

    def answer(self) -> None:
        body = b"\0" + json.dumps({"protocol": self.protocol}).encode()
        connection, _ = self.listener.accept()
        with connection, self.listener:
            connection.recv(1024)
            connection.sendall(struct.pack("<Q", len(body)) + body)

    def get_rpc_port(self) -> int:
        return int(self.listener.getsockname()[1])


def put_in_mooncakes_place(monkeypatch: pytest.MonkeyPatch, engine: type[NpuEngine]) -> None:
    module = ModuleType("mooncake.engine")
    module.TransferEngine = engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mooncake", ModuleType("mooncake"))
    monkeypatch.setitem(sys.modules, "mooncake.engine", module)


@pytest.mark.parametrize("conflicts", [1, 7, 8])
def test_ports_that_others_took_meanwhile_are_tried_again(
    no_mooncake_variables: None, monkeypatch: pytest.MonkeyPatch, conflicts: int
) -> None:
    """Each time by a new engine, eight times in all; then what mooncake said is told."""
    engines: list[object] = []

    class BusyEngine(NpuEngine):
        def initialize(self, *arguments: str) -> int:
            engines.append(self)
            if len(engines) <= conflicts:
                os.write(2, b"E1128 02:30:00.1 1 tcp_transport.cpp:1] bind: Address already in use\n")
                return -1
            return super().initialize(*arguments)

    put_in_mooncakes_place(monkeypatch, BusyEngine)
    monkeypatch.setattr(NpuEngine, "protocol", "tcp")
    if conflicts < 8:
        store = make_p2p_store(load_settings(), "127.0.0.1", "cpu", [])
        assert store.transport == "tcp"
        store.close()
    else:
        with pytest.raises(P2PUnavailable, match=r"cannot start at 127\.0\.0\.1 .*Address already in use"):
            make_p2p_store(load_settings(), "127.0.0.1", "cpu", [])
    assert len({id(engine) for engine in engines}) == min(conflicts + 1, 8)


@pytest.mark.parametrize("protocol", ["ascend", "ascend_direct", "tcp"])
def test_what_mooncake_is_asked_for_on_npus(
    no_mooncake_variables: None, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    """The host's RDMA devices are nothing to it; and it calls its transport `ascend`."""
    put_in_mooncakes_place(monkeypatch, NpuEngine)
    monkeypatch.setattr(NpuEngine, "asked", [])
    monkeypatch.setattr(NpuEngine, "protocol", protocol)
    if protocol == "tcp":
        with pytest.raises(P2PUnavailable, match="should go over ascend_direct, but mooncake takes tcp"):
            make_p2p_store(load_settings(), "127.0.0.1", "npu", ["mlx5_0"])
    else:
        store = make_p2p_store(load_settings(), "127.0.0.1", "npu", ["mlx5_0"])
        assert store.transport == "ascend_direct"
        store.close()
    assert NpuEngine.asked == [("127.0.0.1", "P2PHANDSHAKE", "ascend_direct", "")]


@pytest.mark.parametrize(("vendor", "transport"), [(0x15B3, "rdma"), (0x1D0F, "efa")])
@pytest.mark.parametrize("tells", ["the same", "tcp"])
def test_what_mooncake_is_asked_for_with_rdma_devices(
    no_mooncake_variables: None, monkeypatch: pytest.MonkeyPatch, vendor: int, transport: str, tells: str
) -> None:
    """All of a rank's devices; and what it then takes is what counts."""
    found = [RdmaDevice(name=name, vendor_id=vendor, active_ports=(1,)) for name in ("a0", "a1", "a2")]
    monkeypatch.setattr(mooncake_store, "list_devices", lambda: found)
    put_in_mooncakes_place(monkeypatch, NpuEngine)
    monkeypatch.setattr(NpuEngine, "asked", [])
    monkeypatch.setattr(NpuEngine, "protocol", transport if tells == "the same" else tells)
    if tells == "tcp":
        with pytest.raises(P2PUnavailable, match=f"should go over {transport}, but mooncake takes tcp here"):
            make_p2p_store(load_settings(), "127.0.0.1", "cuda", ["a0", "a2"])
    else:
        store = make_p2p_store(load_settings(), "127.0.0.1", "cuda", ["a0", "a2"])
        assert store.transport == transport
        store.close()
    assert NpuEngine.asked == [("127.0.0.1", "P2PHANDSHAKE", transport, "a0,a2")]


def test_a_mooncake_that_does_not_say_what_it_uses_is_warned_of(
    no_mooncake_variables: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class MuteEngine(NpuEngine):
        def answer(self) -> None:
            connection, _ = self.listener.accept()
            connection.close()
            self.listener.close()

    put_in_mooncakes_place(monkeypatch, MuteEngine)
    store = make_p2p_store(load_settings(), "127.0.0.1", "cpu", [])
    assert store.transport == "tcp"
    assert "does not say what it uses" in caplog.text
    store.close()


@pytest.mark.parametrize(
    ("device_type", "says"),
    [
        ("npu", r"needs mooncake-transfer-engine-npu and CANN.*ckpt-engine\[p2p-npu\]'.*set_env.sh"),
        ("cuda", r"needs mooncake-transfer-engine and libibverbs .*ckpt-engine\[p2p\]'.*libibverbs1"),
    ],
)
def test_without_mooncake_the_right_wheel_is_named(
    monkeypatch: pytest.MonkeyPatch, device_type: str, says: str
) -> None:
    monkeypatch.delenv("MC_FORCE_TCP", raising=False)
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(P2PUnavailable, match=says):
        make_p2p_store(load_settings(), "127.0.0.1", device_type, [])


def test_starting_keeps_what_others_write_to_stderr(
    stores: Callable[..., P2PStore], capfd: pytest.CaptureFixture[str]
) -> None:
    with mooncake_store._stderr() as lines:
        os.write(
            2, b"E1127 19:24:03.199978  3114 transfer_metadata.cpp:1098] no\na warning of somebody else\n"
        )
    assert lines == ["E1127 19:24:03.199978  3114 transfer_metadata.cpp:1098] no\n"]
    assert capfd.readouterr().err == "a warning of somebody else\n"
    stores()
    assert capfd.readouterr().err == ""


def test_ipv6(stores: Callable[..., P2PStore]) -> None:
    """Between two new processes: mooncake decides for or against it once in a process."""
    nbytes = MiB
    with subprocess.Popen(
        [sys.executable, "-c", OWNER.format(nbytes=nbytes, ip="::1")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        try:
            assert owner.stdout is not None
            peer, remote = owner.stdout.readline().split()
            assert peer.startswith("[::1]:")
            code = READER.format(nbytes=nbytes, ip="::1", peer=peer, remote=remote)
            done = subprocess.run(
                [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=LIMIT
            )
            assert done.stdout == "tcp True\n", done.stderr
        finally:
            owner.kill()


def test_bits_come_from_another_process_and_its_end_is_an_error(
    stores: Callable[..., P2PStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    ip = "127.0.0.1"
    monkeypatch.setattr(mooncake_store, "PIECE_NBYTES", MiB)
    nbytes = 8 * MiB
    command = [sys.executable, "-c", OWNER.format(nbytes=nbytes, ip=ip)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            peer, remote = owner.stdout.readline().split()
            here = torch.zeros(nbytes, dtype=torch.uint8)
            store = stores(ip)
            store.register(here.data_ptr(), nbytes)
            piece = Piece(local=here.data_ptr(), remote=int(remote), nbytes=nbytes)
            drive(store.start_read(peer, [piece]))
            assert torch.all(here == 7)
            with pytest.raises(P2PError, match="has not that memory"):
                drive(
                    store.start_read(
                        peer, [Piece(local=here.data_ptr(), remote=int(remote) + 1, nbytes=nbytes)]
                    )
                )
            owner.kill()
            owner.wait(LIMIT)
            with pytest.raises(P2PError, match="failed: it is gone"):
                drive(store.start_read(peer, [piece]))
        finally:
            owner.kill()


def test_no_byte_comes_once_the_store_is_closed(stores: Callable[..., P2PStore]) -> None:
    """From an owner that was stopped in the middle of a read, and goes on when its reader has given it up."""
    nbytes = 256 * MiB
    command = [sys.executable, "-c", OWNER.format(nbytes=nbytes, ip="127.0.0.1")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            peer, remote = owner.stdout.readline().split()
            here = torch.zeros(nbytes, dtype=torch.uint8)
            store = stores()
            store.register(here.data_ptr(), nbytes)
            read = store.start_read(peer, [Piece(local=here.data_ptr(), remote=int(remote), nbytes=nbytes)])
            while not here[::4096].any():  # under way
                assert not read.poll()
            owner.send_signal(signal.SIGSTOP)
            store.close()
            there = int(torch.count_nonzero(here))
            assert there < nbytes, "the read was over before the owner was stopped"
            owner.send_signal(signal.SIGCONT)
            again = stores()
            probe = (ctypes.c_char * 4096)()
            again.register(ctypes.addressof(probe), 4096)
            drive(
                again.start_read(
                    peer, [Piece(local=ctypes.addressof(probe), remote=int(remote), nbytes=4096)]
                )
            )
            assert int(torch.count_nonzero(here)) == there  # it serves again, and nothing came
        finally:
            owner.kill()


def test_a_description_that_comes_in_pieces_is_read_whole() -> None:
    """A socket with a time limit does not wait for all of it by itself."""
    body = b"\0" + json.dumps({"protocol": "tcp"}).encode()

    def answer(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(1024)
            for byte in struct.pack("<Q", len(body)) + body:
                peer.sendall(bytes([byte]))
                time.sleep(0.001)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = threading.Thread(target=answer, args=(listener,))
        peer.start()
        assert describe("127.0.0.1", listener.getsockname()[1]) == {"protocol": "tcp"}
        peer.join()
