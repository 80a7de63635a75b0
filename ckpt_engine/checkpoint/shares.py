"""Who is to own which tensor of the ranks' state dicts, and in which order shards travel there.

Pure functions of what all ranks told each other, so that every rank finds the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckpt_engine.checkpoint.packing import TensorSpec
from ckpt_engine.checkpoint.state_dict import REPLICATED, Held, Sharding, shard_at
from ckpt_engine.errors import CheckpointError
from ckpt_engine.metadata import DTYPE_NBYTES

Coordinate = tuple[int, ...]
_Seen = tuple[str, tuple[int, ...], Sharding | None]
"""dtype, shape of the whole tensor, and how it is sharded, as one rank has it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A shard that `holder` gives: it begins at `start` in the whole tensor."""

    holder: int
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(begin, begin + size) for begin, size in zip(self.start, self.shape, strict=True))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Owned:
    """A tensor, and the rank that is to register it. `sharding`: as its owner has it; None: not at all."""

    spec: TensorSpec
    owner: int
    sharding: Sharding | None

    def pieces(self) -> Iterator[Piece]:
        """The shards that make it whole, in the mesh's order. Of replicas those in the owner's own row."""
        assert self.sharding is not None
        own = _coordinate(self.sharding, self.owner)
        ranges = [
            range(place, place + 1) if dim == REPLICATED else range(parts)
            for dim, parts, place in zip(self.sharding.placements, self.sharding.shape, own, strict=True)
        ]
        for coordinate in itertools.product(*ranges):
            start, shape = shard_at(self.spec.shape, self.sharding, coordinate)
            piece = Piece(_rank(self.sharding, coordinate), start, shape)
            if piece.elements:
                yield piece

    def piece_of(self, rank: int) -> Piece | None:
        """What `rank` gives of it, if anything."""
        assert self.sharding is not None
        if rank not in self.sharding.ranks:
            return None
        mine, own = _coordinate(self.sharding, rank), _coordinate(self.sharding, self.owner)
        for dim, here, there in zip(self.sharding.placements, mine, own, strict=True):
            if dim == REPLICATED and here != there:
                return None
        piece = Piece(rank, *shard_at(self.spec.shape, self.sharding, mine))
        return piece if piece.elements else None


def share_out(held: Mapping[int, Held]) -> list[Owned]:
    """Every tensor with its one owner, by owner and name.

    A tensor's owner is one of the ranks that have it, or a part of it. Those that the same ranks have are
    shared out in runs of about equal bytes, in the order of their names: a layer's stay together.

    Raises:
        CheckpointError: ranks have different things under one name, or a mesh's rank lacks its shard.
    """
    having: dict[str, dict[int, _Seen]] = {}
    for rank in sorted(held):
        for name, entry in held[rank].entries.items():
            sharding = held[rank].shardings[entry.sharding] if entry.sharding >= 0 else None
            having.setdefault(name, {})[rank] = (entry.dtype, entry.shape, sharding)
    groups: dict[tuple[int, ...], list[TensorSpec]] = {}
    for name in sorted(having):
        _check(name, having[name])
        dtype, shape, _ = next(iter(having[name].values()))
        spec = TensorSpec(name, dtype, shape, math.prod(shape) * DTYPE_NBYTES[dtype])
        groups.setdefault(tuple(having[name]), []).append(spec)
    owned = [
        Owned(spec, owner, having[spec.name][owner][2])
        for ranks, specs in groups.items()
        for owner, spec in _runs(ranks, specs)
    ]
    return sorted(owned, key=lambda one: (one.owner, one.spec.name))


def rounds(owned: Sequence[Owned], bucket_nbytes: int) -> Iterator[list[Owned]]:
    """What travels at the same time: a bucket of each owner, of `bucket_nbytes` or one larger tensor."""
    buckets = [
        list(_buckets(list(group), bucket_nbytes))
        for _, group in itertools.groupby(owned, key=lambda one: one.owner)
    ]
    for together in itertools.zip_longest(*buckets, fillvalue=()):
        yield [one for bucket in together for one in bucket]


def _buckets(owned: Sequence[Owned], bucket_nbytes: int) -> Iterator[list[Owned]]:
    bucket: list[Owned] = []
    nbytes = 0
    for one in owned:
        if bucket and nbytes + one.spec.nbytes > bucket_nbytes:
            yield bucket
            bucket, nbytes = [], 0
        bucket.append(one)
        nbytes += one.spec.nbytes
    if bucket:
        yield bucket


def _runs(ranks: Sequence[int], specs: Sequence[TensorSpec]) -> Iterator[tuple[int, TensorSpec]]:
    """Each tensor goes to the run in which its middle lies."""
    total = max(1, sum(spec.nbytes for spec in specs))
    before = 0
    for spec in specs:
        place = (2 * before + spec.nbytes) * len(ranks) // (2 * total)
        yield ranks[min(place, len(ranks) - 1)], spec
        before += spec.nbytes


def _check(name: str, seen: Mapping[int, _Seen]) -> None:
    """Ranks may have it on meshes of their own, as replicas do; it must be the same tensor."""
    first = next(iter(seen))
    for rank, (dtype, shape, sharding) in seen.items():
        if (dtype, shape) != seen[first][:2]:
            raise CheckpointError(
                f"state_dict: {name!r} has {seen[first][0]} {seen[first][1]} on rank {first}, and {dtype} "
                f"{shape} on rank {rank}: shards must be DTensors, and different tensors have names "
                "of their own (rename)"
            )
        for other in sharding.ranks if sharding is not None else ():
            if other not in seen or seen[other][2] != sharding:
                raise CheckpointError(
                    f"state_dict: {name!r} is sharded over ranks {sharding.ranks if sharding else ()} on "
                    f"rank {rank}, but rank {other} has no such shard: rename must treat all ranks alike"
                )


def _coordinate(sharding: Sharding, rank: int) -> Coordinate:
    place = sharding.ranks.index(rank)
    found = []
    for size in reversed(sharding.shape):
        place, here = divmod(place, size)
        found.append(here)
    return tuple(reversed(found))


def _rank(sharding: Sharding, coordinate: Coordinate) -> int:
    place = 0
    for size, here in zip(sharding.shape, coordinate, strict=True):
        place = place * size + here
    return sharding.ranks[place]
