"""Builds TP-sharded `.npy` checkpoints for the tests: files, sidecars, and what should be loaded of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy_format

from ckpt_engine.metadata import DTYPE_NBYTES

CONTAINERS = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4"), 8: np.dtype("<i8")}


@dataclass
class NpyFile:
    """One file to be: arrays, in order, with what the sidecar says of each."""

    tensors: list[tuple[str, torch.Tensor, int]] = field(default_factory=list)
    """(name, shard, concat_dim)"""

    def write(self, path: Path, *, tp_size: int | None = None) -> Path:
        with path.open("wb") as file:
            for _, tensor, _ in self.tensors:
                npy_format.write_array(file, as_array(tensor), allow_pickle=False)
        write_sidecar(path, [described(*tensor) for tensor in self.tensors], tp_size=tp_size)
        return path


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor, or its bits as integers where numpy has no such type."""
    own = str(tensor.dtype).removeprefix("torch.")
    if not own.startswith(("bfloat", "float8")):
        return tensor.contiguous().numpy()
    container = CONTAINERS[DTYPE_NBYTES[own]]
    return np.frombuffer(tensor.contiguous().view(-1).view(torch.uint8).numpy(), container).reshape(
        tensor.shape
    )


def described(name: str, tensor: torch.Tensor, concat_dim: int) -> dict[str, Any]:
    return {
        "name": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "concat_dim": concat_dim,
    }


def write_sidecar(path: Path, tensors: list[dict[str, Any]], **fields: Any) -> None:  # noqa: ANN401
    body = {"version": 1, "tensors": tensors} | {k: v for k, v in fields.items() if v is not None}
    Path(f"{path}.json").write_text(json.dumps(body))


def array_header(descr: str = "'<f4'", order: str = "False", shape: str = "(2, 3)", extra: str = "") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, {extra}}}"


def raw_array(
    header: str | bytes, data: bytes = b"", *, version: int = 1, length: int | None = None
) -> bytes:
    """An array's bytes with that header, true or not."""
    text = header if isinstance(header, bytes) else header.encode()
    size = (len(text) if length is None else length).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data
