"""A digest of a tensor's bytes that hosts and devices compute alike, at about the speed of reading them.

The bytes are taken as a matrix of little-endian 64-bit words w, COLUMNS to a row, the last row filled up
with zeros. All modulo 2^64, >> being a shift that fills up with zeros, M(c) an odd constant of column c,
R(r) one of row r, and mix a bijection that spreads each bit over all (the finalizer of splitmix64):

    y = w ^ (w >> 32)
    digest = sum over rows of mix(sum over c of y + R(r)),  sum over rows of mix(sum over c of M(c) y + R(r))

A change of a single word always changes the second half. What adds up to nothing in one of a row's sums
hardly does in the other one, and rows are mixed before they are added: flips of the same bit, bits that are
stuck, words or blocks that change places do not cancel out but by chance (2^-33 at most, where all of it is
in the highest bits). It tells of broken transfers and memory, not of an attacker: whoever can write the bytes
can make others of the same digest.

Source of mix: Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators (OOPSLA 2014).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from ckpt_engine.errors import ConfigError

COLUMNS = 1024
DIGEST_NBYTES = 16
_ROW_NBYTES = 8 * COLUMNS
_HOST_ROWS = 32
"""Summed at once: on a host they stay in the caches, with what is made of them."""
_DEVICE_ROWS = 2048
_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31

_Words = np.ndarray[Any, np.dtype[np.uint64]]


def checksum(data: torch.Tensor) -> torch.Tensor:
    """The two words of the digest, int64, on the data's device; nothing is waited for.

    Args:
        data: 1-D, uint8, contiguous.

    Raises:
        ConfigError: this host is big-endian: its words are others.
    """
    if sys.byteorder != "little":
        raise ConfigError(
            "verify: digests need a little-endian host: use verify='off', register without digests"
        )
    return _on_host(data) if data.device.type == "cpu" else on_device(data)


def digest_of(words: torch.Tensor) -> bytes:
    """DIGEST_NBYTES bytes, of what `checksum` gave; waits for it."""
    return b"".join((word & _MASK).to_bytes(8, "big") for word in words.tolist())


def _on_host(data: torch.Tensor) -> torch.Tensor:
    # By numpy, whose sums of products of integers are several times as fast as torch's.
    raw = data.detach().numpy()
    rows, rest = divmod(raw.size, _ROW_NBYTES)
    sums = np.empty((2, rows + 1), dtype=np.uint64)
    mixed = np.empty((_HOST_ROWS, COLUMNS), dtype=np.uint64)

    def add(words: _Words, begin: int) -> None:
        end = begin + len(words)
        own = mixed[: len(words)]
        np.right_shift(words, np.uint64(32), out=own)
        np.bitwise_xor(own, words, out=own)
        np.sum(own, axis=1, out=sums[0, begin:end])
        np.matmul(own, _COLUMN_KEYS, out=sums[1, begin:end])

    for begin in range(0, rows, _HOST_ROWS):
        end = min(rows, begin + _HOST_ROWS)
        chunk = raw[begin * _ROW_NBYTES : end * _ROW_NBYTES]
        # A mapped file's tensors lie at any byte.
        aligned = chunk if chunk.ctypes.data % 8 == 0 else chunk.copy()
        add(aligned.view(np.uint64).reshape(-1, COLUMNS), begin)
    last = np.zeros(_ROW_NBYTES, dtype=np.uint8)
    last[:rest] = raw[rows * _ROW_NBYTES :]
    add(last.view(np.uint64).reshape(1, COLUMNS), rows)
    return torch.from_numpy(_mix(sums + _keys(rows + 1)).sum(axis=1).view(np.int64))


def on_device(data: torch.Tensor) -> torch.Tensor:
    """As `checksum`, by torch's own operations, wherever the data is."""
    rows, rest = divmod(data.numel(), _ROW_NBYTES)
    keys = torch.from_numpy(_COLUMN_KEYS.view(np.int64)).to(data.device, non_blocking=True)
    sums = torch.empty((2, rows + 1), dtype=torch.int64, device=data.device)

    def add(words: torch.Tensor, begin: int) -> None:
        end = begin + len(words)
        own = _shifted(words, 32).bitwise_xor_(words)
        sums[0, begin:end] = own.sum(1)
        sums[1, begin:end] = own.mul_(keys).sum(1)

    for begin in range(0, rows, _DEVICE_ROWS):
        end = min(rows, begin + _DEVICE_ROWS)
        chunk = data[begin * _ROW_NBYTES : end * _ROW_NBYTES]
        aligned = chunk.storage_offset() % 8 == 0 and chunk.data_ptr() % 8 == 0
        add((chunk if aligned else chunk.clone()).view(torch.int64).view(-1, COLUMNS), begin)
    last = torch.zeros(_ROW_NBYTES, dtype=torch.uint8, device=data.device)
    last[:rest] = data[rows * _ROW_NBYTES :]
    add(last.view(torch.int64).view(1, COLUMNS), rows)
    sums += torch.arange(1, rows + 2, device=data.device) * _signed(_STEP)
    for shift, factor in _MIX:
        sums.bitwise_xor_(_shifted(sums, shift)).mul_(_signed(factor))
    return sums.bitwise_xor_(_shifted(sums, _LAST_SHIFT)).sum(1)


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 shifted right as if it had no sign."""
    return (words >> bits).bitwise_and_(_MASK >> bits)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _keys(count: int) -> _Words:
    """Of rows, or columns: all different."""
    keys: _Words = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP)
    return keys


def _mix(words: _Words) -> _Words:
    for shift, factor in _MIX:
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    mixed: _Words = words ^ (words >> np.uint64(_LAST_SHIFT))
    return mixed


_COLUMN_KEYS = _mix(_keys(COLUMNS)) | np.uint64(1)
