"""What checkpoints register for P2P, and for how long: on a stand-in that, as a driver, asks the kernel.

Files taken in place follow the rules of RDMA devices; the shared memory pool is registered once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from files_in_memory_for_tests import files_in, two_files
from pinner_for_tests import FakePinner, permissions_of

from ckpt_engine.checkpoint import CheckpointRegistry, HostCheckpoint, mapped_file
from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import P2PError
from ckpt_engine.metadata import layout_digest
from ckpt_engine.transport.leases import Lease, Share
from ckpt_engine.transport.mooncake_store import MooncakeStore
from ckpt_engine.transport.p2p import Piece
from ckpt_engine.update.serving import Serving
from tests.support.fake_mooncake import FakeEngine, FakeNetwork


class Side:
    """An owner that serves over `transport`, on a stand-in for mooncake."""

    def __init__(self, transport: str) -> None:
        self.network = FakeNetwork()
        self.engine: FakeEngine = self.network.engine("10.0.0.1:1", rdma=transport == "rdma")
        self.serving = Serving(
            lambda: MooncakeStore(self.engine, "10.0.0.1:1", transport), "127.0.0.1", max_readers=1
        )
        _, _, self.leases = self.serving.start()

    def read(self, held: HostCheckpoint, buffer: int) -> torch.Tensor:
        """A host buffer's bytes, as another rank gets them, at the address that metas tell."""
        meta = held.buffers[buffer]
        here = torch.zeros(meta.nbytes, dtype=torch.uint8)
        reader = MooncakeStore(self.network.engine("10.0.0.2:1"), "10.0.0.2:1", "rdma")
        reader.register(here.data_ptr(), meta.nbytes)
        piece = Piece(local=here.data_ptr(), remote=meta.address, nbytes=meta.nbytes)
        read = reader.start_read("10.0.0.1:1", [piece])
        while not read.poll():
            pass
        reader.close()
        return here


@pytest.fixture
def registry(shm: Path) -> Iterator[CheckpointRegistry]:
    assert shm.exists()  # its end, which looks for maps, comes after this one's
    with FakePinner() as pinner:
        made = CheckpointRegistry(threads=2, pinner=pinner)
        yield made
        made.close()


def register(registry: CheckpointRegistry, shm: Path) -> HostCheckpoint:
    two_files(shm)
    return registry.register("c", files=files_in(shm), use_inplace_pin_memory=True)


@pytest.mark.parametrize(("transport", "permissions"), [("rdma", {"rw-s"}), ("tcp", {"r--s"})])
def test_they_are_registered_where_they_are(
    registry: CheckpointRegistry, shm: Path, transport: str, permissions: set[str]
) -> None:
    """No byte is copied; only a driver's registration makes the pages writable."""
    side = Side(transport)
    held = register(registry, shm)
    assert all(permissions_of(file.address, file.nbytes) == {"r--s"} for file in held.files)
    side.serving.offer(held)
    assert side.engine.registered == {file.address: file.nbytes for file in held.files}
    assert all(permissions_of(file.address, file.nbytes) == permissions for file in held.files)
    for number, meta in enumerate(held.buffers):
        assert torch.equal(side.read(held, number), held.view(number, 0, meta.nbytes))
    registry.unregister("c")
    assert side.engine.registered == {}
    side.serving.close()


def test_a_file_that_may_not_be_written_is_an_error_that_says_so(
    registry: CheckpointRegistry, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TCP it can be read all the same."""
    real = os.open

    def refuses(path: str, flags: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags)

    with monkeypatch.context() as patch:
        patch.setattr(mapped_file.os, "open", refuses)
        held = register(registry, shm)
    side = Side("rdma")
    with pytest.raises(P2PError, match="cannot be written by this user: an RDMA device needs"):
        side.serving.offer(held)
    assert side.engine.registered == {}
    side.serving.close()
    other = Side("tcp")
    other.serving.offer(held)
    assert torch.equal(other.read(held, 0), held.view(0, 0, held.buffers[0].nbytes))
    other.serving.close()


def test_a_refilled_pool_registers_nothing_and_its_old_metas_read_nothing(
    registry: CheckpointRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other bytes at the same addresses under the same name: only the epoch tells."""
    side = Side("rdma")
    calls: list[int] = []
    real = side.engine.batch_register_memory
    monkeypatch.setattr(
        side.engine, "batch_register_memory", lambda *given: (calls.append(1), real(*given))[1]
    )
    shares: list[Share] = []
    for version in range(3):
        tensors = {"t": torch.full((1000,), float(version))}
        held = registry.register("c", named_tensors=tensors, use_shared_memory_pool=True)
        side.serving.offer(held)
        shares.append(
            Share(
                address=side.leases,
                session=side.serving.session,
                checkpoint="c",
                epoch=held.epoch,
                layout=layout_digest(held.buffers),
            )
        )
        for old in shares[:-1]:
            assert old.layout == shares[-1].layout
            with pytest.raises(P2PError, match="was registered anew: its metas are out of date"):
                Lease.take(old, Deadline.after(30))
        lease = Lease.take(shares[-1], Deadline.after(30))
        assert torch.equal(side.read(held, 0)[:4000].view(torch.float32), tensors["t"])
        lease.check()
        lease.release()
        side.serving.withdraw("c", Deadline.after(30))
        registry.unregister("c")
    assert len(calls) == 1
    registry.unregister("c", force=True)
    assert side.engine.registered == {}
    side.serving.close()
