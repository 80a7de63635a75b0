"""The control plane: ranks that make a call alone, leave one out, or give one up, meet again all the same."""

from __future__ import annotations

import itertools
import random

import pytest
from fleet_for_transport_tests import LIMIT, Fleet, a_record, wait_until

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ErrorRecord, PeerLost, UpdateTimeout
from ckpt_engine.transport import control_messages as messages
from ckpt_engine.transport import rounds as rounds_module
from ckpt_engine.transport.control import Control
from ckpt_engine.transport.rounds import Rounds

SEED = 20261124


def meet(fleet: Fleet, order: list[int], purpose: str = "meet") -> list[dict[int, bytes]]:
    """All ranks make the same call, in this order; what each one learns."""
    server = fleet.controls[0]._server
    assert server is not None
    fleet.rounds = rounds = fleet.open_round(purpose=purpose)
    futures = {}
    for rank in order:
        futures[rank] = fleet.start(rounds[rank].exchange, b"%d" % rank, Deadline.after(LIMIT))
        wait_until(lambda rank=rank: rounds[rank].number, f"rank {rank} to be there")  # type: ignore[misc]
    return [futures[rank].result(LIMIT) for rank in sorted(order)]


def alone(control: Control, purpose: str = "meet") -> None:
    """A call that fails on this rank, and that the others do not make."""
    round_ = control.open_round(purpose)
    assert round_.abort(a_record(f"rank {control.rank} is wrong", rank=control.rank)).record is not None
    round_.leave()


TOGETHER = [{0: b"0", 1: b"1"}] * 2


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("purpose", ["meet", "something else"])
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_call_that_one_rank_made_alone_disturbs_no_later_one(
    pair: Fleet, wrong: int, purpose: str, times: int, order: list[int]
) -> None:
    for _ in range(times):
        alone(pair.controls[wrong], purpose)
    for _ in range(3):
        assert meet(pair, order) == TOGETHER


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_mistake_that_one_rank_made_alone_disturbs_no_later_call(pair: Fleet, order: list[int]) -> None:
    pair.controls[1].tell_mistake("meet", a_record("ranks=[7]"))
    for _ in range(2):
        assert meet(pair, order) == TOGETHER


def test_a_rank_learns_why_another_gave_the_same_call_up(pair: Fleet) -> None:
    alone(pair.controls[0])
    (_, mine) = pair.open_round()
    with pytest.raises(PeerLost, match="rank 0 is wrong"):
        mine.exchange(b"", Deadline.after(LIMIT))
    assert meet(pair, [1, 0]) == TOGETHER


@pytest.mark.parametrize("waits", [True, False])
def test_a_mistake_is_told_to_those_who_wait_for_its_rank(three: Fleet, waits: bool) -> None:
    pair_round = three.controls[1].open_round("meet", [0, 1])
    other_round = three.controls[2].open_round("meet", [1, 2])
    other = three.start(other_round.exchange, b"2", Deadline.after(LIMIT))
    wait_until(lambda: other_round.number, "rank 2 to be there")
    if waits:
        future = three.start(pair_round.exchange, b"", Deadline.after(LIMIT))
        wait_until(lambda: pair_round.number, "rank 1 to be there")
        three.controls[0].tell_mistake("meet", a_record("ranks=[0, 7]"))
    else:
        three.controls[0].tell_mistake("meet", a_record("ranks=[0, 7]"))
        future = three.start(pair_round.exchange, b"", Deadline.after(LIMIT))
    with pytest.raises(PeerLost, match=r"ranks=\[0, 7\]"):
        future.result(LIMIT)
    # Whoever does not wait for that rank is not disturbed.
    mine = three.controls[1].open_round("meet", [1, 2])
    assert mine.exchange(b"1", Deadline.after(LIMIT)) == other.result(LIMIT) == {1: b"1", 2: b"2"}
    for round_ in (pair_round, other_round, mine):
        round_.leave()


def test_a_rank_that_gave_up_and_comes_again_meets_those_who_came_since(pair: Fleet) -> None:
    alone(pair.controls[0])
    mine, theirs = pair.open_round()
    waiting = pair.start(theirs.exchange, b"1", Deadline.after(LIMIT))
    wait_until(lambda: theirs.number, "rank 1 to be there")
    assert mine.exchange(b"0", Deadline.after(LIMIT)) == {0: b"0", 1: b"1"}
    assert waiting.result(LIMIT) == {0: b"0", 1: b"1"}


def test_a_rank_that_gave_up_and_goes_on_leaves_no_one_waiting(pair: Fleet) -> None:
    alone(pair.controls[0], "step 1")
    behind = pair.controls[1].open_round("step 1")
    waiting = pair.start(behind.exchange, b"", Deadline.after(LIMIT))
    wait_until(lambda: behind.number, "rank 1 to be there")
    ahead = pair.controls[0].open_round("step 2")
    going_on = pair.start(ahead.exchange, b"0", Deadline.after(LIMIT))
    with pytest.raises(PeerLost, match="rank 0 is wrong"):
        waiting.result(LIMIT)
    behind.leave()
    pair.rounds = [ahead, pair.controls[1].open_round("step 2")]
    assert pair.rounds[1].exchange(b"1", Deadline.after(LIMIT)) == going_on.result(LIMIT) == TOGETHER[0]


