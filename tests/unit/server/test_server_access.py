"""What requests may name: files below the roots, and engines where the setting says."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from api_for_server_tests import StubServer, answering
from fastapi.testclient import TestClient
from safetensors.torch import save_file

from ckpt_engine.errors import ConfigError, EngineRequestError
from ckpt_engine.server.access import Access, NotAllowedError
from ckpt_engine.server.api_models import EngineTarget
from ckpt_engine.server.app import create_app
from ckpt_engine.server.engine_client import call_engine
from ckpt_engine.settings import Settings

SECRET = "content-of-a-file-of-others"


def access(roots: str | None = None, engines: str | None = None, *, own_user: bool = False) -> Access:
    return Access.of(Settings(allowed_roots=roots, allowed_engines=engines), own_user=own_user)


# Files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """`models` is the root; `other` lies beside it."""
    for name in ("models/m", "other"):
        (tmp_path / name).mkdir(parents=True)
        save_file({"w": torch.zeros(2)}, tmp_path / name / "x.safetensors")
    (tmp_path / "other" / "secret.json").write_text(f'{{"{SECRET}": 1}}')
    return tmp_path


def test_files_below_a_root(tree: Path) -> None:
    allowed = access(f"/nowhere:{tree}/models")
    file = str(tree / "models/m/x.safetensors")
    assert allowed.files([file]) == [file]
    assert allowed.files([str(tree / "models/m"), file]) == [file]
    assert allowed.files([f"{tree}/models/../models/m/x.safetensors"]) == [file]
    # A root that is reached by a link, and links that stay below it.
    (tree / "link").symlink_to(tree / "models")
    (tree / "models/n").symlink_to(tree / "models/m")
    assert access(f"{tree}/link").files([str(tree / "link/n")]) == [file]


def test_a_cache_of_models(tree: Path) -> None:
    """Where a snapshot's files are links to blobs without a suffix: their names count, not the blobs'."""
    (tree / "models/blobs").mkdir()
    (tree / "models/m/x.safetensors").rename(tree / "models/blobs/0123")
    (tree / "models/m/x.safetensors").symlink_to("../blobs/0123")
    file = str(tree / "models/m/x.safetensors")
    assert access(f"{tree}/models").files([str(tree / "models/m")]) == [file]
    with pytest.raises(NotAllowedError):
        access(f"{tree}/models/m").files([file])


@pytest.mark.parametrize(
    "path",
    [
        "other/x.safetensors",
        "other",
        "models/../other/x.safetensors",
        "models-too/x.safetensors",
        "models/link.safetensors",
        "models/through/x.safetensors",
        "models/chain/x.safetensors",
        "models/loop/x.safetensors",
        "other/not-there.safetensors",
        "models/to-proc/1/environ",
        "models/indexed",
        "models/npy",
        "models/listed",
    ],
)
def test_what_leads_out_is_refused_before_it_is_read(tree: Path, path: str) -> None:
    models = tree / "models"
    (tree / "models-too").mkdir()
    (models / "link.safetensors").symlink_to(tree / "other/x.safetensors")
    (models / "through").symlink_to(tree / "other")
    (models / "chain").symlink_to("chained")
    (models / "chained").symlink_to("../other")
    (models / "loop").symlink_to("loop")
    (models / "to-proc").symlink_to("/proc")
    for name in ("indexed", "npy", "listed"):
        (models / name).mkdir()
    (models / "indexed/model.safetensors.index.json").symlink_to(tree / "other/secret.json")
    (models / "npy/model.0.0.npy").write_bytes(b"")
    (models / "npy/model.0.0.npy.json").symlink_to(tree / "other/secret.json")
    (models / "listed/y.safetensors").symlink_to(tree / "other/x.safetensors")
    text = '{"weight_map": {"w": "y.safetensors"}}'
    (models / "listed/model.safetensors.index.json").write_text(text)
    with pytest.raises(Exception) as caught:
        access(str(models)).files([str(tree / path)])
    if "loop" not in path:
        assert isinstance(caught.value, NotAllowedError)
        assert "CKPT_ENGINE_ALLOWED_ROOTS" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_without_roots_only_ones_own_user_may_name_files(tree: Path) -> None:
    file = str(tree / "other/x.safetensors")
    with pytest.raises(NotAllowedError, match=r"there is none. CKPT_ENGINE_ALLOWED_ROOTS says which"):
        access().files([file])
    assert access(own_user=True).files([file, "/not/there", str(tree / "other")]) == [
        file,
        "/not/there",
        file,
    ]
    with pytest.raises(NotAllowedError):
        access(f"{tree}/models", own_user=True).files([file])


def test_roots_that_are_none() -> None:
    for roots in ("models", "/a:", ":/a", "/a:b"):
        with pytest.raises(ConfigError, match=r"CKPT_ENGINE_ALLOWED_ROOTS: .* is not an absolute path"):
            access(roots)


@pytest.mark.parametrize("all_ranks", [False, True])
def test_registering_over_http(tree: Path, all_ranks: bool) -> None:
    ps = StubServer()
    with TestClient(create_app(ps, access=access(f"{tree}/models"))) as client:  # type: ignore[arg-type]

        def register(path: str, **options: bool) -> tuple[int, str]:
            answer = client.post(
                "/v1/checkpoints/a/files",
                params={"all_ranks": all_ranks},
                json={"files": str(tree / path), **options},
            )
            return answer.status_code, answer.text

        # In place, the file would be removed: it is held to the roots like any other.
        for options in ({}, {"use_inplace_pin_memory": True}, {"use_shared_memory_pool": True}):
            status, text = register("other/x.safetensors", **options)
            assert (status, "NotAllowedError" in text) == (403, True), text
        assert ps.calls == []
        status, text = register("models/m")
        assert status == 200, text
        assert ps.registered == {"a": [str(tree / "models/m/x.safetensors")]}


# Engines


def ask(allowed: Access, url: str, uds: str | None = None) -> None:
    allowed.check_engines([EngineTarget(update_url=url, uds=uds)])


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8000/collective_rpc",
        "http://LocalHost./x",
        "http://127.0.0.1/x",
        "http://127.3.2.1:1/x",
        "https://[::1]:9/x",
        "http://[::ffff:127.0.0.1]:9/x",
    ],
)
def test_the_loopback_is_allowed_where_nothing_is_said(url: str) -> None:
    ask(access(), url)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1:8000/x",
        "http://0.0.0.0:8000/x",
        "http://[::]/x",
        "http://[::ffff:10.0.0.1]/x",
        "http://localhost.example.org/x",
        "http://127.0.0.1.example.org/x",
        # Other spellings of the loopback are names to us; so they are to whatever else reads them.
        "http://2130706433/x",
        "http://0x7f.1/x",
        "http://127.1/x",
        "http://example.org#@127.0.0.1/",
        "http://example.org?@127.0.0.1/",
    ],
)
@pytest.mark.parametrize("own_user", [False, True])
def test_anything_else_is_not(url: str, own_user: bool) -> None:
    with pytest.raises(NotAllowedError, match="CKPT_ENGINE_ALLOWED_ENGINES says where it may"):
        ask(access(own_user=own_user), url)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "127.0.0.1:8000",
        "",
        "http://",
        "http://[::1",
        "http:///x",
    ],
)
def test_what_is_no_engines_address(url: str) -> None:
    with pytest.raises(ConfigError, match="update_url"):
        ask(access(), url or "x")


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="must not hold a user or a password") as caught:
        ask(access(), "http://me:hunter2@127.0.0.1/x")
    assert "hunter2" not in str(caught.value)


def test_a_list_takes_the_loopback_s_place() -> None:
    allowed = access(engines="engine-7, other:81,10.1.0.0/16,10.3.0.0/16:83,[fd00::1]:82,192.0.2.1,::2")
    for url in (
        "http://engine-7:1/x",
        "http://ENGINE-7/x",
        "http://other:81/x",
        "http://10.1.255.3:7/x",
        "http://10.3.0.1:83/x",
        "http://[fd00::1]:82/x",
        "http://192.0.2.1:5/x",
        "http://[::2]:5/x",
    ):
        ask(allowed, url)
    for url in (
        "http://other:82/x",
        "http://other/x",
        "http://10.2.0.1/x",
        "http://10.3.0.1/x",
        "http://[fd00::1]/x",
        "http://127.0.0.1/x",
        "http://engine-77/x",
    ):
        with pytest.raises(NotAllowedError):
            ask(allowed, url)


@pytest.mark.parametrize("entry", ["a:b", "a:0", "a:65536", "a b", "*", "", "http://a", "a,,b", "unix:run"])
def test_entries_that_are_none(entry: str) -> None:
    with pytest.raises(ConfigError, match="CKPT_ENGINE_ALLOWED_ENGINES"):
        access(engines=entry or "a,")


def test_unix_sockets(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/out").symlink_to("/var/run")
    ask(access(own_user=True), "http://any-name/x", "/run/engine.sock")
    for path in ("/run/engine.sock", "/var/run/docker.sock"):
        with pytest.raises(NotAllowedError, match=f"put unix:{path}, or its directory, into the list"):
            ask(access(), "http://localhost/x", path)
    allowed = access(engines=f"unix:{tmp_path}/in,unix:/run/engine.sock", own_user=True)
    ask(allowed, "http://any-name/x", f"{tmp_path}/in/engine.sock")
    ask(allowed, "http://any-name/x", "/run/engine.sock")
    for path in ("/run/other.sock", f"{tmp_path}/in/../x", f"{tmp_path}/in/out/docker.sock"):
        with pytest.raises(NotAllowedError):
            ask(allowed, "http://localhost/x", path)
    # With Unix sockets alone in the list, nothing is asked over TCP.
    with pytest.raises(NotAllowedError):
        ask(allowed, "http://127.0.0.1/x")
    for path in ("relative.sock", "\0abstract", "/nul\0"):
        with pytest.raises(ConfigError, match="not an absolute path"):
            ask(access(own_user=True), "http://localhost/x", path)


@pytest.fixture
def redirecting() -> Iterator[tuple[str, list[str]]]:
    """A server that sends everybody on to another of its paths: its URL, and the paths asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with answering(Handler) as url:
        yield url, asked


