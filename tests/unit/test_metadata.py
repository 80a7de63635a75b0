"""Metas: JSON both ways, and what contradicts itself is refused with its name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ckpt_engine.errors import CheckpointFormatError
from ckpt_engine.metadata import (
    DTYPE_NBYTES,
    HostBufferMeta,
    Metas,
    RankMetas,
    TensorMeta,
    align_up,
    metas_from_json,
    metas_to_json,
    topology,
)

reproducible = settings(derandomize=True, print_blob=True, deadline=None, max_examples=60)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
maybe_texts = st.none() | texts


@st.composite
def host_buffers(draw: st.DrawFn) -> HostBufferMeta:
    tensors, end = [], 0
    for _ in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(sorted(DTYPE_NBYTES)))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        offset = end + draw(st.integers(0, 300))
        nbytes = math.prod(shape) * DTYPE_NBYTES[dtype]
        name = draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8))
        tensors.append(TensorMeta(name=name, dtype=dtype, shape=shape, offset=offset, nbytes=nbytes))
        end = offset + nbytes
    return HostBufferMeta(
        address=draw(st.integers(0, 2**64 - 1)), nbytes=end + draw(st.integers(0, 9)), tensors=tuple(tensors)
    )


@st.composite
def fleets(draw: st.DrawFn) -> Metas:
    return {
        rank: RankMetas(
            rank=rank,
            host=draw(texts),
            host_ip=draw(texts),
            device_uuid=draw(texts),
            epoch=draw(texts),
            p2p_address=draw(maybe_texts),
            rdma_device=draw(maybe_texts),
            buffers=tuple(draw(st.lists(host_buffers(), max_size=3))),
        )
        for rank in draw(st.sets(st.integers(0, 300), max_size=4))
    }


@reproducible
@given(fleets())
def test_metas_survive_json(metas: Metas) -> None:
    text = metas_to_json(metas)
    assert metas_from_json(text) == metas
    assert metas_from_json(text.decode()) == metas
    assert json.loads(text).keys() == {str(rank) for rank in metas}


@reproducible
@given(fleets())
def test_counts_are_those_of_the_tensors(metas: Metas) -> None:
    for held in metas.values():
        tensors = [tensor for buffer in held.buffers for tensor in buffer.tensors]
        assert held.tensor_count == len(tensors)
        assert held.nbytes == sum(tensor.nbytes for tensor in tensors)


def test_every_dtype_is_torchs_and_has_its_size() -> None:
    for name, nbytes in DTYPE_NBYTES.items():
        assert getattr(torch, name).itemsize == nbytes, name


@reproducible
@given(st.integers(0, 2**70), st.sampled_from([1, 2, 3, 256, 4096]))
def test_align_up_is_the_next_multiple(nbytes: int, alignment: int) -> None:
    aligned = align_up(nbytes, alignment)
    assert aligned % alignment == 0
    assert nbytes <= aligned < nbytes + alignment


def document() -> dict[str, Any]:
    """Good metas of one rank with two tensors, as JSON data."""
    return {
        "3": {
            "rank": 3,
            "host": "h",
            "host_ip": "127.0.0.1",
            "device_uuid": "CPU-h-3",
            "epoch": "e",
            "buffers": [
                {
                    "address": 4096,
                    "nbytes": 300,
                    "tensors": [
                        {"name": "a", "dtype": "bfloat16", "shape": [3, 4], "offset": 0, "nbytes": 24},
                        {"name": "b", "dtype": "int64", "shape": [], "offset": 256, "nbytes": 8},
                    ],
                }
            ],
        }
    }


def test_the_document_of_the_bad_ones_is_good_itself() -> None:
    held = metas_from_json(json.dumps(document()))[3]
    assert [tensor.name for buffer in held.buffers for tensor in buffer.tensors] == ["a", "b"]
    assert (held.p2p_address, held.rdma_device) == (None, None)


TENSOR_A = ("3", "buffers", 0, "tensors", 0)
TENSOR_B = ("3", "buffers", 0, "tensors", 1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*TENSOR_A, "dtype"), "float12", r"tensor 'a': unknown dtype 'float12'"),
        ((*TENSOR_A, "dtype"), "__class__", r"tensor 'a': unknown dtype '__class__'"),
        ((*TENSOR_A, "shape"), [3, 5], r"tensor 'a': shape \(3, 5\) of bfloat16 is not 24 bytes"),
        ((*TENSOR_A, "shape"), [-3, -4], r"tensor 'a': negative size in shape \(-3, -4\)"),
        ((*TENSOR_A, "shape"), "wide", r"tensors\.0\.shape"),
        ((*TENSOR_A, "shape"), [3, 4.5], r"tensors\.0\.shape\.1"),
        ((*TENSOR_A, "nbytes"), 23, r"tensor 'a': shape \(3, 4\) of bfloat16 is not 23 bytes"),
        ((*TENSOR_A, "offset"), -256, r"tensors\.0\.offset"),
        ((*TENSOR_A, "name"), "", r"tensors\.0\.name"),
        ((*TENSOR_A, "name"), None, r"tensors\.0\.name"),
        ((*TENSOR_B, "offset"), 23, r"tensor 'b' overlaps the one before it"),
        ((*TENSOR_B, "offset"), 293, r"tensors end at byte 301 of a buffer of 300 bytes"),
        (("3", "buffers", 0, "nbytes"), 263, r"tensors end at byte 264 of a buffer of 263 bytes"),
        (("3", "buffers", 0, "address"), -1, r"buffers\.0\.address"),
        (("3", "rank"), 4, r"metas of rank 3 claim to be of rank 4"),
        (("3", "rank"), -3, r"3\.rank"),
        (("3", "surprise"), 1, r"3\.surprise"),
        (("3", "host"), 7, r"3\.host"),
        (("x",), {}, r"x\.\[key\]"),
    ],
)
def test_bad_metas_are_refused_and_the_error_says_where(
    path: tuple[str | int, ...], value: object, message: str
) -> None:
    bad = document()
    target: Any = bad
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    with pytest.raises(CheckpointFormatError, match=message):
        metas_from_json(json.dumps(bad))


@pytest.mark.parametrize("missing", ["rank", "host", "host_ip", "device_uuid", "epoch"])
def test_a_missing_field_is_named(missing: str) -> None:
    bad = document()
    del bad["3"][missing]
    with pytest.raises(CheckpointFormatError, match=rf"3\.{missing}"):
        metas_from_json(json.dumps(bad))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"3": 1}', b"[" * 100_000])
def test_what_is_no_metas_document_is_refused(text: bytes) -> None:
    with pytest.raises(CheckpointFormatError, match="not a metas document"):
        metas_from_json(text)


def test_tensors_may_touch_and_empty_ones_may_share_an_offset() -> None:
    empty = [TensorMeta(name=name, dtype="int8", shape=(0,), offset=4, nbytes=0) for name in "ab"]
    full = TensorMeta(name="c", dtype="int8", shape=(4,), offset=0, nbytes=4)
    assert HostBufferMeta(address=0, nbytes=4, tensors=(full, *empty)).nbytes == 4


def test_metas_cannot_be_changed() -> None:
    tensor = TensorMeta(name="c", dtype="int8", shape=(4,), offset=0, nbytes=4)
    with pytest.raises(ValidationError, match="frozen"):
        tensor.offset = 256


def test_topology_groups_ranks_by_the_device_of_their_host() -> None:
    def held(rank: int, host: str, rdma_device: str | None) -> RankMetas:
        return RankMetas(rank=rank, host=host, host_ip="", device_uuid="", epoch="", rdma_device=rdma_device)

    metas = {
        2: held(2, "a", "mlx5_0"),
        0: held(0, "a", "mlx5_0"),
        1: held(1, "a", "mlx5_1"),
        3: held(3, "b", "mlx5_0"),
        4: held(4, "b", None),
    }
    groups = topology(metas)
    assert groups == {"mlx5_0@a": {0, 2}, "mlx5_1@a": {1}, "mlx5_0@b": {3}, "tcp@b": {4}}
    assert list(groups) == ["mlx5_0@a", "mlx5_1@a", "mlx5_0@b", "tcp@b"]  # its order counts
    assert list(topology(dict(sorted(metas.items())))) == list(groups)
