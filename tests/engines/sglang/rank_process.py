"""One rank of an update of a server with several: `python -m tests.engines.sglang.rank_process REQUEST`.

REQUEST is JSON with `url`, `checkpoint` and `fault`. Faults:

    {"kind": "exit" | "stop", "after": n}   kills or stops itself when its worker has loaded n bytes
    {"kind": "without", "device": uuid}     asks the engine (rank 0) without this device's handle

The answer is a line of JSON: `outcome`, `error`, `seconds`, and the `message` of SGLang (rank 0).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import torch
from ckpt_engine_sglang.client import SglangServer

from ckpt_engine import ParameterServer
from ckpt_engine.checkpoint import split_checkpoint
from ckpt_engine.errors import CkptEngineError


def main() -> None:
    torch.set_num_threads(1)
    request = json.loads(sys.argv[1])
    fault: dict[str, Any] = request["fault"]
    answer: dict[str, Any] = {"outcome": "committed", "error": "", "message": ""}
    server = SglangServer(request["url"])

    def on_progress(done: int, _total: int) -> None:
        if fault.get("kind") in ("exit", "stop") and done >= fault["after"]:
            os.kill(os.getpid(), signal.SIGKILL if fault["kind"] == "exit" else signal.SIGSTOP)

    began = time.monotonic()
    with ParameterServer(device="cpu") as ps:

        def ask(paths: list[tuple[str, str]]) -> None:
            if ps.rank == 0:
                asked = [path for path in paths if path[0] != fault.get("device")]
                answer["message"] = server.update(asked, 60.0, weight_version=request["checkpoint"])

        ps.register_checkpoint("new", files=split_checkpoint(request["checkpoint"], ps.rank, ps.world_size))
        ps.gather_metas("new", timeout=60)
        try:
            began = time.monotonic()
            ps.update("new", ask, timeout=80, on_progress=on_progress)
        except CkptEngineError as error:
            answer |= {"outcome": type(error).__name__, "error": str(error)}
        answer["seconds"] = time.monotonic() - began
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
