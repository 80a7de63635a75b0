"""Broadcasts, subsets and joins between hosts, over real sockets: gloo, mooncake's TCP, leases."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_engine.timeline.trace import COPY, P2P, RELOAD
from tests.multihost.network import Network
from tests.support.checkpoints import digests_of
from tests.support.joins import (
    Launch,
    everybody,
    failed,
    go_on,
    hold_up,
    in_place,
    keep,
    load,
    owners_with,
    register,
    verifies,
)
from tests.support.steered import Fleet
from tests.support.traces import check_committed, updates_in

SEED = 20271127
LEASE_PORT = "21500"
REPORT_SECONDS = 60.0
"""For a lost link: the deadlines of these tests, of the transport, and of a lease, one after the other."""
NBYTES = 24 * 4 * (512 + 64 * 997)


def update(fleet: Fleet, ranks: list[int], seed: int) -> dict[int, dict[str, Any]]:
    """Only `ranks` call."""
    for rank in ranks:
        fleet.worker(rank)
    answers = fleet.ask("update", ranks, name="a", ranks=ranks)
    assert {answer["message"] for answer in answers.values()} == {""}, answers
    for rank in ranks:
        report = fleet.worker(rank).answer()
        assert report["status"]["outcome"] == "committed", report["status"]
        assert report["digests"] == digests_of("layers", seed)
    return answers


@pytest.mark.parametrize(("size", "hosts"), [(4, 2), (4, 4)])
def test_a_broadcast_reaches_every_host(launch: Launch, size: int, hosts: int) -> None:
    fleet = launch(size, hosts, 0)
    for seed in (SEED, SEED + 1):
        register(fleet, seed)
        answers = fleet.ask("update", everybody(fleet), name="a")
        in_place(fleet, seed, answers)
        assert {answer["p2p_nbytes"] for answer in answers.values()} == {0}
        fleet.ask("unregister", everybody(fleet), name="a")


def test_some_ranks_read_what_another_host_holds(launch: Launch) -> None:
    """Owners on the other host do not call; each byte crosses once."""
    fleet = launch(4, 2, 0)
    register(fleet, SEED)
    for ranks in ([0, 1], [3], [2, 0]):
        answers = update(fleet, ranks, SEED)
        assert sum(answer["p2p_nbytes"] for answer in answers.values()) == NBYTES * (4 - len(ranks)) // 4
    in_place(fleet, SEED)


def test_two_fleets_join_at_once(launch: Launch) -> None:
    """Each of another size than the owners', on a host of its own, from their metas as JSON."""
    owners, metas = owners_with(launch, 4, 2, 0, seed=SEED)
    joiners = [launch(2, 1, 2), launch(1, 1, 3)]
    for fleet in joiners:
        load(fleet, metas)
        for rank in everybody(fleet):
            fleet.worker(rank)
    for fleet in joiners:
        fleet.tell("update", everybody(fleet), name="a", ranks=everybody(fleet))
    for fleet in joiners:
        answers = in_place(fleet, SEED, fleet.answers(everybody(fleet)))
        assert sum(answer["p2p_nbytes"] for answer in answers.values()) == NBYTES
        assert {answer["transport"] for answer in answers.values() if answer["p2p_nbytes"]} == {"tcp"}
    in_place(owners, SEED)


def test_what_comes_from_other_hosts_is_verified(launch: Launch) -> None:
    """The digests come with the metas, and each joiner's workers compare."""
    owners, metas = owners_with(launch, 2, 2, 0, seed=SEED, CKPT_ENGINE_VERIFY="transport")
    joiners = launch(2, 1, 2, CKPT_ENGINE_VERIFY="transport")
    load(joiners, metas)
    verifies(owners, joiners, SEED, REPORT_SECONDS)


