"""Real engines for the tests, and what the same engines answer after loading from disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import make_tiny_checkpoint

ROOT = Path(__file__).parents[3]
SEEDS = {"a": 20261124, "b": 20261125}
EXTENSION = "tests.engines.vllm.extension.Extension"
PROMPTS = [[5, 6, 7], [9, 100, 4, 8, 300, 17], [2]]
RUNTIME = Path(tempfile.mkdtemp(prefix="ce-", dir="/tmp"))
"""What this run's parameter servers keep their sockets in, beside those of others."""
os.environ["CKPT_ENGINE_SOCKET_DIR"] = str(RUNTIME)
NO_P2P = {"CKPT_ENGINE_P2P": "off"}
"""Where nothing is read by P2P: mooncake takes a second to end."""
SECONDS = 300.0
"""For an engine to start on a loaded machine."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "CKPT_ENGINE_HOST_ID": "here",
}


@dataclass
class Checkpoints:
    """Tiny checkpoints, made when they are first asked for; `a` and `b` are two versions of a model."""

    base: Path

    def __call__(self, architecture: str, version: str) -> Path:
        directory = self.base / f"{architecture}-{version}"
        if not directory.exists():
            make_tiny_checkpoint(directory, architecture, SEEDS[version])
        return directory


@dataclass
class Answers:
    """What an engine shows of its weights: tokens and logprobs for PROMPTS, and each rank's digests."""

    generated: list[Any]
    digests: list[dict[str, str]] = field(repr=False)


class OfflineEngine:
    """vLLM's LLM class in a process of its own, with more in its `environment`."""

    def __init__(self, log: Path, **environment: str) -> None:
        self._log = log
        self._environment = environment
        self._lock = threading.Lock()
        self._references: dict[tuple[Path, int], Answers] = {}
        self._launch()

    def _launch(self) -> None:
        answers, theirs = os.pipe()
        # With one worker it runs in this very process: engines start fast, one after the other.
        own = ENVIRONMENT | NO_P2P | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | self._environment
        with self._log.open("a") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.engines.vllm.offline_process", str(theirs)],
                cwd=ROOT,
                env=os.environ | own,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs],
                start_new_session=True,
                text=True,
            )
        os.close(theirs)
        self._answers = os.fdopen(answers)

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def ask(self, operation: str, argument: Any) -> Any:  # noqa: ANN401 - JSON
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({operation: argument}) + "\n")
            self._process.stdin.flush()
            line = self._answers.readline()
        if not line:
            pytest.fail(f"vLLM ended during {operation}:\n{self._log.read_text()[-6000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{answer['error']}\n{self._log.read_text()[-3000:]}")
        return answer["result"]

    def start(self, model: Path, **options: Any) -> None:  # noqa: ANN401 - LLM's arguments
        if not self.lives:
            # A test that failed ended it: the others' engine is another one.
            self.close()
            self._launch()
        arguments = {
            "model": str(model),
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "seed": 0,
            "worker_extension_cls": EXTENSION,
        }
        self.ask("start", arguments | options)

    def rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:  # noqa: ANN401 - JSON
        return self.ask("rpc", [method, args, kwargs])

    def answers(self) -> Answers:
        return Answers(self.ask("generate", PROMPTS), self.rpc("test_digests"))

    def from_disk(self, model: Path, tensor_parallel_size: int = 1) -> Answers:
        """What the engine answers when it loads `model` itself. It then holds that model."""
        key = (model, tensor_parallel_size)
        if key not in self._references:
            self.start(model, tensor_parallel_size=tensor_parallel_size)
            self._references[key] = self.answers()
        return self._references[key]

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._answers.close()
        self._process.wait(60)
