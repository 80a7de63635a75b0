"""Owners outside the update, which are read by P2P: one fleet's or several's, and who has the same bytes.

A source is an owner of one of these fleets. In a plan it stands under a number: its rank where it is one of
this fleet's own ranks, else its place in the list of all. Where several have the same tensor, the first is
read, and the others are there in case it dies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ckpt_engine.errors import CheckpointError, PlanError
from ckpt_engine.metadata import HostBufferMeta, Metas, RankMetas
from ckpt_engine.planning.plan import Bucket


@dataclass(kw_only=True, frozen=True, slots=True)
class Extent:
    """Bytes to read: `nbytes` from `address`, in the source's host buffer number `buffer`, to `offset` in the
    bucket."""

    buffer: int
    address: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies; `buffer`: which of the source's; `digest`: of its bytes."""

    source: int
    buffer: int
    address: int
    digest: str


class Sources:
    """The sources of one update.

    `by_number`: all of them. `planned`: the same, with each tensor in one place only, for `make_plan`.
    """

    def __init__(self, by_number: Mapping[int, RankMetas]) -> None:
        self.by_number = dict(by_number)
        self._places: dict[str, list[_Place]] = {}
        self.planned: dict[int, RankMetas] = {}
        for number, held in self.by_number.items():
            for index, buffer in enumerate(held.buffers):
                for tensor in buffer.tensors:
                    place = _Place(number, index, buffer.address + tensor.offset, tensor.digest)
                    self._places.setdefault(tensor.name, []).append(place)
            self.planned[number] = held.model_copy(update={"buffers": self._first_of(number, held)})

    def _first_of(self, number: int, held: RankMetas) -> tuple[HostBufferMeta, ...]:
        return tuple(
            buffer.model_copy(
                update={
                    "tensors": tuple(
                        tensor for tensor in buffer.tensors if self._places[tensor.name][0].source == number
                    )
                }
            )
            for buffer in held.buffers
        )

    @classmethod
    def of_fleets(cls, fleets: Sequence[Metas], first: int = 0) -> Sources:
        """Those of other fleets, `fleets[first]` before the others.

        Raises:
            CheckpointError: the fleets hold different weights, or a tensor cannot be read from anywhere.
        """
        check_fleets(fleets)
        order = [*fleets[first:], *fleets[:first]]
        owners = [held for fleet in order for _, held in sorted(fleet.items())]
        return cls(dict(enumerate(held for held in owners if held.tensor_count and held.readable)))

    def origin_of(self, tensor: str) -> str:
        """The epoch of the share in which it was registered, wherever it is read."""
        place = self._places[tensor][0]
        held = self.by_number[place.source]
        return held.origin_of(held.buffers[place.buffer])

    def digest_of(self, tensor: str) -> str:
        """Of its bytes; empty where no digest was made."""
        return self._places[tensor][0].digest

    def reads_of(self, bucket: Bucket, lost: Collection[int] = ()) -> dict[int, tuple[Extent, ...]]:
        """What to read from which source for a bucket, with as few reads as its layout allows.

        Args:
            lost: sources that cannot be read any more.

        Raises:
            PlanError: only lost sources hold a tensor; it is named.
        """
        found: dict[int, list[Extent]] = {}
        before: _Place | None = None
        for tensor in bucket.tensors:
            place = next((one for one in self._places[tensor.name] if one.source not in lost), None)
            if place is None:
                raise PlanError(f"nobody else holds {tensor.name!r}")
            extents = found.setdefault(place.source, [])
            last = extents[-1] if extents else None
            if (
                last is not None
                and before is not None
                and (before.source, before.buffer) == (place.source, place.buffer)
                and tensor.offset - last.offset == place.address - last.address
            ):
                # As far apart in the bucket as in the host buffer: one read brings both.
                extents[-1] = replace(last, nbytes=tensor.offset + tensor.nbytes - last.offset)
            elif tensor.nbytes:
                extents.append(
                    Extent(
                        buffer=place.buffer, address=place.address, offset=tensor.offset, nbytes=tensor.nbytes
                    )
                )
            else:
                continue
            before = place
        return {source: tuple(extents) for source, extents in found.items() if extents}


def check_fleets(fleets: Sequence[Metas]) -> str:
    """The checkpoint's name that all these metas are of.

    Raises:
        CheckpointError: there is none, fleets hold different weights under one name, or a tensor cannot be
            read from anywhere.
    """
    names = {held.checkpoint for fleet in fleets for held in fleet.values() if held.tensor_count}
    if len(names) != 1 or "" in names:
        raise CheckpointError(
            f"metas of one checkpoint are needed, and these are of {sorted(names) or 'none'}: save them "
            "after gather_metas, with this version"
        )
    seen: dict[str, tuple[object, str]] = {}
    readable: set[str] = set()
    unreadable: dict[str, RankMetas] = {}
    for held in (held for fleet in fleets for _, held in sorted(fleet.items())):
        who = f"rank {held.rank} of host {held.host} (session {held.session or 'unknown'})"
        for buffer in held.buffers:
            for tensor in buffer.tensors:
                what = (tensor.dtype, tensor.shape, held.origin_of(buffer))
                other, whose = seen.setdefault(tensor.name, (what, who))
                if other != what:
                    raise CheckpointError(
                        f"{whose} and {who} hold different weights as {tensor.name!r}: join one of these "
                        "fleets, or replicas of the same one"
                    )
                if held.readable:
                    readable.add(tensor.name)
                else:
                    unreadable.setdefault(tensor.name, held)
    if missing := sorted(unreadable.keys() - readable):
        held = unreadable[missing[0]]
        raise CheckpointError(
            f"{len(missing)} tensors ({missing[0]!r} first) cannot be read by P2P: rank {held.rank} on host "
            f"{held.host}, which holds them, published no address: install ckpt-engine[p2p] there, and "
            "gather again"
        )
    return names.pop()
