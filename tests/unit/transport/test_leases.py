"""Leases: real sockets and threads; readers and owners that are killed or stopped are processes."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError, P2PError
from ckpt_engine.transport import lease_messages as messages
from ckpt_engine.transport import lease_server, leases
from ckpt_engine.transport.framing import LENGTH, FrameBuffer
from ckpt_engine.transport.lease_server import LeaseServer
from ckpt_engine.transport.leases import Lease
from tests.support.stopped import wait_until_stopped

SESSION, NAME, EPOCH = "d7" * 16, "step-100", "e1"
LIMIT = 30.0
"""Seconds for what should happen at once, on a loaded machine."""


@pytest.fixture
def server() -> Iterator[LeaseServer]:
    made = LeaseServer("127.0.0.1", 0, SESSION, max_readers=2)
    made.publish(NAME, EPOCH)
    yield made
    made.close()


_TAKEN: list[Lease] = []


@pytest.fixture(autouse=True)
def release() -> Iterator[None]:
    yield
    while _TAKEN:
        _TAKEN.pop().release()
    until(lambda: not thread_count("ckpt-engine-lease-keeper"), "the keeper ends with the last lease")


def take(
    server: LeaseServer | str,
    reader: str = "r",
    *,
    session: str = SESSION,
    name: str = NAME,
    epoch: str = EPOCH,
    seconds: float = LIMIT,
) -> Lease:
    address = server if isinstance(server, str) else server.address
    lease = Lease.take(address, session, name, epoch, Deadline.after(seconds), reader=reader)
    _TAKEN.append(lease)
    return lease


def until(done: Callable[[], bool], what: str, seconds: float = LIMIT) -> None:
    deadline = Deadline.after(seconds)
    while not done():
        assert not deadline.passed, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def asked(server: LeaseServer) -> int:
    """Connections that have a lease, or wait for one."""
    return sum(one.ask is not None for one in server._connections)


def thread_count(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


@contextmanager
def process(code: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Python code in a process of its own, and the first line that it says."""
    modules = ("transport.leases", "transport.lease_server", "deadline")
    head = "".join(f"from ckpt_engine.{module} import *\n" for module in modules)
    command = [sys.executable, "-c", head + code + "\nimport sys; sys.stdin.read()"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as child:
        try:
            assert child.stdout is not None
            yield child, child.stdout.readline().strip()
        finally:
            child.kill()


def reading_process(address: str) -> str:
    return (
        f"lease = Lease.take({address!r}, {SESSION!r}, {NAME!r}, {EPOCH!r}, Deadline.after({LIMIT}), "
        "reader='the other process')\nprint('taken', flush=True)"
    )


# Granting


def test_a_lease_is_taken_checked_and_released(server: LeaseServer) -> None:
    lease = take(server, "update 7 of fleet b")
    lease.check()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(server.withdraw, NAME, Deadline.after(LIMIT))
        until(lambda: not server._published, "it is withdrawn")
        lease.check()  # it holds until it is released
        assert not waiting.done()
        lease.release()
        assert waiting.result(LIMIT) == ()
    lease.release()
    with pytest.raises(P2PError, match="died"):
        lease.check()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"session": "d8" * 16}, "another process has taken the owner's place: its metas are out of date"),
        ({"session": ""}, "another process has taken the owner's place"),
        ({"name": "step-101"}, "'step-101' is not registered there any more"),
        ({"epoch": "e0"}, "'step-100' was registered anew: its metas are out of date"),
    ],
)
def test_other_memory_than_the_metas_tell_of_is_never_granted(
    server: LeaseServer, wrong: dict[str, str], why: str
) -> None:
    with pytest.raises(P2PError, match=why) as raised:
        take(server, **wrong)
    assert server.address in str(raised.value)
    assert SESSION not in str(raised.value)


def test_a_refilled_share_ends_the_leases_on_what_was_there_before(server: LeaseServer) -> None:
    lease = take(server)
    server.publish(NAME, EPOCH)  # again the same: nothing happens
    lease.check()
    server.publish(NAME, "e2")
    with pytest.raises(P2PError, match="has ended the lease, or died"):
        lease.check()
    take(server, epoch="e2").release()


def test_only_so_many_read_at_the_same_time_and_the_others_come_in_turn(server: LeaseServer) -> None:
    order: list[str] = []

    def wait_for(reader: str) -> Lease:
        lease = take(server, reader)
        order.append(reader)
        return lease

    first = [take(server, reader) for reader in ("a", "b")]
    with ThreadPoolExecutor() as pool:
        waiting = []
        for reader in ("c", "d"):
            waiting.append(pool.submit(wait_for, reader))
            until(lambda: asked(server) == 2 + len(waiting), "it has asked")
        take(server, "a").release()  # whoever reads already may take more
        assert order == []
        for number, lease in enumerate(first):
            lease.release()
            waiting[number].result(LIMIT).check()
        assert order == ["c", "d"]


def test_who_waits_in_vain_is_told_why_at_its_deadline(server: LeaseServer) -> None:
    held = [take(server, reader) for reader in ("a", "b")]
    with pytest.raises(P2PError, match=r"has not granted a lease: others are reading \(waited 0.2 s\)"):
        take(server, "c", seconds=0.2)
    until(lambda: len(server._connections) == 2, "it does not wait any more")
    for lease in held:
        lease.check()


