"""Reads by P2P between real processes: mooncake over TCP, leases, staging, and the broadcast that follows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import free_port
from tests.support.checkpoints import digests_of
from tests.support.joins import (
    HELD_UP,
    Launch,
    everybody,
    go_on,
    launcher,
    load,
    metas_of,
    owners_with,
    register,
    verifies,
)
from tests.support.mooncake import need_mooncake
from tests.support.steered import Fleet, Steered
from tests.support.stopped import wait_until_stopped

need_mooncake()

SEED = 20271001


@pytest.fixture
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    with launcher(tmp_path_factory) as start:
        yield start


def ask(fleet: Fleet, do: str, on: list[int], **arguments: Any) -> dict[int, dict[str, Any]]:  # noqa: ANN401
    """They do it, without an error."""
    answers = fleet.ask(do, on, **arguments)
    assert {answer["message"] for answer in answers.values()} == {""}, answers
    return answers


def update(
    fleet: Fleet, ranks: list[int], seed: int, on: list[int] | None = None
) -> dict[int, dict[str, Any]]:
    """Updates the workers of `ranks`, and verifies every bit; `on`: the ranks that call."""
    for rank in ranks:
        fleet.worker(rank)
    answers = ask(fleet, "update", on or ranks, name="a", ranks=ranks)
    expected = digests_of("layers", seed)
    for rank in ranks:
        report = fleet.worker(rank).answer()
        assert report["status"]["outcome"] == "committed", report["status"]
        wrong = [name for name, digest in expected.items() if report["digests"].get(name) != digest]
        assert not wrong, f"rank {rank} has other bits than those of seed {seed}: {wrong}"
    return answers


def nbytes(fleet: Fleet) -> int:
    return 24 * 4 * (512 + 64 * 997)


@pytest.mark.parametrize(("size", "hosts"), [(1, 1), (3, 1), (4, 2)])
def test_another_fleet_joins(launch: Launch, size: int, hosts: int) -> None:
    """It has other ranks, and other hosts; it registers and gathers nothing. The owners do nothing."""
    owners, joiners = launch(2, 1), launch(size, hosts)
    register(owners, SEED)
    ask(joiners, "load_metas", everybody(joiners), texts=[metas_of(owners)])
    for _ in range(2):
        answers = update(joiners, everybody(joiners), SEED)
        assert {answer["content"] for answer in answers.values()} != {""}
        readers = {rank: answer for rank, answer in answers.items() if answer["p2p_nbytes"]}
        assert sum(answer["p2p_nbytes"] for answer in readers.values()) == nbytes(owners)
        assert {answer["transport"] for answer in readers.values()} == {"tcp"}
    update(owners, everybody(owners), SEED)
    (content,) = {answer["content"] for answer in answers.values()}
    assert {answer["content"] for answer in update(owners, [0], SEED).values()} == {content}


@pytest.mark.parametrize("verify", ["transport", "full"])
def test_what_is_read_is_verified(launch: Launch, verify: str) -> None:
    owners, metas = owners_with(launch, 2, seed=SEED, CKPT_ENGINE_VERIFY=verify)
    joiners = launch(2, CKPT_ENGINE_VERIFY=verify)
    load(joiners, metas)
    verifies(owners, joiners, SEED, 60.0)


def test_some_ranks_are_updated_while_the_others_do_not_call(launch: Launch) -> None:
    """Any subset, in any order, repeatedly; with new weights in between."""
    fleet = launch(3, 1)
    register(fleet, SEED)
    for ranks in ([1], [0, 2], [1], [2], [0, 1, 2]):
        answers = update(fleet, ranks, SEED)
        read = sum(answer["p2p_nbytes"] for answer in answers.values())
        assert read == nbytes(fleet) * (3 - len(ranks)) // 3
    ask(fleet, "unregister", everybody(fleet), name="a")
    register(fleet, SEED + 1)
    update(fleet, [2, 0], SEED + 1)


def test_other_ranks_are_updated_while_an_update_is_at_work(launch: Launch) -> None:
    """One rank's worker stands still in a bucket: it is read from meanwhile, and what it reads stays."""
    fleet = launch(3, 1)
    register(fleet, SEED)
    for rank in everybody(fleet):
        fleet.worker(rank).news.clear()
    fleet.tell("update", [1], name="a", ranks=[1], worker_fault=HELD_UP)
    fleet.worker(1).happened("fault")
    wait_until_stopped(fleet.worker(1).pid)
    update(fleet, [2, 0], SEED)
    update(fleet, [0], SEED)
    go_on(fleet, 1)
    answers = fleet.answers([1])
    assert (answers[1]["message"], answers[1]["p2p_nbytes"]) == ("", nbytes(fleet) * 2 // 3)
    assert fleet.worker(1).answer()["digests"] == digests_of("layers", SEED)


def test_without_mooncake_owners_take_part_and_joins_say_what_is_missing(
    launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake/__init__.py").write_text("raise ImportError('no mooncake in this test')")
    without = {"CKPT_ENGINE_P2P": "auto", "PYTHONPATH": str(tmp_path)}
    fleet, metas = owners_with(launch, 2, seed=SEED, **without)
    needs = "P2P needs mooncake-transfer-engine and libibverbs (no mooncake in this test): pip install"
    assert f"nothing of this rank can be read by P2P: {needs}" in fleet.ranks[0].log()
    answers = update(fleet, [1], SEED, on=[0, 1])
    assert [answer["p2p_nbytes"] for answer in answers.values()] == [0, 0]
    joiners = launch(1)
    refused = joiners.ask("load_metas", [0], texts=[metas])[0]
    assert "which holds them, published no address: install ckpt-engine[p2p] there" in refused["message"]
    _, metas = owners_with(launch, 1, seed=SEED)
    load(fleet, metas)
    for answer in fleet.ask("update", [0, 1], name="a", ranks=[0, 1]).values():
        assert needs in answer["message"], answer
        assert answer["touched"] is False


def test_whoever_owns_all_it_needs_reads_nothing(launch: Launch) -> None:
    fleet = launch(2, 1)
    ask(fleet, "register", [1], name="a", kind="layers", seed=SEED, parts=[0], of=1)
    ask(fleet, "gather", [0, 1], name="a")
    answers = update(fleet, [1], SEED)
    assert answers[1]["transport"] == ""
    assert answers[1]["p2p_nbytes"] == 0
    # A rank that is not needed may call: it returns at once.
    answers = update(fleet, [1], SEED, on=[0, 1])
    assert answers[0]["version"] == ""


@pytest.mark.parametrize(("name", "lease"), [("localhost", "127.0.0.1:"), ("::1", "[::1]:")])
def test_a_host_name_or_an_ipv6_address_of_this_host(launch: Launch, name: str, lease: str) -> None:
    owners = launch(1, PS_HOST_IP=name)
    register(owners, SEED)
    metas = metas_of(owners)
    held = json.loads(metas)["0"]
    assert (held["host_ip"], held["lease_address"].startswith(lease)) == (name, True)
    joiners = launch(1, PS_HOST_IP=name)
    ask(joiners, "load_metas", [0], texts=[metas])
    update(joiners, [0], SEED)


def listening_ports(process: Steered) -> set[int]:
    """TCP ports on which a process listens."""
    held = {link for link in process.descriptors() if link.startswith("socket:")}
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return {
        int(line[1].rpartition(":")[2], 16)
        for line in lines
        if line[3] == "0A" and f"socket:[{line[9]}]" in held
    }


def test_all_ports_can_be_chosen_for_a_firewall(launch: Launch) -> None:
    """Those of the documented table, and no other one."""
    leases = free_port()
    low = 21000 + os.getpid() % 1000 * 8
    fleet = launch(
        2,
        CKPT_ENGINE_LEASE_PORT=str(leases),
        MC_MIN_RPC_PORT=str(low),
        MC_MAX_RPC_PORT=str(low + 64),
    )
    register(fleet, SEED)
    update(fleet, [1], SEED)
    ports = [listening_ports(rank) for rank in fleet.ranks]
    of_mooncake = set(range(low, low + 65))
    # Ranks of one host meet at a Unix socket.
    assert ports[0] - of_mooncake == {leases}
    assert ports[1] - of_mooncake == {leases + 1}
    assert all(mine & of_mooncake for mine in ports)
    # Joining asks for nothing more.
    joiner = launch(1)
    ask(joiner, "load_metas", [0], texts=[metas_of(fleet)])
    update(joiner, [0], SEED)


def test_where_ranks_of_several_hosts_meet_can_be_chosen(launch: Launch) -> None:
    control = free_port()
    fleet = launch(2, 2, CKPT_ENGINE_CONTROL_PORT=str(control))
    register(fleet, SEED)
    first, second = (listening_ports(rank) for rank in fleet.ranks)
    assert first >= {control, fleet.master_port + 1}
    assert not second & {control, fleet.master_port + 1}
