"""Which shards, of which files, make up each tensor of a tensor-parallel checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt_engine.checkpoint.npy_file import NPY_SUFFIX, NpyHeader, NpyName
from ckpt_engine.checkpoint.safetensors_header import HeaderEntry, nbytes_of
from ckpt_engine.errors import CheckpointFormatError

Selected = tuple[NpyHeader, frozenset[str] | None]
"""A file, and which of its tensors: all if None."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One array: where a tensor, or a part of it, is."""

    path: Path
    entry: HeaderEntry


@dataclass(frozen=True, slots=True)
class ShardedTensor:
    """A tensor of the whole `shape`: its shards along dimension `dim`, in order.

    `replicas`: (shard, another place that must hold the same bytes).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    dim: int
    shards: tuple[Shard, ...]
    replicas: tuple[tuple[Shard, Shard], ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """One tensor in one file."""

    header: NpyHeader
    entry: HeaderEntry
    dim: int

    @property
    def tp(self) -> int:
        return self.header.name.tp

    @property
    def shard(self) -> Shard:
        return Shard(self.header.path, self.entry)


def assemble(files: Sequence[Selected]) -> list[ShardedTensor]:
    """The tensors that these files make up; together they must hold every shard of each.

    Files of one layer belong together, in whatever directories they are. Of a shared tensor, and of a shard
    that the files of several `ep` have, the first is taken; the others are its replicas.

    Raises:
        CheckpointFormatError: a shard is missing, shards or files disagree, or a tensor is in two layers.
    """
    groups: dict[tuple[str, str], list[Selected]] = {}
    for file in files:
        groups.setdefault(file[0].name.group, []).append(file)
    where: dict[str, NpyHeader] = {}
    tensors: list[ShardedTensor] = []
    for group in groups.values():
        group.sort(key=lambda file: (file[0].name.tp, file[0].name.ep))
        tp_size = _tp_size([header for header, _ in group])
        for name, found in _by_tensor(group).items():
            first = where.setdefault(name, found[0].header)
            if first is not found[0].header:
                raise CheckpointFormatError(
                    f"tensor {name!r} is there twice: in {first.path} and in {found[0].header.path}, which "
                    "are of two layers"
                )
            tensors.append(_assemble_one(name, found, tp_size))
    return tensors


def _tp_size(headers: Sequence[NpyHeader]) -> int:
    """How many shards this layer has: what the sidecars say, else as many as there are."""
    claims = {header.tp_size: header for header in headers if header.tp_size is not None}
    if len(claims) > 1:
        (one, first), (other, second), *_ = claims.items()
        raise CheckpointFormatError(
            f"the sidecars of {first.path} and {second.path} disagree: tp_size {one}, and tp_size {other}"
        )
    size = max(header.name.tp for header in headers) + 1
    claimed = next(iter(claims), size)
    if size > claimed:
        raise CheckpointFormatError(
            f"{headers[-1].path}: is of tensor-parallel rank {size - 1}, but the sidecar of "
            f"{claims[claimed].path} says tp_size {claimed}"
        )
    return claimed


def _by_tensor(group: Sequence[Selected]) -> dict[str, list[_Found]]:
    found: dict[str, list[_Found]] = {}
    before: NpyHeader | None = None
    for header, names in group:
        if before is not None and before.name == header.name:
            raise CheckpointFormatError(
                f"{before.path} and {header.path} are of the same layer, tp and ep"
                if before.path != header.path
                else f"{header.path} is given twice"
            )
        before = header
        for entry, dim in zip(header.tensors, header.concat_dims, strict=True):
            if names is None or entry.name in names:
                found.setdefault(entry.name, []).append(_Found(header, entry, dim))
    return found


def _assemble_one(name: str, found: Sequence[_Found], tp_size: int) -> ShardedTensor:
    first = found[0]
    for other in found[1:]:
        _check_agree(name, first, other)
    if first.dim == -1:
        entry = first.entry
        replicas = tuple((first.shard, other.shard) for other in found[1:])
        return ShardedTensor(name, entry.dtype, entry.shape, entry.nbytes, 0, (first.shard,), replicas)
    chosen: dict[int, _Found] = {}
    twins: list[tuple[Shard, Shard]] = []
    for one in found:
        kept = chosen.setdefault(one.tp, one)
        if kept is not one:
            if kept.entry.shape != one.entry.shape:
                raise _disagree(name, kept, one, "shape", list(kept.entry.shape), list(one.entry.shape))
            twins.append((kept.shard, one.shard))
    missing = next((tp for tp in range(tp_size) if tp not in chosen), None)
    if missing is not None:
        expected = _file_name(replace(first.header.name, tp=missing))
        raise CheckpointFormatError(
            f"tensor {name!r} of {first.header.path}: its shard {missing} of {tp_size} is missing: "
            f"{expected} is not among the files, or does not have it"
        )
    shards = [chosen[tp] for tp in range(tp_size)]
    shape = list(first.entry.shape)
    shape[first.dim] = sum(shard.entry.shape[first.dim] for shard in shards)
    nbytes = nbytes_of(first.entry.dtype, shape)
    if nbytes is None:
        raise CheckpointFormatError(f"tensor {name!r}: shape {shape} of all its shards overflows 63 bits")
    return ShardedTensor(
        name,
        first.entry.dtype,
        tuple(shape),
        nbytes,
        first.dim,
        tuple(shard.shard for shard in shards),
        tuple(twins),
    )


def _check_agree(name: str, one: _Found, other: _Found) -> None:
    for what, a, b in (
        ("dtype", one.entry.dtype, other.entry.dtype),
        ("concat_dim", one.dim, other.dim),
        ("shape", _fixed(one), _fixed(other)),
    ):
        if a != b:
            shapes = [list(one.entry.shape), list(other.entry.shape)]
            raise _disagree(name, one, other, what, *(shapes if what == "shape" else (a, b)))


def _fixed(one: _Found) -> tuple[int, ...]:
    """The sizes that all shards share."""
    shape = one.entry.shape
    return shape if one.dim == -1 else (*shape[: one.dim], -1, *shape[one.dim + 1 :])


def _disagree(
    name: str, one: _Found, other: _Found, what: str, a: object, b: object
) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"tensor {name!r}: {what} is {a} in {one.header.path}, {b} in {other.header.path}"
    )


def _file_name(name: NpyName) -> str:
    parts = [name.prefix, name.layer, str(name.tp), *([str(name.ep)] if name.ep >= 0 else [])]
    return ".".join(part for part in parts if part) + NPY_SUFFIX


@dataclass(frozen=True, slots=True)
class Chunks:
    """A shard's place in the arena: `count` runs of `nbytes` that lie `stride` bytes apart from `offset` on.

    In its file, from `file_offset` on, they follow each other without a gap.
    """

    path: Path
    file_offset: int
    offset: int
    nbytes: int
    stride: int
    count: int


def chunks_of(tensor: ShardedTensor, place: int) -> Iterator[Chunks]:
    """Where the shards' bytes go for a tensor that begins at byte `place` of the arena."""
    if tensor.nbytes == 0:
        return
    count = 1
    for size in tensor.shape[: tensor.dim]:
        count *= size
    stride = tensor.nbytes // count
    for shard in tensor.shards:
        nbytes = shard.entry.nbytes // count
        if nbytes:
            yield Chunks(shard.path, shard.entry.begin, place, nbytes, stride, count)
        place += nbytes
