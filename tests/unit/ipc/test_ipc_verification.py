"""What workers compare, on devices at the end of the buckets: each tensor with its own digest, and in which
bucket it came; in full what the engine holds as it is, and never nothing in silence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
import zmq
from ends_for_ipc_tests import TENSORS, Receiver, Sender, begin_of

from ckpt_engine.checksum import checksum, digest_of
from ckpt_engine.errors import ConfigError, CorruptionError, UpdateError
from ckpt_engine.ipc import receiver
from ckpt_engine.ipc.messages import Begin
from ckpt_engine.ipc.verification import Verification


@dataclass
class Bytes:
    """A ring's, which the tests fill."""

    memory: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.memory.numel()

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        return self.memory[offset : offset + nbytes]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def begin(verify: str = "transport") -> Begin:
    digests = tuple(digest_of(checksum(bytes_of(tensor))) for tensor in TENSORS.values())
    return msgspec.structs.replace(begin_of(TENSORS), verify=verify, digests=digests)


def received(verification: Verification, ring: Bytes, *, flip: str = "") -> None:
    for index, (name, tensor) in enumerate(TENSORS.items()):
        layout = begin().buckets[index]
        data = bytes_of(tensor).clone()
        if name == flip:
            data[1] ^= 2
        ring.view(layout.ring_offset + layout.tensors[0].offset, tensor.nbytes).copy_(data)
        verification.bucket(index)


@pytest.mark.parametrize("at_once", [True, False], ids=["host", "device"])
@pytest.mark.parametrize(("index", "name"), list(enumerate(TENSORS)))
def test_the_bucket_of_what_arrived_wrong_is_told(at_once: bool, index: int, name: str) -> None:
    ring = Bytes(torch.zeros(1 << 20, dtype=torch.uint8))
    verification = Verification(begin(), ring, None, at_once=at_once)
    with pytest.raises(CorruptionError, match=f"tensor '{name}' .*arrived with other bytes") as caught:
        received(verification, ring, flip=name)
        assert not at_once
        verification.check_arrived()
    assert caught.value.bucket == index


@pytest.mark.parametrize("at_once", [True, False], ids=["host", "device"])
def test_a_parameter_server_is_told_the_same_of_hosts_and_devices(
    context: zmq.Context[zmq.Socket[bytes]], base: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    monkeypatch.setattr(
        receiver, "Verification", lambda *of, at_once: Verification(*of, at_once=use), raising=True
    )
    use = at_once
    with Sender(context, base) as sender:
        sender.plan = begin()
        sender.tensors[1] = sender.tensors[1].clone()
        sender.tensors[1][7] += 1
        worker = Receiver(context, sender.handle)
        with pytest.raises(UpdateError) as caught:
            sender.update()
        sender.channel.abort("corrupted")
        worker.error()
    record = caught.value.record
    assert (record.error_type, record.stage) == ("CorruptionError", "buckets")
    assert (record.bucket, tuple(record.tensors)) == (1, ("b",))


def verified(loaded: dict[str, torch.Tensor]) -> Verification:
    ring = Bytes(torch.zeros(1 << 20, dtype=torch.uint8))
    verification = Verification(begin("full"), ring, loaded.get, at_once=False)
    received(verification, ring)
    verification.check_arrived()
    verification.check_loaded()
    return verification


def test_what_was_compared_is_counted_and_the_rest_is_named() -> None:
    whole = verified(TENSORS)
    assert (whole.counts, whole.not_compared) == ({"arrived": 3, "loaded": 3}, ())
    part = verified({"b": TENSORS["b"]})
    assert (part.counts, part.not_compared) == ({"arrived": 3, "loaded": 1}, ("a", "c"))


def test_what_was_loaded_wrong_is_told_with_its_bucket() -> None:
    wrong = TENSORS["b"].clone()
    wrong[5] += 1
    with pytest.raises(CorruptionError, match=r"'b' \(bucket 1\) was loaded as other bytes") as caught:
        verified(TENSORS | {"b": wrong})
    assert caught.value.bucket == 1


def test_in_full_with_nothing_to_compare_is_no_success() -> None:
    with pytest.raises(ConfigError, match="no tensor of this engine holds one of the 3"):
        verified({})


class Halves:
    """Holds the first half of each tensor, but for `c`, which it cannot tell."""

    def __init__(self) -> None:
        self.held = {name: tensor.reshape(-1).clone() for name, tensor in TENSORS.items()}

    def __call__(self, name: str) -> list[torch.Tensor]:
        return []

    def arriving(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        flat = tensor.reshape(-1)
        return [flat[: flat.numel() // 2]]

    def kept(self, name: str) -> list[torch.Tensor]:
        flat = self.held[name]
        return [] if name == "c" else [flat[: flat.numel() // 2]]


def in_halves(halves: Halves) -> Verification:
    ring = Bytes(torch.zeros(1 << 20, dtype=torch.uint8))
    verification = Verification(begin("full"), ring, halves, at_once=False)
    received(verification, ring)
    ring.memory.fill_(0xFF)
    verification.check_arrived()
    verification.check_loaded()
    return verification


def test_parts_that_an_engine_keeps_are_compared_as_they_arrived() -> None:
    verification = in_halves(Halves())
    assert verification.counts == {"arrived": 3, "loaded": 2}
    assert verification.not_compared == ("c",)
    halves = Halves()
    halves.held["a"][-1] += 1
    in_halves(halves)  # it keeps nothing of that
    halves.held["a"][0] += 1
    with pytest.raises(CorruptionError, match=r"'a' \(bucket 0\): the part of it that this rank keeps"):
        in_halves(halves)
