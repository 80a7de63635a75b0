"""SGLang servers: real processes, and what tests ask them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import httpx
from ckpt_engine_sglang.client import SglangServer

from tests.support.tiny_models import make_tiny_checkpoint

HERE = Path(__file__).parent
START_SECONDS = 280.0
PROMPT = [5, 60, 7, 300, 9]
WAIT = "--checkpoint-engine-wait-weights-before-ready"
STALL_SECONDS = 5.0
"""How long a server's workers wait for a parameter server that gives no sign of life."""
_ARGUMENTS = (
    *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    # The fraction is of memory that other processes take meanwhile, too; the tokens are the limit.
    *("--disable-overlap-schedule", "--disable-cuda-graph", "--mem-fraction-static", "0.8"),
    *("--max-total-tokens", "2048", "--max-running-requests", "4", "--context-length", "512"),
    *("--random-seed", "1", "--log-level-http", "warning", "--sleep-on-idle"),
)


def with_stubs(environment: Mapping[str, str]) -> str:
    """PYTHONPATH of SGLang's processes: the stubs, then whatever it is (`make test-sglang-other`)."""
    return os.pathsep.join([str(HERE / "stubs"), *filter(None, [environment.get("PYTHONPATH")])])


class Checkpoints:
    """Tiny checkpoints, made when they are first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, architecture: str, seed: int) -> Path:
        path = self._directory / f"{architecture}-{seed}"
        if not path.exists():
            make_tiny_checkpoint(path, architecture, seed)
        return path


class Server:
    """One running server.

    Args:
        model: its directory; with dummy weights unless `dummy` is False.
        log: where its processes write.
        devices: CKPT_ENGINE_CPU_DEVICES.
        host: CKPT_ENGINE_HOST_ID.
        device: cpu or cuda.
        address: where it listens.
        api_key: that it asks for; requests of this class have it.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        *arguments: str,
        tp_size: int = 1,
        pp_size: int = 1,
        dummy: bool = True,
        devices: str = "0",
        host: str = "here",
        device: str = "cpu",
        address: str = "127.0.0.1",
        api_key: str | None = None,
        **environment: str,
    ) -> None:
        self.model, self.log, self.host = model, log, host
        self.pp_size, self.rank_count = pp_size, tp_size * pp_size
        self.port = _free_port()
        self.url = f"http://{address}:{self.port}"
        self.client = SglangServer(self.url, api_key=api_key)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.faults = log.with_suffix(".faults")
        settings = {
            "PYTHONPATH": with_stubs(os.environ),
            "SGLANG_USE_CPU_ENGINE": str(int(device == "cpu")),
            "SGLANG_FAULTS": str(self.faults),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CKPT_ENGINE_CPU_DEVICES": devices,
            "CKPT_ENGINE_HOST_ID": host,
            "CKPT_ENGINE_STALL_TIMEOUT": str(STALL_SECONDS),
        }
        if self.rank_count > 1:
            # Each rank must be told its cores; ranks may share one.
            cores = sorted(os.sched_getaffinity(0))
            settings["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
                str(cores[rank % len(cores)]) for rank in range(self.rank_count)
            )
        command = [
            *(sys.executable, "-m", *(("tests.support.forking",) if device == "cpu" else ())),
            *("sglang.launch_server", "--model-path", str(model)),
            *("--host", address, "--port", str(self.port), "--tp-size", str(tp_size)),
            *(("--pp-size", str(pp_size)) if pp_size > 1 else ()),
            *("--load-format", "dummy" if dummy else "auto", "--device", device),
            *(*_ARGUMENTS, *arguments, *(("--api-key", api_key) if api_key else ())),
        ]
        self._output: IO[bytes] = log.open("wb")
        self.process = subprocess.Popen(
            command,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **settings, **environment},
        )

    def wait(self, path: str = "/model_info", timeout: float = START_SECONDS) -> Server:
        """Until GET `path` answers 200."""
        deadline = time.monotonic() + timeout
        while self.status(path) != 200:
            assert self.process.poll() is None, (
                f"the server ended with {self.process.returncode}\n{self.tail()}"
            )
            assert time.monotonic() < deadline, f"no 200 from {path} after {timeout} s\n{self.tail()}"
            time.sleep(0.2)
        return self

    def status(self, path: str) -> int:
        """The status of GET `path`; 0: nobody listens."""
        try:
            return httpx.get(self.url + path, headers=self._headers, timeout=30).status_code
        except httpx.TransportError:
            return 0

    def post(self, path: str, timeout: float = 60, **body: Any) -> httpx.Response:  # noqa: ANN401 - JSON
        return httpx.post(self.url + path, json=body, headers=self._headers, timeout=timeout)

    def generate(
        self, prompt: Sequence[int] = PROMPT, tokens: int = 16, timeout: float = 60
    ) -> tuple[list[int], str]:
        """A greedy continuation, and the weight version that comes with it."""
        parameters = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        answer = self.post("/generate", timeout, input_ids=list(prompt), sampling_params=parameters)
        assert answer.status_code == 200, f"{answer.text}\n{self.tail()}"
        return answer.json()["output_ids"], answer.json()["meta_info"]["weight_version"]

    def weights(self) -> list[dict[str, str]]:
        """The checksums of each rank's parameters, by name."""
        ranks = sorted(self.client.checksums(), key=lambda rank: json.dumps(rank["parallelism_info"]))
        return [rank["checksums"] for rank in ranks]

    def state(self) -> tuple[list[int], list[dict[str, str]]]:
        """What tells two sets of weights apart."""
        return self.generate()[0], self.weights()

    def load_from_disk(self, model: Path) -> None:
        answer = self.post("/update_weights_from_disk", model_path=str(model), load_format="auto")
        assert answer.json()["success"], answer.text

    def fail(self, **fault: object) -> None:
        """See stubs/sglang_faults.py; without arguments: no more."""
        self.faults.write_text(json.dumps(fault))

    def tail(self, nbytes: int = 6000) -> str:
        return self.log.read_bytes()[-nbytes:].decode(errors="replace")

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        end_group(self.process)
        self._output.close()


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kills a process that leads a session, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
