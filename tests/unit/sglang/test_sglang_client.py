"""What is asked of an SGLang server, in the words of several versions, on a server that speaks them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import zmq
from ckpt_engine_sglang import client
from ckpt_engine_sglang.client import SglangServer
from ckpt_engine_sglang.options import parse_options, split_options, with_options
from ckpt_engine_sglang.sglang_update import SglangTarget, command
from ckpt_engine_sglang.verify import compare
from safetensors.torch import save_file

from ckpt_engine.cli.update import InferenceGroup
from ckpt_engine.compat.checkpoint_engine import worker as compat_worker
from ckpt_engine.errors import CkptEngineError, ConfigError, EngineRequestError

PATHS = [("CPU-h-0", "ipc:///tmp/a"), ("CPU-h-1", "ipc:///tmp/b")]
INFO = {
    "version": "0.5.23",
    "tp_size": 2,
    "pp_size": 1,
    "dp_size": 1,
    "load_format": "dummy",
    "checkpoint_engine_wait_weights_before_ready": True,
}


class FakeServer:
    """`routes`: "METHOD /path" -> what it answers, or a function of the request's body that tells; None: the
    connection is dropped."""

    def __init__(self) -> None:
        self.routes: dict[str, Any] = {}
        self.key: str | None = None
        self.sent: list[tuple[str, Any]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = json.loads(text) if text else None
                route = f"{self.command} {self.path}"
                fake.sent.append((route, body))
                answer = fake.routes.get(route, (404, {"detail": "Not Found"}))
                answer = answer(body) if callable(answer) else answer
                if answer is None:
                    return  # without a word
                status, document = answer
                if fake.key is not None and self.headers.get("Authorization") != f"Bearer {fake.key}":
                    status, document = 401, {"error": "Unauthorized"}
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(document).encode())

            do_GET = do_POST = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def make_fake() -> Iterator[Callable[[], FakeServer]]:
    made: list[tuple[FakeServer, threading.Thread]] = []

    def make() -> FakeServer:
        fake = FakeServer()
        thread = threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        made.append((fake, thread))
        return fake

    yield make
    for fake, thread in made:
        fake.server.shutdown()
        fake.server.server_close()
        thread.join()


@pytest.fixture
def fake(make_fake: Callable[[], FakeServer]) -> FakeServer:
    return make_fake()


def target(fake: FakeServer, size: int = 2) -> SglangTarget:
    group = InferenceGroup(first=0, size=size, endpoint=fake.url, uds=None)
    return SglangTarget(group=group, endpoints=[fake.url], weight_version="v1", ready_timeout=0.3)


def test_an_update_carries_what_sglang_takes(fake: FakeServer) -> None:
    fake.routes["POST /update_weights_from_ipc"] = (200, {"success": True, "message": "done"})
    server = SglangServer(fake.url)
    assert server.update(PATHS, weight_version="v1") == "done"
    body = {"zmq_handles": dict(PATHS), "flush_cache": True, "weight_version": "v1"}
    assert fake.sent == [("POST /update_weights_from_ipc", body)]


@pytest.mark.parametrize("status", [200, 400])
def test_sglang_s_own_message_is_told(fake: FakeServer, status: int) -> None:
    fake.routes["POST /update_weights_from_ipc"] = (status, {"success": False, "message": "no such tensor"})
    with pytest.raises(EngineRequestError, match="no such tensor"):
        SglangServer(fake.url).update(PATHS)


@pytest.mark.parametrize("ping", [200, 503])
@pytest.mark.parametrize("route", ["/model_info", "/get_model_info"])
def test_the_probe_works_across_versions(fake: FakeServer, route: str, ping: int) -> None:
    """Waiting for weights, /ping is 503 in new versions, and 200 in old ones, whose routes differ too."""
    fake.routes.update({"GET /ping": (ping, {}), "GET /health": (503, {}), f"GET {route}": (200, {})})
    SglangServer(fake.url).wait_until_serving(5)


def test_a_server_that_does_not_tell_its_model(fake: FakeServer) -> None:
    # As long as a loaded machine may need for one answer.
    with pytest.raises(EngineRequestError, match=r"did not serve within 5 s; last answer: HTTP 404"):
        SglangServer(fake.url).wait_until_serving(5)


def test_the_server_s_key(fake: FakeServer) -> None:
    fake.key = "secret"
    fake.routes["GET /model_info"] = (200, {"weight_version": "v7"})
    assert SglangServer(fake.url, api_key="secret").weight_version() == "v7"
    # A server with two keys takes one of them for some routes, and the other for others.
    assert SglangServer(fake.url, api_key="other", admin_api_key="secret").weight_version() == "v7"
    with pytest.raises(EngineRequestError, match="wants an API key"):
        SglangServer(fake.url).wait_until_serving(30)
    with pytest.raises(EngineRequestError, match=r"wants another API key: HTTP 401 for /update_weights"):
        SglangServer(fake.url, api_key="wrong").update(PATHS)


@pytest.mark.parametrize(
    ("info", "told"),
    [
        ({"dp_size": 2}, "runs 2 data parallel replicas"),
        ({"attn_dp_size": 2}, "runs 2 groups of data parallel attention"),
        ({"tp_size": 4}, "has 4 ranks .* but 2 ranks would update it: give --inference-parallel-size 4"),
        ({"pp_size": 2}, "has 4 ranks "),
    ],
)
def test_a_server_that_cannot_be_updated_is_refused_before_anything_is_sent(
    fake: FakeServer, info: dict[str, int], told: str
) -> None:
    fake.routes.update({"GET /model_info": (200, {}), "GET /server_info": (200, {**INFO, **info})})
    with pytest.raises(ConfigError, match=told):
        target(fake).wait_until_ready(5)
    assert all(route.startswith("GET ") for route, _ in fake.sent)


@pytest.mark.parametrize(
    ("ping", "version", "warned"), [(200, "default", True), (503, "default", False), (200, "v1", False)]
)
def test_dummy_weights_that_were_served_are_told(
    fake: FakeServer, capsys: pytest.CaptureFixture[str], ping: int, version: str, warned: bool
) -> None:
    fake.routes.update(
        {
            "GET /model_info": (200, {"weight_version": version}),
            "GET /server_info": (200, INFO),
            "GET /ping": (ping, {}),
        }
    )
    asked = target(fake)
    asked.wait_until_ready(5)
    fake.routes["GET /ping"] = (200, {})
    asked.finish()
    assert ("was serving its dummy weights" in capsys.readouterr().err) is warned


@pytest.mark.parametrize(
    "routes", [{"GET /ping": 503, "GET /health": 200}, {"GET /ping": 200, "GET /health": 503}]
)
def test_a_server_that_does_not_get_ready(fake: FakeServer, routes: dict[str, int]) -> None:
    """The first is SGLang 0.5.23 while it waits for weights, the second one before it."""
    fake.routes.update({route: (status, {}) for route, status in routes.items()})
    with pytest.raises(EngineRequestError, match=r"did not get ready within 0\.3 s"):
        target(fake).finish()
    fake.routes.update({"GET /ping": (200, {}), "GET /health": (200, {})})
    target(fake).finish()


def test_a_server_whose_requests_are_paused_is_ready(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its /health waits for a token that does not come."""
    monkeypatch.setattr(client, "_HEALTH_SECONDS", 0.2)
    release = threading.Event()

    def health(_: object) -> tuple[int, dict[str, str]]:
        release.wait(30)
        return 503, {}

    fake.routes.update({"GET /ping": (200, {}), "GET /health": health})
    try:
        assert SglangServer(fake.url).is_ready()
    finally:
        release.set()