def test_over_ipv6_with_addresses_that_routes_tell(launch: Launch) -> None:
    """There is no way to any public address here: nobody needs one to learn its own."""
    _, metas = owners_with(launch, 2, 2, 0, seed=SEED, ipv6=True)
    for rank, held in json.loads(metas).items():
        assert held["host_ip"] == f"fd77::{int(rank) + 1}"
        assert held["lease_address"].startswith(f"[{held['host_ip']}]:")
        assert held["p2p_address"].startswith(f"[{held['host_ip']}]:")
    joiners = launch(2, 1, 2, ipv6=True)
    load(joiners, metas)
    in_place(joiners, SEED)


def test_three_that_join_at_once_read_from_each_other(launch: Launch, network: Network) -> None:
    """The owner sends each byte about once, however many join; the last two read what the others keep."""
    _, metas = owners_with(launch, 1, 1, 0, seed=SEED)
    joiners = [launch(1, 1, host) for host in (1, 2, 3)]
    for fleet in joiners:
        load(fleet, metas)
    before = [network.sent_nbytes(host) for host in range(4)]
    answers = keep(*joiners, seed=SEED)
    sent = [network.sent_nbytes(host) - before[host] for host in range(4)]
    assert {answer[0]["p2p_nbytes"] for answer in answers} == {NBYTES}
    assert {answer[0]["kept_nbytes"] for answer in answers} == {NBYTES}
    assert sent[0] < 1.5 * NBYTES, sent
    assert sum(sent[1:]) > 1.9 * NBYTES, sent
    # One that comes later reads a replica as well.
    late = launch(1, 1, 0)
    load(late, metas)
    before = [network.sent_nbytes(host) for host in range(1, 4)]
    in_place(late, SEED)
    assert sum(network.sent_nbytes(host) for host in range(1, 4)) - sum(before) > 0.9 * NBYTES


def test_a_slow_link_only_takes_longer(launch: Launch, network: Network, tmp_path: Path) -> None:
    """While a bucket is read, those before it go to the other rank, and into the workers."""
    network.slow_down(1, "100mbit")
    try:
        owners, metas = owners_with(launch, 2, 2, 0, seed=SEED)
        in_place(owners, SEED)
        joiners = launch(2, 1, 2, CKPT_ENGINE_TRACE_DIR=str(tmp_path))
        load(joiners, metas)
        in_place(joiners, SEED)
    finally:
        network.slow_down(1, "100gbit")
    (traces,) = updates_in(tmp_path)
    check_committed(traces)
    reads = [span for trace in traces for span in trace.of(P2P)]
    assert sorted(span.bucket for span in reads) == list(range(traces[0].about.buckets))
    for track in (COPY, RELOAD):
        spans = [span for trace in traces for span in trace.of(track)]
        beside = [
            span
            for span in spans
            if any(
                read.bucket > span.bucket and read.begin < span.end and span.begin < read.end
                for read in reads
            )
        ]
        assert len(beside) > len(spans) / 2, track


def test_a_cut_link_is_reported_and_all_works_once_it_is_mended(launch: Launch, network: Network) -> None:
    owners, metas = owners_with(launch, 1, 1, 0, seed=SEED)
    joiners = launch(2, 1, 2)
    load(joiners, metas)
    hold_up(joiners, 1)
    network.cut(0)
    try:
        go_on(joiners, 1)
        record = failed(joiners, REPORT_SECONDS)
        assert record["error_type"] == "P2PError", record
        assert "rank 0 on host host0" in record["message"]
    finally:
        network.mend(0)
    in_place(joiners, SEED)
    in_place(owners, SEED)


def test_an_owner_on_another_host_is_killed(launch: Launch) -> None:
    owners, metas = owners_with(launch, 2, 2, 0, seed=SEED)
    joiners = launch(1, 1, 2)
    load(joiners, metas)
    hold_up(joiners, 0)
    owners.ranks[1].signal(signal.SIGKILL)
    owners.ranks[1].wait()
    go_on(joiners, 0)
    record = failed(joiners, REPORT_SECONDS)
    assert (record["error_type"], record["stage"]) == ("P2PError", "buckets"), record
    assert "rank 1 on host host1" in record["message"]
    assert record["tensors"]


