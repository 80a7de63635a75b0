"""`ckpt-engine serve` for real: two ranks under torchrun on Unix sockets, and two embedded engines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from ckpt_engine.cli.demo import two_free_ports
from ckpt_engine.embedded_engine import model as models
from ckpt_engine.embedded_engine.processes import Child, Children, Signals
from ckpt_engine.server.engine_client import call_engine, wait_until_healthy

SECONDS = 90.0
SEED = 20261125
ALL = {"all_ranks": "true"}


def wait_for(what: str, found: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever it finds
    deadline = time.monotonic() + SECONDS
    while not (result := found()):
        assert time.monotonic() < deadline, f"waited {SECONDS} s for {what}"
        time.sleep(0.02)
    return result


class Ranks:
    """Two ranks of `ckpt-engine serve`."""

    def __init__(self, children: Children, name: str, directory: Path) -> None:
        self.directory = directory / name
        self.logs = directory
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
        launch += ["--master-port", str(two_free_ports())]
        serve = ["-m", "ckpt_engine.cli.main", "serve", "--uds", str(self.directory / "ps-{rank}.sock")]
        self.launcher: Child = children.start(
            name,
            launch + serve,
            CKPT_ENGINE_HOST_ID="here",
            CKPT_ENGINE_SOCKET_DIR=str(self.directory / "s"),
            CKPT_ENGINE_SLOT_MIB="0.0625",
            GLOO_SOCKET_IFNAME="lo",
        )
        for rank in range(2):
            wait_for(f"rank {rank}'s socket", self.path(rank).exists)
            wait_until_healthy("http://rank", SECONDS, str(self.path(rank)), path="/v1/healthz")

    def path(self, rank: int) -> Path:
        return self.directory / f"ps-{rank}.sock"

    def ask(self, method: str, path: str, rank: int = 0, **options: Any) -> httpx.Response:  # noqa: ANN401
        transport = httpx.HTTPTransport(uds=str(self.path(rank)))
        with httpx.Client(transport=transport, base_url="http://rank/v1", timeout=SECONDS) as client:
            return client.request(method, path, **options)

    def hold(self, name: str, files: Path | list[str]) -> None:
        """Registers and gathers on all ranks."""
        for path, body in (
            ("files", {"files": files if isinstance(files, list) else str(files)}),
            ("gather-metas", {}),
        ):
            answer = self.ask("POST", f"/checkpoints/{name}/{path}", params=ALL, json=body)
            assert answer.status_code == 200, answer.text

    def update(self, name: str, engines: list[str], **options: Any) -> httpx.Response:  # noqa: ANN401
        """One engine beside each rank."""
        targets = [
            {"update_url": f"{engine}/collective_rpc", "inference_group_ranks": [rank]}
            for rank, engine in enumerate(engines)
        ]
        body = {"engines": targets, "timeout": 60} | options
        return self.ask("POST", f"/checkpoints/{name}/update", params=ALL, json=body)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    # pytest's own directories may be longer than a Unix socket's path may be.
    path = Path(tempfile.mkdtemp(prefix="serve-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def children(directory: Path) -> Iterator[Children]:
    children = Children(directory, Signals())
    yield children
    children.end()


@pytest.fixture(scope="module")
def checkpoint(directory: Path) -> Path:
    models.make_checkpoint(directory / "checkpoint", seed=SEED, size="tiny")
    return directory / "checkpoint"


@pytest.fixture(scope="module")
def engines(children: Children, directory: Path, checkpoint: Path) -> list[str]:
    """Two embedded engines with dummy weights: their addresses."""
    started = [
        children.start(
            f"engine-{index}",
            ["-m", "ckpt_engine.embedded_engine", "--model", str(checkpoint), "--seed", str(index)],
            CKPT_ENGINE_CPU_DEVICES=str(index),
            CKPT_ENGINE_HOST_ID="here",
        )
        for index in range(2)
    ]
    found = [wait_for(f"{engine.name} to listen", engine.announcement) for engine in started]
    return [f"http://127.0.0.1:{announced['port']}" for announced in found]


@pytest.fixture(scope="module")
def ranks(children: Children, directory: Path) -> Ranks:
    return Ranks(children, "ranks", directory)


@contextmanager
def fake_engine(answer: Callable[[], dict[str, Any]]) -> Iterator[str]:
    """An engine that answers HTTP 500 with whatever `answer` returns, and tells no worker."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps(answer()).encode()
            with suppress(OSError):
                self.send_response(500)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def digests(engine: str) -> dict[str, str]:
    (found,) = call_engine(f"{engine}/collective_rpc", "parameter_digests", timeout=SECONDS)
    return dict(found)


