"""Real commands on several hosts: torchrun's rendezvous, and joining a `ckpt-engine serve` of another host.

That is joined by `update --join URL`, and by HTTP requests alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from ckpt_engine.embedded_engine import model as models
from ckpt_engine.server.engine_client import call_engine, wait_until_healthy
from tests.multihost.network import Network

SECONDS = 150.0
SEED = 20271128
PORT = 8700
TOKEN = "a-token-of-these-tests"
SECRET = {"CKPT_ENGINE_API_TOKEN": TOKEN}
ASK = """
import json, sys, urllib.error, urllib.request
method, url, token, body = sys.argv[1:]
headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
request = urllib.request.Request(url, body.encode() or None, headers, method=method)
try:
    with urllib.request.urlopen(request, timeout=120) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except OSError:
    print(0, "null")
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def directory() -> Iterator[Path]:
    # pytest's own directories may be longer than a Unix socket's path may be.
    path = Path(tempfile.mkdtemp(prefix="ce-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start(network: Network, directory: Path) -> Iterator[Start]:
    """(host, arguments of Python, its environment) -> a process there; it ends with the test."""
    made: list[subprocess.Popen[str]] = []

    def run(host: int, *arguments: str, **own: str) -> subprocess.Popen[str]:
        environment = network.environment(host) | {
            "CKPT_ENGINE_HOST_ID": f"host{host}",
            "CKPT_ENGINE_SOCKET_DIR": str(directory / f"sockets-{host}"),
            "CKPT_ENGINE_P2P": "on",
            "CKPT_ENGINE_SLOT_MIB": "0.0625",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **own,
        }
        with (directory / f"log-{len(made)}").open("w") as log:
            process = subprocess.Popen(
                [*network.prefix(host), sys.executable, *arguments],
                env=os.environ | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        made.append(process)
        return process

    yield run
    for process in made:
        process.terminate()
    for process in made:
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait(30)


def ask(network: Network, host: int, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Asks the server of host 0 from `host`: status (0: it cannot be reached) and answer."""
    url = f"http://{network.address(0)}:{PORT}/v1{path}"
    text = "" if body is None else json.dumps(body)
    command = [*network.prefix(host), sys.executable, "-c", ASK, method, url, TOKEN, text]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout
    status, _, answer = said.partition(" ")
    return int(status), json.loads(answer)


def over_unix(uds: str, path: str, body: object = None) -> tuple[int, Any]:
    """Asks the server on this socket."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=uds), timeout=SECONDS) as client:
        url = f"http://ps/v1/{path}"
        answer = client.get(url) if body is None else client.post(url, json=body)
    return answer.status_code, answer.json()


def logs(directory: Path) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(directory.glob("log-*")))


def ended(process: subprocess.Popen[str]) -> int | None:
    """Its status; None: it goes on."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(SECONDS)
    return None


def start_engine(start: Start, directory: Path, host: int) -> str:
    uds = directory / f"engine-{host}.sock"
    model = str(directory / "model")
    start(host, "-m", "ckpt_engine.embedded_engine", "--model", model, "--uds", str(uds), "--seed", str(host))
    return str(uds)


def holds(engine: str, expected: dict[str, str]) -> None:
    (digests,) = call_engine("http://engine/collective_rpc", "parameter_digests", timeout=SECONDS, uds=engine)
    assert digests == expected


def test_a_served_fleet_is_joined(network: Network, start: Start, directory: Path) -> None:
    """By one that only reads, by one that keeps what it reads, by one that is told of that, and by one that
    is told by that when the owner is gone."""
    models.make_checkpoint(directory / "model", seed=SEED, size="tiny")
    expected, nbytes = models.file_digests(directory / "model")
    serve = ("-m", "ckpt_engine.cli.main", "serve")
    roots = {"CKPT_ENGINE_ALLOWED_ROOTS": str(directory / "model")}
    owner = start(0, *serve, "--host", network.address(0), "--port", str(PORT), **SECRET, **roots)
    server = directory / "server"
    start(3, *serve, "--uds", str(server / "ps-{rank}.sock"))
    engines = {host: start_engine(start, directory, host) for host in range(4)}
    deadline = time.monotonic() + SECONDS
    while ask(network, 2, "GET", "/healthz")[0] != 200:
        assert time.monotonic() < deadline, logs(directory)
    for path, body in (("files", {"files": str(directory / "model")}), ("gather-metas", {})):
        status, answer = ask(network, 0, "POST", f"/checkpoints/served/{path}?all_ranks=true", body)
        assert status == 200, answer
    for uds in engines.values():
        wait_until_healthy("http://engine", SECONDS, uds)

    def join(host: int, url: str) -> int:
        """How much host 3 sent meanwhile."""
        report = directory / f"report-{host}.json"
        command = ["update", "--join", url, "--report-file", str(report)]
        command += ["--endpoint", "http://engine", "--uds", engines[host]]
        sent = network.sent_nbytes(3)
        joiner = start(host, "-m", "ckpt_engine.cli.main", *command, **SECRET)
        assert ended(joiner) == 0, logs(directory)
        told = json.loads(report.read_text())
        assert (told["update_method"], told["checkpoint"]) == ("join", "served")
        assert (told["p2p_transport"], told["p2p_bytes"], told["bytes"]) == ("tcp", nbytes, nbytes)
        holds(engines[host], expected)
        return network.sent_nbytes(3) - sent

    # By its URL
    url = f"http://{network.address(0)}:{PORT}"
    assert join(2, url) < nbytes / 2

    # By requests alone
    uds = str(server / "ps-0.sock")
    wait_until_healthy("http://ps", SECONDS, uds, path="/v1/healthz")
    status, metas = ask(network, 3, "GET", "/metas")
    assert status == 200
    assert isinstance(metas, dict)
    update = {"ranks": [0], "update_url": "http://engine/collective_rpc", "uds": engines[3], "keep": True}
    for path, body in (("metas", [metas]), ("checkpoints/served/update", update)):
        status, answer = over_unix(uds, path, body)
        assert status == 200, answer
    assert (answer["transport"], answer["p2p_nbytes"], answer["kept_nbytes"]) == ("tcp", nbytes, nbytes)

    holds(engines[3], expected)

    # By its URL again: the one that has kept it is read
    assert join(1, url) > nbytes * 0.9

    # Who was read has done nothing, and is well.
    status, health = ask(network, 2, "GET", "/healthz")
    assert (status, health["last_update"], health["running"]) == (200, None, None)

    # By the URL of the one that has kept it, which is enough when nobody else is left
    kept, joined = over_unix(uds, "metas")[1]
    assert joined == metas
    assert kept["0"]["host"] == "host3"
    owner.kill()
    owner.wait(SECONDS)
    assert join(0, f"unix:{uds}") > nbytes * 0.9


def test_torchrun_on_two_hosts(network: Network, start: Start, directory: Path) -> None:
    """Two ranks in each, an engine for each rank: a broadcast to all, then the first one reads what others
    hold."""
    models.make_checkpoint(directory / "model", seed=SEED, size="tiny")
    expected, nbytes = models.file_digests(directory / "model")
    for group in range(4):
        arguments = ("--model", directory / "model", "--seed", group, "--device-index", group % 2)
        uds = ("--uds", directory / f"engine-{group}.sock")
        start(group // 2, "-m", "ckpt_engine.embedded_engine", *map(str, (*arguments, *uds)))
    report = directory / "report.json"
    torchrun = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2")
    torchrun += ("--master-addr", network.address(0), "--master-port", "29500")
    update = ("-m", "ckpt_engine.cli.main", "update", "--checkpoint-path", str(directory / "model"))
    update += ("--update-method", "all", "--inference-parallel-size", "1", "--endpoint", "http://engine")
    update += ("--uds", str(directory / "engine-{group}.sock"), "--report-file", str(report))
    # torch asks for the name of each peer's address, and nobody answers here: not for long, then.
    names = {"RES_OPTIONS": "timeout:1 attempts:1"}
    launchers = [start(host, *torchrun, "--node-rank", str(host), *update, **names) for host in (0, 1)]
    for launcher in launchers:
        assert ended(launcher) == 0, logs(directory)
    for group in range(4):
        holds(str(directory / f"engine-{group}.sock"), expected)
    told = json.loads(report.read_text())
    assert (told["world_size"], told["p2p_transport"], told["bytes"]) == (4, "tcp", nbytes)
    assert 0 < told["p2p_bytes"] < nbytes
