"""What a worker compares with the digests that were made when the checkpoint was registered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from ckpt_engine.checksum import DIGEST_NBYTES, checksum, digest_of
from ckpt_engine.errors import ConfigError, CorruptionError
from ckpt_engine.ipc.messages import Begin
from ckpt_engine.ipc.views import RingBytes

logger = logging.getLogger(__name__)

Loaded = Callable[[str], torch.Tensor | None]
"""The engine's own tensor that holds just the bytes of an update's tensor once it is loaded; None: no tensor
does (they are fused, sharded or converted)."""


class Verification:
    """Of one update. `counts`: how many tensors were compared as they `arrived`, and as they were `loaded`;
    `not_compared`: the names of those that no tensor of the engine holds as they are, in full.

    Raises:
        ConfigError: all is to be verified, and the engine cannot tell what it has loaded.
    """

    def __init__(self, begin: Begin, ring: RingBytes, loaded: Loaded | None, *, at_once: bool) -> None:
        if begin.verify == "full" and loaded is None:
            raise ConfigError(
                "verify='full': the adapter of this engine cannot compare what was loaded: use "
                "verify='transport'"
            )
        self.counts = {"arrived": 0, "loaded": 0}
        self.not_compared: tuple[str, ...] = ()
        self._begin = begin
        self._ring: RingBytes | None = ring
        self._loaded = loaded
        self._at_once = at_once
        self._waiting: list[tuple[int, torch.Tensor]] = []

    def bucket(self, index: int) -> None:
        """It lies in the ring. On a device its sums are enqueued, and compared by `check_arrived`.

        Raises:
            CorruptionError: other bytes than were registered.
        """
        assert self._ring is not None
        bucket = self._begin.buckets[index]
        if not bucket.tensors:
            return
        sums = [
            checksum(self._ring.view(bucket.ring_offset + tensor.offset, tensor.nbytes))
            for tensor in bucket.tensors
        ]
        self._waiting.append((index, torch.stack(sums)))
        if self._at_once:
            self.check_arrived()

    def check_arrived(self) -> None:
        """Of all buckets so far. Raises CorruptionError."""
        waiting, self._waiting = self._waiting, []
        for index, sums in waiting:
            self.counts["arrived"] += len(sums)
            self._compare(index, range(len(sums)), sums, "arrived with")

    def check_loaded(self) -> None:
        """Of the engine's own tensors, where they can be told.

        Raises:
            CorruptionError: one holds other bytes than were registered.
            ConfigError: none could be told, so nothing was verified in full.
        """
        if self._begin.verify != "full" or self._loaded is None:
            return
        left_out = []
        for index, bucket in enumerate(self._begin.buckets):
            own = {number: self._loaded(tensor.name) for number, tensor in enumerate(bucket.tensors)}
            sums = {
                number: checksum(held.detach().contiguous().reshape(-1).view(torch.uint8))
                for number, held in own.items()
                if held is not None
            }
            left_out += [tensor.name for number, tensor in enumerate(bucket.tensors) if number not in sums]
            if sums:
                self.counts["loaded"] += len(sums)
                self._compare(index, tuple(sums), torch.stack(list(sums.values())), "was loaded as")
        self.not_compared = tuple(left_out)
        if left_out and not self.counts["loaded"]:
            raise ConfigError(
                f"verify='full': no tensor of this engine holds one of the {len(left_out)} of the checkpoint "
                f"as it is ({left_out[0]!r} first), so nothing could be compared: use verify='transport'"
            )
        if left_out:
            logger.warning("verify='full': %d tensors were not compared: %s", len(left_out), left_out)

    def let_go(self) -> None:
        """Of the ring."""
        self._ring = None

    def _compare(self, index: int, numbers: Sequence[int], sums: torch.Tensor, how: str) -> None:
        """Of tensors `numbers` of bucket `index`; waits once for all of them."""
        for number, words in zip(numbers, sums.cpu(), strict=True):
            found = digest_of(words)
            wanted = self._begin.digests[index][number * DIGEST_NBYTES : (number + 1) * DIGEST_NBYTES]
            if found != wanted:
                name = self._begin.buckets[index].tensors[number].name
                message = (
                    f"tensor {name!r} (bucket {index}) {how} other bytes than were registered: their digest "
                    f"is {found.hex()}, not {wanted.hex()}. Memory or a transfer is broken between the file "
                    "and here"
                )
                raise CorruptionError(message, bucket=index)
