"""The control plane when ranks go: closed, killed or stopped, rank 0 too. Nobody waits for them for long."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from fleet_for_transport_tests import LIMIT, RankProcess, a_record, fleet_of, make_control, readable

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import OutcomeUnknown, PeerLost, UpdateError

Take = Callable[[int], list[RankProcess]]
STALL = 4.0
"""Seconds without a sign of life after which a stopped rank counts as lost."""


def test_a_rank_that_closed_is_named_to_those_who_wait_for_it() -> None:
    with fleet_of(3) as three:
        rounds = three.open_round()
        waiting = [three.start(rounds[rank].exchange, b"", Deadline.after(LIMIT)) for rank in (0, 2)]
        three.controls[1].close()
        for future in waiting:
            with pytest.raises(PeerLost, match="rank 1 left: it has closed its parameter server"):
                future.result(LIMIT)
        three.controls.pop(1)
        three.open_round([0, 2])  # those who are left go on
        assert three.exchange([b"a", b"c"]) == [{0: b"a", 2: b"c"}] * 2


def test_a_round_without_lost_ranks_meets_and_says_who_is_lost() -> None:
    with fleet_of(3) as three:
        three.open_round()
        three.controls.pop(2).close()
        three.rounds.pop(2)
        assert three.exchange([b"a", b"b"], without_lost=True) == [{0: b"a", 1: b"b"}] * 2
        for round_ in three.rounds:
            assert round_.lost == {2: "it has closed its parameter server"}


def test_a_killed_rank_is_noticed_at_once_wherever_the_round_stands(rank_processes: Take) -> None:
    with fleet_of(2, here=1) as fleet:
        (victim,) = rank_processes(1)
        victim.ask("join", rank=1, size=2, port=fleet.port, stall=LIMIT)
        victim.tell("exchange", payload="b")
        (round_,) = fleet.open_round()
        assert round_.exchange(b"a", Deadline.after(LIMIT)) == {0: b"a", 1: b"b"}
        wake = round_.watch()
        round_.vote("1")
        assert victim.answer() == {"0": "a", "1": "b"}
        started = time.monotonic()
        victim.kill()
        assert readable(wake)
        assert time.monotonic() - started < LIMIT / 2  # by its connection's end, not by a deadline
        verdict = round_.peek()
        assert verdict is not None
        assert verdict.record is not None
        assert "rank 1 died or stopped: its process ended or its connection broke" in verdict.record.message
        (after,) = fleet.open_round()
        with pytest.raises(PeerLost, match="rank 1 died"):
            after.exchange(b"", Deadline.after(LIMIT))


def test_a_stopped_rank_is_lost_once_it_has_been_silent_for_the_limit(rank_processes: Take) -> None:
    with fleet_of(2, here=1, stall_seconds=STALL) as fleet:
        (victim,) = rank_processes(1)
        victim.ask("join", rank=1, size=2, port=fleet.port, stall=LIMIT)
        victim.kill(signal.SIGSTOP)
        try:
            (round_,) = fleet.open_round()
            with pytest.raises(
                PeerLost, match=r"rank 1 died or stopped: it has not been heard for \d+\.\d s"
            ):
                round_.exchange(b"", Deadline.after(LIMIT))
        finally:
            victim.kill(signal.SIGCONT)
        # It learns that it was given up.
        answer = victim.ask("exchange", payload="b")
        assert answer["error"] == "PeerLost"
        victim.ask("close")


@pytest.mark.parametrize("voted", [False, True])
def test_without_rank_0_only_a_rank_that_has_voted_does_not_know_the_outcome(
    rank_processes: Take, voted: bool
) -> None:
    (server,) = rank_processes(1)
    port = server.ask("join", rank=0, size=2, port=0, stall=LIMIT)
    control = make_control(1, 2, port)
    server.tell("exchange", payload="a")
    round_ = control.open_round("meet")
    assert round_.exchange(b"b", Deadline.after(LIMIT)) == {0: b"a", 1: b"b"}
    wake = round_.watch()
    if voted:
        round_.vote("1")
    server.kill()
    assert readable(wake)
    record = a_record("my own trouble")
    if voted:
        with pytest.raises(OutcomeUnknown, match=r"rank 0.* is gone"):
            round_.peek()
        with pytest.raises(OutcomeUnknown, match="this rank had voted, and cannot learn the outcome"):
            round_.abort(record)
    else:
        with pytest.raises(PeerLost, match=r"rank 0.* is gone"):
            round_.peek()
        assert round_.abort(record).record == record
    round_.leave()  # a rank that goes does not mind
    with pytest.raises(PeerLost, match=r"rank 0.* is gone"):
        control.open_round("meet").exchange(b"", Deadline.after(LIMIT))
    control.close()


def test_a_stopped_rank_0_holds_nobody_for_longer_than_the_limit(rank_processes: Take) -> None:
    (server,) = rank_processes(1)
    control = make_control(1, 2, server.ask("join", rank=0, size=2, port=0, stall=LIMIT), STALL)
    server.kill(signal.SIGSTOP)
    try:
        round_ = control.open_round("meet")
        wake = round_.watch()
        started = time.monotonic()
        with pytest.raises(UpdateError, match=r"rank 0.* is gone: it has not been heard for \d+\.\d s"):
            round_.exchange(b"", Deadline.after(10 * LIMIT))
        assert time.monotonic() - started < LIMIT
        assert readable(wake, 0)
        assert round_.abort(a_record()).record == a_record()
        round_.leave()
        control.close()
    finally:
        server.kill(signal.SIGCONT)
    server.ask("close")
