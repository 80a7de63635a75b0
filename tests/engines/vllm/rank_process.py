"""A parameter server's process, driven by JSON lines on stdin; it answers on stdout.

A request is {"checkpoint": directory, "endpoint" and "uds": the engine's, "native", "timeout", "tells"}, an
answer {"report": ...} or {"error", "type", "record", "seconds"}. With "tells" the engine is not asked: rank 0
says {"handles": [...]} first, and waits for a line. With "withholds", a bucket's index, the workers never
hear of that bucket nor of later ones: such an update takes too long, with signs of life.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any
from unittest.mock import patch

from ckpt_engine_vllm import VllmServer

from ckpt_engine import ParameterServer
from ckpt_engine.checkpoint import split_checkpoint
from ckpt_engine.errors import UpdateError
from ckpt_engine.ipc.sender import WorkerChannel


def update(ps: ParameterServer, request: dict[str, Any]) -> dict[str, Any]:
    def ask(socket_paths: list[tuple[str, str]]) -> None:
        if ps.rank == 0 and request.get("tells"):
            sys.stdout.write(json.dumps({"handles": socket_paths}) + "\n")
            sys.stdout.flush()
            sys.stdin.readline()
        elif ps.rank == 0:
            engine = VllmServer(
                endpoint=request["endpoint"], uds=request["uds"], native=request["native"], api_key="any"
            )
            engine.receive(socket_paths, request["timeout"] - 10)

    announce = WorkerChannel.announce

    def announce_some(channel: WorkerChannel, index: int) -> None:
        if request.get("withholds") is None or index < request["withholds"]:
            announce(channel, index)

    name = request["checkpoint"]
    started = time.monotonic()
    try:
        ps.register_checkpoint(name, files=split_checkpoint(name, ps.rank, ps.world_size))
        try:
            ps.gather_metas(name)
            with patch.object(WorkerChannel, "announce", announce_some):
                report = ps.update(name, ask, timeout=request["timeout"])
        finally:
            ps.unregister_checkpoint(name)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        record = error.record.to_dict() if isinstance(error, UpdateError) else None
        seconds = time.monotonic() - started
        return {"error": str(error), "type": type(error).__name__, "record": record, "seconds": seconds}
    return {"report": {"version": report.version, "buckets": report.buckets, "tensors": report.tensors}}


def main() -> None:
    with ParameterServer(device=os.environ.get("TEST_DEVICE", "cpu")) as ps:
        for line in sys.stdin:
            sys.stdout.write(json.dumps(update(ps, json.loads(line))) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