def check_engines(engines: list[str], checkpoint: Path) -> None:
    expected, _ = models.file_digests(checkpoint)
    for engine in engines:
        assert digests(engine) == expected


def test_one_call_of_rank_0_for_each_step(ranks: Ranks, engines: list[str], checkpoint: Path) -> None:
    expected, nbytes = models.file_digests(checkpoint)
    assert all(digests(engine) != expected for engine in engines)
    ranks.hold("step/1", checkpoint)
    for rank in range(2):
        # Each holds its share, and knows the whole.
        metas = ranks.ask("GET", "/metas", rank).json()
        assert [bool(metas[str(owner)]["buffers"]) for owner in range(2)] == [True, True]
        health = ranks.ask("GET", "/healthz", rank).json()
        assert (health["rank"], health["world_size"], health["checkpoints"]) == (rank, 2, ["step/1"])

    answer = ranks.update("step/1", engines)
    assert answer.status_code == 200, answer.text
    parts = [answer.json()["ranks"][str(rank)]["answer"] for rank in range(2)]
    assert [(part["tensors"], part["nbytes"]) for part in parts] == [(len(expected), nbytes)] * 2
    assert parts[0]["version"] == parts[1]["version"]
    check_engines(engines, checkpoint)
    assert ranks.ask("GET", "/healthz").json()["last_update"] == parts[0]

    freed = ranks.ask("DELETE", "/checkpoints/step/1", params=ALL)
    assert freed.status_code == 200, freed.text
    assert [ranks.ask("GET", "/healthz", rank).json()["checkpoints"] for rank in range(2)] == [[], []]
    assert ranks.update("step/1", engines).status_code == 404


def test_each_rank_asked_by_itself(
    ranks: Ranks, engines: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    models.make_checkpoint(other, seed=SEED + 1, size="tiny")
    files = sorted(map(str, other.glob("*.safetensors")))
    with ThreadPoolExecutor(2) as pool:

        def on_both(path: str, bodies: list[dict[str, Any]]) -> None:
            asked = [
                pool.submit(ranks.ask, "POST", f"/checkpoints/own/{path}", rank, json=bodies[rank])
                for rank in range(2)
            ]
            for answer in (future.result(SECONDS) for future in asked):
                assert answer.status_code == 200, answer.text

        on_both("files", [{"files": files[rank::2]} for rank in range(2)])
        on_both("gather-metas", [{}, {}])
        # Each asks its own engine: the same request would do as well.
        on_both(
            "update",
            [
                {
                    "update_url": f"{engines[rank]}/collective_rpc",
                    "inference_group_ranks": [rank],
                    "timeout": 60,
                }
                for rank in range(2)
            ],
        )
    check_engines(engines, other)
    assert ranks.ask("DELETE", "/checkpoints/own", params=ALL).status_code == 200


def test_names_that_are_wrong(ranks: Ranks, engines: list[str], checkpoint: Path) -> None:
    for path in ("gather-metas", "update"):
        answer = ranks.ask("POST", f"/checkpoints/nobody/{path}", params=ALL, json={})
        assert answer.status_code == 404
        assert {part["status"] for part in answer.json()["ranks"].values()} == {404}
    assert ranks.ask("DELETE", "/checkpoints/nobody", params=ALL).status_code == 404

    ranks.hold("twice", checkpoint)
    for params in (ALL, {}):
        again = ranks.ask("POST", "/checkpoints/twice/files", params=params, json={"files": str(checkpoint)})
        assert (again.status_code, again.json()["error_type"]) == (409, "CheckpointExistsError")
    # What was there is still there.
    assert ranks.update("twice", engines).status_code == 200
    assert ranks.ask("DELETE", "/checkpoints/twice", params=ALL).status_code == 200


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_call_of_one_rank_alone_disturbs_no_later_one(
    ranks: Ranks, engines: list[str], checkpoint: Path, rank: int
) -> None:
    ranks.hold("right", checkpoint)
    ask = {"update_url": engines[0], "timeout": 30}
    for name, options in (("wrong", {}), ("right", {"ranks": [7]}), ("wrong", {})):
        answer = ranks.ask("POST", f"/checkpoints/{name}/update", rank, json=ask | options)
        assert answer.status_code in (400, 404), answer.text
    for _ in range(2):
        answer = ranks.ask("POST", "/checkpoints/right/gather-metas", params=ALL, json={"timeout": 30})
        assert answer.status_code == 200, answer.text
        assert ranks.update("right", engines).status_code == 200
    assert ranks.ask("DELETE", "/checkpoints/right", params=ALL).status_code == 200


def test_a_share_that_cannot_be_read_leaves_nothing(ranks: Ranks, checkpoint: Path, tmp_path: Path) -> None:
    good = sorted(checkpoint.glob("*.safetensors"))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good[0].read_bytes()[:-100])
    files = [str(cut), *map(str, good[1:])]
    answer = ranks.ask("POST", "/checkpoints/cut/files", params=ALL, json={"files": files})
    assert answer.status_code == 400
    assert answer.json()["error_type"] == "CheckpointFormatError"
    assert str(cut) in answer.json()["message"]
    assert sorted(part["undone"] for part in answer.json()["ranks"].values()) == [False, True]
    assert [ranks.ask("GET", "/healthz", rank).json()["checkpoints"] for rank in range(2)] == [[], []]


