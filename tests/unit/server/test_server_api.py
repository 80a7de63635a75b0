"""The routes over one rank: what they call, and what each failure becomes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import quote

import pytest
from api_for_server_tests import EVERYTHING, SECONDS, StubServer, answering, metas_of, update_error
from fastapi.testclient import TestClient

from ckpt_engine.errors import (
    CheckpointFormatError,
    ConfigError,
    EngineRequestError,
    HostMemoryError,
    OutcomeUnknown,
    PeerLost,
    PublishError,
    UpdateTimeout,
)
from ckpt_engine.metadata import fleets_from_json, metas_from_json, metas_to_json
from ckpt_engine.server.app import create_app

FILES = "/v1/checkpoints/a/files"
GATHER = "/v1/checkpoints/a/gather-metas"
UPDATE = "/v1/checkpoints/a/update"


@pytest.fixture
def engine() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An engine that commits: its URL, and the requests that it got."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = b'{"results": [{"outcome": "committed"}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with answering(Handler) as url:
        yield f"{url}/collective_rpc", requests


def test_a_checkpoint_s_life(client: TestClient, ps: StubServer) -> None:
    answer = client.post(FILES, json={"files": ["/m/x.safetensors"], "use_inplace_pin_memory": True})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["checkpoint"], answer.json()["files"]) == ("a", 1)
    assert client.get("/v1/healthz").json()["checkpoints"] == ["a"]
    assert client.get("/v1/healthz").json()["last_update"] is None

    gathered = client.post(GATHER).json()
    assert (gathered["ranks"], gathered["tensors"], gathered["nbytes"]) == (1, 1, 12)
    assert metas_from_json(client.get("/v1/metas").content) == metas_of(1)

    updated = client.post(UPDATE, json={"timeout": 7})
    assert updated.status_code == 200, updated.text
    # Every field of the report, also those that this API does not know.
    assert (updated.json()["version"], updated.json()["stages"]) == ("v-1", {"begin": 0.1})
    assert client.get("/v1/healthz").json() == {
        "status": "ok",
        "rank": 0,
        "world_size": 1,
        "checkpoints": ["a"],
        "running": None,
        "last_update": updated.json(),
        "weights": {"state": "unknown", "version": None, "checkpoint": None, "reason": None},
    }
    assert client.delete("/v1/checkpoints/a", params={"force": True}).json() == {"checkpoint": "a"}
    assert ps.calls == [
        (
            "register",
            "a",
            ["/m/x.safetensors"],
            {"use_shared_memory_pool": False, "use_inplace_pin_memory": True},
        ),
        ("gather", "a", 600.0),
        ("update", "a", 7.0, None),
        ("unregister", "a", True),
    ]


@pytest.mark.parametrize("name", ["org/model-7", "sp ace", "ä", "files", "a/files"])
def test_names_are_any_text(client: TestClient, ps: StubServer, name: str) -> None:
    path = f"/v1/checkpoints/{quote(name, safe='')}"
    assert client.post(f"{path}/files", json={"files": "/m/x"}).status_code == 200
    assert client.get("/v1/healthz").json()["checkpoints"] == [name]
    assert client.post(f"{path}/gather-metas", json={"timeout": 5}).json()["checkpoint"] == name
    assert client.delete(path).status_code == 200
    assert ps.registered == {}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("no"), 400),
        (HostMemoryError("no"), 507),
        (CheckpointFormatError("no"), 400),
        (EngineRequestError("no"), 502),
        (update_error(), 500),
        (update_error(PeerLost, error_type="PeerLost"), 500),
        (update_error(UpdateTimeout, error_type="UpdateTimeout"), 504),
        (update_error(error_type="EngineRequestError"), 502),
        (update_error(error_type="HostMemoryError"), 507),
        (OSError("no"), 500),
        (ZeroDivisionError(), 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_every_error_has_a_status_and_says_all(
    client: TestClient, ps: StubServer, error: Exception, status: int
) -> None:
    ps.fail["update"] = error
    answer = client.post(UPDATE, json={})
    body = answer.json()
    assert answer.status_code == status
    assert body["error_type"] == type(error).__name__
    assert body["message"]
    assert "Traceback" in body["traceback"]
    assert body["committed"] is False
    # The place is free again.
    assert client.get("/v1/healthz").json()["running"] is None


def test_an_update_s_record_travels(client: TestClient, ps: StubServer) -> None:
    ps.fail["update"] = update_error()
    body = client.post(UPDATE, json={}).json()
    assert body["record"]["rank"] == 1
    assert body["record"]["bucket"] == 3
    assert body["traceback"] == "Traceback: over there"
    assert body["message"] == "rank 1, stage buckets, bucket 3: RuntimeError: boom"


@pytest.mark.parametrize(
    ("error", "committed"),
    [(PublishError("the weights are in place, but"), True), (update_error(OutcomeUnknown), None)],
)
def test_whether_the_weights_are_in_place(
    client: TestClient, ps: StubServer, error: Exception, committed: bool | None
) -> None:
    ps.fail["update"] = error
    answer = client.post(UPDATE, json={})
    assert (answer.status_code, answer.json()["committed"]) == (500, committed)


def test_unknown_and_taken_names(client: TestClient) -> None:
    for answer in (client.post(GATHER), client.delete("/v1/checkpoints/a")):
        assert answer.status_code == 404
        assert answer.json()["error_type"] == "UnknownCheckpointError"
    client.post(FILES, json={"files": []})
    again = client.post(FILES, json={"files": []})
    assert (again.status_code, again.json()["error_type"]) == (409, "CheckpointExistsError")


def test_a_failed_registration_is_forgotten_by_delete(client: TestClient, ps: StubServer) -> None:
    ps.fail["register"] = CheckpointFormatError("cut short")
    assert client.post(FILES, json={"files": "/x"}).status_code == 400
    assert client.delete("/v1/checkpoints/a").status_code == 404
    assert ps.calls[-1] == ("unregister", "a", False)
    # With force it is about the pool, which no name says.
    assert client.delete("/v1/checkpoints/a?force=true").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (FILES, {}, "files"),
        (FILES, {"files": ["relative"]}, "'relative' is not an absolute path"),
        (FILES, {"files": "/a\0b"}, "not an absolute path"),
        (FILES, {"files": [], "file": []}, "file"),
        (GATHER, {"timeout": 0}, "timeout"),
        (GATHER, {"timeout": 1e300}, "timeout"),
        (UPDATE, {"timeout": "NaN"}, "timeout"),
        (UPDATE, {"ranks": [-1]}, "ranks"),
        (UPDATE, {"uds": "/e.sock"}, "give update_url"),
        (UPDATE, {"inference_group_ranks": [0]}, "give update_url"),
        (UPDATE, {"update_url": "http://localhost", "engines": [{"update_url": "http://f"}]}, "not both"),
        (
            UPDATE,
            {"engines": [{"update_url": "http://e"}, {"update_url": "http://f"}]},
            "of http://e",
        ),
        (
            UPDATE,
            {"engines": [{"update_url": u, "inference_group_ranks": [0]} for u in ("http://e", "http://f")]},
            "rank 0 is in the groups of two engines",
        ),
    ],
)
def test_bodies_that_are_refused(
    client: TestClient, ps: StubServer, path: str, body: dict[str, Any], named: str
) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error_type"] == "RequestValidationError"
    assert named in answer.json()["message"]
    assert ps.calls == []


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_bodies_that_are_not_json(client: TestClient, content: bytes) -> None:
    answer = client.post(UPDATE, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["message"]


def test_ranks_that_are_none(client: TestClient, ps: StubServer) -> None:
    for body in ({"ranks": [1]}, {"update_url": "http://localhost", "inference_group_ranks": [0, 1]}):
        answer = client.post(UPDATE, json=body)
        assert answer.status_code == 400
        assert "1 is not a rank: they go from 0 to 0" in answer.json()["message"]
    assert ps.calls == []


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v2", 404), ("PUT", "/v1/metas", 405)])
def test_routes_that_are_none(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json().keys() == {"error_type", "message", "record", "traceback", "committed", "restored"}


def test_metas_go_out_and_in(client: TestClient, ps: StubServer) -> None:
    assert client.get("/v1/metas").json() == {}
    document = metas_to_json(metas_of(3))
    headers = {"Content-Type": "application/json"}
    loaded = client.post("/v1/metas", content=document, headers=headers).json()
    assert loaded == {"fleets": 1, "ranks": 3, "tensors": 3, "senders": {"tcp@h": [0, 1, 2]}}
    assert client.get("/v1/metas").content == document
    several = b"[" + document + b", " + metas_to_json(metas_of(2)) + b"]"
    loaded = client.post("/v1/metas", content=several, headers=headers).json()
    assert loaded == {"fleets": 2, "ranks": 5, "tensors": 3, "senders": {"tcp@h": [0, 1, 2]}}
    assert ps.calls[-1] == ("load", [[0, 1, 2], [0, 1]])
    assert fleets_from_json(client.get("/v1/metas").content) == [metas_of(3), metas_of(2)]
    for bad in (b"{}x", b"[]", b'{"1": {}}', document.replace(b'"rank":1', b'"rank":2')):
        answer = client.post("/v1/metas", content=bad, headers=headers)
        assert (answer.status_code, answer.json()["error_type"]) == (422, "InvalidMetas")
    assert len(ps.metas) == 3


def test_one_operation_at_a_time_while_questions_are_answered(client: TestClient, ps: StubServer) -> None:
    go = ps.hold("update")
    with ThreadPoolExecutor(1) as pool:
        update = pool.submit(client.post, UPDATE, json={})
        assert ps.begun["update"].wait(SECONDS)
        running = client.get("/v1/healthz").json()["running"]
        assert (running["operation"], running["checkpoint"]) == ("update", "a")
        assert client.get("/v1/metas").status_code == 200
        metas = {"content": b"{}", "headers": {"Content-Type": "application/json"}}
        for answer in (
            client.post(UPDATE, json={}),
            client.post(GATHER),
            client.post(FILES, json={"files": []}),
            client.delete("/v1/checkpoints/a"),
            client.post("/v1/metas", **metas),
        ):
            assert (answer.status_code, answer.json()["error_type"]) == (409, "RankBusy")
            assert "at the update of 'a'" in answer.json()["message"]
        go.set()
        assert update.result(SECONDS).status_code == 200
    assert [call[0] for call in ps.calls] == ["update"]


def test_one_request_for_each_engine_by_its_lowest_rank(engine: tuple[str, list[dict[str, Any]]]) -> None:
    url, requests = engine
    body = {"update_url": url, "inference_group_ranks": [3, 2], "timeout": 40}
    for rank in range(4):
        with TestClient(create_app(StubServer(rank, 4), access=EVERYTHING)) as client:
            assert client.post(UPDATE, json=body).status_code == 200
    (request,) = requests
    assert request["method"] == "update_weights_from_ipc"
    assert request["args"] == [[["CPU-h-2", "ipc:///h2"], ["CPU-h-3", "ipc:///h3"]]]
    assert request["timeout"] == 30


def test_several_engines_and_all_ranks(engine: tuple[str, list[dict[str, Any]]]) -> None:
    url, requests = engine
    engines = [{"update_url": url, "inference_group_ranks": group} for group in ([0, 1], [2])]
    for rank in range(4):
        with TestClient(create_app(StubServer(rank, 4), access=EVERYTHING)) as client:
            assert client.post(UPDATE, json={"engines": engines}).status_code == 200
            assert client.post(UPDATE, json={"update_url": url}).status_code == 200
            assert client.post(UPDATE, json={}).status_code == 200
    assert sorted(len(request["args"][0]) for request in requests) == [1, 2, 4]


def test_a_group_outside_the_ranks_that_are_updated() -> None:
    with TestClient(create_app(StubServer(0, 4), access=EVERYTHING)) as client:
        body = {"ranks": [0, 1], "update_url": "http://localhost", "inference_group_ranks": [1, 2]}
        answer = client.post(UPDATE, json=body)
    assert answer.status_code == 400
    assert "rank 2 is not among the ranks that are updated, [0, 1]" in answer.json()["message"]


def test_an_engine_that_cannot_be_reached(client: TestClient) -> None:
    answer = client.post(UPDATE, json={"update_url": "http://127.0.0.1:9/collective_rpc", "timeout": 5})
    assert answer.status_code == 502
    assert answer.json()["record"]["error_type"] == "EngineRequestError"
    assert "http://127.0.0.1:9/collective_rpc" in answer.json()["message"]


def test_names_of_files_that_are_not_utf_8_do_not_break_the_answer(
    client: TestClient, ps: StubServer
) -> None:
    ps.fail["register"] = CheckpointFormatError("/m/\udcff.safetensors: cut short")
    answer = client.post(FILES, json={"files": "/m"})
    assert answer.status_code == 400
    assert "\\udcff" in answer.text


def test_the_document_names_every_route(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    routes = {(method, path) for path, item in document["paths"].items() for method in item}
    assert routes == {
        ("post", "/v1/checkpoints/{name}/files"),
        ("delete", "/v1/checkpoints/{name}"),
        ("post", "/v1/checkpoints/{name}/gather-metas"),
        ("post", "/v1/checkpoints/{name}/update"),
        ("get", "/v1/healthz"),
        ("get", "/v1/metas"),
        ("post", "/v1/metas"),
        ("get", "/v1/checkpoints"),
        ("get", "/v1/operations"),
        ("get", "/v1/events"),
        ("post", "/v1/cancel"),
        ("get", "/metrics"),
    }
    for item in document["paths"].values():
        for operation in item.values():
            assert operation["summary"]
