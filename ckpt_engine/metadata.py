"""The vocabulary: what ranks tell each other about the weights they hold. JSON both ways (pydantic)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ckpt_engine.errors import CheckpointFormatError

ALIGNMENT = 256
"""Bytes to which every tensor is aligned in host buffers and slots."""

DTYPE_NBYTES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
    "complex64": 8,
}
"""The dtypes that travel, by torch's names (`getattr(torch, name)`), and the bytes of one element."""


def align_up(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """`nbytes` rounded up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorMeta(_Model):
    """One tensor: `dtype` by torch's name, `offset` and `nbytes` in bytes from the start of its buffer.

    `digest`: of its bytes, in hex (`ckpt_engine.checksum`); empty where none was made.
    """

    name: str = Field(min_length=1)
    dtype: str
    shape: tuple[int, ...]
    offset: int = Field(ge=0)
    nbytes: int = Field(ge=0)
    digest: str = Field("", pattern="^([0-9a-f]{32})?$")

    @model_validator(mode="after")
    def _consistent(self) -> TensorMeta:
        if self.dtype not in DTYPE_NBYTES:
            raise ValueError(f"tensor {self.name!r}: unknown dtype {self.dtype!r}")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"tensor {self.name!r}: negative size in shape {self.shape}")
        if math.prod(self.shape) * DTYPE_NBYTES[self.dtype] != self.nbytes:
            raise ValueError(
                f"tensor {self.name!r}: shape {self.shape} of {self.dtype} is not {self.nbytes} bytes"
            )
        return self


class HostBufferMeta(_Model):
    """A packed part of a host arena: `address` in the owner's process, `nbytes`, tensors by offset.

    `origin`: the epoch of the share that its bytes were copied from, where a replica keeps what it read by
    P2P; empty: these are the rank's own.
    """

    address: int = Field(ge=0)
    nbytes: int = Field(ge=0)
    tensors: tuple[TensorMeta, ...]
    origin: str = ""

    @model_validator(mode="after")
    def _in_order(self) -> HostBufferMeta:
        end = 0
        for tensor in self.tensors:
            if tensor.offset < end:
                raise ValueError(f"tensor {tensor.name!r} overlaps the one before it")
            end = tensor.offset + tensor.nbytes
        if end > self.nbytes:
            raise ValueError(f"tensors end at byte {end} of a buffer of {self.nbytes} bytes")
        return self


class RankMetas(_Model):
    """What one rank holds of one checkpoint, and who it is.

    `epoch` changes whenever the rank's arena of that name is made or refilled; `session` is the process's
    own. A rank that can be read by P2P has a `p2p_address`, by `p2p_transport`, and grants leases at
    `lease_address`; `rdma_device` is None where that is no RDMA device.
    """

    rank: int = Field(ge=0)
    host: str
    host_ip: str
    device_uuid: str
    epoch: str
    checkpoint: str = ""
    session: str = ""
    p2p_address: str | None = None
    p2p_transport: str | None = None
    lease_address: str | None = None
    rdma_device: str | None = None
    buffers: tuple[HostBufferMeta, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the padding between them."""
        return sum(tensor.nbytes for buffer in self.buffers for tensor in buffer.tensors)

    @property
    def tensor_count(self) -> int:
        return sum(len(buffer.tensors) for buffer in self.buffers)

    @property
    def readable(self) -> bool:
        """Whether others can read it by P2P."""
        return self.p2p_address is not None and self.lease_address is not None

    def origin_of(self, buffer: HostBufferMeta) -> str:
        """The epoch of the share in which these bytes were registered."""
        return buffer.origin or self.epoch


Layout = tuple[HostBufferMeta, ...]
"""A share's host buffers: addresses, names, dtypes, shapes; all but its epoch."""

_LAYOUT: TypeAdapter[Layout] = TypeAdapter(Layout)


def layout_to_json(layout: Layout) -> bytes:
    """A layout as UTF-8 JSON."""
    return _LAYOUT.dump_json(layout)


def layout_from_json(text: bytes) -> Layout:
    """The inverse of `layout_to_json`. Raises pydantic's ValidationError."""
    return _LAYOUT.validate_json(text)


def layout_digest(layout: Layout) -> str:
    """SHA-256 (hex) of a layout."""
    return hashlib.sha256(layout_to_json(layout)).hexdigest()


Metas = dict[int, RankMetas]
"""rank -> what it holds."""

_METAS = TypeAdapter(Metas)


def metas_to_json(metas: Mapping[int, RankMetas]) -> bytes:
    """Metas as UTF-8 JSON: an object whose keys are ranks."""
    return _METAS.dump_json(dict(metas))


def metas_from_json(text: bytes | str) -> Metas:
    """The inverse of `metas_to_json`.

    Raises:
        CheckpointFormatError: not metas, or metas that contradict themselves.
    """
    try:
        metas = _METAS.validate_json(text)
    except ValidationError as error:
        raise CheckpointFormatError(f"not a metas document: {error}") from None
    for rank, held in metas.items():
        if held.rank != rank:
            raise CheckpointFormatError(f"metas of rank {rank} claim to be of rank {held.rank}")
    return metas


def fleets_to_json(fleets: Sequence[Metas]) -> bytes:
    """One fleet's metas, or an array of several fleets'; none: an empty object."""
    if len(fleets) == 1 or not fleets:
        return metas_to_json(fleets[0] if fleets else {})
    return b"[" + b",".join(map(metas_to_json, fleets)) + b"]"


def fleets_from_json(text: bytes | str) -> list[Metas]:
    """One fleet's metas, or an array of several fleets'. Raises as `metas_from_json`."""
    try:
        several = msgspec.json.decode(text, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeError, RecursionError):  # no array, or worse: that is told of one
        return [metas_from_json(text)]
    if not several:
        raise CheckpointFormatError("not a metas document: an array without a fleet")
    return [metas_from_json(bytes(fleet)) for fleet in several]


def distinct(fleets: Iterable[Metas]) -> list[Metas]:
    """Each fleet once: those of the same processes, and their same shares, are the same."""
    found: dict[tuple[tuple[int, str, str], ...], Metas] = {}
    for fleet in fleets:
        found.setdefault(
            tuple((rank, held.session, held.epoch) for rank, held in sorted(fleet.items())), fleet
        )
    return list(found.values())


_JSON = msgspec.json.Encoder()


def content_digest(metas: Iterable[RankMetas]) -> str:
    """SHA-256 (hex) of what these ranks hold together: names, dtypes, shapes, and the shares they come from.

    It does not matter who holds what, nor where: a replica has the digest of what it was made from.
    """
    lines = sorted(
        _JSON.encode([tensor.name, tensor.dtype, tensor.shape, held.origin_of(buffer)])
        for held in metas
        for buffer in held.buffers
        for tensor in buffer.tensors
    )
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def topology(metas: Mapping[int, RankMetas]) -> dict[str, set[int]]:
    """`{rdma_device}@{host}` -> ranks behind that device (`tcp` where a rank has no RDMA device)."""
    groups: dict[str, set[int]] = {}
    for rank, held in sorted(metas.items()):
        groups.setdefault(f"{held.rdma_device or 'tcp'}@{held.host}", set()).add(rank)
    return groups
