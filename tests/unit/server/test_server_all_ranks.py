"""`all_ranks`: several real servers, each over a stub; where they are, and what becomes of failures."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
import torch
from api_for_server_tests import EVERYTHING, REPORT, SECONDS, StubServer, served, update_error, world
from fastapi.testclient import TestClient
from safetensors.torch import save_file

from ckpt_engine.checkpoint import files_of, split_files
from ckpt_engine.errors import (
    CheckpointError,
    ConfigError,
    EngineRequestError,
    ErrorRecord,
    HostMemoryError,
    UpdateError,
)
from ckpt_engine.server import all_ranks
from ckpt_engine.server.all_ranks import tcp_addresses, unix_addresses, unix_path
from ckpt_engine.server.app import create_app
from ckpt_engine.state import Weights

ALL = "?all_ranks=true"
FILES = f"/v1/checkpoints/a/files{ALL}"
GATHER = f"/v1/checkpoints/a/gather-metas{ALL}"
UPDATE = f"/v1/checkpoints/a/update{ALL}"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Four files, of 4000, 3000, 2000 and 1000 floats."""
    for number in range(1, 5):
        save_file({f"w{number}": torch.zeros(number * 1000)}, tmp_path / f"{number}.safetensors")
    return tmp_path


def test_one_request_for_everybody(checkpoint: Path) -> None:
    with world(3) as ranks:
        answer = ranks.client.post(FILES, json={"files": str(checkpoint)})
        assert answer.status_code == 200, answer.text
        assert {int(rank): part["status"] for rank, part in answer.json()["ranks"].items()} == {
            rank: 200 for rank in range(3)
        }
        shares = [[Path(file).name[0] for file in stub.registered["a"]] for stub in ranks.stubs]
        assert shares == [["4"], ["3"], ["1", "2"]]

        assert ranks.client.post(GATHER, json={"timeout": 9}).json()["ranks"]["2"]["answer"]["tensors"] == 3
        updated = ranks.client.post(UPDATE, json={"timeout": 8}).json()
        assert {part["answer"]["version"] for part in updated["ranks"].values()} == {REPORT["version"]}
        freed = ranks.client.delete(f"/v1/checkpoints/a{ALL}&force=true")
        assert freed.status_code == 200, freed.text
        for stub in ranks.stubs:
            assert [call[0] for call in stub.calls] == ["register", "gather", "update", "unregister"]
            assert [call[2] for call in stub.calls[1:]] == [9.0, 8.0, True]
            assert stub.registered == {}


def test_version_and_restore_reach_every_rank_and_its_error_comes_back() -> None:
    with world(2) as ranks:
        ranks.stubs[1].weights = Weights("serving", "v1", "a")
        assert ranks.client.get("/v1/healthz").json()["weights"]["state"] == "unknown"
        body = {"version": "v2", "on_failure": "restore", "verify": "full"}
        assert ranks.client.post(UPDATE, json=body).status_code == 200
        assert [stub.calls[-1][4:] for stub in ranks.stubs] == [("v2", "restore", "full")] * 2
        for stub in ranks.stubs:
            error = UpdateError(ErrorRecord(error_type="ValueError", message="no", rank=1), touched=False)
            error.restored = "v1"
            stub.fail["update"] = error
        answer = ranks.client.post(UPDATE, json=body).json()
        assert "version 'v1' was put back" in answer["message"]
        assert [part["answer"]["restored"] for part in answer["ranks"].values()] == ["v1"] * 2


@pytest.mark.parametrize("name", ["org/model-7", "ä%2F ?#", "a/../b"])
def test_any_name_reaches_every_rank(name: str) -> None:
    with world(2) as ranks:
        path = f"/v1/checkpoints/{quote(name, safe='')}"
        assert ranks.client.post(f"{path}/files{ALL}", json={"files": []}).status_code == 200
        assert [list(stub.registered) for stub in ranks.stubs] == [[name], [name]]
        assert ranks.client.delete(path + ALL).status_code == 200


def test_a_failed_registration_is_undone_where_it_worked(checkpoint: Path) -> None:
    with world(3) as ranks:
        ranks.stubs[1].fail["register"] = HostMemoryError("12 GiB are missing")
        answer = ranks.client.post(FILES, json={"files": [str(checkpoint)]})
        assert answer.status_code == 507
        body = answer.json()
        assert body["error_type"] == "HostMemoryError"
        assert body["message"] == "1 of 3 ranks failed; rank 1: 12 GiB are missing"
        assert {rank: (part["status"], part["undone"]) for rank, part in body["ranks"].items()} == {
            "0": (200, True),
            "1": (507, False),
            "2": (200, True),
        }
        assert [stub.registered for stub in ranks.stubs] == [{}, {}, {}]


