"""What the documents tell people to run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.engines import ENVIRONMENT, ROOT, Checkpoints, OfflineEngine
from tests.integration.conftest import free_port

SECONDS = 400
PROMPT = "w5 w6 w7"
# In float32 vLLM does not use AMX, see extension.py.
LLM_OPTIONS = ("--llm-options", '{"enforce_eager": true, "dtype": "float32"}')
SERVER_OPTIONS = "--max-model-len 2048 --max-num-seqs 8 --enforce-eager --dtype float32"
BIN = Path(sys.executable).parent


def run(*command: str, code: int = 0, **environment: str) -> str:
    """What it says, until it ends with `code`."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        # With all that it has started.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    assert process.returncode == code, output[-8000:]
    return output


@pytest.mark.timeout(SECONDS + 60)
def test_the_llm_class_with_two_workers(checkpoints: Checkpoints, offline: OfflineEngine) -> None:
    new = checkpoints("qwen3", "b")
    options = ("--update-from", str(new), "--tensor-parallel-size", "2", "--prompt", PROMPT, *LLM_OPTIONS)
    output = run(sys.executable, "examples/vllm_offline.py", str(checkpoints("qwen3", "a")), *options)
    offline.start(new, tensor_parallel_size=2, dtype="float32")
    assert "25 tensors" in output
    assert offline.ask("complete", PROMPT) in output.splitlines()


def server_example(model: Path, options: str, code: int = 0) -> str:
    return run(
        "bash",
        "examples/vllm_server.sh",
        str(model),
        code=code,
        VLLM="python -m vllm.entrypoints.openai.api_server --model",
        VLLM_OPTIONS=options,
        PORT=str(free_port()),
        PROMPT=PROMPT,
        PATH=f"{BIN}:{os.environ['PATH']}",
    )


@pytest.mark.timeout(SECONDS + 60)
def test_a_server(checkpoints: Checkpoints, offline: OfflineEngine) -> None:
    model = checkpoints("qwen3", "b")
    output = server_example(model, SERVER_OPTIONS)
    assert "is in place as version" in output
    (answer,) = [line for line in output.splitlines() if line.startswith('{"id"')]
    offline.start(model, dtype="float32")
    assert json.loads(answer)["choices"][0]["text"] == offline.ask("complete", PROMPT)


@pytest.mark.timeout(SECONDS + 60)
def test_a_server_that_cannot_start(checkpoints: Checkpoints) -> None:
    """Nobody waits for its health."""
    output = server_example(checkpoints("qwen3", "b"), "--no-such-option", code=1)
    assert "--no-such-option" in output
    assert "the server has ended: what it said is above" in output


@pytest.mark.timeout(SECONDS + 60)
def test_a_policy_learns_what_its_engine_rolls_out() -> None:
    """Step by step: had the engine kept its first weights, the reward would stay where it was."""
    output = run(sys.executable, "examples/rl_loop.py", "--steps", "6")
    rewards = [float(reward) for reward in re.findall(r"^step \d+: reward ([0-9.]+)", output, re.MULTILINE)]
    assert len(rewards) == 6, output[-4000:]
    assert rewards[0] < 0.2 < rewards[-1], rewards


@pytest.mark.timeout(SECONDS + 60)
def test_the_demo() -> None:
    output = run(str(BIN / "ckpt-engine"), "demo", "--engine", "vllm")
    document: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert document["verified"] is True
    assert document["engine"].startswith("vllm ")
    assert 0 < document["update_seconds"] < document["restart_seconds"]
