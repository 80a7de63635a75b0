"""Reads a trainer's state dict: what it holds under which names, how it is sharded, what cannot be taken.

Plain tensors and DTensors (FSDP2, tensor parallel). Nothing is copied or sent here: `shares` says who is to
own what, and `ckpt_engine.collecting` brings the shards there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeGuard

import msgspec
import torch

from ckpt_engine.checkpoint.tensor_copies import tensor_spec
from ckpt_engine.errors import CheckpointError, ConfigError
from ckpt_engine.metadata import DTYPE_NBYTES

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Rename = Callable[[str], str | None]
"""The trainer's name -> the engine's; None leaves the entry out."""
Cast = torch.dtype | Callable[[str], torch.dtype | None]
"""To which dtype, or that of each of the engine's names (None: as it is)."""

REPLICATED = -1
ARGUMENT = "state_dict"


class Sharding(msgspec.Struct, frozen=True):
    """Where a tensor's shards are: on a mesh of this `shape`, whose `ranks` stand in row-major order.

    `placements`: for each dimension of the mesh the tensor's dimension that it cuts, or REPLICATED. `whole`:
    not so simple (a sum that is still to be made, strided shards): DTensor itself must make it whole.
    """

    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    placements: tuple[int, ...]
    device: str
    whole: bool = False


class Entry(msgspec.Struct, frozen=True):
    """A tensor as it is to be registered: `sharding` is an index into the shardings; -1: a plain tensor."""

    dtype: str
    shape: tuple[int, ...]
    sharding: int


class Held(msgspec.Struct, frozen=True):
    """What a rank's state dict holds, in the engine's names. Travels as JSON."""

    entries: dict[str, Entry]
    shardings: tuple[Sharding, ...]


@dataclass(kw_only=True)
class StateDict:
    """`tensors`: by the engine's names, DTensors included. `tied`: names of the same memory, sorted."""

    held: Held
    tensors: dict[str, torch.Tensor] = field(repr=False)
    tied: tuple[tuple[str, ...], ...]


def read_state_dict(
    state_dict: Mapping[str, torch.Tensor], rename: Rename | None = None, dtype: Cast | None = None
) -> StateDict:
    """What is to be registered of a state dict.

    Args:
        rename: see `Rename`. Two names that share their memory may become one; others must not.
        dtype: see `Cast`; only floating-point tensors of 2 bytes and more are cast.

    Raises:
        ConfigError: it is no state dict, two tensors would have one name, or no such cast.
        CheckpointError: a tensor that has no data, or cannot be copied.
    """
    if not isinstance(state_dict, Mapping):
        raise ConfigError(f"{ARGUMENT} is a {type(state_dict).__name__}: give a mapping of names to tensors")
    entries: dict[str, Entry] = {}
    tensors: dict[str, torch.Tensor] = {}
    shardings: dict[Sharding, int] = {}
    old_names: dict[str, str] = {}
    memories: dict[str, tuple[object, ...]] = {}
    for old, tensor in state_dict.items():
        new = rename(old) if rename is not None else old
        if new is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(
                f"{ARGUMENT}: {old!r} is a {type(tensor).__name__}, not a torch.Tensor: leave it out (rename "
                "returns None for it)"
            )
        local, sharding = _local(old, tensor)
        spec = tensor_spec(new, local, ARGUMENT)
        memory = (local.data_ptr(), local.dtype, tuple(local.shape), local.stride()) if spec.nbytes else ()
        if new in tensors:
            if memory and memory == memories[new]:
                continue  # tied, and said so by its name
            raise ConfigError(
                f"{ARGUMENT}: rename gives {old_names[new]!r} and {old!r} the same name, {new!r}: give each "
                "one its own, or None to leave it out"
            )
        number = -1 if sharding is None else shardings.setdefault(sharding, len(shardings))
        entries[new] = Entry(_target(new, tensor.dtype, dtype), tuple(tensor.shape), number)
        tensors[new], old_names[new], memories[new] = tensor, old, memory
    held = Held(dict(sorted(entries.items())), tuple(shardings))
    return StateDict(held=held, tensors=tensors, tied=_tied(memories))


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's shard on this rank, or the tensor itself."""
    with torch.no_grad():
        return tensor.to_local() if _is_dtensor(tensor) else tensor


