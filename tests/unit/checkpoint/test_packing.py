"""Packing: the rules of SPEC row 2, on random tensors; and the cutting of reads."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_engine.checkpoint import file_reads
from ckpt_engine.checkpoint.file_reads import MAX_IOVECS, Segment, cut_pieces
from ckpt_engine.checkpoint.packing import TensorSpec, pack
from ckpt_engine.errors import ConfigError
from ckpt_engine.metadata import HostBufferMeta

reproducible = settings(derandomize=True, print_blob=True, deadline=None)
specs = st.dictionaries(st.text(min_size=1, max_size=4), st.integers(0, 3000), max_size=30).map(
    lambda sizes: [TensorSpec(name, "uint8", (nbytes,), nbytes) for name, nbytes in sizes.items()]
)


@reproducible
@given(specs, st.integers(1, 8000))
def test_rules(given_specs: list[TensorSpec], buffer_limit: int) -> None:
    packed = pack(given_specs, buffer_limit)
    names = [tensor.name for buffer in packed for tensor in buffer.tensors]
    assert names == sorted(spec.name for spec in given_specs)
    sizes = {spec.name: spec.nbytes for spec in given_specs}
    end = 0
    for buffer in packed:
        assert buffer.start % 256 == 0
        assert end <= buffer.start < end + 256  # consecutive
        assert buffer.nbytes <= max([buffer_limit, *sizes.values()])
        assert buffer.tensors
        assert all(tensor.offset % 256 == 0 for tensor in buffer.tensors)
        assert all(tensor.nbytes == sizes[tensor.name] for tensor in buffer.tensors)
        assert buffer.nbytes == buffer.tensors[-1].offset + buffer.tensors[-1].nbytes
        HostBufferMeta(address=buffer.start, nbytes=buffer.nbytes, tensors=buffer.tensors)  # no overlaps
        end = buffer.start + buffer.nbytes
    # No buffer ends while the next tensor would have fitted.
    for this, following in pairwise(packed):
        used = -(-this.nbytes // 256) * 256 + following.tensors[0].nbytes
        assert used > max([buffer_limit, *sizes.values()])
    shuffled = list(given_specs)
    random.Random(1).shuffle(shuffled)
    assert pack(shuffled, buffer_limit) == packed


def test_the_largest_tensor_fits_whatever_the_limit() -> None:
    packed = pack([TensorSpec(n, "uint8", (s,), s) for n, s in [("a", 300), ("b", 1001), ("c", 1)]], 512)
    assert [(b.start, b.nbytes, len(b.tensors)) for b in packed] == [
        (0, 300, 1),
        (512, 1001, 1),
        (1536, 1, 1),
    ]


def test_nothing_and_bad_limit() -> None:
    assert pack([]) == ()
    with pytest.raises(ConfigError, match="buffer_limit=0"):
        pack([], 0)


@reproducible
@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=60), st.integers(1, 50))
def test_pieces_cover_all_segments_once(tensors: list[tuple[int, bool]], piece_nbytes: int) -> None:
    segments, offset = [], 8
    for index, (nbytes, gap) in enumerate(tensors):
        offset += 3 if gap else 0
        segments.append(Segment(str(index), offset, 1000 * (len(tensors) - index), nbytes))
        offset += nbytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_reads, "PIECE_NBYTES", piece_nbytes)
        pieces = cut_pieces(reversed(segments))
    covered = {}
    for piece in pieces:
        assert 0 < piece.nbytes <= piece_nbytes
        end = piece.segments[0].file_offset
        for part in piece.segments:
            assert part.file_offset == end  # one preadv can read it
            end += part.nbytes
            for byte in range(part.nbytes):
                assert covered.setdefault(part.file_offset + byte, part.arena_offset + byte) is not None
    assert sum(piece.nbytes for piece in pieces) == len(covered)
    assert covered == {
        s.file_offset + byte: s.arena_offset + byte for s in segments for byte in range(s.nbytes)
    }


def test_pieces_have_at_most_1024_buffers() -> None:
    pieces = cut_pieces(Segment(str(i), i, 256 * i, 1) for i in range(2 * MAX_IOVECS + 1))
    assert [len(piece.segments) for piece in pieces] == [MAX_IOVECS, MAX_IOVECS, 1]
