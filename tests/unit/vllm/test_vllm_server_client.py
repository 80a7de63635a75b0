"""The client of vLLM's server against a local one that answers as a test says: what becomes of a pause."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from ckpt_engine_vllm.server_client import PauseMode, VllmServer

from ckpt_engine.errors import EngineRequestError, ErrorRecord, UpdateError

PATHS = [("CPU-h-0", "ipc:///tmp/a")]
COMMITTED = {"outcome": "committed", "device": "CPU-h-0", "handle": "ipc:///tmp/a", "version": "v1"}
SECONDS = 20.0


class Vllm:
    """`statuses`: what its workers' ckpt_engine_status is; None: it cannot be asked. `posts`: the routes that
    were asked, in their order, /collective_rpc by its method; `bodies`: what they were sent; `keys`: with
    which keys."""

    def __init__(self) -> None:
        self.statuses: list[Any] | None = []
        self.posts: list[str] = []
        self.bodies: dict[str, Any] = {}
        self.keys: list[str | None] = []
        self.paused = False
        self.on_status: Callable[[], object] = lambda: None
        self.may_answer_pause = threading.Event()
        self.may_answer_pause.set()
        vllm = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                vllm.keys.append(self.headers.get("Authorization"))
                code, answer = vllm.answer(self.path.split("?")[0], json.loads(body or b"null"))
                text = json.dumps(answer).encode()
                # A client that waits no longer has closed its end.
                with suppress(BrokenPipeError):
                    self.send_response(code)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)

            def log_message(self, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:  # noqa: ANN401 - JSON
        self.posts.append(path if path != "/collective_rpc" else body["method"])
        self.bodies[self.posts[-1]] = body
        if path == "/pause":
            self.paused = True
            self.may_answer_pause.wait(SECONDS)
        elif path == "/resume":
            self.paused = False
        elif path == "/collective_rpc":
            self.on_status()
            return (
                (500, {"error": "no workers"}) if self.statuses is None else (200, {"results": self.statuses})
            )
        return 200, {"success": True}

    def close(self) -> None:
        self.may_answer_pause.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def vllm() -> Iterator[Vllm]:
    made = Vllm()
    yield made
    made.close()


def status(weights: str, **more: object) -> dict[str, object]:
    return {"rank": 0, "weights": weights, "version": "v0", "last": None} | more


def test_a_good_update_is_paused_for_and_resumed(vllm: Vllm) -> None:
    with VllmServer(endpoint=vllm.url, pause=PauseMode.KEEP).paused(SECONDS):
        assert vllm.posts == ["/pause"]
    assert vllm.posts == ["/pause", "/resume"]
    with VllmServer(endpoint=vllm.url).paused(SECONDS):
        pass
    assert len(vllm.posts) == 2


@pytest.mark.parametrize(
    "failure",
    [
        UpdateError(ErrorRecord(error_type="ValueError", message="of this rank"), touched=False),
        UpdateError(ErrorRecord(error_type="ValueError", message="of this rank"), touched=True),
        EngineRequestError("the prefix cache stays"),
        KeyboardInterrupt(),
    ],
    ids=["untouched", "touched", "request", "interrupt"],
)
@pytest.mark.parametrize(
    ("statuses", "resumed"),
    [
        ([status("serving"), status("serving")], True),
        ([status("serving"), status("updating")], False),
        ([status("serving"), status("incomplete")], False),
        ([status("serving"), {"weights": "unknown", "error": "E"}], False),
        # The late reply to another call.
        ([status("serving"), COMMITTED], False),
        ([status("serving"), None], False),
        ([], False),
        (None, False),
    ],
)
def test_after_a_failure_the_workers_say_whether_it_goes_on(
    vllm: Vllm,
    failure: BaseException,
    statuses: list[Any] | None,
    resumed: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All of them: the rank that failed knows only of itself, and an interrupt of nothing."""
    vllm.statuses = statuses
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(type(failure)),
        VllmServer(endpoint=vllm.url, pause=PauseMode.KEEP).paused(SECONDS),
    ):
        raise failure
    assert vllm.posts == ["/pause", "ckpt_engine_status", *(["/resume"] if resumed else [])]
    assert vllm.paused is not resumed
    assert ("paused" in caplog.text) is not resumed


