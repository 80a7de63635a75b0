"""Builds checkpoints on disk for the tests of this folder, true ones and lying ones."""

from __future__ import annotations

import json
import mmap
import os
import weakref
from pathlib import Path

import torch
from safetensors.torch import save_file

from ckpt_engine.checkpoint import HostArena, HostCheckpoint
from ckpt_engine.metadata import DTYPE_NBYTES


def raw_file(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file of that header (bytes as they are, else as JSON) and data; `length` is what it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits of that dtype (NaNs of every kind among them)."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.Size(shape).numel()) * DTYPE_NBYTES[dtype]
    if dtype == "bool":
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    bits = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    return bits.view(getattr(torch, dtype)).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def contents(checkpoint: HostCheckpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """name -> dtype, shape, bits, as held in host memory."""
    return {
        tensor.name: (
            tensor.dtype,
            tensor.shape,
            checkpoint.view(index, tensor.offset, tensor.nbytes).numpy().tobytes(),
        )
        for index, buffer in enumerate(checkpoint.buffers)
        for tensor in buffer.tensors
    }


def expected(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), bits(tensor))
        for name, tensor in tensors.items()
    }


def sharded_checkpoint(directory: Path, *, index: bool = True) -> dict[str, torch.Tensor]:
    """Three files of tensors of many sizes; returns all tensors."""
    directory.mkdir(exist_ok=True)
    everything: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    for shard in range(3):
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        tensors = {
            f"layers.{shard}.{i}.weight": random_tensor("bfloat16", (3 * i, 1 + shard), seed=10 * shard + i)
            for i in range(8)
        }
        save_file(tensors, directory / file)
        everything |= tensors
        weight_map |= dict.fromkeys(tensors, file)
    if index:
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    return everything


def open_files() -> set[str]:
    """What this process's descriptors point to."""
    links = (Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd"))
    return {os.readlink(link) for link in links if link.is_symlink()}  # that of the listing is gone


def memory_of(arena: HostArena) -> weakref.ref[mmap.mmap]:
    """Dead once the arena's memory is unmapped. (An address will not do: it may be in use again.)"""
    mapping = arena._mapping
    assert mapping is not None
    return weakref.ref(mapping)


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False