def test_an_engine_s_redirects_are_not_followed(redirecting: tuple[str, list[str]]) -> None:
    url, asked = redirecting
    with pytest.raises(EngineRequestError, match="HTTP 307"):
        call_engine(f"{url}/collective_rpc", "x", timeout=5)
    assert asked == ["/collective_rpc"]


@pytest.mark.parametrize("form", ["one", "in a list", "the second of two"])
def test_no_connection_is_made_to_what_is_not_allowed(form: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.setblocking(False)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x"
        bodies: dict[str, object] = {
            "one": {"update_url": url},
            "in a list": {"engines": [{"update_url": url}]},
            "the second of two": {
                "engines": [
                    {"update_url": "http://engine-7/x", "inference_group_ranks": [0]},
                    {"update_url": url, "inference_group_ranks": [1]},
                ]
            },
        }
        ps = StubServer(0, 2)
        with TestClient(create_app(ps, access=access(engines="engine-7"))) as client:  # type: ignore[arg-type]
            answer = client.post("/v1/checkpoints/a/update", content=json.dumps(bodies[form]), headers=JSON)
        assert (answer.status_code, answer.json()["error_type"]) == (403, "NotAllowedError")
        assert ps.calls == []  # nothing was begun that the other rank would wait in
        with pytest.raises(BlockingIOError):
            trap.accept()


JSON = {"Content-Type": "application/json"}


def test_without_being_told_an_app_allows_as_little_as_it_can() -> None:
    ps = StubServer()
    with TestClient(create_app(ps)) as client:  # type: ignore[arg-type]
        files = client.post("/v1/checkpoints/a/files", json={"files": os.__file__})
        update = client.post("/v1/checkpoints/a/update", json={"update_url": "http://192.0.2.1/"})
    assert (files.status_code, update.status_code, ps.calls) == (403, 403, [])
