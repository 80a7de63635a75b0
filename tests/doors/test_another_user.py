"""A process of another user can neither connect, nor read a ring, nor stop an update: a real second user.

As root only, since nobody else can become two users. CI runs as root.
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckpt_engine.ipc.sockets import listen
from ckpt_engine.server.listening import UnixListener
from tests.doors.conftest import HeldWorld
from tests.integration.conftest import free_port
from tests.support.listening_sockets import doors_of
from tests.support.steered import ROOT

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")

CROWD = 300
"""Connections that it opens to each port, and holds."""
LIMIT = 120.0


@pytest.fixture
def open_to_all() -> Iterator[str]:
    """A socket that anybody may connect to: that the attacker can shows that its failures mean something."""
    with tempfile.TemporaryDirectory(prefix="ce-open-", dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        path = f"{directory}/s"
        with listen(path):
            os.chmod(path, 0o666)
            yield path


@contextmanager
def attacker(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Tries it all, and holds its crowd of connections while the block runs; what each attempt came to."""
    plan = {"uid": pwd.getpwnam("nobody").pw_uid, "files": [], "crowd": CROWD} | plan
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.another_user"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(plan) + "\n")
        process.stdin.flush()
        yield json.loads(process.stdout.readline())
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(LIMIT) == 0


def check_refused(said: dict[str, Any], plan: dict[str, Any]) -> None:
    """Everything that was tried was denied, and everything that there is was tried."""
    assert said["uid"] == pwd.getpwnam("nobody").pw_uid
    assert said["own"] == "got 'connected'"
    assert set(said["paths"]) == set(plan["paths"])
    assert set(said["paths"].values()) == {"denied"}, said["paths"]
    assert said["directories"] == {path: ["denied", "denied"] for path in plan["directories"]}
    assert set(said["files"].values()) <= {"denied"}, said["files"]
    pids = list(map(str, plan["pids"]))
    assert said["signals"] == {pid: ["denied"] * 4 for pid in pids}
    assert said["traced"] == dict.fromkeys(pids, "denied")
    for pid in pids:
        assert set(said["memory"][pid]) == {"denied"}, (pid, said["memory"][pid])


def test_on_one_host_it_finds_no_door(new_world: Callable[..., HeldWorld], open_to_all: str) -> None:
    world = new_world(2, 1)
    world.update()
    base = world.fleet.socket_dir
    http = UnixListener(base / "ps-0.sock")

    def meanwhile() -> None:
        doors = [doors_of(rank.pid) for rank in world.fleet.ranks]
        # Nothing on TCP; the worker's two sockets and the links' of each rank, and rank 0's control server.
        assert [door.ports for door in doors] == [[], []]
        kinds = [sorted(Path(path).name.split("-")[0] for path in door.paths) for door in doors]
        assert kinds == [["control", "peer", "w", "w"], ["peer", "w", "w"]], doors
        assert [doors_of(worker.pid).ports for worker in world.workers()] == [[], []]
        paths = [path for door in doors for path in door.paths] + [str(http.path)]
        plan = {
            "own": open_to_all,
            "paths": paths,
            "directories": [str(base), *{str(Path(path).parent) for path in paths}],
            "pids": world.pids(),
            "ports": [],
        }
        with attacker(plan) as said:
            check_refused(said, plan)

    world.update(meanwhile)
    http.close()
    world.update()


def test_between_hosts_it_stops_no_update(new_world: Callable[..., HeldWorld], open_to_all: str) -> None:
    """The control server is on TCP there: it has neither the token nor the last word."""
    port = free_port()
    world = new_world(2, 2, CKPT_ENGINE_CONTROL_PORT=str(port))
    world.update()
    plan = {
        "own": open_to_all,
        "paths": [path for rank in world.fleet.ranks for path in doors_of(rank.pid).paths],
        "directories": [str(world.fleet.socket_dir)],
        "pids": world.pids(),
        "ports": [port],
    }
    assert port in doors_of(world.fleet.ranks[0].pid).ports

    def meanwhile() -> None:
        with attacker(plan) as said:
            check_refused_ports(said, port)

    world.update(meanwhile)
    # Its crowd is there while others begin and end an update.
    with attacker(plan) as said:
        check_refused_ports(said, port)
        world.update()
        assert len(world.fleet.ranks[0].descriptors()) < CROWD
    world.update()


def check_refused_ports(said: dict[str, Any], port: int) -> None:
    assert said["crowd"] == CROWD
    assert set(said["ports"][str(port)]) == {"closed"}, said["ports"]
