"""Whatever is in a file: it is read, or refused by an error that names it; no other, no hang."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from numpy.lib import format as npy_format
from safetensors import SafetensorError, safe_open

from ckpt_engine.checkpoint import checkpoint_files, read_header, split_checkpoint
from ckpt_engine.checkpoint.npy_file import read_npy_header
from ckpt_engine.cli.pickled_sidecars import read_pickled_sidecar
from ckpt_engine.errors import CheckpointError, CheckpointFormatError
from tests.fuzz.fuzzing import documents, fuzz, mutations


def safetensors_file(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = {
    "w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    "__metadata__": {"format": "pt"},
}
HEADERS = st.one_of(
    st.just(GOOD),
    documents(("w", "b", "dtype", "shape", "data_offsets", "__metadata__")),
    st.dictionaries(
        st.text(max_size=4),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(("F32", "BF16", "U8", "I64", "F8_E4M3", "BOOL", "C64", "x")),
                "shape": st.lists(st.one_of(st.integers(0, 3), st.integers(-1, 2**63)), max_size=3),
                "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ),
)


def test_safetensors_headers(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            header = read_header(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            return
        # What we take lies in the file, and the library that everybody writes with takes it too.
        assert all(0 <= entry.begin <= entry.end <= len(data) for entry in header.tensors)
        try:
            with safe_open(str(path), "numpy") as theirs:
                assert sorted(theirs.keys()) == sorted(entry.name for entry in header.tensors)
        except SafetensorError as error:
            raise AssertionError(f"we took what the library refuses: {error}") from error

    files = st.builds(safetensors_file, HEADERS, st.sampled_from((bytes(22), b"", bytes(40), bytes(16))))
    known = (safetensors_file({"__metadata__": False}, b""),)
    fuzz("safetensors header", mutations(files), check, known)


def test_npy_headers(tmp_path: Path) -> None:
    path = tmp_path / "model.0.0.npy"
    sidecar = tmp_path / "model.0.0.npy.json"
    good = tmp_path / "good"
    with good.open("wb") as file:
        npy_format.write_array(file, np.zeros((2, 3), "<f4"), allow_pickle=False)
    described = {
        "version": 1,
        "tensors": [{"name": "w", "dtype": "float32", "shape": [2, 3], "concat_dim": 0}],
    }
    texts = json.dumps(described).encode()

    def check(example: tuple[bytes, bytes]) -> None:
        array, text = example
        path.write_bytes(array)
        sidecar.write_bytes(text)
        try:
            header = read_npy_header(path)
        except CheckpointError as error:
            assert path.name in str(error)
            return
        assert all(0 <= entry.begin <= entry.end <= len(array) for entry in header.tensors)

    arrays = mutations(st.just(good.read_bytes()))
    keys = ("version", "tensors", "name", "dtype", "shape", "concat_dim", "tp_size")
    texts_of = st.one_of(mutations(st.just(texts)), documents(keys).map(lambda d: json.dumps(d).encode()))
    whole = st.one_of(st.tuples(arrays, st.just(texts)), st.tuples(st.just(good.read_bytes()), texts_of))
    fuzz("npy header and sidecar", whole, check)


def test_indexes(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "x.safetensors").write_bytes(safetensors_file(GOOD, bytes(22)))

    def check(text: bytes) -> None:
        index.write_bytes(text)
        try:
            files = checkpoint_files(tmp_path)
            split_checkpoint(tmp_path, 0, 2)
        except CheckpointError as error:
            assert tmp_path.name in str(error)
            return
        assert files == [tmp_path / "x.safetensors"]

    keys = ("weight_map", "metadata", "w", "b", "total_size")
    good = {"metadata": {"total_size": 22}, "weight_map": {"w": "x.safetensors", "b": "x.safetensors"}}
    maps = st.dictionaries(st.text(max_size=3), documents(keys), max_size=3)
    texts = st.one_of(st.just(good), documents(keys), st.builds(lambda m: {"weight_map": m}, maps))
    fuzz("index", mutations(texts.map(lambda document: json.dumps(document).encode())), check)


def test_pickled_sidecars(tmp_path: Path) -> None:
    """Of the converter: it makes a sidecar or refuses, and calls nothing."""
    path = tmp_path / "model.0.0.npy.meta"
    good = (
        b"\x80\x02]q\x00}q\x01(X\x03\x00\x00\x00keyq\x02X\x01\x00\x00\x00wq\x03X\x05\x00\x00\x00dtypeq\x04"
        b"ctorch\nfloat32\nq\x05X\x05\x00\x00\x00shapeq\x06ctorch\nSize\nq\x07K\x02K\x03\x86q\x08\x85q\tRq\n"
        b"X\x04\x00\x00\x00typeq\x0bctorch\nTensor\nq\x0cX\r\x00\x00\x00tp_concat_dimq\rK\x00ua."
    )

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read_pickled_sidecar(path, None)
        except CheckpointFormatError as error:
            assert str(path) in str(error)

    # Places in the memo up to 4 G, each of which would be allocated: killed the process that read it.
    known = (good, b"\x80\x02]r\xff\xff\xff\xff.", b"]p4294967295\n.")
    fuzz("pickled sidecar", mutations(st.just(good)), check, known)
