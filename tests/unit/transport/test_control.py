"""The control plane: ranks meet, exchange values of any size, and go without leaving anything."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading

import pytest
from fleet_for_transport_tests import LIMIT, Fleet, a_record, fleet_of, make_control, wait_until

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError, PeerLost, UpdateError, UpdateTimeout
from ckpt_engine.settings import Settings
from ckpt_engine.transport import control as control_module
from ckpt_engine.transport import control_messages as messages
from ckpt_engine.transport.bootstrap import own_store
from ckpt_engine.transport.control import Control, Round
from ckpt_engine.transport.control_server import JOIN_SECONDS

SEED = 20261124


def arrive(fleet: Fleet, rank: int, seconds: float = LIMIT) -> object:
    """Starts to wait for the others, and returns the future once the server knows."""
    server = fleet.controls[0]._server
    assert server is not None
    round_ = fleet.rounds[rank]
    future = fleet.start(round_.exchange, b"", Deadline.after(seconds))
    wait_until(
        lambda: round_.number and rank in server._rounds._rounds[round_.number].brought,
        f"rank {rank} to arrive",
    )
    return future


# Meeting


def test_every_rank_learns_what_all_brought_by_rank(fleet: Fleet) -> None:
    payloads = [b"", b"two\nlines\n\x00\xff", bytes(range(256)) * 9][: fleet.size]
    fleet.open_round()
    assert fleet.exchange(payloads) == [dict(enumerate(payloads))] * fleet.size


def test_values_of_many_mib_arrive_whole(pair: Fleet) -> None:
    source = random.Random(SEED)  # incompressible, so that no compression makes it small
    payloads = [source.randbytes(9 * 2**20 + 1), source.randbytes(12 * 2**20)]
    pair.open_round()
    for brought in pair.exchange(payloads):
        # Not `brought == ...`: pytest would spend minutes on the difference.
        assert all(brought[rank] == sent for rank, sent in enumerate(payloads)), f"seed {SEED}"


def test_rounds_do_not_mix_and_have_names_of_their_own(three: Fleet) -> None:
    names = []
    for number, members in enumerate([None, [1, 2], None, [0, 2], [2, 1], [1]]):
        ranks = members or [0, 1, 2]
        rounds = three.open_round(members)
        sent = {rank: f"round {number} rank {rank}".encode() for rank in sorted(ranks)}
        assert three.exchange(list(sent.values())) == [sent] * len(ranks)
        assert {round_.members for round_ in rounds} == {tuple(sorted(ranks))}
        (name,) = {round_.name for round_ in rounds}
        names.append(name)
    assert len(set(names)) == len(names)


def test_a_rank_may_be_a_round_ahead(pair: Fleet) -> None:
    def both_rounds(control: Control) -> list[dict[int, bytes]]:
        learnt = []
        for number in "ab":
            round_ = control.open_round("go")
            learnt.append(round_.exchange(f"{control.rank}{number}".encode(), Deadline.after(LIMIT)))
            round_.leave()
        return learnt

    ahead = pair.start(both_rounds, pair.controls[1])
    expected = [{0: b"0a", 1: b"1a"}, {0: b"0b", 1: b"1b"}]
    assert both_rounds(pair.controls[0]) == expected
    assert ahead.result(LIMIT) == expected


def test_ranks_that_do_different_things_are_told_so(three: Fleet) -> None:
    purposes = ["update('a')", "update('a')", "gather('b')"]

    three.rounds = [
        control.open_round(purpose) for control, purpose in zip(three.controls, purposes, strict=True)
    ]

    def meet(rank: int, round_: Round) -> str:
        with pytest.raises(UpdateError) as caught:
            round_.exchange(b"", Deadline.after(LIMIT))
        assert caught.value.record.error_type == "ProtocolError"
        return caught.value.record.message

    (message,) = set(three.on_all(meet))
    assert "not doing the same" in message
    assert all(purpose in message for purpose in purposes)


@pytest.mark.parametrize(
    ("asker", "arrived", "missing"), [(0, [], "[1, 2]"), (0, [1], "[2]"), (1, [0], "[2]"), (2, [], "[0, 1]")]
)
def test_a_timeout_names_the_ranks_that_are_missing(
    three: Fleet, asker: int, arrived: list[int], missing: str
) -> None:
    three.open_round()
    # They wait much longer: whose deadline passes first must know, whoever it is.
    waiting = [arrive(three, rank) for rank in arrived]
    with pytest.raises(UpdateTimeout) as caught:
        three.rounds[asker].exchange(b"", Deadline.after(0.1))
    assert caught.value.record.message == f"waited for all ranks in meet: ranks {missing} did not arrive"
    for future in waiting:
        with pytest.raises(UpdateTimeout) as theirs:
            future.result(LIMIT)  # type: ignore[attr-defined]
        assert theirs.value.record == caught.value.record


@pytest.mark.parametrize("aborter", [0, 2])
def test_an_abort_ends_the_wait_of_those_who_have_arrived(three: Fleet, aborter: int) -> None:
    three.open_round()
    waiting = [arrive(three, rank, 10 * LIMIT) for rank in range(3) if rank != aborter]
    decided = three.rounds[aborter].abort(a_record(rank=aborter)).record
    assert decided is not None
    assert (decided.message, decided.rank) == ("boom", aborter)
    for future in waiting:
        with pytest.raises(PeerLost) as caught:
            future.result(LIMIT)  # type: ignore[attr-defined]
        assert caught.value.record == decided


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_comes_late_to_an_aborted_round_raises_its_record(pair: Fleet, late: int) -> None:
    rounds = pair.open_round()
    rounds[1 - late].abort(a_record("too late for you"))
    with pytest.raises(PeerLost, match="too late for you"):
        rounds[late].exchange(b"", Deadline.after(LIMIT))
    pair.open_round()  # and the next round is a new one
    assert pair.exchange([b"a", b"b"]) == [{0: b"a", 1: b"b"}] * 2


def test_what_ranks_brought_is_not_kept(pair: Fleet) -> None:
    server = pair.controls[0]._server
    assert server is not None
    for _ in range(3):
        pair.open_round()
        pair.exchange([b"a", b"b"])
    pair.open_round()[0].abort(a_record())
    for round_ in pair.rounds:
        round_.leave()
    wait_until(
        lambda: not server._rounds._rounds and not server._rounds._calls,
        "the server to forget what every rank has left",
    )


# Coming


def test_a_rank_that_finds_no_store_says_where_it_looked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"rank 1 cannot reach .* 127\.0\.0\.1:{port}.*MASTER_PORT"):
        own_store(1, 2, "127.0.0.1", port, Settings(), Deadline.after(0.1))


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"rank 0 cannot serve .* 127\.0\.0\.1:{port}.*MASTER_PORT"):
            own_store(0, 2, "127.0.0.1", port, Settings(), Deadline.after(LIMIT))


def test_a_rank_that_rank_0_does_not_serve_gives_up_at_its_deadline() -> None:
    served = own_store(0, 2, "127.0.0.1", 0, Settings(), Deadline.after(LIMIT))  # but no control server
    with pytest.raises(ConfigError, match="rank 1 cannot reach the control server of rank 0"):
        Control(served, rank=1, world_size=2, deadline=Deadline.after(0.1))


def test_a_second_rank_of_the_same_number_is_refused(pair: Fleet) -> None:
    with pytest.raises(ConfigError, match=r"rank 1 cannot reach .* another process has its number"):
        make_control(1, 2, pair.port)
    pair.open_round()
    assert pair.exchange([b"a", b"b"]) == [{0: b"a", 1: b"b"}] * 2  # the first one is not disturbed


def join(rank: int, token: str) -> bytes:
    return messages.encode_frame(messages.Join(messages.CONTROL_PROTOCOL, token, rank, 1, 3))


@pytest.mark.parametrize(
    "first_words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<I", 2**20),  # a frame of a MiB
        struct.pack("<I", 3) + b"\xff\xff\xff",
        join(2, "guess"),
        join(2, ""),
        messages.encode_frame(messages.Goodbye()),
        messages.encode_frame(messages.Abandon(1, (0, 1), "meet", a_record("from nowhere"))),
    ],
    ids=["http", "large", "garbage", "wrong-token", "no-token", "goodbye", "abandon"],
)
def test_a_stranger_is_put_out_and_disturbs_nobody(first_words: bytes) -> None:
    with fleet_of(3, here=2) as fleet:
        server = fleet.controls[0]._server
        assert server is not None
        # At once, not when its time to show the token is over.
        with socket.create_connection(("127.0.0.1", server.port), timeout=JOIN_SECONDS / 2) as sock:
            sock.sendall(first_words)
            with contextlib.suppress(ConnectionResetError):  # it had not read everything
                assert sock.recv(1) == b""
        fleet.controls.append(make_control(2, 3, fleet.port))  # its place is still free
        fleet.open_round()
        assert fleet.exchange([b"a", b"b", b"c"]) == [{0: b"a", 1: b"b", 2: b"c"}] * 3


# Going


@pytest.mark.parametrize("left", [True, False])
def test_rank_0_closes_once_the_others_know_how_the_round_ended(pair: Fleet, left: bool) -> None:
    mine, theirs = pair.open_round()
    theirs.abort(a_record())
    mine.leave()
    if left:
        theirs.leave()
    closing = pair.start(pair.controls[0].close)
    if not left:
        # Rank 1 has much to do before it leaves; it is served as before.
        for _ in range(50):
            alone = pair.controls[1].open_round("alone", [1])
            assert alone.exchange(b"x", Deadline.after(LIMIT)) == {1: b"x"}
            alone.leave()
        assert not closing.done()
        theirs.leave()
    closing.result(control_module.EXIT_SECONDS / 2)


def test_rank_0_does_not_wait_for_ever(pair: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "EXIT_SECONDS", 0.05)
    pair.open_round()[1].abort(a_record())
    pair.start(pair.controls[0].close).result(LIMIT)


def entries(kind: str) -> int:
    """How many threads (`task`) or open descriptors (`fd`) this process has."""
    return len(os.listdir(f"/proc/self/{kind}"))


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ckpt-engine")]


def test_closing_leaves_no_thread_and_no_descriptor() -> None:
    def work() -> None:
        with fleet_of(3) as three:
            for version in "ab":
                three.open_round()
                three.exchange([b""] * 3)
                for round_ in three.rounds:
                    round_.watch()
                three.on_all(lambda _, round_, version=version: round_.vote(version))  # type: ignore[misc]
            for round_ in three.rounds:
                round_.leave()
            for control in reversed(three.controls):
                control.close()  # and once more when the fleet ends
            assert not our_threads()

    work()  # what torch and the tests' pool keep for good, they have now
    threads, descriptors = entries("task"), entries("fd")
    work()
    wait_until(lambda: entries("task") <= threads, "the store's threads to end")
    wait_until(lambda: entries("fd") <= descriptors, "every socket and pipe to close")
