"""Leases: real sockets and threads; readers and owners that are killed or stopped are processes."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from leases_for_transport_tests import (
    EPOCH,
    LAYOUT,
    LIMIT,
    NAME,
    SESSION,
    asked,
    process,
    publish,
    reading_process,
    share_at,
    take,
    thread_count,
    until,
)

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import P2PError
from ckpt_engine.transport import lease_server, leases
from ckpt_engine.transport.lease_messages import ALL
from ckpt_engine.transport.lease_server import LeaseServer
from ckpt_engine.transport.leases import Lease
from tests.support.stopped import wait_until_stopped

pytestmark = pytest.mark.usefixtures("releases_leases")


# Granting


def test_a_lease_is_taken_checked_and_released(server: LeaseServer) -> None:
    lease = take(server, "update 7 of fleet b")
    lease.check()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(server.withdraw, NAME, Deadline.after(LIMIT))
        until(lambda: not server._published, "it is withdrawn")
        lease.check()  # it holds until it is released
        assert lease.present == ALL  # and all of it can still be read
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
        (
            {"layout": "another"},
            "'step-100' lies there in another way than its metas tell: ask for them again",
        ),
    ],
)
def test_other_memory_than_the_metas_tell_of_is_never_granted(
    server: LeaseServer, wrong: dict[str, str], why: str
) -> None:
    with pytest.raises(P2PError, match=why) as raised:
        take(server, **wrong)
    assert server.address in str(raised.value)
    assert SESSION not in str(raised.value)


def test_a_share_that_fills_says_how_far_it_is(server: LeaseServer) -> None:
    publish(server, "filling", "e7", present=0)
    lease = take(server, name="filling", epoch="e7")
    assert lease.present == 0
    server.came("filling", 3)
    assert lease.present == 0
    lease.check()
    assert lease.present == 3
    assert take(server, "other", name="filling", epoch="e7").present == 3
    assert take(server).present == ALL


def test_a_refilled_share_ends_the_leases_on_what_was_there_before(server: LeaseServer) -> None:
    lease = take(server)
    publish(server)  # again the same: nothing happens
    lease.check()
    publish(server, epoch="e2")
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
        Lease.take(share_at(server), Deadline.after(LIMIT), reader="c", poll=poll)
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
    publish(server, "other", "e9")
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
        f"server.publish({NAME!r}, {EPOCH!r}, lambda: {LAYOUT!r})\nprint(server.address, flush=True)"
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


@pytest.mark.parametrize(
    ("host", "hinted"), [("127.0.0.1", True), ("[::1]", True), ("no-such-host.invalid", False)]
)
def test_an_owner_that_told_the_loopback_s_address_needs_another(host: str, hinted: bool) -> None:
    with pytest.raises(P2PError, match="cannot be reached") as raised:
        take(f"{host}:1")
    assert ("must have PS_HOST_IP set, and gather again" in str(raised.value)) == hinted


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
    publish(server)
    lease = take(server)
    assert thread_count("ckpt-engine-lease-keeper") == 1
    server.close()
    server.close()
    with pytest.raises(P2PError, match="has ended the lease"):
        lease.check()
    with pytest.raises(P2PError, match="cannot be reached"):
        take(server)
    assert thread_count("ckpt-engine-leases") == 0
