"""The control plane: a round is decided once, and every rank learns the same."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fleet_for_transport_tests import LIMIT, Fleet, RankProcess, a_record, fleet_of, readable
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import MAX_TEXT, ErrorRecord, OutcomeUnknown, PeerLost, UpdateError, UpdateTimeout
from ckpt_engine.transport.control import Round, Verdict, error_of
from ckpt_engine.transport.control_messages import (
    MAX_FRAME_NBYTES,
    Abandon,
    Decided,
    decode_rank_frame,
    decode_server_frame,
    encode_frame,
)
from ckpt_engine.transport.control_server import ControlServer
from ckpt_engine.transport.framing import FrameBuffer


def met(fleet: Fleet) -> tuple[list[Round], list[int]]:
    """A new round in which all have met, with each rank's descriptor for the verdict."""
    fleet.open_round()
    fleet.exchange([b""] * fleet.size)
    return fleet.rounds, [round_.watch() for round_ in fleet.rounds]


def test_of_two_racing_processes_one_decides_and_both_learn_the_same(
    rank_processes: Callable[[int], list[RankProcess]],
) -> None:
    racers = rank_processes(2)
    with fleet_of(3, here=1) as fleet:
        for rank, racer in enumerate(racers, 1):
            assert racer.ask("join", rank=rank, size=3, port=fleet.port, stall=LIMIT) == fleet.port
        for racer in racers:
            racer.tell("race", members=[1, 2], rounds=100)
        first, second = [racer.answer() for racer in racers]
        for racer in racers:
            racer.ask("close")
    assert first == second
    assert len(first) == 100
    assert set(first) <= {"by rank 1", "by rank 2"}


def test_an_abort_that_races_the_last_vote_has_one_outcome(pair: Fleet) -> None:
    for number in range(60):
        rounds, wakes = met(pair)
        rounds[0].vote("v")
        gate = threading.Barrier(2)

        def vote(round_: Round, gate: threading.Barrier) -> None:
            gate.wait(LIMIT)
            round_.vote("v")

        def abort(round_: Round, gate: threading.Barrier) -> Verdict:
            gate.wait(LIMIT)
            return round_.abort(a_record())

        voting = pair.start(vote, rounds[1], gate)
        verdict = pair.start(abort, rounds[0], gate).result(LIMIT)
        voting.result(LIMIT)
        for round_, wake in zip(rounds, wakes, strict=True):
            assert readable(wake)
            assert round_.peek() == verdict, f"round {number}"


def test_only_the_last_vote_commits_and_every_rank_is_woken(three: Fleet) -> None:
    rounds, wakes = met(three)
    for rank in (2, 0):
        rounds[rank].vote("17")
        rounds[rank].vote("17")  # a rank has one vote
    # What rank 1 still exchanges alone is served after those votes: they have not decided.
    alone = three.controls[1].open_round("alone", [1])
    alone.exchange(b"", Deadline.after(LIMIT))
    alone.leave()
    assert [round_.peek() for round_ in rounds] == [None] * 3
    assert not any(readable(wake, 0) for wake in wakes)
    rounds[1].vote("17")
    for round_, wake in zip(rounds, wakes, strict=True):
        assert readable(wake)
        assert round_.peek() == Verdict(version="17", met=True)
    decided = rounds[0].abort(a_record())  # too late: it stays committed
    assert decided.committed
    assert decided.version == "17"


def test_a_timeout_of_the_last_step_names_the_ranks_that_have_not_voted(three: Fleet) -> None:
    rounds, _ = met(three)
    for rank in (0, 1):
        rounds[rank].vote("17")
        # What it still exchanges alone is served after its vote.
        alone = three.controls[rank].open_round("alone", [rank])
        alone.exchange(b"", Deadline.after(LIMIT))
        alone.leave()
    late = ErrorRecord(error_type="UpdateTimeout", message="not every rank finished", stage="decide", rank=0)
    decided = rounds[0].abort(late).record
    assert decided is not None
    assert decided.message == "not every rank finished: ranks [2] had not"


def test_a_rank_is_woken_by_anothers_abort(pair: Fleet) -> None:
    (mine, theirs), (wake, _) = met(pair)
    assert mine.peek() is None
    assert not readable(wake, 0)
    decided = theirs.abort(a_record())
    assert readable(wake)
    assert mine.peek() == decided
    assert not decided.committed