def test_a_receiver_on_another_host_is_killed(launch: Launch) -> None:
    owners, metas = owners_with(launch, 1, 1, 0, seed=SEED, CKPT_ENGINE_LEASE_TIMEOUT="60")
    joiners = launch(2, 2, 2)
    load(joiners, metas)
    hold_up(joiners, 1)
    joiners.ranks[0].signal(signal.SIGKILL)
    joiners.ranks[0].wait()
    go_on(joiners, 1)
    answer = joiners.ranks[1].answer(REPORT_SECONDS)
    assert answer["record"]["error_type"] == "PeerLost", answer
    # Nobody reads any more: its memory is freed at once.
    owners.tell("unregister", [0], name="a")
    assert owners.ranks[0].answer(REPORT_SECONDS)["message"] == ""


def test_a_restarted_owner_is_refused_by_its_session_and_not_read(launch: Launch, network: Network) -> None:
    """It has the address of the one before it, and other weights of the same name."""
    owners, stale = owners_with(launch, 1, 1, 0, seed=SEED, CKPT_ENGINE_LEASE_PORT=LEASE_PORT)
    owners.ranks[0].signal(signal.SIGKILL)
    owners.ranks[0].wait()
    _, metas = owners_with(launch, 1, 1, 0, seed=SEED + 1, CKPT_ENGINE_LEASE_PORT=LEASE_PORT)
    before, after = (json.loads(text)["0"] for text in (stale, metas))
    assert before["lease_address"] == after["lease_address"]
    joiners = launch(1, 1, 2)
    load(joiners, stale)
    sent = network.sent_nbytes(0)
    refused(joiners, "another process has taken the owner's place: its metas are out of date")
    assert network.sent_nbytes(0) - sent < NBYTES / 50
    load(joiners, metas)
    in_place(joiners, SEED + 1)


def test_wrong_metas_touch_nothing(launch: Launch, network: Network) -> None:
    """Each is refused before a byte is read, but the last: only reading tells that nobody is there."""
    _, metas = owners_with(launch, 1, 1, 0, seed=SEED)
    joiners = launch(1, 1, 2)

    def refused_with(why: str, change: Callable[[dict[str, Any]], object]) -> None:
        document = json.loads(metas)
        change(document["0"])
        load(joiners, json.dumps(document))
        sent = network.sent_nbytes(0)
        refused(joiners, why)
        assert network.sent_nbytes(0) - sent < NBYTES / 50, why

    elsewhere = f"{network.address(0)}:1"
    refused_with("cannot be reached", lambda held: held.update(lease_address=elsewhere))
    # What an owner tells whose ranks are all on one host, and that was not told its address
    refused_with("must have PS_HOST_IP set", lambda held: held.update(lease_address="127.0.0.1:1"))
    refused_with("was registered anew", lambda held: held.update(epoch="e"))
    other_way = "lies there in another way than its metas tell"
    refused_with(
        other_way, lambda held: held["buffers"][0].update(address=held["buffers"][0]["address"] + 256)
    )
    refused_with(other_way, lambda held: held["buffers"][0]["tensors"][0].update(name="another"))
    joiners.worker(0)
    refused_with("nobody else holds", lambda held: held.update(p2p_address=elsewhere))
    status = joiners.worker(0).answer()["status"]
    assert (status["outcome"], status["touched"]) == ("failed", False)
    load(joiners, metas)
    in_place(joiners, SEED)


def refused(fleet: Fleet, why: str) -> None:
    """An update of its only rank fails, and its worker has all its old weights."""
    answer = fleet.ask("update", [0], name="a", ranks=[0])[0]
    assert answer["record"]["error_type"] == "P2PError", answer
    assert why in answer["message"]
    assert answer["touched"] is False
