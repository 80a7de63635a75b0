"""Headers and sidecars of `.npy` files: true ones of numpy's, and every lie that one could tell."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_engine.checkpoint import npy_file
from ckpt_engine.checkpoint.npy_file import parse_npy_name, read_npy_header
from ckpt_engine.errors import CheckpointError, CheckpointFormatError
from tests.support.npy_files import NpyFile, array_header, described, raw_array, write_sidecar

ONE = [{"name": "w", "dtype": "float32", "shape": [2, 3], "concat_dim": 0}]


def a_file(directory: Path, data: bytes, tensors: object = None, name: str = "model.0.0.npy") -> Path:
    path = directory / name
    path.write_bytes(data)
    write_sidecar(path, ONE if tensors is None else tensors)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.3.1.npy", ("model", "3", 1, -1)),
        ("model.3.1.7.npy", ("model", "3", 1, 7)),
        ("model.3.npy", ("model", "3", 0, -1)),
        ("model.embed.12.npy", ("model", "embed", 12, -1)),
        ("weights.npy", ("weights", "", 0, -1)),
    ],
)
def test_names(name: str, parts: tuple[str, str, int, int]) -> None:
    found = parse_npy_name(Path("/x.y") / name)
    assert (found.prefix, found.layer, found.tp, found.ep) == parts


@pytest.mark.parametrize(
    "name",
    ["model.3.x.npy", "model.3.1.x.npy", "model.3.1.2.3.npy", "model.3.-1.npy", ".npy", "model.3.1.NPY"],
)
def test_names_that_say_nothing(name: str) -> None:
    with pytest.raises(CheckpointFormatError, match=r"is called model\.LAYER\.TP\.npy"):
        parse_npy_name(Path(name))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("descr", ["<f4", "<i8", "|u1", "|b1", "<c8", "|V2", "<u2"])
def test_what_numpy_writes(tmp_path: Path, version: tuple[int, int], descr: str) -> None:
    arrays = [np.zeros(shape, descr) for shape in [(), (3,), (2, 0, 4), (2, 3)]]
    file = io.BytesIO()
    for array in arrays:
        np.lib.format.write_array(file, array, version=version)
    tensors = [
        {"name": str(i), "dtype": "uint8", "shape": [array.nbytes], "concat_dim": 0}
        for i, array in enumerate(arrays)
    ]
    path = tmp_path / "model.0.0.npy"
    if descr in ("<f4", "|u1", "|b1", "<c8"):  # not containers of another type's bits
        for tensor, array in zip(tensors, arrays, strict=True):
            tensor |= {"dtype": array.dtype.name, "shape": list(array.shape), "concat_dim": -1}
    path = a_file(tmp_path, file.getvalue(), tensors)
    header = read_npy_header(path)
    assert [entry.nbytes for entry in header.tensors] == [array.nbytes for array in arrays]
    assert header.tensors[-1].end == header.file_nbytes == len(file.getvalue())


@pytest.mark.parametrize(
    ("descr", "dtype", "fits"),
    [
        ("<f2", "bfloat16", True),
        ("<f1", "float8_e5m2", True),
        ("|V2", "bfloat16", True),
        ("<i4", "bfloat16", True),  # twice the elements
        ("<f4", "bfloat16", False),
        ("<f4", "float16", False),
        ("<f4", "int32", False),
        ("<c8", "float64", False),
        ("|b1", "uint8", False),
    ],
)
def test_which_arrays_can_hold_which_dtype(tmp_path: Path, descr: str, dtype: str, fits: bool) -> None:
    nbytes = 16
    size = int(descr[2:])
    tensor = {"name": "w", "dtype": dtype, "concat_dim": 0}
    tensor["shape"] = [nbytes // getattr(torch, dtype).itemsize]
    data = raw_array(array_header(f"'{descr}'", shape=f"({nbytes // size},)"), bytes(nbytes))
    path = a_file(tmp_path, data, [tensor])
    if fits:
        assert read_npy_header(path).tensors[0].nbytes == nbytes
    else:
        with pytest.raises(CheckpointFormatError, match=rf"is {dtype} by its sidecar, and its array holds"):
            read_npy_header(path)


GOOD = raw_array(array_header(), bytes(24))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds 0 arrays, but its sidecar has 1 tensors: truncated"),
        (GOOD[:7], "truncated while reading its header"),
        (GOOD[:20], "truncated while reading its header"),
        (GOOD[:-1], "ends 1 bytes past the end of the file"),
        (GOOD + b"x", "more arrays than its sidecar has tensors"),
        (GOOD + GOOD, "more arrays than its sidecar has tensors"),
        (b"PK\3\4" + GOOD, "no array in numpy's format at byte 0"),
        (b"\x93NUMPY\x04\x00" + GOOD[8:], "version 4.0 of numpy's format is unknown"),
        (b"\x93NUMPY\x01\x01" + GOOD[8:], "version 1.1 of numpy's format is unknown"),
        (raw_array(array_header(), length=60_000), "over the limit of 10000"),
        (raw_array(array_header(), version=2, length=2**32 - 1), "over the limit of 10000"),
        (raw_array(b""), "not that of a plain array"),
        (raw_array(b"\xff\x00{"), "not that of a plain array"),
        (raw_array("{}"), "not that of a plain array"),
        (raw_array("__import__('os').system('true')"), "not that of a plain array"),
        (raw_array("(" * 9000), "not that of a plain array"),
        (raw_array("{" * 9000), "not that of a plain array"),
        (raw_array(array_header(extra="'more': 1")), "not that of a plain array"),
        (raw_array(array_header() + "+1"), "not that of a plain array"),
        (raw_array(array_header(extra="'shape': (1,)")), "has 'shape' twice"),
        (raw_array(array_header("'|O'")), "Python objects, which are pickles"),
        (raw_array(array_header("'O'")), "Python objects, which are pickles"),
        (raw_array(array_header("[('a', '<f4')]")), "not that of a plain array"),
        (raw_array(array_header("'>f4'")), "is big-endian"),
        (raw_array(array_header("'<U4'")), "type '<U4' is not supported"),
        (raw_array(array_header("'<M8[s]'")), "is not supported"),
        (raw_array(array_header("'|V0'")), "is not supported"),
        (raw_array(array_header("True")), "type True is not supported"),
        (raw_array(array_header(order="'C'")), "fortran_order is neither True nor False"),
        (raw_array(array_header(order="True"), bytes(24)), "is in Fortran's order"),
        (raw_array(array_header(shape="'23'")), "is not a tuple of integers"),
        (raw_array(array_header(shape="(2, , 3)")), "is not a tuple of integers"),
        (raw_array(array_header(shape="(2 3)")), "is not a tuple of integers"),
        (raw_array(array_header(shape="(-2, 3)")), "not that of a plain array"),
        (raw_array(array_header(shape=f"({'9' * 5000},)")), "is not a tuple of integers"),
        (raw_array(array_header(shape=f"({2**62}, 4)")), "overflows"),
        (raw_array(array_header(shape=f"({2**62}, 4, 0)")), "overflows"),
        (raw_array(array_header(shape=f"({2**60},)")), "past the end of the file"),
        (raw_array(array_header(shape="(2, 4)"), bytes(32)), "is 24 bytes, its array .* is 32"),
        (raw_array(array_header(shape="(3, 2)"), bytes(24)), r"shape \[2, 3\] by its sidecar, \[3, 2\]"),
        (raw_array(array_header("'<f8'", shape="(3,)"), bytes(24)), "float32 by its sidecar, .* holds f8"),
    ],
)
def test_files_that_lie(tmp_path: Path, data: bytes, message: str) -> None:
    path = a_file(tmp_path, data)
    with pytest.raises(CheckpointFormatError, match=message):
        read_npy_header(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"[]", "a JSON list where an object was expected"),
        (b"\x80\x04]\x94.", "not UTF-8"),  # the pickle, renamed
        ({}, "missing required field"),
        ({"version": 2, "tensors": []}, "version 2 is unknown"),
        ({"version": 1, "tensors": [], "more": 1}, "unknown field"),
        ({"version": 1, "tensors": {}}, "Expected `array`"),
        ({"version": 1, "tensors": [], "tp_size": 0}, "tp_size 0 is not 1 or more"),
        ({"version": 1, "tensors": ONE, "tp_size": True}, "Expected `int"),
        (b'{"version": 1, "version": 1, "tensors": []}', "'version' is there twice"),
        ([{**ONE[0], "name": 3}], "Expected `str`"),
        ([{**ONE[0], "name": ""}], "name is empty"),
        ([{**ONE[0], "name": "\ud800"}], "lone surrogate"),
        ([{**ONE[0], "dtype": "float7"}], "dtype 'float7' is unknown"),
        ([{**ONE[0], "dtype": "__class__"}], "is unknown"),
        ([{**ONE[0], "shape": [2, -3]}], "not a list of integers from 0 up"),
        ([{**ONE[0], "shape": [2, 3.0]}], "Expected `int`"),
        ([{**ONE[0], "shape": [2, True]}], "Expected `int`"),
        ([{**ONE[0], "shape": [2**62, 4]}], "overflows 63 bits"),
        ([{**ONE[0], "shape": [0, 2**62, 4]}], "overflows 63 bits"),
        ([{**ONE[0], "concat_dim": 2}], r"concat_dim 2 is no dimension of \[2, 3\]"),
        ([{**ONE[0], "concat_dim": -2}], "concat_dim -2 is no dimension"),
        ([{**ONE[0], "shape": [], "concat_dim": 0}], "concat_dim 0 is no dimension"),
        ([], "more arrays than its sidecar has tensors"),
        ([ONE[0], {**ONE[0], "name": "v"}], "holds 1 arrays, but its sidecar has 2"),
    ],
)
def test_sidecars_that_lie(tmp_path: Path, text: Any, message: str) -> None:  # noqa: ANN401
    path = a_file(tmp_path, GOOD)
    if isinstance(text, list):
        write_sidecar(path, text)
    else:
        body = text if isinstance(text, bytes) else json.dumps(text).encode()
        Path(f"{path}.json").write_bytes(body)
    with pytest.raises(CheckpointFormatError, match=message):
        read_npy_header(path)


def test_a_sidecar_that_names_a_tensor_twice(tmp_path: Path) -> None:
    path = a_file(tmp_path, GOOD + GOOD, [ONE[0], ONE[0]])
    with pytest.raises(CheckpointFormatError, match="'w' is there twice"):
        read_npy_header(path)


def test_a_sidecar_of_another_rank(tmp_path: Path) -> None:
    path = NpyFile([("w", torch.ones(2), 0)]).write(tmp_path / "model.0.3.npy", tp_size=3)
    with pytest.raises(
        CheckpointFormatError, match=r"tensor-parallel rank 3, but its sidecar says tp_size 3"
    ):
        read_npy_header(path)


def test_a_sidecar_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "model.0.0.npy"
    path.write_bytes(GOOD)
    with pytest.raises(CheckpointError, match=r"has no sidecar model\.0\.0\.npy\.json, which says"):
        read_npy_header(path)
    Path(f"{path}.meta").touch()
    with pytest.raises(CheckpointError, match=r"if you trust it, `ckpt-engine convert-metadata .*0\.npy`"):
        read_npy_header(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_npy_header(tmp_path / "model.0.1.npy")


def test_a_sidecar_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_file(tmp_path, GOOD)
    monkeypatch.setattr(npy_file, "MAX_HEADER_NBYTES", 50)
    with pytest.raises(CheckpointFormatError, match="over the limit of 50"):
        read_npy_header(path)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(GOOD) - 25), byte=st.integers(0, 255), data=st.binary(max_size=40))
def test_any_damage_is_an_error_of_ours_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, data: bytes
) -> None:
    """A changed byte of the header, or other bytes from there on: no other exception, and no other size."""
    directory = tmp_path_factory.mktemp("damage")
    for damaged in (GOOD[:at] + bytes([byte]) + GOOD[at + 1 :], GOOD[:at] + data):
        path = a_file(directory, damaged)
        try:
            header = read_npy_header(path)
        except CheckpointError:
            continue
        assert header.tensors[0].end == len(damaged)
        assert header.tensors[0].nbytes == 24


def test_described_is_what_the_docstring_shows() -> None:
    assert described("w", torch.ones(2, 3), 0) == ONE[0]
