"""What the documents tell people to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.engines import ENVIRONMENT, ROOT, Checkpoints, OfflineEngine
from tests.integration.conftest import free_port

SECONDS = 500
PROMPT = "w5 w6 w7"
BIN = Path(sys.executable).parent


def run(*command: str, **environment: str) -> str:
    """What it says on stdout."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.mark.timeout(SECONDS)
def test_the_llm_class_with_two_workers(checkpoints: Checkpoints, offline: OfflineEngine) -> None:
    new = checkpoints("qwen3", "b")
    options = ("--update-from", str(new), "--tensor-parallel-size", "2", "--prompt", PROMPT)
    output = run(sys.executable, "examples/vllm_offline.py", str(checkpoints("qwen3", "a")), *options)
    offline.start(new, tensor_parallel_size=2)
    assert "25 tensors" in output
    assert offline.ask("complete", PROMPT) in output.splitlines()


@pytest.mark.timeout(SECONDS)
def test_a_server(checkpoints: Checkpoints, offline: OfflineEngine) -> None:
    model = checkpoints("qwen3", "b")
    output = run(
        "bash",
        "examples/vllm_server.sh",
        str(model),
        VLLM="python -m vllm.entrypoints.openai.api_server --model",
        VLLM_OPTIONS="--max-model-len 2048 --max-num-seqs 8 --enforce-eager",
        PORT=str(free_port()),
        PROMPT=PROMPT,
        PATH=f"{BIN}:{os.environ['PATH']}",
    )
    assert "is in place as version" in output
    (answer,) = [line for line in output.splitlines() if line.startswith('{"id"')]
    offline.start(model)
    assert json.loads(answer)["choices"][0]["text"] == offline.ask("complete", PROMPT)


@pytest.mark.timeout(SECONDS)
def test_the_demo() -> None:
    output = run(str(BIN / "ckpt-engine"), "demo", "--engine", "vllm")
    document: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert document["verified"] is True
    assert document["engine"].startswith("vllm ")
    assert 0 < document["update_seconds"] < document["restart_seconds"]
