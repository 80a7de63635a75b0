"""A worker process: `serve_update` into a dict of tensors, driven by JSON lines on stdin.

Each request is one line {"handles": [[uuid, handle], ...], "fault": {...}}, each answer one line: the
status of `serve_update` and the digests of all tensors held after it. Faults:

    {"kind": "run", "bucket": i, "action": A}   at bucket i (-1: the last): A is raise, exit, stop or device
    {"kind": "post_hook", "action": A}          in the post hook
    {"kind": "missing"}                         looks for a device that nobody serves
    {"kind": "writes"}                          writes over each tensor once it is loaded
    {"kind": "slow"}                            on CUDA: enqueues 50 ms of work before each bucket's copies

With TEST_DEVICE=cuda the tensors are copied into slices of one fused parameter on the device (cuda:TEST_GPU),
without a wait: only the events keep a slot from being overwritten before it was read.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
import zmq

from ckpt_engine.devices import worker_uuid
from ckpt_engine.ipc.receiver import serve_update


def digest(tensor: torch.Tensor) -> str:
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data).hexdigest()


def act(action: str, where: str) -> None:
    if action == "exit":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "device":
        # Found by the device only later, when nobody waits for it any more.
        torch.zeros(4, device="cuda")[torch.tensor([10**6], device="cuda")]
        return
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    raise RuntimeError(f"injected in {where}")


def main() -> None:
    torch.set_num_threads(1)
    cuda = os.environ.get("TEST_DEVICE") == "cuda"
    index = int(os.environ.get("TEST_GPU", "0")) if cuda else None
    if index is not None:
        torch.cuda.set_device(index)
    uuid = worker_uuid(index or 0, "cuda" if cuda else "cpu")
    weights: dict[str, torch.Tensor] = {}
    fused = torch.zeros(512 * 1024 * 1024 if cuda else 0, dtype=torch.uint8, device="cuda" if cuda else "cpu")
    used = 0

    def load(name: str, tensor: torch.Tensor) -> None:
        nonlocal used
        if not cuda:
            weights[name] = tensor.clone()
            return
        held = weights.get(name)
        if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
            part = fused[used : used + tensor.nbytes]
            used += -(-tensor.nbytes // 256) * 256
            weights[name] = held = part.view(tensor.dtype).view(tensor.shape)
        held.copy_(tensor, non_blocking=True)

    context = zmq.Context()
    sys.stdout.write(json.dumps({"pid": os.getpid()}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        fault = request.get("fault") or {}
        seen = 0

        def run(tensors: list[tuple[str, torch.Tensor]], fault: dict = fault) -> None:
            nonlocal seen
            if fault.get("kind") == "run" and fault["bucket"] == seen:
                act(fault["action"], f"bucket {seen}")
            if fault.get("kind") == "slow" and cuda:
                torch.cuda._sleep(100_000_000)
            if "progress" in fault:
                Path(fault["progress"]).write_text(str(seen))
            for name, tensor in tensors:
                load(name, tensor)
                if fault.get("kind") == "writes":
                    tensor.zero_()
            seen += 1

        def post_hook(fault: dict = fault) -> None:
            if fault.get("kind") == "post_hook":
                act(fault["action"], "post_hook")

        device = "CPU-nowhere-0" if fault.get("kind") == "missing" else uuid
        status = serve_update(context, request["handles"], device, index, run=run, post_hook=post_hook)
        answer = {
            "status": status,
            "digests": {name: digest(tensor) for name, tensor in weights.items()},
            "threads": len(os.listdir("/proc/self/task")),
            "fds": len(os.listdir("/proc/self/fd")),
        }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
