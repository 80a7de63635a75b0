"""`examples/update.py` with each option of the reference's command line, against one vLLM server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ckpt_engine.metadata import metas_from_json
from tests.engines.vllm.engines import ENVIRONMENT, ROOT, Answers, Checkpoints, OfflineEngine
from tests.engines.vllm.servers import Server
from tests.engines.vllm.test_examples import run
from tests.integration.conftest import free_port
from tests.support.mooncake import need_mooncake

SECONDS = 120.0


@dataclass
class Served:
    server: Server
    paths: dict[str, Path]
    """In two files, with an index: each of two ranks holds a share."""
    expected: dict[str, Answers]

    def command(self, *options: str, ranks: int = 1) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        launcher += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        assert self.server.uds is not None
        engine = ["--endpoint", self.server.url, "--uds", self.server.uds]
        return [*launcher, "examples/update.py", *engine, *options]

    def update(self, *options: str, ranks: int = 1) -> str:
        return run(*self.command(*options, ranks=ranks))

    def holds(self, version: str) -> None:
        assert self.server.answers() == self.expected[version]


@pytest.fixture(scope="module")
def served(
    offline: OfflineEngine, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    base = tmp_path_factory.mktemp("update-example")
    originals = {version: checkpoints("qwen3", version) for version in "ab"}
    with tempfile.TemporaryDirectory(prefix="vllm-") as sockets:
        uds = Path(sockets) / "http"
        server = Server(originals["a"], 1, base / "server.txt", "--load-format", "dummy", uds=uds)
        try:
            # The server starts meanwhile.
            expected = {version: offline.from_disk(path) for version, path in originals.items()}
            paths = {version: in_two_files(path, base / version) for version, path in originals.items()}
            server.wait()
            yield Served(server, paths, expected)
        finally:
            server.close()


def in_two_files(source: Path, directory: Path) -> Path:
    directory.mkdir()
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    where = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({name: tensors[name] for name in names if where[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return directory


@pytest.fixture(autouse=True)
def ready(served: Served) -> None:
    """Before each test."""
    served.server.make_ready()


@contextmanager
def staying(served: Served, *options: str) -> Iterator[None]:
    """Parameter servers that have updated the engine and stay."""
    process = subprocess.Popen(
        served.command(*options, "--sleep-time", "3600"),
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith("staying for"):
                break
        else:
            pytest.fail("".join(said))
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


@pytest.mark.parametrize("method", [None, "broadcast", "all"])
def test_checkpoint_path_and_name_and_update_method(served: Served, method: str | None) -> None:
    """`all` broadcasts, and then sends the same again as p2p does: a lone rank holds all of it itself."""
    more = [] if method is None else ["--update-method", method]
    for version in "ba":
        output = served.update(
            "--checkpoint-path", str(served.paths[version]), "--checkpoint-name", f"step-{version}", *more
        )
        assert output.count(f"step-{version} is in place as version") == (2 if method == "all" else 1)
        served.holds(version)


def test_the_reference_s_default_name(served: Served) -> None:
    output = served.update("--checkpoint-path", str(served.paths["b"]))
    assert "my-checkpoint-iter-0 is in place" in output
    served.holds("b")


def test_p2p_and_inference_parallel_size(served: Served) -> None:
    """Two ranks, each an inference group of one: the first's engine is updated, and it reads what the second
    holds."""
    need_mooncake()
    for version in "ab":
        output = served.update(
            *("--checkpoint-path", str(served.paths[version]), "--inference-parallel-size", "1"),
            *("--update-method", "p2p"),
            ranks=2,
        )
        assert "read by P2P" in output
        served.holds(version)


def test_sleep_time(served: Served) -> None:
    began = time.monotonic()
    output = served.update("--checkpoint-path", str(served.paths["a"]), "--sleep-time", "1")
    assert "staying for 1 s" in output
    assert time.monotonic() - began > 1
    served.holds("a")


def test_metas_saved_and_loaded_again(served: Served, tmp_path: Path) -> None:
    """The weights of those who stay are read by others, who have no checkpoint."""
    need_mooncake()
    file = tmp_path / "metas.json"
    with staying(served, "--checkpoint-path", str(served.paths["b"]), "--save-metas-file", str(file)):
        served.holds("b")
        assert metas_from_json(file.read_text())[0].tensor_count == 25
        served.update("--checkpoint-path", str(served.paths["a"]))
        served.holds("a")
        output = served.update("--load-metas-file", str(file))
        assert "read by P2P" in output
        served.holds("b")