@pytest.mark.parametrize(("weights", "resumed"), [("serving", True), ("incomplete", False)])
def test_a_pause_that_takes_too_long_is_taken_back(vllm: Vllm, weights: str, resumed: bool) -> None:
    """vLLM queues new requests from the moment it is asked."""
    vllm.statuses = [status(weights)]
    vllm.may_answer_pause.clear()
    with (
        pytest.raises(EngineRequestError, match=r"did not answer /pause within 0\.3 s"),
        VllmServer(endpoint=vllm.url, pause=PauseMode.WAIT).paused(0.3),
    ):
        pytest.fail("the update began though the server was not paused")
    assert vllm.paused is not resumed


@pytest.mark.parametrize("during", ["update", "resume"])
def test_a_rank_that_is_told_to_end_resumes_first(vllm: Vllm, during: str) -> None:
    """Launchers end the others as soon as one rank has failed."""
    vllm.statuses = [status("serving")]
    before = signal.getsignal(signal.SIGTERM)
    if during == "resume":
        vllm.on_status = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit), VllmServer(endpoint=vllm.url, pause=PauseMode.KEEP).paused(SECONDS):
        if during == "resume":
            raise ValueError("the update failed")
        os.kill(os.getpid(), signal.SIGTERM)
    assert vllm.posts == ["/pause", "ckpt_engine_status", "/resume"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_server_that_is_gone_hides_no_failure() -> None:
    gone = VllmServer(endpoint="http://127.0.0.1:9", pause=PauseMode.KEEP)
    with pytest.raises(EngineRequestError, match="/pause"), gone.paused(1):
        pytest.fail("the update began")


@pytest.mark.parametrize(
    "bad",
    [
        {"weights": "unknown", "error": "KeyError: worker"},
        status("serving"),
        status("serving", last={"outcome": "committed"}),
        None,
        "text",
    ],
)
def test_a_native_update_that_no_worker_tells_of_has_failed_and_is_finished(vllm: Vllm, bad: object) -> None:
    """vLLM would refuse the next start else."""
    vllm.statuses = [status("serving", last=COMMITTED), bad]
    with pytest.raises(EngineRequestError, match=r"worker 1 of the engine at .* does not say how"):
        VllmServer(endpoint=vllm.url, native=True).receive(PATHS, SECONDS)
    assert vllm.posts[1:] == [
        *("/start_weight_update", "/update_weights", "ckpt_engine_status", "/finish_weight_update")
    ]
    assert vllm.bodies["/finish_weight_update"] is None


@pytest.mark.parametrize("native", [False, True])
def test_a_worker_gets_less_time_than_its_call(vllm: Vllm, native: bool) -> None:
    """A reply after the RPC's end would be taken for the next call's."""
    vllm.statuses = [COMMITTED | status("serving", last=COMMITTED)]
    VllmServer(endpoint=vllm.url, native=native).receive(PATHS, 100)
    sent = vllm.bodies["/update_weights"]["update_info"] if native else vllm.bodies["update_weights_from_ipc"]
    options = sent if native else sent["kwargs"]
    assert options["time_limit"] == 95
    if not native:
        assert sent["timeout"] == 100


def test_a_native_update_gives_the_server_its_version(vllm: Vllm) -> None:
    vllm.statuses = [status("serving", last=COMMITTED)]
    VllmServer(endpoint=vllm.url, native=True).receive(PATHS, SECONDS)
    assert vllm.bodies["/finish_weight_update"] == {"weight_version": "v1"}
    assert vllm.posts[-1] == "/reset_prefix_cache"


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("key", [None, "secret"])
def test_the_key_goes_with_each_request(vllm: Vllm, native: bool, key: str | None) -> None:
    vllm.statuses = [COMMITTED | status("serving", last=COMMITTED)]
    server = VllmServer(endpoint=vllm.url, native=native, api_key=key, pause=PauseMode.KEEP)
    with server.paused(SECONDS):
        server.receive(PATHS, SECONDS)
    assert len(vllm.posts) >= 4
    assert vllm.keys == [None if key is None else f"Bearer {key}"] * len(vllm.posts)