def _local(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, Sharding | None]:
    """This rank's part, and how the tensor is sharded; None: not at all."""
    if hasattr(tensor, "local_shards"):
        raise CheckpointError(
            f"{ARGUMENT}: {name!r} is a {type(tensor).__name__}, as FSDP1 makes them: use fully_shard "
            "(FSDP2), or a full state dict on one rank"
        )
    if not _is_dtensor(tensor):
        return tensor, None
    sharding = _sharding(tensor)
    local = local_of(tensor)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise CheckpointError(
            f"{ARGUMENT}: {name!r} is a DTensor on a mesh that this rank is not part of: leave it out here"
        )
    if not sharding.whole:
        _, shape = shard_at(tuple(tensor.shape), sharding, tuple(coordinate))
        if tuple(local.shape) != shape:
            raise CheckpointError(
                f"{ARGUMENT}: {name!r}: this rank's shard has shape {tuple(local.shape)}, and {shape} by its "
                f"placements {tensor.placements}: give tensor.full_tensor()"
            )
    return local, sharding


def _sharding(tensor: DTensor) -> Sharding:
    from torch.distributed.tensor import Replicate, Shard

    mesh = tensor.device_mesh
    simple = all(type(placement) in (Shard, Replicate) for placement in tensor.placements)
    return Sharding(
        ranks=tuple(mesh.mesh.flatten().tolist()),
        shape=tuple(mesh.mesh.shape),
        placements=tuple(
            placement.dim % tensor.dim() if type(placement) is Shard else REPLICATED
            for placement in tensor.placements
        ),
        device=mesh.device_type,
        whole=not simple,
    )


def shard_at(
    shape: tuple[int, ...], sharding: Sharding, coordinate: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a shard begins in the whole tensor, and its shape, by its place on the mesh.

    A dimension of n elements that k ranks share is cut as by torch.chunk: ceil(n / k) each, the last ones get
    fewer, or none. Several dimensions of a mesh cut one after the other.
    """
    start, size = [0] * len(shape), list(shape)
    for dim, parts, place in zip(sharding.placements, sharding.shape, coordinate, strict=True):
        if dim == REPLICATED:
            continue
        chunk = -(-size[dim] // parts)
        begin = min(place * chunk, size[dim])
        start[dim] += begin
        size[dim] = min(chunk, size[dim] - begin)
    return tuple(start), tuple(size)


def _is_dtensor(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")  # where nobody imported it there is none
    return module is not None and isinstance(tensor, module.DTensor)


def _target(name: str, dtype: torch.dtype, cast: Cast | None) -> str:
    wanted = cast if cast is None or isinstance(cast, torch.dtype) else cast(name)
    if wanted is None or not dtype.is_floating_point or dtype.itemsize < 2:
        wanted = dtype
    elif not (
        isinstance(wanted, torch.dtype) and wanted.is_floating_point and _dtype_name(wanted) in DTYPE_NBYTES
    ):
        raise ConfigError(
            f"dtype={wanted!r} for {name!r}: give a floating-point torch.dtype, or None to leave it as it is"
        )
    return _dtype_name(wanted)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tied(memories: Mapping[str, tuple[object, ...]]) -> tuple[tuple[str, ...], ...]:
    names: dict[tuple[object, ...], list[str]] = {}
    for name, memory in memories.items():
        if memory:
            names.setdefault(memory, []).append(name)
    return tuple(sorted(tuple(sorted(group)) for group in names.values() if len(group) > 1))
