"""Headers: what safetensors writes is read; every lie is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files_for_tests import raw_file
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save_file

from ckpt_engine.checkpoint import HeaderEntry, read_header
from ckpt_engine.checkpoint.safetensors_header import DTYPES, MAX_HEADER_NBYTES
from ckpt_engine.errors import CheckpointError, CheckpointFormatError
from ckpt_engine.metadata import DTYPE_NBYTES


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(2, 3), "b": torch.ones(5, dtype=torch.int16)}, path, metadata={"k": "v"})
    header = read_header(path)
    assert header.path == path
    assert header.file_nbytes == path.stat().st_size
    assert {(e.name, e.dtype, e.shape, e.nbytes) for e in header.tensors} == {
        ("w", "float32", (2, 3), 24),
        ("b", "int16", (5,), 10),
    }
    data = path.read_bytes()
    b = next(e for e in header.tensors if e.name == "b")
    assert data[b.begin : b.end] == b"\1\0" * 5


def test_offsets_are_absolute_and_in_file_order(tmp_path: Path) -> None:
    header = {"z": entry("U8", [2], [0, 2]), "a": entry("U8", [1], [2, 3])}
    path = raw_file(tmp_path / "f", header, b"xyz")
    begin = path.stat().st_size - 3
    assert read_header(path).tensors == (
        HeaderEntry("z", "uint8", (2,), begin, begin + 2),
        HeaderEntry("a", "uint8", (1,), begin + 2, begin + 3),
    )


def test_every_supported_dtype_has_a_size() -> None:
    assert set(DTYPES.values()) == set(DTYPE_NBYTES)
    assert all(hasattr(torch, dtype) for dtype in DTYPES.values())


def test_no_tensors_scalars_zero_sizes_and_padding(tmp_path: Path) -> None:
    assert read_header(raw_file(tmp_path / "a", {})).tensors == ()
    assert read_header(raw_file(tmp_path / "b", b'{"__metadata__": null}   ')).tensors == ()
    header = {"s": entry("F32", [], [0, 4]), "e": entry("F32", [0, 7], [4, 4]), "f": entry(offsets=[4, 8])}
    shapes = [(e.name, e.shape) for e in read_header(raw_file(tmp_path / "c", header, b"12345678")).tensors]
    assert shapes == [("s", ()), ("e", (0, 7)), ("f", (4,))]


LIES: dict[str, tuple[Any, bytes, str]] = {
    "not UTF-8": (b'{"\xff": 1}', b"", "not UTF-8"),
    "not JSON": (b'{"w": ', b"", "not valid JSON"),
    "two values": (b"{} {}", b"", "not valid JSON"),
    "NaN": (b'{"w": NaN}', b"", "NaN is not JSON"),
    "deep nesting": (b'{"w": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", "not valid JSON"),
    "huge integer": (b'{"w": ' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "list": ([], b"", "JSON list where an object"),
    "number": (3, b"", "JSON int where an object"),
    "metadata is false": ({"__metadata__": False}, b"", "__metadata__ is not an object of strings"),
    "metadata has a number": ({"__metadata__": {"step": 3}}, b"", "__metadata__ is not an object of strings"),
    "name twice": (b'{"w": {}, "w": {}}', b"", "key 'w' is there twice"),
    "field twice": (b'{"w": {"dtype": "U8", "dtype": "U8"}}', b"", "key 'dtype' is there twice"),
    "surrogate": (b'{"\\ud800": {}}', b"", "lone surrogate"),
    "empty name": ({"": entry()}, b"1234", "its name is empty"),
    "entry is a list": ({"w": []}, b"", "tensor 'w': its entry is a JSON list"),
    "entry lacks": ({"w": {"dtype": "U8"}}, b"", "tensor 'w': its entry lacks shape, data_offsets"),
    "unknown dtype": ({"w": entry("U9")}, b"1234", "tensor 'w': dtype 'U9' is unknown"),
    "dtype is a list": ({"w": entry(["U8"])}, b"1234", r"dtype \['U8'\] is unknown"),
    "sub-byte dtype": ({"w": entry("F4", [8])}, b"1234", "dtype 'F4' is not supported"),
    "other float8": ({"w": entry("F8_E4M3FNUZ")}, b"1234", "is not supported"),
    "negative size": ({"w": entry(shape=[-4])}, b"1234", r"tensor 'w': shape \[-4\]"),
    "two negative sizes": ({"w": entry(shape=[-2, -2])}, b"1234", "shape"),
    "bool size": ({"w": entry("U8", [True], [0, 1])}, b"1", r"shape \[True\]"),
    "float size": ({"w": entry(shape=[4.0])}, b"1234", r"shape \[4.0\]"),
    "shape is a number": ({"w": entry(shape=4)}, b"1234", "shape 4"),
    "negative offset": ({"w": entry(offsets=[-4, 0])}, b"1234", "data_offsets"),
    "bool offset": ({"w": entry("U8", [1], [False, True])}, b"1", "data_offsets"),
    "float offset": ({"w": entry(offsets=[0, 4.0])}, b"1234", "data_offsets"),
    "three offsets": ({"w": entry(offsets=[0, 2, 4])}, b"1234", "are not two integers"),
    "one offset": ({"w": entry(offsets=[4])}, b"1234", "are not two integers"),
    "offsets are null": ({"w": entry(offsets=None)}, b"1234", "are not two integers"),
    "reversed": ({"w": entry(offsets=[4, 0])}, b"1234", "are reversed"),
    "past the end": ({"w": entry()}, b"123", "1 bytes past the end of the file"),
    "too small": ({"w": entry(shape=[5])}, b"1234", "span 4 bytes, but .5. of uint8 is 5"),
    "too large": ({"w": entry("F32", [2])}, b"1234", "span 4 bytes, but .2. of float32 is 8"),
    "overflow": ({"w": entry("F32", [2**32, 2**32])}, b"1234", "overflows"),
    "overflow to zero": ({"w": entry("U8", [2**32, 2**32, 0], [0, 0])}, b"", "overflows"),
    "huge offsets": ({"w": entry("U8", [4], [2**64, 2**64 + 4])}, b"1234", "past the end"),
    "overlap": (
        {"w": entry(), "v": entry("U8", [4], [2, 6])}, b"123456", "tensor 'v' overlaps tensor 'w'",
    ),
    "same bytes": ({"w": entry(), "v": entry()}, b"1234", "tensor 'v' overlaps tensor 'w'"),
    "hole": (
        {"w": entry(), "v": entry("U8", [1], [5, 6])}, b"123456", "hole of 1 bytes between tensor 'w' and",
    ),
    "hole at the start": ({"w": entry(offsets=[1, 5])}, b"12345", "hole of 1 bytes between the header"),
    "trailing bytes": ({"w": entry()}, b"12345", "1 bytes after tensor 'w' belong to no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(lie: str, tmp_path: Path) -> None:
    header, data, message = LIES[lie]
    path = raw_file(tmp_path / "lying.safetensors", header, data)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


# The format leaves these to each reader, or safetensors has dtypes that do not travel here.
OURS = {"name twice", "surrogate", "empty name", "sub-byte dtype", "other float8"}


@pytest.mark.parametrize("lie", sorted(LIES.keys() - OURS))
def test_safetensors_refuses_it_too(lie: str, tmp_path: Path) -> None:
    """We are as strict as the format's own library, and otherwise not stricter."""
    header, data, _ = LIES[lie]
    with pytest.raises(SafetensorError):
        safetensors_load(raw_file(tmp_path / "lying", header, data).read_bytes())


@pytest.mark.parametrize("nbytes", [0, 1, 7])
def test_a_file_too_short_for_a_length(nbytes: int, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(b"\0" * nbytes)
    with pytest.raises(CheckpointFormatError, match=f"short.safetensors: {nbytes} bytes are too few"):
        read_header(path)


@pytest.mark.parametrize("length", [3, 2**62, 2**64 - 1])
def test_a_length_past_the_end(length: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormatError, match=r"header claims .* but the file has only"):
        read_header(raw_file(tmp_path / "f", b"{}", length=length))


def test_a_header_over_the_limit(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "f", b"{}", length=MAX_HEADER_NBYTES + 1)
    os.truncate(path, MAX_HEADER_NBYTES + 1000)  # sparse
    with pytest.raises(CheckpointFormatError, match="over the limit"):
        read_header(path)


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        read_header(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a directory"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="null character"):
        read_header("a\0b")
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        read_header("x" * 5000)
    path = raw_file(tmp_path / "secret", {})

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)  # chmod does not stop root
    with pytest.raises(CheckpointError, match="secret: no permission"):
        read_header(path)
