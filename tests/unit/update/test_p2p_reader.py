"""Reads ahead of their turn: which bytes arrive where, how far ahead, and what becomes of failed ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reads_for_update_tests import SECONDS, Owners, Reads, wait
from store_for_update_tests import FakeLease, FakeRead

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import UpdateError
from ckpt_engine.planning.plan import PlannedBucket
from ckpt_engine.update.p2p_reader import P2PReader

reproducible = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def take(reads: Reads, reader: P2PReader, item: PlannedBucket, owners: Owners) -> None:
    """Waits for a bucket, compares its bytes, and lets it go."""
    wait(reader, lambda: reader.view(item) is not None)
    memory = reader.view(item)
    assert memory is not None
    for tensor in item.bucket.tensors:
        got = memory[tensor.offset : tensor.offset + tensor.nbytes]
        assert torch.equal(got, owners.expected[tensor.name]), tensor.name
    reader.let_go(item)


def read_all(reads: Reads, owners: Owners) -> P2PReader:
    reader = reads.start()
    try:
        for item in reads.plan.buckets:
            take(reads, reader, item, owners)
    finally:
        reader.stop()
        reader.close()
    return reader


@pytest.fixture
def owners() -> Owners:
    return Owners([[["a", "b", "c"], ["d", "e"]]])


@pytest.fixture
def reads(owners: Owners) -> Iterator[Reads]:
    made = Reads(owners.fleets)
    yield made
    made.reading.close()
    assert all(store.closed for store in made.network.stores)


def test_every_byte_arrives_and_each_bucket_is_checked(reads: Reads, owners: Owners) -> None:
    ended: dict[str, int] = {"f0:0": 0, "f0:1": 0}

    def outcome(read: FakeRead) -> bool | None:
        # One at a time, so that each needs a check of its own.
        if read is not next(one for one in reads.network.started if not one.ended):
            return None
        if sum(lease.checks for lease in reads.leases.values()) < sum(ended.values()):
            return None
        ended[read.peer] += 1
        return True

    reads.network.outcome = outcome
    reader = read_all(reads, owners)
    assert reader.nbytes == 5 * 3000
    assert {peer: lease.checks for peer, lease in reads.leases.items()} == {"f0:0": 3, "f0:1": 2}
    assert all(lease.released.is_set() for lease in reads.leases.values())


def test_the_thread_that_reads_is_on_the_ranks_own_device(reads: Reads, owners: Owners) -> None:
    """Before it does anything: in a new thread, another one may be current."""
    seen: list[tuple[str, int]] = []
    reads.reading.make_current = lambda: seen.append(
        (threading.current_thread().name, len(reads.network.started))
    )
    read_all(reads, owners)
    assert seen == [("ckpt-engine-p2p", 0)]


def test_one_check_is_enough_for_all_that_was_read_before(reads: Reads, owners: Owners) -> None:
    reads.network.outcome = lambda read: True if len(reads.network.started) >= 3 else None
    reader = reads.start()
    wait(reader, lambda: all(reader.view(item) is not None for item in reads.plan.buckets[:3]))
    assert reads.leases["f0:0"].checks == 1
    reader.stop()
    reader.close()


def test_the_store_and_the_staging_buffer_are_kept_for_the_next_update(reads: Reads, owners: Owners) -> None:
    read_all(reads, owners)
    read_all(reads, owners)
    (store,) = reads.network.stores
    assert len(store.registered) == 1


def test_it_reads_ahead_as_far_as_there_is_room_and_no_further(reads: Reads, owners: Owners) -> None:
    reader = reads.start()
    buckets = reads.plan.buckets
    wait(reader, lambda: all(reader.view(item) is not None for item in buckets[:3]))
    assert len(reads.network.started) == 3
    take(reads, reader, buckets[0], owners)
    wait(reader, lambda: reader.view(buckets[3]) is not None)
    assert len(reads.network.started) == 4
    reader.stop()
    reader.close()


def test_several_reads_are_under_way_at_once(reads: Reads, owners: Owners) -> None:
    reads.network.outcome = lambda read: True if len(reads.network.started) >= 3 else None
    read_all(reads, owners)


def test_what_nobody_else_holds_fails_by_name(reads: Reads, owners: Owners) -> None:
    reads.network.outcome = lambda read: read.peer != "f0:1"
    with pytest.raises(UpdateError) as caught:
        read_all(reads, owners)
    record = caught.value.record
    assert (record.error_type, record.stage) == ("P2PError", "buckets")
    assert reads.plan.buckets[record.bucket or 0].owner == 1
    assert tuple(record.tensors) in (("d",), ("e",))
    assert "rank 1 on host host-f0 (f0:1, session f0) cannot be read by P2P" in record.message
    assert "nobody else holds" in record.message


def test_after_a_failed_read_its_late_bytes_hit_nobody(reads: Reads, owners: Owners) -> None:
    """Until the store is closed they may arrive; the memory is freed after that only."""
    closed: list[bool] = []
    network = reads.network

    def outcome(read: FakeRead) -> bool | None:
        if read.peer == "f0:1":
            read.bring()
            return False
        return True

    network.outcome = outcome
    give_up = reads.reading.give_up

    def watched() -> Any:  # noqa: ANN401
        staging = give_up()
        assert staging is not None
        closed.append(network.stores[0].closed and not staging.arena.closed)
        abandoned.append(staging)
        return staging

    abandoned: list[Any] = []
    reads.reading.give_up = watched  # type: ignore[method-assign]
    with pytest.raises(UpdateError):
        read_all(reads, owners)
    assert closed == [True]
    assert abandoned[0].arena.closed
    network.outcome = lambda read: True
    read_all(reads, owners)
    assert len(network.stores) == 2


def test_a_stale_lease_is_refused_before_a_byte_is_read(reads: Reads, owners: Owners) -> None:
    reads.refuses = {"f0:0"}
    with pytest.raises(UpdateError, match="out of date"):
        read_all(reads, owners)
    assert not [read for read in reads.network.started if read.peer == "f0:0"]


def test_bytes_whose_lease_has_ended_are_not_used(reads: Reads, owners: Owners) -> None:
    lease = reads.leases["f0:0"] = FakeLease(lambda: lease.checks < 2)
    taken: list[bool] = []
    started = reads.network.started
    reads.network.outcome = lambda read: True if taken or read is started[0] else None
    reader = reads.start()
    take(reads, reader, reads.plan.buckets[0], owners)
    taken.append(True)
    with pytest.raises(UpdateError, match="ended the lease"):
        wait(reader, lambda: False)
    of_owner_0 = [item for item in reads.plan.buckets if item.owner == 0]
    assert reader.view(of_owner_0[1]) is None
    reader.stop()
    reader.close()


def test_a_read_without_an_end_counts_as_failed(owners: Owners) -> None:
    reads = Reads(owners.fleets, read_timeout=0.05)
    reads.network.outcome = lambda read: None
    with pytest.raises(UpdateError, match="no end of a read"):
        read_all(reads, owners)
    reads.reading.close()


def test_an_update_that_ends_takes_its_reads_along(reads: Reads, owners: Owners) -> None:
    reads.network.outcome = lambda read: None
    reader = reads.start()
    deadline = Deadline.after(SECONDS)
    while len(reads.network.started) < 3:
        assert not deadline.passed
    reader.stop()
    assert reads.network.stores[0].closed
    assert all(lease.released.is_set() for lease in reads.leases.values())
    reader.close()
    reads.network.outcome = lambda read: True
    read_all(reads, owners)


def test_another_source_takes_a_dead_ones_place() -> None:
    """Also where it holds the tensors in another order, and with others."""
    owners = Owners([[["a", "b", "c"], ["d", "e"]], [["e", "c"], ["x", "b"], ["a", "d"]]])
    reads = Reads(owners.fleets)
    asked = 0

    def outcome(read: FakeRead) -> bool | None:
        nonlocal asked
        asked += 1
        return not (read.peer == "f0:0" and asked > 1)

    reads.network.outcome = outcome
    reader = read_all(reads, owners)
    (lost,) = reader.lost
    assert lost.startswith("rank 0 on host host-f0 (f0:0, session f0) cannot be read by P2P")
    assert {read.peer for read in reads.network.started} & {"f1:0", "f1:1", "f1:2"}
    reads.reading.close()


@reproducible
@given(data=st.data())
def test_whatever_dies_the_bytes_are_right_or_the_error_is(data: st.DataObject) -> None:
    """Fleets that share tensors out differently, and sources that die after any number of reads."""
    names = [f"t{number}" for number in range(data.draw(st.integers(1, 12)))]
    fleets = []
    for _ in range(data.draw(st.integers(1, 3))):
        order = data.draw(st.permutations(names))
        cut = data.draw(st.integers(0, len(names)))
        fleets.append([order[:cut], order[cut:]])
    owners = Owners(fleets, nbytes=data.draw(st.integers(1, 5000)))
    dies = {
        f"f{fleet}:{rank}": data.draw(st.one_of(st.none(), st.integers(0, 3)))
        for fleet in range(len(fleets))
        for rank in range(2)
    }
    reads = Reads(owners.fleets, places=data.draw(st.integers(1, 4)))
    served = dict.fromkeys(dies, 0)

    def outcome(read: FakeRead) -> bool | None:
        limit = dies[read.peer]
        served[read.peer] += 1
        return limit is None or served[read.peer] <= limit

    reads.network.outcome = outcome
    immortal = {peer for peer, limit in dies.items() if limit is None}
    safe = {
        name
        for fleet, ranks in enumerate(fleets)
        for rank, held in enumerate(ranks)
        if f"f{fleet}:{rank}" in immortal
        for name in held
    }
    try:
        read_all(reads, owners)
    except UpdateError as error:
        assert not set(error.record.tensors) <= safe, "it could have been read"
    finally:
        reads.reading.close()
    # Late bytes of failed reads: nobody's memory is hit, since their stores are closed.
    for read in reads.network.failed:
        assert read.store.closed
