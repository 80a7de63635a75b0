"""vLLM's HTTP server, with one worker and with two: updates, failures in every phase, deaths."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from ckpt_engine_vllm import VllmServer
from ckpt_engine_vllm.server_client import PauseMode
from safetensors.torch import load_file, save_file

from tests.engines.vllm.engines import RUNTIME, Answers, Checkpoints, OfflineEngine
from tests.engines.vllm.servers import Fleet, Server
from tests.integration.conftest import torchrun

pytestmark = pytest.mark.timeout(600)
TOKENS, STEP_SECONDS = 200, 0.025
"""Of a long answer: seconds, in which an update takes a part of one."""
ATTEMPTS = 3
"""On a loaded machine an answer may be complete before the update is asked for."""
OPTIONS = (
    *("--weight-transfer-config", '{"backend": "ckpt_engine"}'),
    *("--middleware", "ckpt_engine_vllm.health.WeightsHealth"),
)
BELOW = ("checksum", "deadline", "host_memory", "state")
PROMPT_SECONDS = 20.0
"""What a failure may take on a loaded machine; far below the update's 60 s."""


@dataclass
class World:
    server: Server
    fleet: Fleet
    paths: dict[str, Path]
    expected: dict[str, Answers]

    @property
    def size(self) -> int:
        return self.server.tensor_parallel_size


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def world(
    request: pytest.FixtureRequest,
    offline: OfflineEngine,
    checkpoints: Checkpoints,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    logs = tmp_path_factory.mktemp(f"server-{request.param}")
    paths = {version: checkpoints("qwen3", version) for version in "ab"}
    with tempfile.TemporaryDirectory(prefix="vllm-") as sockets:
        # With two workers on a Unix socket (107 bytes at most), with one on a port.
        uds = Path(sockets) / "http" if request.param == 2 else None
        yield from _world(request.param, offline, paths, logs, uds)


def _world(
    size: int, offline: OfflineEngine, paths: dict[str, Path], logs: Path, uds: Path | None
) -> Iterator[World]:
    server = Server(paths["a"], size, logs / "server.txt", "--load-format", "dummy", *OPTIONS, uds=uds)
    world = World(server, Fleet(size, logs / "ranks.txt", CKPT_ENGINE_SLOT_MIB="0.05"), paths, {})
    try:
        # The server starts meanwhile.
        for version, path in paths.items():
            world.expected[version] = offline.from_disk(path, size)
        server.wait()
        yield world
    finally:
        world.fleet.close()
        server.close()


@pytest.fixture(autouse=True)
def ready(world: World) -> None:
    """Before each test."""
    world.server.make_ready()
    world.fleet.make_ready()


def test_it_answers_as_if_loaded_from_disk_update_after_update(world: World) -> None:
    for version in "aba":
        committed = world.fleet.commit(world.server, world.paths[version])
        assert world.server.answers() == world.expected[version]
        for rank, status in enumerate(world.server.rpc("ckpt_engine_status")):
            assert (status["rank"], status["weights"], status["version"]) == (rank, "serving", committed)


def test_a_worker_imports_little(world: World) -> None:
    world.fleet.commit(world.server, world.paths["a"])
    for modules in world.server.rpc("test_modules"):
        packages = {".".join(name.split(".")[:2]) for name in modules if name.startswith("ckpt_engine.")}
        assert packages <= {
            f"ckpt_engine.{part}" for part in ("ipc", "devices", "errors", "loading", "settings", *BELOW)
        }


@pytest.mark.parametrize(("phase", "bucket"), [("prepare", 0), ("run", 0), ("run", 3), ("finish", 0)])
def test_an_exception_in_a_worker_comes_back_and_the_next_update_works(
    world: World, phase: str, bucket: int
) -> None:
    """On the last rank: the others have to hear of it too."""
    world.fleet.commit(world.server, world.paths["a"])
    world.server.rpc("test_fault", phase, bucket, world.size - 1)
    results = world.fleet.update(world.server, world.paths["b"])
    for result in results:
        assert result["type"] == "UpdateError"
        assert f"RuntimeError: injected in {phase}" in result["error"]
        assert "tests/engines/vllm/extension.py" in result["record"]["traceback"]
        assert result["seconds"] < PROMPT_SECONDS
    last = world.server.rpc("ckpt_engine_status")[-1]["last"]
    assert f"RuntimeError: injected in {phase}" in last["error"]
    assert "tests/engines/vllm/extension.py" in last["traceback"]
    weights = [status["weights"] for status in world.server.rpc("ckpt_engine_status")]
    if phase == "prepare":
        # Nothing was touched here.
        assert weights[-1] == "serving"
    else:
        assert weights == ["incomplete"] * world.size
    # It lives, whatever it says.
    assert len(world.server.generate([5, 6, 7])[0]) > 0
    world.fleet.commit(world.server, world.paths["b"])
    assert world.server.answers() == world.expected["b"]


@pytest.mark.parametrize("phase", ["prepare", "run", "finish"])
def test_the_http_answer_has_the_workers_traceback(world: World, phase: str) -> None:
    """Whoever asks the engine without a client of ours is told as well."""
    world.server.rpc("test_fault", phase, 0, world.size - 1)
    world.fleet.start_update(world.server, world.paths["b"], tells=True)
    statuses = world.server.rpc("update_weights_from_ipc", world.fleet.handles())
    world.fleet.go_on()
    assert [status["outcome"] for status in statuses] == ["failed"] * world.size
    assert f"RuntimeError: injected in {phase}" in statuses[-1]["error"]
    assert "tests/engines/vllm/extension.py" in statuses[-1]["traceback"]
    for result in world.fleet.results():
        assert f"RuntimeError: injected in {phase}" in result["error"]
    world.fleet.commit(world.server, world.paths["b"])
    assert world.server.answers() == world.expected["b"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "no handle for device"),
        ((5,), "TypeError"),
        (([["CPU-here-9"]],), "ValueError"),
        (([], False, 7), "TypeError"),
        (([], False, [], "more"), "takes no arguments"),
    ],
)
def test_whatever_is_asked_of_a_worker_nothing_is_raised(
    world: World, args: tuple[object, ...], message: str
) -> None:
    """With several workers vLLM would give out later replies to other calls."""
    for rank, status in enumerate(world.server.rpc("update_weights_from_ipc", *args)):
        assert status["outcome"] == "failed", rank
        assert message in status["error"]
    assert world.server.rpc("test_echo", 42) == ["42"] * world.size
    world.server.post("/init_weight_transfer_engine", {"init_info": {"unknown": 1}})
    for status in world.server.rpc("ckpt_engine_status"):
        assert "init_info={'unknown': 1}" in status["last"]["error"]
    world.server.post("/init_weight_transfer_engine", {"init_info": {}})
    assert world.server.post("/start_weight_update") == {"message": "Weight update started"}
    for bad in ({"zmq_handles": 5}, {"unknown": 1}):
        world.server.post("/update_weights", {"update_info": bad})
        for status in world.server.rpc("ckpt_engine_status"):
            assert status["last"]["outcome"] == "failed"
    world.server.post("/finish_weight_update")
    assert world.server.rpc("test_echo", 43) == ["43"] * world.size


