"""A parameter server and its worker in one process, as with vLLM's in-process executor. CUDA maps memory and
opens events of other processes only, so that such a worker uses the ring itself."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
import torch
import zmq

from ckpt_engine import ParameterServer
from ckpt_engine.devices import worker_uuid
from ckpt_engine.errors import UpdateError
from ckpt_engine.ipc.receiver import serve_update

DEVICE = "cuda"
SEED = 20261127


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="ce-", dir="/tmp") as sockets:
        monkeypatch.setenv("CKPT_ENGINE_SOCKET_DIR", sockets)
        # Several buckets, and slots that are used again.
        monkeypatch.setenv("CKPT_ENGINE_SLOT_MIB", "1")
        yield


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{number}.weight": torch.randn(100_000, generator=generator) for number in range(30)}


def update(
    ps: ParameterServer, tensors: dict[str, torch.Tensor], fail: bool = False
) -> dict[str, torch.Tensor]:
    """What the worker has received, in this very process."""
    received: dict[str, torch.Tensor] = {}

    def run(bucket: list[tuple[str, torch.Tensor]]) -> None:
        if fail and received:
            raise RuntimeError("injected")
        received.update({name: tensor.clone() for name, tensor in bucket})

    def ask(socket_paths: list[tuple[str, str]]) -> None:
        with zmq.Context() as context:
            index = 0 if DEVICE == "cuda" else None
            status = serve_update(context, socket_paths, worker_uuid(0, DEVICE), index, run=run)
        if status["outcome"] != "committed":
            raise RuntimeError(status["error"])

    ps.register_checkpoint("new", named_tensors=tensors)
    try:
        ps.gather_metas("new")
        assert ps.update("new", ask, timeout=60).buckets > 4
    finally:
        ps.unregister_checkpoint("new")
    return received


def test_updates_within_one_process() -> None:
    """A failed one between them leaves nothing that stands in the way."""
    print(f"seed {SEED}")  # noqa: T201
    with ParameterServer(rank=0, world_size=1, device=DEVICE) as ps:
        for number in range(3):
            tensors = checkpoint(SEED + number)
            received = update(ps, tensors)
            assert received.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(received[name].cpu(), tensor), (number, name)
            with pytest.raises(UpdateError, match="injected"):
                update(ps, tensors, fail=True)
