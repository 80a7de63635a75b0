"""A server behind a Unix socket. SGLang itself listens on none: something in front of it does."""

from __future__ import annotations

import shutil
import socket
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.sglang.parameter_servers import command_line, update_from
from tests.engines.sglang.servers import Checkpoints, Server

pytestmark = pytest.mark.timeout(600)


class Forward(socketserver.BaseRequestHandler):
    """One connection, there and back."""

    port: int

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as behind:
            back = threading.Thread(target=copy, args=(behind, self.request))
            back.start()
            copy(self.request, behind)
            back.join()


def copy(source: socket.socket, sink: socket.socket) -> None:
    """Until either side is closed."""
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return  # the other direction's reader hears of it too


@pytest.fixture
def unix_socket(server: Server) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="sglang-", dir="/tmp"))
    handler = type("ToServer", (Forward,), {"port": server.port})
    with socketserver.ThreadingUnixStreamServer(str(directory / "sglang.sock"), handler) as listener:
        listener.daemon_threads = True
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield directory / "sglang.sock"
        listener.shutdown()
        thread.join()
    shutil.rmtree(directory)


def test_the_command_over_a_unix_socket(
    server: Server, disk_server: Server, checkpoints: Checkpoints, unix_socket: Path
) -> None:
    update_from(server, checkpoints("llama", 2))
    done = command_line(
        *("--checkpoint-path", checkpoints("llama", 1), "--endpoint", "http://127.0.0.1:9"),
        *("--uds", unix_socket, "--weight-version", "over-uds"),
    )
    assert done.returncode == 0, f"{done.stderr}\n{server.tail()}"
    assert server.state() == disk_server.state()
    assert server.generate()[1] == "over-uds"