def given_up_on_rank_1(pair: Fleet) -> None:
    """Rank 0 waits for rank 1 in vain."""
    mine = pair.controls[0].open_round("step 1")
    with pytest.raises(UpdateTimeout, match=r"ranks \[1\] did not arrive"):
        mine.exchange(b"", Deadline.after(0.05))
    mine.leave()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_rank_that_left_a_call_out_meets_the_others_in_the_next(pair: Fleet, order: list[int]) -> None:
    given_up_on_rank_1(pair)
    for step in ("step 2", "step 1"):  # a rank may do the same in each
        assert meet(pair, order, step) == TOGETHER


@pytest.mark.parametrize("ahead", [True, False])
def test_a_rank_that_is_late_learns_that_it_was_given_up(pair: Fleet, ahead: bool) -> None:
    given_up_on_rank_1(pair)
    first, late = pair.controls[0].open_round("step 2"), pair.controls[1].open_round("step 1")
    if ahead:
        waiting = pair.start(first.exchange, b"0", Deadline.after(LIMIT))
        wait_until(lambda: first.number, "rank 0 to be at the next step")
    with pytest.raises(UpdateTimeout, match=r"ranks \[1\] did not arrive"):
        late.exchange(b"", Deadline.after(LIMIT))
    late.leave()
    if ahead:
        then = pair.controls[1].open_round("step 2")
        assert then.exchange(b"1", Deadline.after(LIMIT)) == waiting.result(LIMIT) == TOGETHER[0]
        then.leave()
    first.leave()


def test_a_timeout_tells_what_became_of_the_one_that_is_missing(pair: Fleet) -> None:
    alone(pair.controls[1], "update('typo')")
    mine = pair.controls[0].open_round("update('right')")
    with pytest.raises(
        UpdateTimeout, match=r"\[1\] did not arrive \(rank 1 had given up update\('typo'\): rank 1"
    ):
        mine.exchange(b"", Deadline.after(0.05))
    mine.leave()


def test_a_rank_that_leaves_without_a_word_holds_nobody(pair: Fleet) -> None:
    rounds = pair.open_round()
    pair.exchange([b"", b""])
    rounds[0].leave()
    rounds[1].vote("1")
    rounds[1].wait_for_verdict(Deadline.after(LIMIT))
    verdict = rounds[1].peek()
    assert verdict is not None
    assert verdict.record is not None
    assert verdict.record.message == "rank 0 left meet without a word"


class World:
    """Ranks in front of `Rounds`, without sockets."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.call = itertools.count(1)
        self.rounds = Rounds(self.tell, size)
        self.heard: dict[int, list[messages.ServerFrame]] = {rank: [] for rank in range(size)}

    def tell(self, ranks: object, message: messages.ServerFrame) -> None:
        for rank in ranks:  # type: ignore[attr-defined]
            self.heard[rank].append(message)

    def give_up(self, rank: int, purpose: str) -> None:
        call, record = next(self.call), ErrorRecord(error_type="ConfigError", message=f"rank {rank}")
        self.rounds.abandon(rank, messages.Abandon(call, tuple(range(self.size)), purpose, record))
        self.rounds.leave(rank, messages.Left(call))

    def mistake(self, rank: int, purpose: str) -> None:
        self.rounds.mistake(
            rank, messages.Mistake(purpose, ErrorRecord(error_type="ConfigError", message=f"rank {rank}"))
        )

    def enter_all(self, order: list[int], purpose: str) -> list[messages.ServerFrame]:
        """The last that each rank, which makes this call now, hears."""
        calls = {rank: next(self.call) for rank in order}
        for rank in order:
            members = tuple(range(self.size))
            self.rounds.enter(rank, messages.Enter(calls[rank], members, purpose, b"%d" % rank, False, False))
            self.rounds.look_at_the_clock()
        last = [self.heard[rank][-1] for rank in sorted(order)]
        for rank in order:
            self.rounds.leave(rank, messages.Left(calls[rank]))
        return last


@pytest.mark.parametrize("size", [2, 3, 5])
def test_after_any_calls_made_alone_all_meet_in_any_order(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds_module, "COME_AGAIN_SECONDS", 1e9)
    source = random.Random(SEED)
    for attempt in range(200):
        world = World(size)
        for _ in range(source.randrange(6)):
            for _ in range(source.randrange(5)):
                act = source.choice([world.give_up, world.mistake])
                act(source.randrange(size), source.choice(["a", "b"]))
            order = source.sample(range(size), size)
            heard = world.enter_all(order, source.choice(["a", "b"]))
            assert all(isinstance(message, messages.Met) for message in heard), (SEED, attempt, order, heard)
        assert not world.rounds._rounds, "nothing is kept of rounds that are over"
        assert not world.rounds._calls
        assert not world.rounds._gathering


def test_rounds_that_are_given_up_are_not_remembered_without_end(pair: Fleet) -> None:
    rounds = pair.controls[0]._server._rounds  # type: ignore[union-attr]
    for number in range(rounds_module.REMEMBERED + 10):
        alone(pair.controls[0], f"update('{number}')")
    assert len(rounds._given_up) == rounds_module.REMEMBERED
    wait_until(lambda: not rounds._rounds, "the last one to be left")
    assert meet(pair, [1, 0]) == TOGETHER