def test_files_that_were_taken_in_place_are_kept(checkpoint: Path) -> None:
    with world(2) as ranks:
        ranks.stubs[1].fail["register"] = HostMemoryError("no")
        body = {"files": str(checkpoint), "use_inplace_pin_memory": True}
        answer = ranks.client.post(FILES, json=body)
        assert answer.status_code == 507
        assert answer.json()["ranks"]["0"]["undone"] is False
        # Its memory is the only place where they are.
        assert [list(stub.registered) for stub in ranks.stubs] == [["a"], []]


def test_what_was_registered_before_is_not_undone(checkpoint: Path) -> None:
    with world(2) as ranks:
        ranks.stubs[1].registered["a"] = ["mine"]
        answer = ranks.client.post(FILES, json={"files": str(checkpoint)})
        assert (answer.status_code, answer.json()["error_type"]) == (409, "CheckpointExistsError")
        assert [stub.registered for stub in ranks.stubs] == [{}, {"a": ["mine"]}]


def test_a_checkpoint_that_is_not_there() -> None:
    with world(2) as ranks:
        answer = ranks.client.post(FILES, json={"files": "/nowhere/at-all"})
        assert answer.status_code == 500
        assert "/nowhere/at-all does not exist" in answer.json()["message"]
        assert [stub.calls for stub in ranks.stubs] == [[], []]


def test_delete_is_content_with_what_there_is() -> None:
    with world(2) as ranks:
        ranks.stubs[1].registered["a"] = []
        answer = ranks.client.delete(f"/v1/checkpoints/a{ALL}")
        assert answer.status_code == 200
        assert {rank: part["status"] for rank, part in answer.json()["ranks"].items()} == {"0": 404, "1": 200}
        assert ranks.client.delete(f"/v1/checkpoints/a{ALL}").status_code == 404


def test_the_worst_failure_speaks_for_all() -> None:
    with world(3) as ranks:
        ranks.stubs[0].fail["update"] = ConfigError("mine")
        ranks.stubs[1].fail["update"] = update_error()
        ranks.stubs[2].fail["update"] = EngineRequestError("HTTP 500\n--- traceback in the engine ---")
        body = ranks.client.post(UPDATE, json={})
        assert body.status_code == 502
        assert (
            "3 of 3 ranks failed; rank 2: HTTP 500\n--- traceback in the engine ---" in body.json()["message"]
        )
        parts = body.json()["ranks"]
        assert [parts[str(rank)]["status"] for rank in range(3)] == [400, 500, 502]
        assert parts["1"]["answer"]["record"]["bucket"] == 3
        assert parts["1"]["answer"]["traceback"] == "Traceback: over there"


def test_a_rank_that_is_not_there_is_told_before_anything_begins() -> None:
    with world(3, absent=(2,)) as ranks:
        answer = ranks.client.post(UPDATE, json={})
        assert (answer.status_code, answer.json()["error_type"]) == (502, "RankUnreachable")
        assert f"rank 2's server at unix:{ranks.path(2)}" in answer.json()["message"]
        assert [stub.calls for stub in ranks.stubs] == [[], [], []]


def test_a_rank_that_is_busy_is_told_before_anything_begins() -> None:
    with world(2) as ranks, ThreadPoolExecutor(1) as pool:
        go = ranks.stubs[1].hold("gather")
        transport = httpx.HTTPTransport(uds=str(ranks.path(1)))
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=SECONDS) as other:
            waiting = pool.submit(other.post, "/v1/checkpoints/b/gather-metas")
            assert ranks.stubs[1].begun["gather"].wait(SECONDS)
            answer = ranks.client.post(UPDATE, json={})
            go.set()
            waiting.result(SECONDS)
        assert (answer.status_code, answer.json()["error_type"]) == (409, "RankBusy")
        assert "at the gather of 'b'" in answer.json()["message"]
        assert ranks.stubs[0].calls == []
        # And it is free again.
        assert ranks.client.post(UPDATE, json={}).status_code == 200


def test_another_rank_at_the_address() -> None:
    with world(3, absent=(2,)) as ranks:
        with served(create_app(StubServer(1, 3)), ranks.path(2)):  # type: ignore[arg-type]
            answer = ranks.client.post(UPDATE, json={})
        assert answer.status_code == 400
        assert "says that it is rank 1 of 3, not 2 of 3" in answer.json()["message"]


def test_a_rank_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_ranks, "_PROBE_SECONDS", 0.2)
    with world(2, absent=(1,)) as ranks, socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(ranks.path(1)))
        deaf.listen(1)
        answer = ranks.client.post(UPDATE, json={})
    assert answer.status_code == 502
    assert "did not answer within 0.2 s" in answer.json()["message"]


