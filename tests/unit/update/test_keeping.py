"""What a joiner keeps: bytes, host buffers and origins, whatever its sources do meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reads_for_update_tests import Owners, Reads, wait
from store_for_update_tests import FakeLease, FakeRead

from ckpt_engine.update.keeping import KeptShare
from ckpt_engine.update.p2p_reader import P2PReader

NAMES = [["a", "b", "c"], ["d", "e"]]


class Serving:
    """Notes how many host buffers could be read, each time."""

    def __init__(self) -> None:
        self.present: list[int] = []

    def came(self, checkpoint_name: str, buffer_count: int) -> None:
        assert checkpoint_name == "c"
        self.present.append(buffer_count)


class Keeper:
    def __init__(self, reads: Reads) -> None:
        self.serving = Serving()
        self.reads = reads
        self.items = reads.plan.read_by(0)
        self.kept = KeptShare("c", self.items, reads.sources, None)
        self.kept.prepare()

    def start(self) -> P2PReader:
        return self.reads.start(
            lambda: self.kept.landing(self.reads.reading.store().register),
            lambda item: self.kept.came(item, self.serving),  # type: ignore[arg-type]
        )

    def read_all(self, before_letting_go: Callable[[int], object] = lambda number: None) -> None:
        reader = self.start()
        try:
            for number, item in enumerate(self.items):
                wait(reader, lambda item=item: reader.view(item) is not None)  # type: ignore[misc]
                before_letting_go(number)
                reader.let_go(item)
        finally:
            reader.close()

    def check(self, owners: Owners) -> None:
        """Every tensor is there, where the host buffers say."""
        found = {}
        for number, buffer in enumerate(self.kept.checkpoint.buffers):
            assert buffer.origin == "the first share"
            for tensor in buffer.tensors:
                found[tensor.name] = self.kept.checkpoint.view(number, tensor.offset, tensor.nbytes)
        assert found.keys() == owners.expected.keys()
        assert all(torch.equal(found[name], owners.expected[name]) for name in found)


@pytest.fixture
def owners() -> Owners:
    return Owners([NAMES, NAMES[::-1]])


def test_all_is_kept_and_each_bucket_can_be_read_as_it_comes(owners: Owners) -> None:
    keeper = Keeper(Reads(owners.fleets))
    keeper.read_all()
    keeper.check(owners)
    assert keeper.serving.present == [1, 2, 3, 4, 5]
    keeper.kept.close()
    keeper.reads.reading.close()


def test_it_reads_ahead_without_a_limit(owners: Owners) -> None:
    """Its memory is for all buckets: nobody need let go of any."""
    keeper = Keeper(Reads(owners.fleets, places=1))
    reader = keeper.start()
    wait(reader, lambda: all(reader.view(item) is not None for item in keeper.items))
    reader.close()
    keeper.check(owners)
    keeper.reads.reading.close()


@pytest.mark.parametrize("dies_after", [0, 1, 2])
def test_what_came_before_a_source_died_stays(owners: Owners, dies_after: int) -> None:
    """The rest comes from others, into the same memory, by another store."""
    reads = Reads(owners.fleets)
    served = 0

    def outcome(read: FakeRead) -> bool | None:
        nonlocal served
        if read.peer != "f0:0":
            return True
        served += 1
        return served <= dies_after

    reads.network.outcome = outcome
    keeper = Keeper(reads)
    keeper.read_all()
    keeper.check(owners)
    assert keeper.serving.present == [1, 2, 3, 4, 5]
    assert len(reads.network.stores) == 2
    reads.reading.close()


def test_a_source_that_is_still_filling_is_waited_for(owners: Owners) -> None:
    """No bucket is asked of it before it has it."""
    reads = Reads(owners.fleets)
    lease = reads.leases["f0:0"] = FakeLease()
    lease.present = 0
    started: list[tuple[int, int]] = []

    def outcome(read: FakeRead) -> bool | None:
        if read.peer == "f0:0":
            started.append((sum(one.peer == "f0:0" for one in reads.network.started), lease.present))
        return True

    reads.network.outcome = outcome
    # It has all three tensors in one host buffer.
    reader = reads.start()
    checks = lease.checks
    while lease.checks < checks + 3:
        wait(reader, lambda: True)
    assert not [read for read in reads.network.started if read.peer == "f0:0"]
    lease.present = 1
    for item in reads.plan.buckets:
        wait(reader, lambda item=item: reader.view(item) is not None)  # type: ignore[misc]
        reader.let_go(item)
    reader.close()
    assert {present for _, present in started} == {1}
    reads.reading.close()


def test_a_source_that_fills_no_more_is_given_up(owners: Owners) -> None:
    reads = Reads(owners.fleets, read_timeout=0.05)
    lease = reads.leases["f0:0"] = FakeLease()
    lease.present = 0
    reader = reads.start()
    for item in reads.plan.buckets:
        wait(reader, lambda item=item: reader.view(item) is not None)  # type: ignore[misc]
        reader.let_go(item)
    (lost,) = reader.lost
    assert "has read nothing more itself for 0.05 s" in lost
    assert lease.released.is_set()
    reader.close()
    reads.reading.close()
