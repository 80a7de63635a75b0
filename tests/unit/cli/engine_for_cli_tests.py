"""An engine for the tests of the commands."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import zmq

from ckpt_engine.ipc.receiver import serve_update


class Engine:
    """An engine of one worker for each device, on which the receiver really runs; `fail` makes its loading
    raise."""

    def __init__(self, *device_uuids: str) -> None:
        self.device_uuids = device_uuids or ("CPU-here-0",)
        self.weights: dict[str, torch.Tensor] = {}
        self.requests: list[dict[str, Any]] = []
        self.fail = False
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({"status": "ok", "tp_size": len(engine.device_uuids)})

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
                key = self.headers.get("Authorization")
                engine.requests.append(request | {"path": self.path, "authorization": key})
                if "zmq_handles" in request:  # SGLang's way
                    found = engine.receive_all([list(pair) for pair in request["zmq_handles"].items()])
                    self.answer({"success": all(one["outcome"] == "committed" for one in found)})
                elif "args" in request:
                    self.answer({"results": engine.receive_all(request["args"][0])})
                else:  # a route of vLLM's that asks nothing of its workers
                    self.answer({"success": True})

            def answer(self, body: dict[str, Any]) -> None:
                text = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def receive_all(self, handles: list[list[str]]) -> list[dict[str, Any]]:
        """What each worker says, in order."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda uuid: self.receive(handles, uuid), self.device_uuids))

    def receive(self, handles: list[list[str]], device_uuid: str) -> dict[str, Any]:
        with zmq.Context() as context:
            return serve_update(context, handles, device_uuid, None, run=self._load)

    def _load(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        if self.fail:
            raise RuntimeError("the engine cannot take it")
        self.weights.update({name: tensor.clone() for name, tensor in weights})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