def test_an_engine_that_refuses(ranks: Ranks, engines: list[str], checkpoint: Path) -> None:
    ranks.hold("refused", checkpoint)
    trace = "Traceback (most recent call last):\n  in the engine, line 7"
    with fake_engine(lambda: {"error": "RuntimeError: unwell", "traceback": trace}) as refusing:
        answer = ranks.update("refused", [engines[0], refusing])
    assert answer.status_code == 502
    for rank in range(2):
        part = answer.json()["ranks"][str(rank)]
        assert part["status"] == 502
        assert part["answer"]["record"]["rank"] == 1
        assert part["answer"]["record"]["error_type"] == "EngineRequestError"
        assert "HTTP 500: RuntimeError: unwell" in part["answer"]["message"]
        assert "in the engine, line 7" in part["answer"]["traceback"]
    assert ranks.update("refused", engines).status_code == 200
    check_engines(engines, checkpoint)
    assert ranks.ask("DELETE", "/checkpoints/refused", params=ALL).status_code == 200


def test_a_worker_that_fails(ranks: Ranks, engines: list[str], tmp_path: Path) -> None:
    save_file({"model.no.such.weight": torch.zeros(7)}, tmp_path / "x.safetensors")
    ranks.hold("strange", [str(tmp_path / "x.safetensors")])
    answer = ranks.update("strange", engines)
    assert answer.status_code in (500, 502)
    body = answer.json()
    assert "the model has no parameter 'model.no.such.weight'" in body["message"]
    assert "load_weights" in body["traceback"]
    assert body["committed"] is False
    assert {part["status"] for part in body["ranks"].values()} == {answer.status_code}
    assert ranks.ask("DELETE", "/checkpoints/strange", params=ALL).status_code == 200


def test_questions_are_answered_during_an_update(ranks: Ranks, engines: list[str], checkpoint: Path) -> None:
    ranks.hold("slow", checkpoint)
    asked, go = threading.Event(), threading.Event()

    def answer() -> dict[str, Any]:
        asked.set()
        assert go.wait(SECONDS)
        return {"error": "after all, no"}

    with fake_engine(answer) as slow, ThreadPoolExecutor(1) as pool:
        update = pool.submit(ranks.update, "slow", [engines[0], slow])
        assert asked.wait(SECONDS)
        for rank in range(2):
            began = time.monotonic()
            running = ranks.ask("GET", "/healthz", rank).json()["running"]
            assert (running["operation"], running["checkpoint"]) == ("update", "slow")
            assert len(ranks.ask("GET", "/metas", rank).json()) == 2
            busy = ranks.ask("POST", "/checkpoints/slow/gather-metas", rank)
            assert (busy.status_code, busy.json()["error_type"]) == (409, "RankBusy")
            assert time.monotonic() - began < 10
        go.set()
        assert update.result(SECONDS).status_code == 502
    assert ranks.ask("DELETE", "/checkpoints/slow", params=ALL).status_code == 200


