"""A rank or a worker gets no more memory, on a host whose /dev/shm is full. Nobody dies of it.

The kernel itself refuses: an address space may not grow (RLIMIT_AS, as under strict overcommit), a memfd may
not be that long (RLIMIT_FSIZE). One tensor has 64 MiB, and so has the ring.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from reports_for_fault_tests import MISTAKE_SECONDS
from world_for_fault_tests import NewWorld, World, failed_alike

from tests.support.steered import Engines

MiB = 1024 * 1024
FULL_SHM = (
    'mount -t tmpfs -o size=64k tmpfs /dev/shm && { cat /dev/zero > /dev/shm/full 2>/dev/null; exec "$@"; }'
)
"""In a mount namespace of its own: /dev/shm is as small as some containers have it, and full."""


def namespace() -> Sequence[str]:
    """What to start a program with, so that its /dev/shm is full; empty where that is not allowed."""
    prefix = ["unshare", "--mount", "sh", "-c", FULL_SHM, "sh"]
    tried = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    return prefix if tried.returncode == 0 else []


@pytest.fixture(scope="module")
def world(new_world: NewWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    prefix = namespace()
    engines = Engines(tmp_path_factory.mktemp("engines"), lambda host: prefix)
    world = new_world(2, 1, engines, kind="large")
    yield world
    world.fleet.end()
    engines.end()


def recovers(world: World, seed: int) -> None:
    world.put_in_place(seed)
    world.nothing_is_left()


def test_a_full_shm_stops_nothing(world: World) -> None:
    if not world.fleet.engines.prefix:
        pytest.skip("no mount namespace of its own is allowed here")
    for process in (*world.fleet.ranks, *(world.fleet.worker(rank) for rank in world.alive)):
        shm = os.statvfs(f"/proc/{process.pid}/root/dev/shm")
        assert (shm.f_blocks * shm.f_frsize, shm.f_bfree) == (64 * 1024, 0)
    world.put_in_place(world.new_checkpoint())
    world.nothing_is_left()


def test_a_share_that_gets_no_memory_is_known_to_all(world: World) -> None:
    """Rank 0 holds the large tensor. Nothing of what failed stays, and the next attempt works."""
    world.ask("unregister", name="a")
    arguments = {"name": "a", "kind": "large", "seed": 1, "parts": lambda rank: [world.part(rank)], "of": 2}
    answers = world.answers_to("register", **arguments, limit=lambda rank: None if rank else 32 * MiB)
    assert (answers[0]["error"], answers[1]["error"]) == ("HostMemoryError", None)
    assert "are needed" in answers[0]["message"]
    world.fleet.tell("gather", world.alive, name="a")
    when = world.started()
    record = failed_alike(world.reported("no memory for a share", when, MISTAKE_SECONDS, world.alive))
    assert (record["rank"], record["stage"], record["error_type"]) == (0, "register", "HostMemoryError")
    world.ask("unregister", name="a")
    world.nothing_is_left()
    world.registered = False
    recovers(world, world.new_checkpoint())


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("limit", ["limit", "file_limit"])
def test_a_rank_that_gets_no_ring_is_named_by_all(world: World, victim: int, limit: str) -> None:
    seed = world.new_checkpoint()
    limits: dict[str, Any] = {limit: lambda rank: 32 * MiB if rank == victim else None}
    world.start(**limits)
    when = world.started()
    fault = f"no memory for a ring ({'RLIMIT_AS' if limit == 'limit' else 'RLIMIT_FSIZE'})"
    record = failed_alike(world.reported(fault, when, MISTAKE_SECONDS, world.alive))
    assert (record["rank"], record["device"]) == (victim, world.fleet.device(victim))
    assert (record["stage"], record["error_type"]) == ("begin", "HostMemoryError")
    assert f"a ring of {64 * MiB} bytes" in record["message"]
    recovers(world, seed)


def test_a_worker_that_cannot_map_the_ring_is_named_by_all(world: World) -> None:
    seed, victim = world.new_checkpoint(), world.last
    world.start(worker_faults={victim: {"act": "limit", "nbytes": 32 * MiB}})
    when = world.started()
    record = failed_alike(
        world.reported("no memory for a worker's map of the ring", when, MISTAKE_SECONDS, world.alive)
    )
    assert (record["rank"], record["device"]) == (victim, world.fleet.device(victim))
    assert (record["stage"], record["error_type"]) == ("handshake", "HostMemoryError")
    recovers(world, seed)


def test_an_engine_without_memory_for_a_tensor_is_named_by_all(world: World) -> None:
    """The ring can be mapped, but the engine's own copy of the large tensor has no place beside it."""
    seed, victim = world.new_checkpoint(), world.last
    world.start(worker_faults={victim: {"act": "limit", "nbytes": 96 * MiB}})
    when = world.started()
    record = failed_alike(
        world.reported("no memory for an engine's tensor", when, MISTAKE_SECONDS, world.alive)
    )
    assert (record["rank"], record["device"]) == (victim, world.fleet.device(victim))
    assert (record["stage"], list(record["tensors"])) == ("buckets", ["embedding"])
    assert record["bucket"] is not None
    assert "can't allocate memory" in record["message"]
    recovers(world, seed)
