"""vLLM's HTTP server, and the parameter servers beside its workers, in processes of their own."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from ckpt_engine.errors import EngineRequestError
from ckpt_engine.server.engine_client import call_engine, wait_until_healthy
from tests.engines.vllm.engines import ENVIRONMENT, EXTENSION, NO_P2P, PROMPTS, ROOT, SECONDS, Answers
from tests.engines.vllm.offline_process import MAX_TOKENS
from tests.integration.conftest import free_port

_NUMBERS = itertools.count(1000)


class Server:
    """`python -m vllm.entrypoints.openai.api_server` (the wheel for CPU has no `vllm serve`).

    Args:
        uds: listen on this Unix socket, in place of a port.
        eager: compile nothing, and capture no graphs.
    """

    def __init__(
        self,
        model: Path,
        tensor_parallel_size: int,
        log: Path,
        *options: str,
        uds: Path | None = None,
        eager: bool = True,
    ) -> None:
        self.model = model
        self.tensor_parallel_size = tensor_parallel_size
        self.log = log
        self.uds = None if uds is None else str(uds)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.rpc_url = f"{self.url}/collective_rpc"
        command = [sys.executable, "-m", "tests.engines.vllm.light", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model), "--served-model-name", "model"]
        command += ["--host", "127.0.0.1", "--port", str(port)] if uds is None else ["--uds", str(uds)]
        command += ["--tensor-parallel-size", str(tensor_parallel_size), "--worker-extension-cls", EXTENSION]
        command += ["--max-model-len", "2048", "--max-num-seqs", "8", "--seed", "0", *options]
        command += ["--enforce-eager"] if eager else []
        self._command = command
        self._start()

    def _start(self) -> None:
        if self.uds is not None:
            Path(self.uds).unlink(missing_ok=True)  # a killed one leaves it, and the next could not bind
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=os.environ | ENVIRONMENT | {"VLLM_SERVER_DEV_MODE": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        try:
            wait_until_healthy(self.url, SECONDS, self.uds)
        except EngineRequestError:
            pytest.fail(f"vLLM did not start:\n{self.log.read_text()[-8000:]}")

    def make_ready(self) -> None:
        """Serving right, whatever a test that failed has left of it: else it is started anew."""
        try:
            number = next(_NUMBERS)
            if self.rpc("test_echo", number) != [str(number)] * self.tensor_parallel_size:
                raise EngineRequestError("its replies are out of step")
            self.rpc("test_clean")
            if self.get("/is_sleeping")["is_sleeping"]:
                self.post("/wake_up")
            if self.get("/is_paused")["is_paused"]:
                self.post("/resume")
        except (EngineRequestError, httpx.HTTPError) as error:
            print(f"vLLM is started anew: {error}")  # noqa: T201 - a test before this one did it
            self.close()
            self._start()
            self.wait()

    def rpc(self, method: str, *args: Any) -> list[Any]:  # noqa: ANN401 - JSON
        return call_engine(self.rpc_url, method, args, timeout=60, uds=self.uds)

    @contextmanager
    def client(self) -> Iterator[httpx.Client]:
        # One for each request: after an error the server resets connections that are kept.
        with httpx.Client(transport=httpx.HTTPTransport(uds=self.uds), timeout=120) as client:
            yield client

    def post(self, path: str, body: Any = None) -> Any:  # noqa: ANN401 - JSON
        with self.client() as client:
            answer = client.post(self.url + path, json=body).raise_for_status()
        return answer.json() if answer.content else None

    def generate(self, prompt: list[int]) -> list[Any]:
        """The prompt's tokens, and the log-probabilities of the likeliest ones."""
        request = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "logprobs": 3,
        }
        answer = self.post(
            "/v1/completions", request | {"ignore_eos": True, "return_tokens_as_token_ids": True}
        )
        found = answer["choices"][0]["logprobs"]
        steps = [
            sorted([int(token.removeprefix("token_id:")), value] for token, value in step.items())
            for step in found["top_logprobs"]
        ]
        return [[int(token.removeprefix("token_id:")) for token in found["tokens"]], steps]

    def complete(self, prompt: list[int], max_tokens: int, **options: Any) -> dict[str, Any]:  # noqa: ANN401
        request = {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        answer = self.post("/v1/completions", request | {"ignore_eos": True} | options)
        return answer["choices"][0]

    def get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        with self.client() as client:
            return client.get(self.url + path).raise_for_status().json()

    def stream(self, prompt: list[int], max_tokens: int) -> Iterator[dict[str, Any]]:
        """The choices of an answer, token by token; the first is asked for at once."""
        request = {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        request |= {"ignore_eos": True, "stream": True}
        with (
            self.client() as client,
            client.stream("POST", f"{self.url}/v1/completions", json=request) as answer,
        ):
            for line in answer.iter_lines():
                text = line.removeprefix("data: ")
                if text and text != "[DONE]":
                    yield from json.loads(text)["choices"]

    def answers(self) -> Answers:
        self.post("/reset_prefix_cache")
        return Answers([self.generate(prompt) for prompt in PROMPTS], self.rpc("test_digests"))

    def close(self) -> None:
        """Idempotent."""
        if self.process.returncode is not None:
            return
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


class Fleet:
    """A parameter server for each rank, or for those from `first` on."""

    def __init__(self, size: int, log: Path, *, first: int = 0, **environment: str) -> None:
        self._size, self._first, self._environment = size, first, environment
        self._log = log
        self.processes: list[subprocess.Popen[str]] = []
        self._start()

    def _start(self) -> None:
        self.port = free_port()
        self.processes = []
        self._updates = 0
        size, environment = self._size, NO_P2P | self._environment
        with self._log.open("a") as output:
            for rank in range(self._first, size):
                env = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "GLOO_SOCKET_IFNAME": "lo"}
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.engines.vllm.rank_process"],
                    cwd=ROOT,
                    env=os.environ | ENVIRONMENT | env | environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    text=True,
                )
                self.processes.append(process)

    def start_update(
        self,
        server: Server | None,
        checkpoint: Path,
        *,
        native: bool = False,
        timeout: float = 60,
        tells: bool = False,
        withholds: int | None = None,
    ) -> None:
        """Without a `server`, whoever has an engine of another kind asks it with what `tells` tells."""
        assert server is not None or tells
        request: dict[str, Any] = {"checkpoint": str(checkpoint)}
        if server is not None:
            request |= {"endpoint": server.url, "uds": server.uds}
        request |= {"native": native, "timeout": timeout, "tells": tells}
        request |= {"withholds": withholds}
        self._updates += 1
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()

    def handles(self) -> list[list[str]]:
        """Of an update that was started with `tells`, to ask the engine with."""
        assert self.processes[0].stdout is not None
        return json.loads(self.processes[0].stdout.readline())["handles"]

    def go_on(self) -> None:
        """The engine has been asked: what an update that was started with `tells` waits for."""
        assert self.processes[0].stdin is not None
        self.processes[0].stdin.write("\n")
        self.processes[0].stdin.flush()

    def make_ready(self) -> None:
        """All there and none in an update, whatever a test that failed has left: else started anew."""
        if self._updates or any(process.poll() is not None for process in self.processes):
            self.kill()
            self._start()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def results(self) -> list[dict[str, Any]]:
        """Each rank's answer; {} of one that is gone."""
        self._updates -= 1
        lines = [process.stdout.readline() for process in self.processes if process.stdout is not None]
        return [json.loads(line) if line else {} for line in lines]

    def update(self, server: Server, checkpoint: Path, *, native: bool = False) -> list[dict[str, Any]]:
        self.start_update(server, checkpoint, native=native)
        return self.results()

    def commit(self, server: Server, checkpoint: Path) -> str:
        """An update that must succeed; its version."""
        results = self.update(server, checkpoint)
        for result in results:
            assert "report" in result, (result, self._log.read_text()[-4000:], server.log.read_text()[-4000:])
        return str(results[0]["report"]["version"])

    def close(self) -> None:
        for process in self.processes:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    try:
        # Nothing more is asked of it.
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