def test_a_server_that_is_too_busy_to_say_is_asked_again(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_PROBE_SECONDS", 0.5)
    release = threading.Event()

    def ping(_: object) -> tuple[int, dict[str, str]]:
        if len(fake.sent) == 1:
            release.wait(30)
        return 200, {}

    fake.routes.update({"GET /ping": ping, "GET /health": (200, {})})
    server = SglangServer(fake.url)
    try:
        server.wait_until_ready(60)
    finally:
        release.set()
    assert [route for route, _ in fake.sent][:2] == ["GET /ping", "GET /ping"]
    with pytest.raises(EngineRequestError, match=r"did not get ready within 1 s; .* could not be asked"):
        SglangServer("http://127.0.0.1:9").wait_until_ready(1)


@pytest.mark.parametrize("route", ["GET /ping", "GET /health"])
def test_a_connection_that_is_dropped_once(fake: FakeServer, route: str) -> None:
    asked: list[str] = []

    def once(_: object) -> tuple[int, dict[str, str]] | None:
        asked.append(route)
        return None if len(asked) == 1 else (200, {})

    fake.routes.update({"GET /ping": (200, {}), "GET /health": (200, {}), route: once})
    server = SglangServer(fake.url)
    assert not server.is_ready()
    asked.clear()
    server.wait_until_ready(60)
    assert len(asked) == 2


@pytest.mark.parametrize(("wait", "what"), [("serving", "to serve"), ("ready", "to get ready")])
def test_who_waits_says_for_what(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, wait: str, what: str
) -> None:
    """At once, and again and again, with the last answer."""
    monkeypatch.setattr(client, "_TELL_SECONDS", 0.5)
    fake.routes["GET /model_info"] = fake.routes["GET /ping"] = (503, {})
    told: list[tuple[str, int]] = []
    with pytest.raises(EngineRequestError):
        getattr(SglangServer(fake.url), f"wait_until_{wait}")(
            5, lambda text: told.append((text, len(fake.sent)))
        )
    assert told[0][0].startswith(f"waiting up to 5 s for SGLang at {fake.url} {what}; last answer: ")
    assert told[0][1] == 1
    assert len(told) > 1
    assert all("HTTP 503" in text for text, _ in told)


def checksums(*ranks: dict[str, str]) -> dict[str, Any]:
    # In any order, as SGLang gives them.
    return {
        "ranks": [
            {"parallelism_info": {"tp_rank": rank}, "checksums": each} for rank, each in enumerate(ranks)
        ][::-1]
    }


def test_checksums_are_compared(make_fake: Callable[[], FakeServer], tmp_path: Path) -> None:
    one, other = make_fake(), make_fake()
    servers = [SglangServer(each.url) for each in (one, other)]
    route, file = "POST /weights_checker", tmp_path / "checksums.json"
    one.routes[route] = other.routes[route] = (200, checksums({"a": "1", "b": "2"}, {"a": "3"}))
    assert compare(servers, None, 2) == "checksums of 2 ranks of 2 servers compared"
    assert compare(servers, None, 4) == "checksums of 2 of 4 ranks of 2 servers compared"
    assert compare(servers[:1], None, 2).startswith("nothing to verify: there is one server")
    told = compare(servers, None, 2, 2)
    assert told.startswith("checksums of 2 ranks of 2 servers compared; not verified: 2 of 4 servers, since ")
    assert compare(servers, file, 2).endswith(f"written to {file}")
    assert compare(servers, file, 2).endswith(f"and with {file}")
    other.routes[route] = (200, checksums({"a": "1", "b": "9"}, {"a": "3"}))
    told = f"the weights of {other.url} are not those of {one.url}: on rank 0 b"
    with pytest.raises(EngineRequestError, match=told):
        compare(servers, None, 2)
    with pytest.raises(EngineRequestError, match=f"are not those of {file}: on rank 0 b"):
        compare(servers[1:], file, 2)
    other.routes[route] = (200, checksums({"a": "1", "b": "2"}))
    with pytest.raises(EngineRequestError, match="not as many ranks"):
        compare(servers[1:], file, 2)
    file.write_text("{")
    with pytest.raises(ConfigError, match="--checksums-file"):
        compare(servers[:1], file, 2)


def test_an_sglang_without_checksums(fake: FakeServer) -> None:
    with pytest.raises(EngineRequestError, match="/weights_checker with HTTP 404"):
        compare([SglangServer(fake.url)], None, 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"host": "a", "endpoint": ["http://b"]}, "not both"),
        ({"nnodes": 2}, "where host 0 is"),
        ({"nnodes": 2, "node_rank": 2, "master_addr": "a"}, "2: of 2 hosts"),
        ({"checksums_file": Path("f")}, "is for --verify"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], told: str) -> None:
    with pytest.raises(typer.BadParameter, match=told):
        command(checkpoint_path=Path("m"), **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"checkpoint_path": Path("nowhere")}, "nowhere"),
        ({"save_metas_file": Path("nowhere/metas")}, "a directory that exists"),
        ({"report_file": Path("nowhere/report")}, "a directory that exists"),
        ({"verify": True, "checksums_file": Path("nowhere/sums")}, "a directory that exists"),
    ],
)
def test_paths_are_looked_at_before_any_wait(
    fake: FakeServer, weights: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], told: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises((CkptEngineError, typer.BadParameter), match=told):
        command(**{"checkpoint_path": weights, "endpoint": [fake.url], **options})
    assert fake.sent == []


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("served", [True, False])
def test_groups_that_share_an_address_are_said_not_to_be_verified(
    fake: FakeServer, capsys: pytest.CaptureFixture[str], tmp_path: Path, served: bool
) -> None:
    fake.routes.update({"GET /ping": (200, {}), "GET /health": (200, {})})
    fake.routes["POST /weights_checker"] = (200, checksums({"a": "1"}))
    group = InferenceGroup(first=0, size=1, endpoint=fake.url, uds=None, count=3)
    file = tmp_path / "sums" if served else None
    asked = SglangTarget(
        group=group, endpoints=[fake.url], weight_version="v1", verify=True, checksums_file=file
    )
    asked.finish()
    told = capsys.readouterr().out
    assert "not verified: 2 of 3 servers, since they share an address" in told
    assert ("written to" in told) is served