@pytest.mark.parametrize("text", [b"[]", b"no JSON", b'"' + b"x" * 100 + b'"'])
def test_a_server_that_is_none_of_ours(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_ranks, "MAX_ANSWER_NBYTES", 50)

    async def app(scope: dict, receive: object, send: object) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
            await send({"type": "http.response.body", "body": text})  # type: ignore[operator]

    with world(2, absent=(1,)) as ranks, served(app, ranks.path(1)):
        answer = ranks.client.post(UPDATE, json={})
    assert (answer.status_code, answer.json()["error_type"]) == (502, "RankUnreachable")


def test_only_rank_0_drives() -> None:
    with TestClient(create_app(StubServer(1, 2), access=EVERYTHING)) as client:  # type: ignore[arg-type]
        answer = client.post(UPDATE, json={})
    assert answer.status_code == 400
    assert "only rank 0" in answer.json()["message"]


def test_a_server_that_does_not_know_the_others_says_so() -> None:
    with TestClient(create_app(StubServer(0, 2), access=EVERYTHING)) as client:  # type: ignore[arg-type]
        answer = client.post(UPDATE, json={})
    assert answer.status_code == 400
    assert "was not told where the other ranks' servers are" in answer.json()["message"]
    # A lone rank is all ranks.
    with TestClient(create_app(StubServer(), access=EVERYTHING)) as client:  # type: ignore[arg-type]
        assert client.post(UPDATE, json={}).json()["ranks"]["0"]["status"] == 200


def test_rank_0_answers_questions_while_it_drives() -> None:
    with world(2) as ranks, ThreadPoolExecutor(1) as pool:
        gates = [stub.hold("update") for stub in ranks.stubs]
        update = pool.submit(ranks.client.post, UPDATE, json={})
        for stub in ranks.stubs:
            assert stub.begun["update"].wait(SECONDS)
        assert ranks.client.get("/v1/healthz").json()["running"]["operation"] == "update"
        assert ranks.client.post(UPDATE, json={}).status_code == 409
        for gate in gates:
            gate.set()
        assert update.result(SECONDS).status_code == 200
    assert threading.active_count() < 20


def test_files_are_dealt_by_size(checkpoint: Path) -> None:
    files = files_of([checkpoint, checkpoint / "1.safetensors"])
    assert len(files) == 4
    shares = split_files(files, 2)
    assert [[file.name[0] for file in share] for share in shares] == [["1", "4"], ["2", "3"]]
    assert split_files(files[:1], 3) == [files[:1], [], []]
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be read: No such file"):
        split_files([checkpoint / "gone.safetensors"], 1)


def urls(peers: str | None, world_size: int = 4, host: str = "127.0.0.1", per_host: int = 2) -> list[str]:
    found = tcp_addresses(host=host, port=9000, peers=peers, world_size=world_size, ranks_per_host=per_host)
    return [str(address) for address in found]


def test_tcp_addresses() -> None:
    on_one_host = ["http://127.0.0.1:9000", "http://127.0.0.1:9001"]
    assert urls(None, 2) == on_one_host
    assert urls(None, 2, host="0.0.0.0") == on_one_host
    assert urls(None, 1, host="::1") == ["http://[::1]:9000"]
    assert urls(None, 1, host="::") == ["http://[::1]:9000"]
    per_host = [
        f"http://{host}:{port}" for host, port in (("a", 9000), ("a", 9001), ("b", 9002), ("b", 9003))
    ]
    assert urls("a, b") == per_host
    assert urls("a,a,b,b") == per_host
    assert urls("a:1,a:2,[::2]:3,b") == ["http://a:1", "http://a:2", "http://[::2]:3", "http://b:9003"]
    assert urls("node-{rank}", 2) == ["http://node-0:9000", "http://node-1:9001"]
    assert urls("a,b", 2, per_host=1) == ["http://a:9000", "http://b:9001"]


@pytest.mark.parametrize(
    ("peers", "message"),
    [
        (None, "4 ranks on 2 hosts: give --peers"),
        ("a", "give 4 entries, one for each rank, or 2, one for each host"),
        ("a,b,c", "give 4 entries"),
        ("a,,b,c", "give 4 entries"),
        ("a:1,b:2", "cannot have a port"),
        ("a,b,c,http://d", "'http://d' is neither host nor host:port"),
        ("a,b,c,d/e", "'d/e' is neither host nor host:port"),
        ("a,b,c,d:99999999", "neither host nor host:port"),
    ],
)
def test_peers_that_do_not_fit(peers: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        urls(peers)


def test_unix_addresses() -> None:
    assert [str(address) for address in unix_addresses("/s/{rank}.sock", 2)] == [
        "unix:/s/0.sock",
        "unix:/s/1.sock",
    ]
    assert unix_path("/s/ps.sock", 0, 1) == "/s/ps.sock"
    with pytest.raises(ConfigError, match=r"--uds /s/ps.sock: put \{rank\} into it"):
        unix_path("/s/ps.sock", 1, 2)
