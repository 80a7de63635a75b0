"""A worker process of vllm-ascend's kind: NPUWorker's attributes, our extension mixed in, a tiny model.

Driven by JSON lines on stdin: {"handles": [[uuid, handle], ...], "fault": {...}}; each answer is one line:
the status, the digests of what the model holds, and whether its parameters lie where they lay. Faults:

    {"kind": "identity", "scenario": S}          npu-smi answers as in that scenario
    {"kind": "run", "bucket": i, "action": A}    at bucket i: A is raise or exit
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from ckpt_engine_ascend import NpuColocateWorkerExtension, identity
from ckpt_engine_vllm import VllmColocateWorkerExtension

from ckpt_engine.devices.npu import load as load_npu
from tests.support.worker import digest


def vllm_config(quantization: str | None = None, speculative: object = None) -> SimpleNamespace:
    """The parts of vLLM's that an update looks at."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model="main",
            quantization=quantization,
            enforce_eager=True,
            hf_text_config=SimpleNamespace(num_hidden_layers=4),
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, enable_expert_parallel=False
        ),
        compilation_config=SimpleNamespace(cudagraph_mode=None),
        lora_config=None,
        speculative_config=speculative,
    )


class WorkerBase:
    """What NPUWorker has, and what an extension therefore must not bring."""

    def __init__(self, local_rank: int) -> None:
        from tests.engines.ascend.npu_model_for_tests import TinyModel

        npu = load_npu()
        npu.set_device(local_rank)
        self.local_rank = self.rank = local_rank
        # 0.11's leaves it None.
        self.device = torch.device("npu", local_rank) if os.environ.get("TEST_WORKER_DEVICE") else None
        self.model = TinyModel(torch.device("npu", local_rank))
        self.model_runner = SimpleNamespace(model=self.model)
        self.vllm_config = vllm_config()

    def get_model(self) -> torch.nn.Module:
        return self.model


class Worker(WorkerBase, NpuColocateWorkerExtension):
    """As vLLM's executor makes it."""


class VllmWorker(WorkerBase, VllmColocateWorkerExtension):
    """The same with the extension for all of vLLM's devices."""


def act(fault: dict[str, Any], seen: int) -> None:
    if fault.get("kind") == "run" and fault["bucket"] == seen:
        if fault["action"] == "exit":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(f"injected in bucket {seen}")


def main() -> None:
    torch.set_num_threads(1)
    if "TEST_SAMPLE_PID" in os.environ:
        os.environ[f"FAKE_PID__{os.environ['TEST_SAMPLE_PID']}"] = str(os.getpid())
    kind = VllmWorker if os.environ.get("TEST_EXTENSION") == "vllm" else Worker
    worker = kind(int(os.environ["TEST_INDEX"]))
    load_weights = worker.model.load_weights
    places = worker.model.places()
    sys.stdout.write(json.dumps({"pid": os.getpid()}) + "\n")
    sys.stdout.flush()
    scenario = os.environ["FAKE_NPU_SMI_SCENARIO"]
    for line in sys.stdin:
        request = json.loads(line)
        fault = request.get("fault") or {}
        seen = 0

        def load(weights: Iterable[tuple[str, torch.Tensor]], fault: dict[str, Any] = fault) -> None:
            nonlocal seen
            act(fault, seen)
            seen += 1
            load_weights(weights)

        worker.model.load_weights = load  # type: ignore[method-assign]
        identity._NUMBERS.clear()
        os.environ["FAKE_NPU_SMI_SCENARIO"] = fault.get("scenario", scenario)
        status = worker.update_weights_from_ipc(request["handles"])
        answer = {
            "status": status,
            "state": worker.ckpt_engine_status(),
            "digests": {name: digest(tensor) for name, tensor in worker.model.as_checkpoint().items()},
            "in_place": worker.model.places() == places,
        }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