def test_an_update_is_watched_and_cancelled(ranks: Ranks, engines: list[str], checkpoint: Path) -> None:
    """Both ranks end it, nothing is loaded, and what comes after works."""
    ranks.hold("unwanted", checkpoint)
    before = [digests(engine) for engine in engines]
    asked, go = threading.Event(), threading.Event()

    def answer() -> dict[str, Any]:
        asked.set()
        assert go.wait(SECONDS)
        return {"error": "after all, no"}

    assert ranks.ask("POST", "/cancel").json()["error_type"] == "NothingRuns"
    with fake_engine(answer) as slow, ThreadPoolExecutor(1) as pool:
        update = pool.submit(ranks.update, "unwanted", [slow, slow])
        assert asked.wait(SECONDS)
        cancelled = ranks.ask("POST", "/cancel", 1)
        assert (cancelled.status_code, cancelled.json()["operation"]) == (200, "update")
        answered = update.result(SECONDS)
        go.set()
    parts = answered.json()["ranks"]
    assert parts["1"]["answer"]["error_type"] == "Cancelled", parts["1"]
    assert "cancelled by a request" in parts["0"]["answer"]["message"], parts["0"]
    for rank in range(2):
        last = ranks.ask("GET", "/operations", rank).json()["ended"][-1]
        assert (last["operation"], last["checkpoint"]) == ("update", "unwanted")
        assert last["error"]["committed"] is False
    assert [digests(engine) for engine in engines] == before
    assert ranks.update("unwanted", engines).status_code == 200
    check_engines(engines, checkpoint)
    assert ranks.ask("DELETE", "/checkpoints/unwanted", params=ALL).status_code == 200


def test_a_rank_that_is_not_asked(ranks: Ranks, checkpoint: Path) -> None:
    ranks.hold("alone", checkpoint)
    answer = ranks.ask("POST", "/checkpoints/alone/update", json={"timeout": 0.5})
    assert answer.status_code == 504
    assert (answer.json()["error_type"], answer.json()["record"]["stage"]) == ("UpdateTimeout", "begin")
    # The other comes too late, and learns it.
    late = ranks.ask("POST", "/checkpoints/alone/update", 1, json={"timeout": 5})
    assert late.status_code == 504
    assert ranks.ask("DELETE", "/checkpoints/alone", params=ALL).status_code == 200


@pytest.mark.parametrize("working", [False, True], ids=["idle", "during-an-update"])
def test_sigterm_leaves_nothing(children: Children, directory: Path, checkpoint: Path, working: bool) -> None:
    ranks = Ranks(children, f"ending-{working}", directory)
    ranks.hold("a", checkpoint)
    asked = threading.Event()
    ended = threading.Event()

    def answer() -> dict[str, Any]:
        asked.set()
        assert ended.wait(SECONDS)
        return {}

    with fake_engine(answer) as slow, ThreadPoolExecutor(1) as pool:
        if working:
            update = pool.submit(ranks.update, "a", [slow, slow])
            assert asked.wait(SECONDS)
        began = time.monotonic()
        os.kill(ranks.launcher.process.pid, signal.SIGTERM)
        ranks.launcher.process.wait(SECONDS)
        assert time.monotonic() - began < 25
        if working:
            response = update.result(SECONDS)
            assert response.status_code >= 500
            assert "SIGTERM" in response.text
        ended.set()
    log = (ranks.logs / f"{ranks.directory.name}.err.log").read_text()
    assert "not ended" not in log
    left = [path for path in ranks.directory.rglob("*") if not path.is_dir()]
    assert left == []
    assert [path for path in (ranks.directory / "s").iterdir()] == []
    wait_for("the ranks to be gone", lambda: not processes_with(str(ranks.directory)))


def processes_with(text: str) -> list[bytes]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(entry.read_bytes())
    return [command for command in found if text.encode() in command]
