"""What a worker compares with the digests that were made when the checkpoint was registered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from ckpt_engine.checksum import DIGEST_NBYTES, checksum, digest_of
from ckpt_engine.errors import ConfigError, CorruptionError
from ckpt_engine.ipc.messages import Begin
from ckpt_engine.ipc.views import RingBytes

logger = logging.getLogger(__name__)

NAMES_SHOWN = 16

Loaded = Callable[[str], torch.Tensor | Sequence[torch.Tensor] | None]
"""The engine's own tensor that holds just the bytes of an update's tensor once it is loaded, or several, each
of which does; none: no tensor does (they are sharded or converted)."""


@runtime_checkable
class LoadedInPart(Protocol):
    """A `Loaded` of an engine that keeps a part of some tensors.

    `arriving`: the parts of an arriving tensor that it will keep, where it does not keep all of it; `kept`:
    what it holds of them once they are loaded, in the same order; empty: it cannot tell.
    """

    def __call__(self, name: str, /) -> Sequence[torch.Tensor]: ...

    def arriving(self, name: str, tensor: torch.Tensor, /) -> Sequence[torch.Tensor]: ...

    def kept(self, name: str, /) -> Sequence[torch.Tensor]: ...


class Verification:
    """Of one update. `counts`: how many tensors were compared as they `arrived`, and (all of it, or the parts
    of it that the engine keeps) as they were `loaded`; `not_compared`: the names of the others, in full.

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
        # Sums of the parts that the engine keeps, as they arrived, by bucket and tensor.
        self._parts: dict[tuple[int, int], list[torch.Tensor]] = {}

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
        if self._begin.verify == "full" and isinstance(self._loaded, LoadedInPart):
            self._note_parts(index, self._loaded)
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
            numbers, sums = [], []
            for number, tensor in enumerate(bucket.tensors):
                held = self._held(tensor.name)
                if held:
                    numbers += [number] * len(held)
                    sums += [_sums_of(own) for own in held]
                elif not self._check_parts(index, number):
                    left_out.append(tensor.name)
                    continue
                self.counts["loaded"] += 1
            if sums:
                self._compare(index, numbers, torch.stack(sums), "was loaded as")
        self.not_compared = tuple(left_out)
        if left_out and not self.counts["loaded"]:
            raise ConfigError(
                f"verify='full': no tensor of this engine holds one of the {len(left_out)} of the checkpoint "
                f"as it is ({left_out[0]!r} first), so nothing could be compared: use verify='transport'"
            )
        if left_out:
            shown = ", ".join(left_out[:NAMES_SHOWN]) + " ..." * (len(left_out) > NAMES_SHOWN)
            logger.warning("verify='full': %d tensors were not compared as loaded: %s", len(left_out), shown)

    def let_go(self) -> None:
        """Of the ring."""
        self._ring = None

    def _held(self, name: str) -> Sequence[torch.Tensor]:
        held = None if self._loaded is None else self._loaded(name)
        if held is None:
            return ()
        return (held,) if isinstance(held, torch.Tensor) else held

    def _note_parts(self, index: int, loaded: LoadedInPart) -> None:
        assert self._ring is not None
        bucket = self._begin.buckets[index]
        for number, layout in enumerate(bucket.tensors):
            data = self._ring.view(bucket.ring_offset + layout.offset, layout.nbytes)
            if layout.nbytes:
                tensor = data.view(getattr(torch, layout.dtype)).view(layout.shape)
                self._parts[index, number] = [_sums_of(part) for part in loaded.arriving(layout.name, tensor)]

    def _check_parts(self, index: int, number: int) -> bool:
        """Whether what the engine keeps of a tensor could be compared. Raises CorruptionError."""
        arrived = self._parts.get((index, number))
        if not arrived or not isinstance(self._loaded, LoadedInPart):
            return False
        name = self._begin.buckets[index].tensors[number].name
        kept = [_sums_of(part) for part in self._loaded.kept(name)]
        if len(kept) != len(arrived):
            return False
        for wanted, found in zip(torch.stack(arrived).cpu(), torch.stack(kept).cpu(), strict=True):
            if not torch.equal(wanted, found):
                raise CorruptionError(
                    f"tensor {name!r} (bucket {index}): the part of it that this rank keeps was loaded as "
                    f"other bytes than arrived: their digest is {digest_of(found).hex()}, not "
                    f"{digest_of(wanted).hex()}. Memory or the engine's load is broken here",
                    bucket=index,
                )
        return True

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


def _sums_of(tensor: torch.Tensor) -> torch.Tensor:
    return checksum(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
