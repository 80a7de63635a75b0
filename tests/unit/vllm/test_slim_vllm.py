"""The archive for GPU machines keeps the code of one architecture, in its place."""

from __future__ import annotations

import struct

from tests.gpu.slim_vllm import ELF, MAGIC, payloads, without_others

PTX = 1
HEADER = 64


def entry(kind: int, arch: int, payload: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0, HEADER, len(payload)).ljust(28, b"\0") + struct.pack("<I", arch)
    return header.ljust(HEADER, b"\0") + payload


def library(entries: bytes) -> bytes:
    """An ELF file with a section of GPU code, after padding, and one of the sections' names."""
    fat = bytes(8) + struct.pack("<IHHQ", MAGIC, 1, 16, len(entries)) + entries + bytes(16)
    names = b"\0.nv_fatbin\0.names\0"
    table = 64 + len(fat) + len(names)
    sections = [(1, 64, len(fat)), (12, 64 + len(fat), len(names))]
    header = bytearray(64)
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, 64, len(sections), 1)
    rows = [struct.pack("<IIQQQQ", name, 1, 0, 0, at, size).ljust(64, b"\0") for name, at, size in sections]
    return bytes(header) + fat + names + b"".join(rows)


def test_only_machine_code_of_the_architecture_stays() -> None:
    parts = [(PTX, 90, b"ptx." * 4), (ELF, 80, b"old." * 6), (ELF, 90, b"mine" * 8), (ELF, 100, b"new." * 2)]
    data = library(b"".join(entry(*part) for part in parts))
    slim, kept = without_others(data, 90)
    assert kept == 32
    assert len(slim) == len(data)
    assert [slim[begin:end] for begin, end, _, _ in payloads(slim)] == [
        part[2] if part[:2] == (ELF, 90) else bytes(len(part[2])) for part in parts
    ]
    changed = [part[2] for part in parts if part[:2] != (ELF, 90)]
    assert sum(a != b for a, b in zip(data, slim, strict=True)) == sum(map(len, changed))
