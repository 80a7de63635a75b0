"""How a joiner lays out what it keeps: a place for each bucket that it reads, with host buffers in it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from ckpt_engine.metadata import HostBufferMeta, TensorMeta, align_up
from ckpt_engine.planning.plan import PlannedBucket
from ckpt_engine.planning.sources import Sources


class KeptLayout:
    """Of one receiver, in the order of its reads.

    `places`: each bucket's start and bytes, in memory of `nbytes`; `present[index]`: how many of the host
    buffers are there once bucket `index` has come, with those before it.
    """

    def __init__(self, items: Sequence[PlannedBucket], sources: Sources) -> None:
        self.places: list[tuple[int, int]] = []
        self.present: dict[int, int] = {}
        self.nbytes = 0
        self._runs: list[tuple[int, int, str, tuple[TensorMeta, ...]]] = []
        for item in items:
            self.places.append((self.nbytes, item.nbytes))
            self._runs += [
                (self.nbytes, item.nbytes, origin, tensors) for origin, tensors in _runs_of(item, sources)
            ]
            self.present[item.index] = len(self._runs)
            self.nbytes = align_up(self.nbytes + item.nbytes)

    def buffers(self, address: int) -> tuple[HostBufferMeta, ...]:
        """In memory at `address`."""
        return tuple(
            HostBufferMeta(address=address + start, nbytes=nbytes, origin=origin, tensors=tensors)
            for start, nbytes, origin, tensors in self._runs
        )


def _runs_of(item: PlannedBucket, sources: Sources) -> list[tuple[str, tuple[TensorMeta, ...]]]:
    """A bucket's tensors, by the share that they come from: each run is a host buffer."""
    return [
        (
            origin,
            tuple(
                TensorMeta(
                    name=tensor.name,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    offset=tensor.offset,
                    nbytes=tensor.nbytes,
                    digest=sources.digest_of(tensor.name),
                )
                for tensor in tensors
            ),
        )
        for origin, tensors in groupby(item.bucket.tensors, key=lambda tensor: sources.origin_of(tensor.name))
    ]
