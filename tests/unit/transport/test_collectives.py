"""gloo's groups between hosts: bytes in place, waits that end. (nccl's need several GPUs.)"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from fleet_for_transport_tests import LIMIT, Fleet, wait_until

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ErrorRecord, PeerLost, UpdateError, UpdateTimeout
from ckpt_engine.transport.collectives import BEYOND_DEADLINE, GlooCollectives, Poll, broken, form_in_thread

SHORTEST = 1.0
"""Seconds of the shortest timeout that a group is made with."""


def idle() -> None:
    pass


class Members(Fleet):
    """A fleet with a group of all its ranks."""

    def __init__(self, size: int, seconds: float = LIMIT) -> None:
        super().__init__(size)
        makers = [self.start(self.make_group, "group", rank, seconds) for rank in range(size)]
        self.groups = [maker.result(LIMIT) for maker in makers]

    def make_group(self, name: str, rank: int, seconds: float, poll: Poll = idle) -> GlooCollectives:
        store = self.controls[rank].store
        return GlooCollectives(store, name, rank, self.size, Deadline.after(seconds), poll)

    def broadcast(self, rank: int, root: int, seconds: float = LIMIT, poll: Poll = idle) -> torch.Tensor:
        """What member `rank` holds after a broadcast of bytes that name the root."""
        tensor = torch.full((1000,), rank + 1, dtype=torch.uint8)
        self.groups[rank].broadcast(tensor, root, Deadline.after(seconds), poll)
        return tensor

    def close(self) -> None:
        for group in self.groups:
            group.close()
        super().close()


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture
def pair() -> Iterator[Members]:
    members = Members(2)
    yield members
    members.close()


@pytest.mark.parametrize("root", [0, 1, 2])
def test_the_roots_bytes_reach_every_member(root: int) -> None:
    members = Members(3)
    futures = [members.start(members.broadcast, rank, root) for rank in range(3)]
    for future in futures:
        assert torch.equal(future.result(LIMIT), torch.full((1000,), root + 1, dtype=torch.uint8))
    members.close()


def test_a_broadcast_that_does_not_end_meets_its_own_deadline(pair: Members) -> None:
    with pytest.raises(UpdateTimeout, match="broadcast between hosts did not end"):
        pair.broadcast(1, root=0, seconds=0.1)


def test_a_broadcast_may_take_longer_than_the_deadline_its_group_was_made_under() -> None:
    members = Members(2, seconds=SHORTEST)
    overdue = threading.Event()
    started = time.monotonic()

    def poll() -> None:
        if time.monotonic() > started + 1.3 * SHORTEST:
            overdue.set()

    waiting = members.start(lambda: members.broadcast(1, root=0, poll=poll))
    assert overdue.wait(LIMIT)
    members.broadcast(0, root=0)
    assert torch.equal(waiting.result(LIMIT), torch.full((1000,), 1, dtype=torch.uint8))
    members.close()


def test_what_poll_raises_ends_the_wait(pair: Members) -> None:
    def poll() -> None:
        raise UpdateError(ErrorRecord(error_type="UpdateError", message="decided elsewhere"))

    with pytest.raises(UpdateError, match="decided elsewhere"):
        pair.broadcast(1, root=0, poll=poll)


def test_a_member_that_drops_the_group_releases_those_who_wait(pair: Members) -> None:
    polled = threading.Event()
    waiting = pair.start(lambda: pair.broadcast(1, root=0, poll=polled.set))
    assert polled.wait(LIMIT)
    pair.groups[0].close()
    pair.groups[0].close()  # again does no harm
    with pytest.raises(PeerLost, match="a broadcast broke"):
        waiting.result(LIMIT)


def test_a_group_with_a_broadcast_at_work_is_closed_without_waiting_for_it(pair: Members) -> None:
    """Its destructor waits until gloo itself gives up, `BEYOND_DEADLINE` later."""
    with pytest.raises(UpdateTimeout):
        pair.broadcast(1, root=0, seconds=0.1)
    started = time.monotonic()
    pair.groups[1].close()
    assert time.monotonic() - started < BEYOND_DEADLINE.total_seconds() / 2


def test_a_group_that_is_being_made_holds_nothing_up(pair: Members) -> None:
    """It waits in the store's connection of its own, not in the one that all else goes through."""
    with pytest.raises(UpdateTimeout):
        pair.make_group("second", 1, seconds=0.1)
    futures = [pair.start(pair.make_group, "third", rank, LIMIT) for rank in range(2)]
    for future in futures:
        future.result(LIMIT).close()
    wait_until(no_group_is_being_made, "the thread to end by torch's own timeout")


def no_group_is_being_made() -> bool:
    return not any(thread.name == "ckpt-engine-group" for thread in threading.enumerate())


def test_a_group_that_does_not_form_meets_its_deadline(pair: Members) -> None:
    with pytest.raises(UpdateTimeout, match="did not form a group"):
        pair.make_group("second", 1, seconds=0.1)
    wait_until(no_group_is_being_made, "the thread to end by torch's own timeout")


def test_what_poll_raises_ends_the_making_of_a_group(pair: Members) -> None:
    def poll() -> None:
        raise UpdateError(ErrorRecord(error_type="UpdateError", message="decided elsewhere"))

    with pytest.raises(UpdateError, match="decided elsewhere"):
        pair.make_group("second", 1, seconds=SHORTEST, poll=poll)
    wait_until(no_group_is_being_made, "the thread to end by torch's own timeout")


def test_a_group_that_comes_too_late_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody has it, so nobody else would; whatever its end raises is no error of the update's."""
    comes, ended = threading.Event(), threading.Event()

    def make() -> str:
        assert comes.wait(30)
        return "group"

    def end(group: str) -> None:
        assert group == "group"
        ended.set()
        raise RuntimeError("it cannot end")

    def give_up() -> None:
        raise KeyError("another rank failed")

    with pytest.raises(KeyError):
        form_in_thread(make, Deadline.after(30), give_up, end)
    assert not ended.is_set()
    comes.set()
    assert ended.wait(30)
    for thread in threading.enumerate():
        if thread.name == "ckpt-engine-group":
            thread.join(30)
    assert "nobody waited for any more: it cannot end" in caplog.text


def test_a_group_that_comes_in_time_is_kept() -> None:
    ended: list[str] = []
    assert form_in_thread(lambda: "group", Deadline.after(30), idle, ended.append) == "group"
    assert ended == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("first\nsecond"), "it broke: first"),
        (AssertionError(), "it broke: AssertionError"),
        (RuntimeError("\n"), "it broke: RuntimeError"),
    ],
)
def test_the_first_line_of_an_error_is_told_if_there_is_any(error: Exception, says: str) -> None:
    assert broken("it broke", error).record.message == says