def test_a_wait_can_be_interrupted(server: LeaseServer) -> None:
    for reader in ("a", "b"):
        take(server, reader)

    def poll() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Lease.take(server.address, SESSION, NAME, EPOCH, Deadline.after(LIMIT), reader="c", poll=poll)
    until(lambda: len(server._connections) == 2, "its connection ended")


# Withdrawing


def test_withdrawing_names_those_who_still_read_at_the_deadline(server: LeaseServer) -> None:
    leases = [take(server, "rank 3 of host x"), take(server, "rank 4 of host x")]
    names = server.withdraw(NAME, Deadline.after(0.05))
    assert [name.split(" (127.0.0.1:")[0] for name in names] == ["rank 3 of host x", "rank 4 of host x"]
    with pytest.raises(P2PError, match="is not registered there any more"):
        take(server)
    leases[0].check()
    server.end_leases(NAME)
    for lease in leases:
        with pytest.raises(P2PError, match="has ended the lease"):
            lease.check()
    assert server.withdraw(NAME, Deadline.after(0)) == ()


def test_withdrawing_refuses_those_who_wait(server: LeaseServer) -> None:
    held = [take(server, reader) for reader in ("a", "b")]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(take, server, "c")
        until(lambda: asked(server) == 3, "it has asked")
        assert len(server.withdraw(NAME, Deadline.after(0))) == len(held)
        with pytest.raises(P2PError, match="'step-100' is being unregistered"):
            waiting.result(LIMIT)


def test_withdrawing_one_checkpoint_leaves_the_others(server: LeaseServer) -> None:
    server.publish("other", "e9")
    lease = take(server, name="other", epoch="e9")
    assert server.withdraw(NAME, Deadline.after(0)) == ()
    lease.check()


# Ends


def test_a_killed_reader_holds_nothing_up(server: LeaseServer) -> None:
    with process(reading_process(server.address)) as (child, said):
        assert said == "taken"
        (name,) = server.withdraw(NAME, Deadline.after(0))
        assert name.startswith("the other process (")
        child.kill()
        began = time.monotonic()
        assert server.withdraw(NAME, Deadline.after(LIMIT)) == ()
        assert time.monotonic() - began < leases.LEASE_SECONDS / 2  # by its connection's end


def test_a_stopped_reader_loses_its_lease_and_gets_to_know(
    server: LeaseServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_server, "LEASE_SECONDS", 2.0)
    code = reading_process(server.address) + (
        "\nimport sys; sys.stdin.readline()\ntry: lease.check()\nexcept Exception as e: print(e, flush=True)"
    )
    with process(
        code.replace("lease = ", "import ckpt_engine.transport.leases as l; l.RENEW_SECONDS = 0.2; lease = ")
    ) as (
        child,
        said,
    ):
        assert said == "taken"
        time.sleep(2.5)  # a live one renews it
        assert len(server.withdraw(NAME, Deadline.after(0))) == 1
        child.send_signal(signal.SIGSTOP)
        assert server.withdraw(NAME, Deadline.after(LIMIT)) == ()
        child.send_signal(signal.SIGCONT)
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        assert "has ended the lease, or died" in child.stdout.readline()


def owning_process() -> str:
    return (
        f"server = LeaseServer('127.0.0.1', 0, {SESSION!r}, max_readers=1)\n"
        f"server.publish({NAME!r}, {EPOCH!r})\nprint(server.address, flush=True)"
    )


def test_a_killed_owner_is_noticed_by_the_next_check() -> None:
    with process(owning_process()) as (child, address):
        lease = take(address)
        child.kill()
        child.wait(LIMIT)
        with pytest.raises(P2PError, match=f"lease server at {address} has ended the lease, or died"):
            lease.check()
        with pytest.raises(P2PError, match=f"lease server at {address} cannot be reached"):
            take(address)


