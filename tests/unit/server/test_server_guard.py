"""What stands before the routes: the token, the bounds on bodies, and errors that nobody expected."""

from __future__ import annotations

import json

import pytest
from api_for_server_tests import StubServer, world
from fastapi.testclient import TestClient

from ckpt_engine.server.app import create_app
from ckpt_engine.server.guard import MAX_BODY_NBYTES, MAX_METAS_NBYTES

UPDATE = "/v1/checkpoints/a/update"
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Bearer secre", "Bearer secrett", "Basic secret", "secret", "Bearer ä"],
)
def test_without_the_token_nothing_is_answered(given: str | None) -> None:
    headers = {"Authorization": given.encode()} if given is not None else {}
    with TestClient(create_app(StubServer(), token="secret")) as client:
        for path in ("/v1/healthz", "/v1/metas", "/openapi.json", "/nowhere"):
            answer = client.get(path, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json()["error_type"] == "Unauthorized"
            assert "secret" not in answer.text


@pytest.mark.parametrize("given", ["Bearer secret", "bearer  secret "])
def test_with_the_token_everything_is(given: str) -> None:
    with TestClient(create_app(StubServer(), token="secret")) as client:
        assert client.get("/v1/healthz", headers={"Authorization": given}).status_code == 200


def test_the_token_is_sent_to_the_other_ranks() -> None:
    with world(2, token="secret") as ranks:
        answer = ranks.client.post("/v1/checkpoints/a/files?all_ranks=true", json={"files": []})
        assert answer.status_code == 200, answer.text
        assert [list(stub.registered) for stub in ranks.stubs] == [["a"], ["a"]]


@pytest.mark.parametrize(("path", "limit"), [(UPDATE, MAX_BODY_NBYTES), ("/v1/metas", MAX_METAS_NBYTES)])
def test_bodies_are_bounded(client: TestClient, ps: StubServer, path: str, limit: int) -> None:
    assert client.post(path, content=b"{" + b" " * (limit - 2) + b"}", headers=JSON).status_code == 200
    del ps.calls[:]
    for content in (b" " * (limit + 1), iter([b" " * limit, b" "])):
        answer = client.post(path, content=content, headers=JSON)
        assert (answer.status_code, answer.json()["error_type"]) == (413, "BodyTooLarge")
        assert str(limit) in answer.json()["message"]
    assert ps.calls == []


@pytest.mark.parametrize("length", [str(MAX_BODY_NBYTES + 1), "9" * 30])
def test_a_length_that_is_too_large_is_refused_unread(client: TestClient, length: str) -> None:
    answer = client.post(UPDATE, content=b"{}", headers=JSON | {"Content-Length": length})
    assert answer.status_code == 413


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
@pytest.mark.parametrize("path", [UPDATE, "/v1/metas", "/v1/checkpoints/a/gather-metas"])
def test_what_a_page_in_a_browser_may_send_is_refused(
    client: TestClient, ps: StubServer, path: str, kind: str
) -> None:
    assert client.post(path, content=b"{}", headers={"Content-Type": kind}).status_code == 415
    assert ps.calls == []


def test_an_error_that_nobody_expected(ps: StubServer, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> list[str]:
        raise RuntimeError("what was that")

    app = create_app(ps)

    @app.get("/broken")
    async def route() -> None:
        broken()

    # The client would raise what the server raised: it must not.
    with TestClient(app) as client:
        answer = client.get("/broken")
    body = json.loads(answer.content)
    assert answer.status_code == 500
    assert (body["error_type"], body["message"]) == ("RuntimeError", "what was that")
    assert "in broken" in body["traceback"]
    assert "GET /broken failed" in caplog.text


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": ""}])
def test_requests_of_web_pages_are_refused(
    client: TestClient, ps: StubServer, headers: dict[str, str]
) -> None:
    answer = client.post(UPDATE, json={}, headers=headers)
    assert (answer.status_code, answer.json()["error_type"], ps.calls) == (403, "Forbidden", [])


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:9000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:9000", 200),
        ("evil.example:9000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
    ],
)
def test_a_name_that_was_pointed_to_the_loopback_is_refused(ps: StubServer, host: str, status: int) -> None:
    """A page of that name is no other origin to a browser: it may send anything."""
    with TestClient(create_app(ps, local_only=True)) as client:
        assert client.get("/v1/healthz", headers={"Host": host}).status_code == status
    with TestClient(create_app(ps)) as client:
        assert client.get("/v1/healthz", headers={"Host": host}).status_code == 200