def test_a_rank_that_watches_late_is_woken_at_once(pair: Fleet) -> None:
    pair.open_round()
    pair.exchange([b"", b""])
    mine, theirs = pair.rounds
    decided = theirs.abort(a_record())
    assert mine.abort(a_record("second")) == decided  # now it is known here
    assert readable(mine.watch(), 0)


def test_a_round_of_other_members_is_not_decided_along(three: Fleet) -> None:
    met(three)
    for_all = three.rounds
    some = three.controls[1].open_round("some", [1, 2])
    some.abort(a_record())
    assert not any(round_.verdict for round_ in for_all)
    for round_ in for_all:
        round_.vote("1")
    assert all(readable(round_.watch()) for round_ in for_all)
    assert [round_.peek() for round_ in for_all] == [Verdict(version="1", met=True)] * 3
    some.leave()


def server_of(fleet: Fleet) -> ControlServer:
    server = fleet.controls[0]._server
    assert server is not None
    return server


def test_a_record_of_any_size_is_decided_and_rounds_go_on(pair: Fleet) -> None:
    mine, theirs = pair.open_round()
    names = [f"layers.{number}." + "w" * 100 for number in range(100_000)]
    huge = ErrorRecord(
        error_type="PeerLost",
        message="no file \udcff" + "m" * 2**20,
        traceback="t" * 2**20 + "the end",
        tensors=names,
    )
    record = mine.abort(huge).record
    assert record is not None
    assert len(record.message) == MAX_TEXT
    assert record.message.startswith("no file \\udcff")
    assert record.traceback.endswith("the end")
    assert (record.tensors[0], record.tensors[-1], len(record.tensors)) == (names[0], names[-1], 64)
    assert theirs.abort(a_record()).record == record
    pair.open_round()
    assert pair.exchange([b"a", b"b"]) == [{0: b"a", 1: b"b"}] * 2


def test_a_record_becomes_its_own_kind_of_update_error() -> None:
    for kind in (UpdateTimeout, PeerLost, OutcomeUnknown):
        error = error_of(ErrorRecord(error_type=kind.__name__, message="m"), touched=True)
        assert type(error) is kind
        assert error.touched is True
    for name in ("ValueError", "PlanError", "__init__"):
        assert type(error_of(ErrorRecord(error_type=name, message="m"))) is UpdateError


# What travels

texts = st.text(st.characters(), max_size=20)  # lone surrogates too: a traceback names any file
maybe_numbers = st.none() | st.integers(0, 2**40)
records = st.builds(
    ErrorRecord,
    error_type=texts,
    message=texts,
    stage=st.text(max_size=9),
    rank=maybe_numbers,
    host=st.none() | st.text(max_size=9),
    device=st.none() | st.text(max_size=9),
    bucket=maybe_numbers,
    tensors=st.lists(texts, max_size=3),
    elapsed=st.none() | st.floats(0, 1e6),
    traceback=texts,
)
reproducible = settings(derandomize=True, print_blob=True, deadline=None, max_examples=60)


@reproducible
@given(records)
def test_a_record_survives_the_wire(record: ErrorRecord) -> None:
    sent = record.travelling()
    abandon = Abandon(3, (0, 7), "meet", sent)
    frames = FrameBuffer(MAX_FRAME_NBYTES)
    frames.feed(encode_frame(abandon))
    frames.feed(encode_frame(Decided(5, Verdict(record=sent))))
    first, second = frames.next(), frames.next()
    assert first is not None
    assert second is not None
    assert decode_rank_frame(first) == abandon
    assert decode_server_frame(second) == Decided(5, Verdict(record=sent))
    assert frames.next() is None


@reproducible
@given(st.lists(st.binary(max_size=9), max_size=5), st.integers(1, 7))
def test_frames_are_cut_alike_however_the_bytes_come(bodies: list[bytes], step: int) -> None:
    stream = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    frames, found = FrameBuffer(limit=9), []
    for start in range(0, len(stream), step):
        frames.feed(stream[start : start + step])
        while (body := frames.next()) is not None:
            found.append(body)
    assert found == bodies
