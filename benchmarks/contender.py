"""One system of `benchmarks.compare`, alone in its process: a rank, and its worker in another process.

Reads a word from each line of stdin, and answers with a JSON line of what it did. `reference` is
checkpoint-engine as PyPI has it, through its public functions.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.fleet import Context, Handles, Tensors, Worker, receive_ours, shapes_of, share_of, sum_of

NAME = "benchmark"


class System(Protocol):
    def register(self, **what: Any) -> None: ...  # noqa: ANN401

    def gather(self) -> None: ...

    def update(self, ask: Callable[[Handles], object]) -> None: ...

    def unregister(self) -> None: ...


class Ours:
    receive = staticmethod(receive_ours)

    def __init__(self) -> None:
        from ckpt_engine import ParameterServer

        self._ps = ParameterServer(device="cuda", gpu_count=1)

    def register(self, **what: Any) -> None:  # noqa: ANN401
        self._ps.register_checkpoint(NAME, **what)

    def gather(self) -> None:
        self._ps.gather_metas(NAME)

    def update(self, ask: Callable[[Handles], object]) -> None:
        self._ps.update(NAME, ask, timeout=600)

    def unregister(self) -> None:
        self._ps.unregister_checkpoint(NAME)


def receive_reference(
    context: Context, handles: Handles, uuid: str, index: int | None, run: Callable[[Tensors], None]
) -> dict[str, Any]:
    worker = importlib.import_module("checkpoint_engine.worker")
    worker.update_weights_from_ipc(context, dict(handles)[uuid], index, run=run)
    return {"outcome": "committed"}


class Reference:
    receive = staticmethod(receive_reference)

    def __init__(self) -> None:
        self._ps = importlib.import_module("checkpoint_engine.ps").ParameterServer(auto_pg=True)

    def register(self, **what: Any) -> None:  # noqa: ANN401
        self._ps.register_checkpoint(NAME, **what, use_inplace_pin_memory=False)

    def gather(self) -> None:
        self._ps.gather_metas(NAME)

    def update(self, ask: Callable[[Handles], object]) -> None:
        self._ps.update(NAME, ask)

    def unregister(self) -> None:
        self._ps.unregister_checkpoint(NAME)


SYSTEMS: dict[str, type[Ours] | type[Reference]] = {"ours": Ours, "reference": Reference}


class Contender:
    def __init__(self, name: str, nbytes: int, tensor_mib: float, files: list[str]) -> None:
        self._shapes = shapes_of(nbytes, tensor_mib)
        self._tensors = share_of(self._shapes, 0, 1)
        self._expected = sum_of(self._tensors)
        self._files = files
        self._worker = Worker("cuda", 0, self._shapes, SYSTEMS[name].receive)
        self._worker.wait_until_ready()
        self._system: System = SYSTEMS[name]()

    def register_tensors(self) -> float:
        return seconds_of(lambda: self._system.register(named_tensors=self._tensors))

    def register_files(self) -> float:
        return seconds_of(lambda: self._system.register(files=self._files))

    def gather(self) -> float:
        return seconds_of(self._system.gather)

    def update(self) -> float:
        seconds = seconds_of(lambda: self._system.update(self._worker.update))
        got = self._worker.sum()
        if got != self._expected:
            raise RuntimeError(f"the worker's parameters sum to {got}, not {self._expected}")
        return seconds

    def unregister(self) -> float:
        return seconds_of(self._system.unregister)

    def close(self) -> None:
        self._worker.close()

    def forget(self) -> float:
        """Of the tensors, whose memory is needed for larger checkpoints."""
        self._tensors.clear()
        return 0.0


def seconds_of(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system", choices=sorted(SYSTEMS))
    parser.add_argument("--gib", type=float, required=True)
    parser.add_argument("--tensor-mib", type=float, required=True)
    parser.add_argument("--files", type=Path, required=True, help="a directory of .safetensors files")
    arguments = parser.parse_args()
    # Whatever either of them prints to stdout is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    files = sorted(map(str, arguments.files.glob("*.safetensors")))
    contender = Contender(arguments.system, int(arguments.gib * 2**30), arguments.tensor_mib, files)
    answers.write('"ready"\n')
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(getattr(contender, line.strip())()) + "\n")
        answers.flush()
    contender.close()


if __name__ == "__main__":
    main()
