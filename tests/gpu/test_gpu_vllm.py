"""Real vLLM on CUDA with its graphs on: after updates by CUDA IPC it is the engine that loads from disk.

Compared with an engine of the same vLLM that loaded the same checkpoint itself: the bytes of every parameter,
the greedy tokens, and the log-probabilities within TOLERANCE.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from safetensors.torch import load_file

from ckpt_engine.errors import UpdateError
from tests.engines.vllm.engines import Answers, Checkpoints, OfflineEngine
from tests.engines.vllm.parameter_servers import update_from
from tests.engines.vllm.servers import Server
from tests.gpu.vllm_engines import APART, DECODES, SLOT_NBYTES, SMALL, WHOLE_GRAPHS, same, tell
from tests.integration.conftest import torchrun

pytestmark = pytest.mark.timeout(500)

MODES: dict[str, dict[str, Any]] = {"qwen3": {}, "tied": WHOLE_GRAPHS, "moe": WHOLE_GRAPHS}
BETWEEN_SERVERS = 0.2
"""The same, between two servers of a larger model, of which one wrote the compiled code that the other found:
three units in the last place of logits near 16. In one process TOLERANCE holds."""
SERVER_OPTIONS = (
    *("--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(2**30)),
    *("--weight-transfer-config", '{"backend": "ckpt_engine"}'),
)


@dataclass
class Model:
    """An engine that started with dummy weights; what it answered then, and what it should for a version."""

    engine: OfflineEngine
    paths: dict[str, Path]
    expected: dict[str, Answers]
    dummy: Answers


@dataclass
class Served:
    """A server that started with dummy weights; `link` leads to the checkpoint that it was given."""

    server: Server
    paths: dict[str, Path]
    link: Path


@dataclass
class Starting:
    """What is started takes most of the time, so all starts at once; each may fail alone."""

    models: dict[str, Future[Model]]
    served: Future[Served]


def _point(link: Path, target: Path) -> Path:
    """Engines of one model are given the same path: vLLM finds the code it compiled by that."""
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    return link


def _start_model(base: Path, architecture: str, paths: dict[str, Path]) -> Model:
    options = MODES[architecture] | SMALL | {"enforce_eager": False}
    link = base / f"{architecture}-current"
    expected = {}
    for version, path in paths.items():
        engine = OfflineEngine(base / f"{architecture}-{version}.log", **APART)
        engine.start(_point(link, path), **options)
        expected[version] = engine.answers()
        engine.close()
    engine = OfflineEngine(base / f"{architecture}-updated.log", **APART)
    engine.start(link, load_format="dummy", **options)
    return Model(engine, paths, expected, engine.answers())


def _start_server(base: Path) -> Served:
    checkpoints = Checkpoints(base)
    paths = {version: checkpoints("medium", version) for version in "ab"}
    link = _point(base / "medium-current", paths["a"])
    log = base / "server-updated.log"
    server = Server(link, 1, log, "--load-format", "dummy", *SERVER_OPTIONS, eager=False)
    server.wait()
    return Served(server, paths, link)


@pytest.fixture(scope="module")
def starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starting]:
    base = tmp_path_factory.mktemp("engines")
    checkpoints = Checkpoints(base)
    paths = {name: {version: checkpoints(name, version) for version in "ab"} for name in MODES}
    with ThreadPoolExecutor(len(MODES) + 1) as pool:
        models = {name: pool.submit(_start_model, base, name, paths[name]) for name in MODES}
        yield Starting(models, served := pool.submit(_start_server, base))
    for model in models.values():
        if model.exception() is None:
            model.result().engine.close()
    if served.exception() is None:
        served.result().server.close()


@pytest.fixture(params=MODES)
def model(request: pytest.FixtureRequest, starting: Starting) -> Model:
    return starting.models[request.param].result()


def test_updates_equal_loads_from_disk(model: Model) -> None:
    assert model.dummy.digests != model.expected["a"].digests
    (addresses,) = model.engine.rpc("test_addresses")
    (replays,) = model.engine.rpc("test_replays")
    differences = []
    for version in "aba":
        report = update_from(model.engine, model.paths[version], slot_nbytes=SLOT_NBYTES, device="cuda")
        assert report.buckets > 1
        differences.append(same(model.engine.answers(), model.expected[version]))
        (status,) = model.engine.rpc("ckpt_engine_status")
        assert (status["weights"], status["version"]) == ("serving", report.version)
        # The graphs that were captured before read what is there now.
        assert model.engine.rpc("test_addresses") == [addresses]
        (now,) = model.engine.rpc("test_replays")
        assert now >= replays + DECODES, "no CUDA graphs ran"
        replays = now
    tell(logprob_differences=differences, parameters=len(addresses), replays=replays)


def test_update_in_one_call(model: Model) -> None:
    for version in "ba":
        committed = model.engine.ask("update", [str(model.paths[version]), {}])
        same(model.engine.answers(), model.expected[version])
        assert model.engine.rpc("ckpt_engine_status")[0]["version"] == committed


def test_an_exception_in_the_worker_comes_back_and_the_next_update_works(model: Model) -> None:
    update_from(model.engine, model.paths["a"], device="cuda")
    model.engine.rpc("test_fault", "run", 1)
    with pytest.raises(UpdateError, match="RuntimeError: injected in run"):
        update_from(model.engine, model.paths["b"], slot_nbytes=SLOT_NBYTES, device="cuda")
    assert model.engine.rpc("ckpt_engine_status")[0]["weights"] == "incomplete"
    update_from(model.engine, model.paths["b"], device="cuda")
    same(model.engine.answers(), model.expected["b"])


def test_a_missing_tensor_is_refused_and_the_old_weights_serve(model: Model) -> None:
    update_from(model.engine, model.paths["a"], device="cuda")
    tensors = load_file(model.paths["b"] / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(UpdateError, match=r"WeightsMismatch: .*k_proj.weight"):
        update_from(model.engine, tensors, device="cuda")
    same(model.engine.answers(), model.expected["a"])


def test_a_server_is_updated_sooner_than_restarted(starting: Starting, tmp_path: Path) -> None:
    served = starting.served.result()
    server = served.server
    (addresses,) = server.rpc("test_addresses")
    ways = [("a", "--pause", "keep"), ("b",), ("a",), ("b", "--native")]
    updates = [
        _command_line(server, served.paths[version], tmp_path / f"{number}.json", *options)
        for number, (version, *options) in enumerate(ways)
    ]
    received = server.answers()
    assert server.rpc("test_addresses") == [addresses]
    server.close()
    # What was compiled is in vLLM's cache, as before most restarts.
    began = time.monotonic()
    link = _point(served.link, served.paths["b"])
    server = Server(
        link, 1, tmp_path / "server-restarted.log", "--load-format", "auto", *SERVER_OPTIONS, eager=False
    )
    try:
        server.wait()
        seconds = time.monotonic() - began
        from_disk = server.answers()
        same(received, from_disk, BETWEEN_SERVERS)
        # In one process the same weights answer alike, wherever they came from.
        updates += [
            _command_line(server, served.paths[version], tmp_path / f"again-{version}.json")
            for version in "ab"
        ]
        difference = same(server.answers(), from_disk)
    finally:
        server.close()
    nbytes = (served.paths["b"] / "model.safetensors").stat().st_size
    tell(nbytes=nbytes, updates=updates, restart_seconds=round(seconds, 2), logprob_difference=difference)
    assert all(update["update_seconds"] < seconds for update in updates)


def _command_line(server: Server, checkpoint: Path, report: Path, *options: str) -> dict[str, float]:
    """`ckpt-engine update --engine vllm`: the update's seconds, and the whole command's."""
    began = time.monotonic()
    torchrun(
        1,
        "ckpt_engine.cli.main",
        *("update", "--checkpoint-path", str(checkpoint), "--endpoint", server.url, "--engine", "vllm"),
        *("--report-file", str(report), "--timeout", "100", "--health-timeout", "60", *options),
        timeout=150,
        GLOO_SOCKET_IFNAME="lo",
        CKPT_ENGINE_HOST_ID="here",
    )
    command = time.monotonic() - began
    update = float(json.loads(report.read_bytes())["update_seconds"])
    return {"update_seconds": round(update, 3), "command_seconds": round(command, 2)}