def test_each_group_s_own_server_is_verified(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.routes.update({"GET /ping": (200, {}), "GET /health": (200, {})})
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "ckpt_engine_sglang.verify.compare",
        lambda servers, *rest: asked.append(([(each.endpoint, each.uds) for each in servers], *rest)),
    )
    group = InferenceGroup(first=0, size=1, endpoint=fake.url, uds=None, count=2)

    def finish(**options: Any) -> tuple[Any, ...]:  # noqa: ANN401
        SglangTarget(group=group, weight_version="v1", verify=True, **options).finish()
        return asked.pop()

    two, sockets = [fake.url, "http://b"], "/run/{group}.sock"
    assert finish(endpoints=two) == ([(fake.url, None), ("http://b", None)], None, 1, 0)
    each = [(fake.url, "/run/0.sock"), (fake.url, "/run/1.sock")]
    assert finish(endpoints=[fake.url], uds=sockets) == (each, None, 1, 0)
    # By P2P from files only the first one is updated.
    assert finish(endpoints=two, only_first=True) == ([(fake.url, None)], None, 1, 0)


def test_options_travel_with_each_handle(fake: FakeServer) -> None:
    fake.routes["POST /update_weights_from_ipc"] = (200, {"success": True, "message": ""})
    SglangServer(fake.url).update(PATHS, partial=True, ignored=["vision.*"])
    for uuid, handle in PATHS:
        found, text = split_options(fake.sent[0][1]["zmq_handles"][uuid])
        assert (found, parse_options(text)) == (handle, (True, ("vision.*",)))


def test_a_worker_that_compares_nothing_refuses_options() -> None:
    with (
        zmq.Context() as context,
        pytest.raises(ConfigError, match=r"was given ckpt_engine_options=.*partial"),
    ):
        compat_worker.update_weights_from_ipc(
            context, with_options("ipc:///tmp/a", True, ()), None, run=lambda _: None
        )
