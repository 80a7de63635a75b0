"""What those see who look on: progress, history, events, metrics; and an end that somebody asks for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from api_for_server_tests import EVERYTHING, SECONDS, StubServer, update_error, world
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from ckpt_engine.errors import UpdateTimeout
from ckpt_engine.server.app import create_app
from ckpt_engine.state import Weights

UPDATE = "/v1/checkpoints/a/update"


def held(client: TestClient, ps: StubServer, look: Callable[[], Any]) -> Any:  # noqa: ANN401
    """What `look` finds in the middle of an update."""
    go = ps.hold("update")
    with ThreadPoolExecutor(1) as pool:
        update = pool.submit(client.post, UPDATE, json={})
        assert ps.begun["update"].wait(SECONDS)
        try:
            return look()
        finally:
            go.set()
            assert update.result(SECONDS).status_code == 200


def test_progress_of_an_update(client: TestClient, ps: StubServer) -> None:
    running = held(client, ps, lambda: client.get("/v1/healthz").json()["running"])
    assert (running["operation"], running["bytes_done"], running["bytes_total"]) == ("update", 6, 24)
    assert running["eta_seconds"] == pytest.approx(3 * running["seconds"])
    assert client.get("/v1/operations").json()["running"] is None


def test_the_history_has_what_was_done_and_why_not(client: TestClient, ps: StubServer) -> None:
    assert client.post("/v1/checkpoints/a/files", json={"files": "/m"}).status_code == 200
    assert client.post(UPDATE, json={}).status_code == 200
    ps.fail["update"] = update_error()
    assert client.post(UPDATE, json={}).status_code == 500
    ended = client.get("/v1/operations").json()["ended"]
    assert [each["operation"] for each in ended] == ["registration", "update", "update"]
    assert [each["number"] for each in ended] == [1, 2, 3]
    assert (ended[1]["version"], ended[1]["nbytes"], ended[1]["stages"]) == ("v-1", 24, {"begin": 0.1})
    assert ended[1]["error"] is None
    assert ended[2]["error"]["record"]["bucket"] == 3
    assert ended[2]["version"] is None


def test_the_last_hundred_are_remembered(client: TestClient) -> None:
    for _ in range(103):
        assert client.post(UPDATE, json={}).status_code == 200
    ended = client.get("/v1/operations").json()["ended"]
    assert [each["number"] for each in ended] == [*range(4, 104)]


def test_what_is_registered(client: TestClient, ps: StubServer) -> None:
    assert client.get("/v1/checkpoints").json() == []
    ps.registered["b/1"] = []
    assert client.get("/v1/checkpoints").json() == [
        {"name": "b/1", "nbytes": 24, "tensors": 2, "digests": False}
    ]


def metrics_of(client: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_of_what_has_ended(client: TestClient, ps: StubServer) -> None:
    assert client.post(UPDATE, json={}).status_code == 200
    ps.fail["update"] = update_error(UpdateTimeout, error_type="UpdateTimeout")
    assert client.post(UPDATE, json={}).status_code == 504
    found = metrics_of(client)
    operations = "ckpt_engine_operations_total"
    assert found[operations, (("operation", "update"), ("outcome", "succeeded"))] == 1
    assert found[operations, (("operation", "update"), ("outcome", "failed"))] == 1
    assert found["ckpt_engine_deadlines_total", (("stage", "buckets"),)] == 1
    assert found["ckpt_engine_update_bytes_total", ()] == 24
    assert found["ckpt_engine_update_seconds_count", ()] == 1
    assert found["ckpt_engine_stage_seconds_sum", (("stage", "begin"),)] == pytest.approx(0.1)


def test_metrics_of_what_there_is_now(client: TestClient, ps: StubServer) -> None:
    ps.registered["a"] = []
    ps.weights = Weights("serving", "step-7", "a")
    found = held(client, ps, lambda: metrics_of(client))
    assert found["ckpt_engine_host_bytes", (("checkpoint", "a"),)] == 24
    assert found["ckpt_engine_busy", (("operation", "update"),)] == 1
    assert found["ckpt_engine_progress_ratio", ()] == 0.25
    assert found["ckpt_engine_version_info", (("checkpoint", "a"), ("version", "step-7"))] == 1
    states = {labels[0][1]: value for (name, labels), value in found.items() if name == "ckpt_engine_weights"}
    assert states == {"unknown": 0, "serving": 1, "updating": 0, "incomplete": 0}
    assert not [name for name, _ in metrics_of(client) if name == "ckpt_engine_busy"]


def test_every_rank_s_update_is_in_the_history_of_the_rank_that_drove_it() -> None:
    with world(2) as two:
        assert two.client.post(UPDATE, params={"all_ranks": "true"}, json={}).status_code == 200
        (ended,) = two.client.get("/v1/operations").json()["ended"]
    assert (ended["version"], ended["nbytes"], ended["error"]) == ("v-1", 24, None)


def events(client: httpx.Client, count: int, headers: dict[str, str], begun: threading.Event) -> list[Any]:
    """The first `count` events: (kind, id, data)."""
    found: list[Any] = []
    event: dict[str, str] = {}
    with client.stream("GET", "/v1/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        begun.set()
        for line in answer.iter_lines():
            if line:
                key, _, value = line.partition(": ")
                event[key] = value
                continue
            found.append((event["event"], event.get("id"), json.loads(event["data"])))
            event = {}
            if len(found) == count:
                break
    return found


def test_events_as_they_happen() -> None:
    """A real server: what it streams comes before the update has ended."""
    with world(1) as one, ThreadPoolExecutor(2) as pool:
        assert one.client.post(UPDATE, json={}).status_code == 200
        begun = threading.Event()
        go = one.stubs[0].hold("update")
        watching = pool.submit(events, one.client, 2, {}, begun)
        assert begun.wait(SECONDS)
        update = pool.submit(one.client.post, UPDATE, json={})
        assert one.stubs[0].begun["update"].wait(SECONDS)
        threading.Timer(0.5, go.set).start()
        (first, _, running), (second, number, ended) = watching.result(SECONDS)
        assert update.result(SECONDS).status_code == 200
        assert (first, running["bytes_done"], running["bytes_total"]) == ("running", 6, 24)
        assert (second, number, ended["version"]) == ("ended", "2", "v-1")
        # Who comes back is told what has ended since.
        ((kind, number, _),) = events(one.client, 1, {"Last-Event-ID": "1"}, threading.Event())
        assert (kind, number) == ("ended", "2")


def test_nothing_to_cancel(client: TestClient) -> None:
    answer = client.post("/v1/cancel")
    assert (answer.status_code, answer.json()["error_type"]) == (409, "NothingRuns")


def test_what_runs_in_a_thread_of_the_app_cannot_be_cancelled(client: TestClient, ps: StubServer) -> None:
    answer = held(client, ps, lambda: client.post("/v1/cancel"))
    assert (answer.status_code, answer.json()["error_type"]) == (501, "CannotCancel")
    assert "ckpt-engine serve" in answer.json()["message"]


class Late(BaseException):
    pass


def test_an_end_that_came_too_late_says_that_the_weights_are_in_place(ps: StubServer) -> None:
    def update(*_: object, **__: object) -> None:
        ps.weights = Weights("serving", "step-8", "a")
        raise Late("it was cancelled by a request")

    ps.update = update  # type: ignore[method-assign,assignment]
    executor: Executor = ThreadPoolExecutor(1)
    with TestClient(create_app(ps, access=EVERYTHING, executor=executor)) as client:  # type: ignore[arg-type]
        answer = client.post(UPDATE, json={})
    executor.shutdown()
    assert (answer.status_code, answer.json()["error_type"]) == (409, "Cancelled")
    assert answer.json()["committed"] is True
    assert "the weights were in place already" in answer.json()["message"]