def test_a_stopped_owner_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By who reads, and by who waits for others."""
    monkeypatch.setattr(leases, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.2)
    with process(owning_process()) as (child, address), ThreadPoolExecutor() as pool:
        lease = take(address, "a")
        waiting = pool.submit(take, address, "b")
        time.sleep(2.5)  # a live one answers
        assert not waiting.done()
        child.send_signal(signal.SIGSTOP)
        wait_until_stopped(child.pid)
        with pytest.raises(P2PError, match="does not answer: it is stopped, or cut off"):
            lease.check(Deadline.after(0.3))
        with pytest.raises(P2PError, match=r"has not been heard for 2 s: is it stopped\?"):
            waiting.result(LIMIT)


def test_closing_ends_the_leases_the_threads_and_the_port() -> None:
    server = LeaseServer("127.0.0.1", 0, SESSION)
    server.publish(NAME, EPOCH)
    lease = take(server)
    assert thread_count("ckpt-engine-lease-keeper") == 1
    server.close()
    server.close()
    with pytest.raises(P2PError, match="has ended the lease"):
        lease.check()
    with pytest.raises(P2PError, match="cannot be reached"):
        take(server)
    assert thread_count("ckpt-engine-leases") == 0


# Addresses


def test_ipv6() -> None:
    server = LeaseServer("::1", 0, SESSION)
    try:
        assert server.address.startswith("[::1]:")
        server.publish(NAME, EPOCH)
        lease = take(server, "six")
        assert server.withdraw(NAME, Deadline.after(0))[0].startswith("six ([::1]:")
        lease.release()
    finally:
        server.close()


def test_a_port_of_choice_and_one_that_is_taken(server: LeaseServer) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"cannot serve leases at 127.0.0.1, port {port}"):
        LeaseServer("127.0.0.1", port, SESSION)
    server.close()
    again = LeaseServer("127.0.0.1", port, SESSION)
    assert again.address == f"127.0.0.1:{port}"
    again.close()


@pytest.mark.parametrize("address", ["", "nowhere", "nowhere:", ":80", "host:port", "host:65536"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(P2PError, match="is no address of a lease server"):
        take(address)


# Strangers, and what is malformed


def connect(server: LeaseServer) -> socket.socket:
    host, port = messages.parts_of(server.address)
    return socket.create_connection((host, port), timeout=LIMIT)


def ask(**other: str) -> bytes:
    fields = {"session": SESSION, "checkpoint": NAME, "epoch": EPOCH, "reader": "r"} | other
    return messages.frame(messages.Ask(messages.LEASE_PROTOCOL, **fields))


def answer(sock: socket.socket) -> messages.OwnerMessage:
    frames = FrameBuffer(messages.MAX_NBYTES)
    while (body := frames.next()) is None:
        data = sock.recv(4096)
        assert data
        frames.feed(data)
    return messages.owner_message(body)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        LENGTH.pack(messages.MAX_NBYTES + 1),
        LENGTH.pack(4) + b"\xff\xff\xff\xff",
        LENGTH.pack(3) + b'{"a',
        messages.frame(messages.Check()),
        messages.frame(messages.Renew()),
        ask() + ask(),
        messages.frame(messages.Held()),
    ],
)
def test_who_speaks_otherwise_is_hung_up_on(server: LeaseServer, said: bytes) -> None:
    with connect(server) as sock:
        sock.sendall(said)
        while data := sock.recv(4096):  # to the end of the connection, at once
            assert data == messages.frame(messages.Granted())
    take(server).release()


def test_another_version_is_told(server: LeaseServer) -> None:
    with connect(server) as sock:
        sock.sendall(messages.frame(messages.Ask(0, SESSION, NAME, EPOCH, "old")))
        assert answer(sock) == messages.Refused("it speaks version 2 of this protocol")


def test_a_message_may_come_byte_by_byte(server: LeaseServer) -> None:
    with connect(server) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in ask():
            sock.sendall(bytes([byte]))
        assert answer(sock) == messages.Granted()


def test_who_is_silent_or_slow_is_hung_up_on(server: LeaseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_server, "ASK_SECONDS", 0.5)
    with connect(server) as silent, connect(server) as slow:
        began = time.monotonic()
        slow.settimeout(0.1)
        data = None
        while data is None:
            assert time.monotonic() - began < LIMIT
            try:
                slow.sendall(b"\x20")  # a length that is never whole keeps nobody on the line
                data = slow.recv(1)
            except TimeoutError:
                data = None
            except ConnectionError:
                data = b""
        assert data == b""
        assert silent.recv(1) == b""
        assert time.monotonic() - began >= 0.5


def test_strangers_never_keep_readers_out(server: LeaseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_server, "MAX_STRANGERS", 4)
    lease = take(server)
    crowd = [connect(server) for _ in range(9)]
    try:
        take(server).release()
        lease.check()
        assert len([one for one in server._connections if one.ask is None]) <= 4
        assert crowd[0].recv(1) == b""  # the oldest went first
    finally:
        for sock in crowd:
            sock.close()


def test_leases_are_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_server, "MAX_LEASES", 2)
    server = LeaseServer("127.0.0.1", 0, SESSION)
    server.publish(NAME, EPOCH)
    try:
        kept = [take(server), take(server)]
        with pytest.raises(P2PError, match="it has given 2 leases: ask again later"):
            take(server)
        kept[0].release()
        until(lambda: len(server._connections) == 1, "it is released")
        take(server).release()
    finally:
        server.close()


def test_without_descriptors_it_waits_and_goes_on(
    server: LeaseServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exhausted:
        tries = 0

        def accept(self) -> None:
            self.tries += 1
            raise OSError(errno.EMFILE, "too many open files")

        def fileno(self) -> int:
            return listener.fileno()

    listener = server._listener
    exhausted = Exhausted()
    with server._changed:
        server._selector.unregister(listener)
        server._listener = exhausted  # type: ignore[assignment]
        server._selector.register(exhausted, 1, server._accept)
    with ThreadPoolExecutor() as pool:
        taken = pool.submit(take, server)
        until(lambda: exhausted.tries == 1, "it cannot accept")
        server._listener = listener
        taken.result(LIMIT).release()
    assert exhausted.tries == 1  # it did not spin
