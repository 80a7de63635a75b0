"""The engine's routes: in this process with a model that blocks, and as the real process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from ckpt_engine.embedded_engine import model as models
from ckpt_engine.embedded_engine.engine import EmbeddedEngine, UnknownMethod
from ckpt_engine.embedded_engine.server import create_app
from ckpt_engine.errors import ConfigError
from ckpt_engine.ipc import receiver
from ckpt_engine.server.engine_client import call_engine, wait_until_healthy
from ckpt_engine.settings import load_settings

ROOT = Path(__file__).parents[3]
PROMPT = [1, 17, 42, 7]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    models.make_checkpoint(directory, seed=3, size="tiny")
    return directory


@pytest.fixture
def engine(checkpoint: Path) -> EmbeddedEngine:
    return EmbeddedEngine(checkpoint, seed=5, device_index=0)


@contextmanager
def process(checkpoint: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    command = [sys.executable, "-W", "error", "-m", "ckpt_engine.embedded_engine", "--model", str(checkpoint)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CKPT_ENGINE_HOST_ID": "here"}
    with subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            if not line:
                pytest.fail(f"the engine did not start:\n{child.communicate()[1]}")
            yield child, json.loads(line)
        finally:
            child.kill()


@pytest.fixture(scope="module")
def endpoint(checkpoint: Path) -> Iterator[str]:
    with process(checkpoint, "--port", "0", "--seed", "5") as (_, announced):
        yield f"http://127.0.0.1:{announced['port']}"


def test_health_tells_who_it_is(endpoint: str) -> None:
    wait_until_healthy(endpoint, 10)
    assert httpx.get(f"{endpoint}/health").json() == {
        "status": "ok",
        "device": "CPU-here-0",
        "weights": "serving",
        "version": None,
        "reason": None,
        "busy": False,
    }


def test_generation_is_greedy_and_repeatable(endpoint: str, checkpoint: Path) -> None:
    request = {"prompt_token_ids": PROMPT, "max_tokens": 12}
    answers = [httpx.post(f"{endpoint}/generate", json=request).json() for _ in range(2)]
    expected = models.generate_greedily(models.load_dummy(checkpoint, 5), PROMPT, 12)
    assert answers == [{"token_ids": expected}] * 2


def test_digests_of_the_process_are_those_of_its_seed(endpoint: str, checkpoint: Path) -> None:
    (digests,) = call_engine(f"{endpoint}/collective_rpc", "parameter_digests")
    assert digests == models.parameter_digests(models.load_dummy(checkpoint, 5))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"method": "__init__"}, "no method '__init__'"),
        ({"method": "call", "args": ["parameter_digests"]}, "no method 'call'"),
        ({"method": "generate", "args": [[1], 1]}, "no method 'generate'"),
        ({"method": "parameter_digests", "args": [1]}, "parameter_digests"),
        ({"method": "update_weights_from_ipc", "kwargs": {"other": 1}}, "update_weights_from_ipc"),
    ],
)
def test_what_is_not_offered_is_refused(endpoint: str, request_: dict[str, Any], message: str) -> None:
    response = httpx.post(f"{endpoint}/collective_rpc", json=request_)
    assert response.status_code == 400
    assert message in response.json()["error"]


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt_token_ids": [], "max_tokens": 1},
        {"prompt_token_ids": [256], "max_tokens": 1},
        {"prompt_token_ids": [-1], "max_tokens": 1},
        {"prompt_token_ids": [1], "max_tokens": 0},
        {"prompt_token_ids": [1], "max_tokens": 1024},
    ],
)
def test_prompts_that_do_not_fit_are_refused(endpoint: str, request_: dict[str, Any]) -> None:
    assert httpx.post(f"{endpoint}/generate", json=request_).status_code == 400


def test_an_update_without_a_handle_for_the_device_is_a_failed_status(endpoint: str) -> None:
    (status,) = call_engine(f"{endpoint}/collective_rpc", "update_weights_from_ipc", [[]], timeout=30)
    assert status["outcome"] == "failed"
    assert "CPU-here-0" in status["error"]
    assert httpx.get(f"{endpoint}/health").json()["weights"] == "serving"


def test_it_listens_on_the_loopback_alone(endpoint: str) -> None:
    port = int(endpoint.rpartition(":")[2])
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", port))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_unix_socket_is_private_and_the_exit_is_clean(checkpoint: Path, signum: int) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        uds = Path(directory) / "engine.sock"
        # What a crashed predecessor leaves behind.
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(uds))
        with process(checkpoint, "--uds", str(uds)) as (child, announced):
            assert announced == {"uds": str(uds)}
            assert stat.S_IMODE(uds.stat().st_mode) == 0o600
            wait_until_healthy("http://localhost", 10, uds=str(uds))
            child.send_signal(signum)
            _, errors = child.communicate(timeout=30)
        assert (child.returncode, errors) == (0, "")
        assert not uds.exists()


def test_a_directory_without_a_model_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ckpt_engine.embedded_engine", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == f"error: --model {tmp_path}: no config.json there\n"


def test_a_missing_extra_says_what_to_install() -> None:
    code = (
        "import sys, runpy; sys.modules['transformers'] = None\n"
        "runpy.run_module('ckpt_engine.embedded_engine', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: The embedded engine could not import transformers")
    assert done.stderr.rstrip().endswith("pip install 'ckpt-engine[demo]'")


# In this process: the receiver is replaced by one that waits, fails or loads as told.


def ask(engine: EmbeddedEngine, talk: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(app=create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            await talk(client)

    asyncio.run(run())


UPDATE = {"method": "update_weights_from_ipc", "args": [[["CPU-here-0", "ipc:///x"]]]}


def test_health_answers_and_generation_waits_during_an_update(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, release = threading.Event(), threading.Event()
    order: list[str] = []

    def serve_update(*_: object, **__: object) -> dict[str, Any]:
        started.set()
        assert release.wait(30)
        order.append("update")
        assert engine.health()["weights"] == "updating"
        return {"outcome": "committed", "version": "v7"}

    monkeypatch.setattr(receiver, "serve_update", serve_update)

    async def talk(client: httpx.AsyncClient) -> None:
        updates = asyncio.create_task(client.post("/collective_rpc", json=UPDATE))
        await asyncio.to_thread(started.wait, 30)
        request = {"prompt_token_ids": PROMPT, "max_tokens": 1}
        generation = asyncio.create_task(client.post("/generate", json=request))
        generation.add_done_callback(lambda _: order.append("generation"))
        began = time.monotonic()
        for _ in range(20):
            assert (await client.get("/health")).json()["busy"] is True
        assert time.monotonic() - began < 5
        assert not generation.done()
        release.set()
        assert (await updates).json() == {"results": [{"outcome": "committed", "version": "v7"}]}
        assert (await generation).status_code == 200
        health = (await client.get("/health")).json()
        assert (health["weights"], health["version"]) == ("serving", "v7")

    ask(engine, talk)
    assert order == ["update", "generation"]


def test_an_update_that_broke_off_leaves_the_engine_incomplete(
    engine: EmbeddedEngine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dict(models.load_from_disk(checkpoint).named_parameters())
    outcome = "failed"

    def serve_update(*_: object, run: Callable[[Any], object], **__: object) -> dict[str, Any]:
        run([(name, tensor.detach()) for name, tensor in source.items()])
        if outcome == "committed":
            return {"outcome": outcome, "version": "v8"}
        return {"outcome": outcome, "error": "it broke off", "touched": True}

    monkeypatch.setattr(receiver, "serve_update", serve_update)
    engine.call("update_weights_from_ipc", [[]])
    assert (engine.health()["weights"], engine.health()["reason"]) == ("incomplete", "it broke off")

    async def not_ready(client: httpx.AsyncClient) -> None:
        response = await client.get("/health")
        assert (response.status_code, response.json()["status"]) == (503, "not_ready")

    ask(engine, not_ready)
    outcome = "committed"
    engine.call("update_weights_from_ipc", [[]])
    assert engine.health() | {"device": ""} == {
        "status": "ok",
        "device": "",
        "weights": "serving",
        "version": "v8",
        "reason": None,
        "busy": False,
    }
    assert engine.parameter_digests() == models.file_digests(checkpoint)[0]


def test_a_timeout_is_answered_while_the_worker_goes_on(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(
        receiver,
        "serve_update",
        lambda *_, **__: {"outcome": "committed", "version": "v"} if release.wait(30) else {},
    )

    async def talk(client: httpx.AsyncClient) -> None:
        response = await client.post("/collective_rpc", json=UPDATE | {"timeout": 0.1})
        assert response.status_code == 504
        assert "still at work" in response.json()["error"]
        assert engine.busy
        release.set()
        # Behind the update, through its lock.
        assert (await client.post("/collective_rpc", json={"method": "parameter_digests"})).is_success

    ask(engine, talk)
    assert engine.health()["weights"] == "serving"


def test_an_error_in_the_worker_is_an_answer_with_its_traceback(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> dict[str, Any]:
        raise RuntimeError("the worker is unwell")

    monkeypatch.setattr(receiver, "serve_update", fail)

    async def talk(client: httpx.AsyncClient) -> None:
        response = await client.post("/collective_rpc", json=UPDATE)
        assert response.status_code == 500
        assert response.json()["error"] == "RuntimeError: the worker is unwell"
        assert "in fail" in response.json()["traceback"]

    ask(engine, talk)
    assert not engine.busy


def test_the_device_is_the_hosts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_ENGINE_HOST_ID", "node-a")
    monkeypatch.setenv("CKPT_ENGINE_CPU_DEVICES", "4,6")
    engine = EmbeddedEngine(checkpoint, seed=0, device_index=1, settings=load_settings())
    assert engine.device_uuid == "CPU-node-a-6"


def test_calls_in_process_are_checked_too(engine: EmbeddedEngine) -> None:
    with pytest.raises(UnknownMethod, match="parameter_digests, update_weights_from_ipc"):
        engine.call("health")
    with pytest.raises(ConfigError, match="between 0 and 255"):
        engine.generate([256], 1)