@pytest.mark.parametrize("what", ["missing", "missing member", "unknown", "misshapen", "too large"])
def test_other_tensors_than_the_models_are_refused_by_name(world: World, what: str, tmp_path: Path) -> None:
    world.fleet.commit(world.server, world.paths["a"])
    tensors = load_file(world.paths["b"] / "model.safetensors")
    norm, member = "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.k_proj.weight"
    if what == "missing":
        del tensors[norm]
    elif what == "missing member":
        del tensors[member]
    elif what == "unknown":
        tensors["model.layers.1.mlp.extra_proj.weight"] = torch.zeros(3)
    elif what == "misshapen":
        tensors[norm] = torch.zeros(7, dtype=torch.bfloat16)
    else:
        tensors[member] = torch.zeros((256, 128), dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    name = {"missing": norm, "misshapen": norm, "unknown": "model.layers.1.mlp.extra_proj"}.get(what, member)
    for result in world.fleet.update(world.server, tmp_path):
        assert result["type"] == "UpdateError"
        assert "WeightsMismatch" in result["error"]
        assert name in result["error"]
    assert world.server.answers() == world.expected["a"]


def test_the_command_line(world: World) -> None:
    """As the README has it; the server is reached by --engine vllm, generation is paused meanwhile."""
    for version, pause, *more in (("b", "keep", "--native"), ("a", "wait")):
        assert "is in place as version" in _command_line(world, version, "--pause", pause, *more)
        assert world.server.post("/reset_prefix_cache")
        assert world.server.answers() == world.expected[version]


def _command_line(world: World, version: str, *options: str) -> str:
    return torchrun(
        world.size,
        "ckpt_engine.cli.main",
        *("update", "--checkpoint-path", str(world.paths[version]), "--endpoint", world.server.url),
        *("--engine", "vllm", "--timeout", "100", "--health-timeout", "60", *options),
        *(() if world.server.uds is None else ("--uds", world.server.uds)),
        timeout=200,
        GLOO_SOCKET_IFNAME="lo",
        CKPT_ENGINE_HOST_ID="here",
    )


def test_a_server_stays_paused_after_an_update_that_failed_half_way(world: World) -> None:
    """But not after one that was refused; the last rank fails, another one asks."""
    world.fleet.commit(world.server, world.paths["a"])
    for phase, paused in (("prepare", False), ("run", True)):
        world.server.rpc("test_fault", phase, 0, world.size - 1)
        with pytest.raises(pytest.fail.Exception, match=f"RuntimeError: injected in {phase}"):
            _command_line(world, "b", "--pause", "keep")
        assert world.server.get("/is_paused") == {"is_paused": paused}
    _command_line(world, "b", "--pause", "keep")
    assert world.server.get("/is_paused") == {"is_paused": False}
    assert world.server.answers() == world.expected["b"]


@pytest.mark.parametrize("route", ["/health", "/ping"])
def test_health_is_503_while_a_worker_has_incomplete_weights(world: World, route: str) -> None:
    """The last rank's; the server lives, and the next update mends it."""
    world.fleet.commit(world.server, world.paths["a"])
    assert _health(world, route) == (200, None)
    world.server.rpc("test_fault", "prepare", 0, world.size - 1)
    assert "injected in prepare" in world.fleet.update(world.server, world.paths["b"])[0]["error"]
    assert _health(world, route) == (200, None)
    world.server.rpc("test_fault", "run", 0, world.size - 1)
    assert "injected in run" in world.fleet.update(world.server, world.paths["b"])[0]["error"]
    status, answer = _health(world, route)
    assert status == 503
    assert answer is not None
    assert answer["weights"] == "incomplete"
    assert "injected in run" in answer["error"]
    assert len(world.server.generate([5, 6, 7])[0]) > 0
    # Who waits for the server's health before an update does not wait for what the update brings.
    VllmServer(endpoint=world.server.url, uds=world.server.uds).wait_until_ready(10)
    world.fleet.commit(world.server, world.paths["b"])
    assert _health(world, route) == (200, None)
    assert world.server.answers() == world.expected["b"]


def test_health_answers_while_workers_receive(world: World, tmp_path: Path) -> None:
    """With what they said before; and no reply of theirs comes late."""
    world.fleet.commit(world.server, world.paths["a"])
    fifo = _fifo(tmp_path)
    world.server.rpc("test_fault", "run", 2, 0, str(fifo), False)
    world.fleet.start_update(world.server, world.paths["b"])
    assert fifo.read_text() == "here"
    for _ in range(2):
        assert _health(world, "/health") == (200, None)
    fifo.write_text("go on")
    for result in world.fleet.results():
        assert "report" in result, result
    for number in range(3):
        assert world.server.rpc("test_echo", number) == [str(number)] * world.size
    assert _health(world, "/health") == (200, None)
    assert world.server.answers() == world.expected["b"]


def _health(world: World, route: str) -> tuple[int, dict[str, str] | None]:
    """Status, and the body, if there is one."""
    with world.server.client() as client:
        answer = client.get(world.server.url + route)
    return answer.status_code, answer.json() if answer.content else None


def test_what_the_old_weights_computed_is_forgotten(world: World) -> None:
    """The attention state of a prompt is kept by its tokens alone: vLLM does not know that the weights are
    others."""
    prompt = [token % 500 + 2 for token in range(200)]
    answers = {}
    for version in "ab":
        world.fleet.commit(world.server, world.paths[version])
        answers[version] = world.server.generate(prompt)
    assert answers["a"] != answers["b"]
    world.fleet.commit(world.server, world.paths["a"])
    assert world.server.generate(prompt) == answers["a"]


def test_a_failure_over_the_native_routes_is_told_and_the_next_update_works(world: World) -> None:
    """vLLM itself would say that all went well."""
    world.fleet.commit(world.server, world.paths["a"])
    before = world.server.get("/weight_info")["weight_version"]
    world.server.rpc("test_fault", "run", 1, world.size - 1)
    for result in world.fleet.update(world.server, world.paths["b"], native=True):
        assert "RuntimeError: injected in run" in result["error"]
    assert world.server.get("/weight_info")["weight_version"] == before
    for result in world.fleet.update(world.server, world.paths["b"], native=True):
        assert "report" in result, result
    assert world.server.answers() == world.expected["b"]
    after = world.server.get("/weight_info")["weight_version"]
    assert after == world.server.rpc("ckpt_engine_status")[0]["version"]


def test_a_session_that_its_asker_left_open_is_ended_by_the_next_update(world: World) -> None:
    """vLLM's workers would raise at the next start, and with several give out each later reply one call
    late."""
    world.fleet.commit(world.server, world.paths["a"])
    world.server.post("/start_weight_update")
    assert [status["session_open"] for status in world.server.rpc("ckpt_engine_status")] == [
        True
    ] * world.size
    for result in world.fleet.update(world.server, world.paths["b"], native=True):
        assert "report" in result, result
    for number in range(3):
        assert world.server.rpc("test_echo", number) == [str(number)] * world.size
    statuses = world.server.rpc("ckpt_engine_status")
    assert [status["session_open"] for status in statuses] == [False] * world.size
    assert world.server.get("/weight_info")["weight_version"] == statuses[0]["version"]
    assert world.server.answers() == world.expected["b"]


def test_sessions_that_only_some_workers_have_are_told_and_nothing_is_asked_of_them(world: World) -> None:
    if world.size == 1:
        pytest.skip("takes two workers")
    world.fleet.commit(world.server, world.paths["a"])
    world.server.rpc("test_session", 1, True)
    for result in world.fleet.update(world.server, world.paths["b"], native=True):
        assert "only workers [1]" in result["error"]
        assert "restart the engine" in result["error"]
    world.server.rpc("test_session", 1, False)
    assert world.server.rpc("test_echo", 44) == ["44"] * world.size
    for result in world.fleet.update(world.server, world.paths["b"], native=True):
        assert "report" in result, result


@pytest.mark.parametrize("mode", list(PauseMode))
def test_requests_in_flight(world: World, mode: PauseMode) -> None:
    world.fleet.commit(world.server, world.paths["a"])
    client = VllmServer(endpoint=world.server.url, uds=world.server.uds, pause=mode)
    client.reset_prefix_cache()
    old = world.server.complete([5, 6, 7], TOKENS)["text"]
    for _ in range(ATTEMPTS):
        text, ending = _answered_across_an_update(world, client)
        if ending == "abort":
            assert mode is PauseMode.ABORT
            assert old.startswith(text)
            break
        assert ending == "length"
        if mode is PauseMode.WAIT:
            assert text == old
            break
        if text != old:
            assert mode is not PauseMode.ABORT
            break
        # The answer was complete before the pause.
        world.fleet.commit(world.server, world.paths["a"])
    else:
        pytest.fail("every answer was the old weights' alone")
    assert world.server.post("/reset_prefix_cache")["success"]


def _answered_across_an_update(world: World, client: VllmServer) -> tuple[str, str]:
    """A long answer to which there is an update to b: its text, and why it ended."""
    client.reset_prefix_cache()
    choices = world.server.stream([5, 6, 7], TOKENS)
    world.server.rpc("test_pace", STEP_SECONDS)
    text = next(choices)["text"]
    ending = ""
    with client.paused(60):
        world.fleet.commit(world.server, world.paths["b"])
    world.server.rpc("test_pace", 0)
    for choice in choices:
        text += choice["text"]
        ending = choice["finish_reason"]
    return text, ending


@pytest.mark.parametrize("level", [1, 2])
def test_between_sleep_and_waking_up(world: World, level: int) -> None:
    """The order for an engine that has given its memory back. One on CPU does not: its allocator is made to
    say so. An update that comes too early would write to no memory."""
    world.fleet.commit(world.server, world.paths["a"])
    world.server.post(f"/sleep?level={level}")
    world.server.rpc("test_asleep", ["weights", "kv_cache"])
    for result in world.fleet.update(world.server, world.paths["b"]):
        assert "ConfigError: the engine's weights are asleep" in result["error"]
        assert "/wake_up?tags=weights" in result["error"]
    assert {status["weights"] for status in world.server.rpc("ckpt_engine_status")} == {"serving"}
    world.server.post("/wake_up?tags=weights")
    world.server.rpc("test_asleep", ["kv_cache"])
    assert world.server.get("/is_sleeping") == {"is_sleeping": True}
    world.fleet.commit(world.server, world.paths["b"])
    world.server.post("/wake_up?tags=kv_cache")
    world.server.rpc("test_asleep", None)
    assert world.server.get("/is_sleeping") == {"is_sleeping": False}
    assert world.server.answers() == world.expected["b"]


def ranks_directories() -> list[Path]:
    """Without the link to that of rank 0, where ranks of one host meet."""
    return [path for path in RUNTIME.iterdir() if not path.is_symlink()]


@pytest.mark.parametrize("asker", ["killed as well", "lives"])
def test_parameter_servers_that_die_leave_an_engine_that_lives(
    world: World, tmp_path: Path, asker: str
) -> None:
    """And who asked the engine, if not killed as well, has the workers' answers soon."""
    fifo, lives = _fifo(tmp_path), asker == "lives"
    world.server.rpc("test_fault", "run", 2, 0, str(fifo), False)
    world.fleet.start_update(world.server, world.paths["b"], tells=lives)
    with ThreadPoolExecutor(1) as pool:
        if lives:
            asked = pool.submit(world.server.rpc, "update_weights_from_ipc", world.fleet.handles())
        assert fifo.read_text() == "here"
        world.fleet.kill()
        assert len(ranks_directories()) == world.size
        fifo.write_text("go on")
        started = time.monotonic()
        if lives:
            for status in asked.result(PROMPT_SECONDS):
                assert status["outcome"] == "failed"
                assert "PeerLost" in status["error"]
    statuses = world.server.rpc("ckpt_engine_status")
    assert time.monotonic() - started < PROMPT_SECONDS
    assert [status["weights"] for status in statuses] == ["incomplete"] * world.size
    assert len(world.server.generate([5, 6, 7])[0]) > 0
    world.fleet = Fleet(world.size, world.server.log.with_name("ranks.txt"), CKPT_ENGINE_SLOT_MIB="0.05")
    world.fleet.commit(world.server, world.paths["b"])
    assert world.server.answers() == world.expected["b"]
    # The new ones' own; what the killed ones left is gone.
    assert len(ranks_directories()) == world.size


def test_an_update_that_is_too_slow_ends_before_its_call_and_the_next_one_works(world: World) -> None:
    """Its parameter servers are there and would go on; but no reply may come after the RPC's end."""
    world.fleet.commit(world.server, world.paths["a"])
    # The RPC gets 10 s less, its workers some more seconds less.
    world.fleet.start_update(world.server, world.paths["b"], timeout=22, withholds=2)
    for result in world.fleet.results():
        assert "a limit of 11.4 s, which came while this worker waited for bucket 2" in result["error"]
    statuses = world.server.rpc("ckpt_engine_status")
    assert [status["weights"] for status in statuses] == ["incomplete"] * world.size
    assert world.server.rpc("test_echo", 44) == ["44"] * world.size
    world.fleet.commit(world.server, world.paths["b"])
    assert world.server.answers() == world.expected["b"]


def test_replies_that_are_late_are_told_from_those_asked_for(world: World, tmp_path: Path) -> None:
    """A worker is held up for longer than vLLM's RPC may take. vLLM then gives out each of its later replies
    one call late, and only another engine process helps: so no update may be said to have worked."""
    world.fleet.commit(world.server, world.paths["a"])
    fifo = _fifo(tmp_path)
    world.server.rpc("test_fault", "run", 2, world.size - 1, str(fifo))
    world.fleet.start_update(world.server, world.paths["b"], tells=True)
    # Without the time limit that our clients give the workers: the other one would leave before the RPC ends.
    request = {"method": "update_weights_from_ipc", "args": [world.fleet.handles()], "timeout": 5}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(world.server.post, "/collective_rpc", request)
        assert fifo.read_text() == "here"
        with pytest.raises(httpx.HTTPStatusError, match="500"):
            asked.result()
    world.fleet.go_on()
    fifo.write_text("go on")
    for result in world.fleet.results():
        assert "RuntimeError: injected in run" in result["error"]
    results = world.fleet.update(world.server, world.paths["b"])
    for result in results:
        assert "answered an earlier call" in result["error"]
        assert "restart it" in result["error"]


def test_an_engine_that_dies_ends_the_update(world: World, tmp_path: Path) -> None:
    """The last test of a world."""
    fifo = _fifo(tmp_path)
    pid = int(world.server.rpc("test_pid")[-1])
    world.server.rpc("test_fault", "run", 2, world.size - 1, str(fifo))
    world.fleet.start_update(world.server, world.paths["a"])
    assert fifo.read_text() == "here"
    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(world.fleet.results)
        os.kill(pid, signal.SIGKILL)
        for result in results.result(PROMPT_SECONDS):
            assert result["type"] in ("PeerLost", "UpdateError")


def _fifo(directory: Path) -> Path:
    path = directory / "fifo"
    os.mkfifo(path)
    return path
