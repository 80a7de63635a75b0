"""A bucket's tensors are views of the ring with the bits, dtype and shape of the layout."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from ckpt_engine.errors import ProtocolError
from ckpt_engine.ipc.messages import BucketLayout, TensorLayout
from ckpt_engine.ipc.views import RingViews
from ckpt_engine.metadata import DTYPE_NBYTES, align_up


class Bytes:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.manual_seed(1))

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        return self.data[offset : offset + nbytes]


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (0, 4), (1, 0)], ids=str)
def test_every_dtype_and_shape(shape: tuple[int, ...]) -> None:
    ring = Bytes(64 * 1024 + 255)
    layouts, offset = [], 0
    for dtype, itemsize in DTYPE_NBYTES.items():
        nbytes = torch.Size(shape).numel() * itemsize
        layouts.append(TensorLayout(f"of {dtype}", dtype, shape, offset, nbytes))
        offset = align_up(offset + nbytes)
    bucket = BucketLayout(512, offset, tuple(layouts))
    views = RingViews(ring)
    for layout, (name, tensor) in zip(layouts, views.tensors_of(bucket), strict=True):
        start = bucket.ring_offset + layout.offset
        expected = ring.view(start, layout.nbytes).view(getattr(torch, layout.dtype)).view(shape)
        assert name == layout.name
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (expected.dtype, shape, expected.stride())
        assert tensor.is_contiguous()
        assert tensor.data_ptr() == expected.data_ptr()
        bits = [one.contiguous().view(-1).view(torch.uint8) for one in (tensor, expected)]
        assert torch.equal(*bits)


def test_a_write_into_a_view_is_one_into_the_ring() -> None:
    ring = Bytes(1024)
    layout = TensorLayout("t", "float32", (2, 2), 256, 16)
    [(_, tensor)] = RingViews(ring).tensors_of(BucketLayout(256, 512, (layout,)))
    tensor.zero_()
    assert not ring.data[512:528].any()


@pytest.mark.parametrize(
    "layout",
    [
        TensorLayout("t", "float32", (2,), 0, 4),
        TensorLayout("t", "float32", (1,), 0, 8),
        TensorLayout("t", "float32", (1,), 2, 4),
        TensorLayout("t", "device", (4,), 0, 4),
        TensorLayout("t", "uint8", (-2, -2), 0, 4),
    ],
)
def test_bytes_that_are_no_such_tensor_are_refused(layout: TensorLayout) -> None:
    with pytest.raises(ProtocolError, match=r"'t'|no tensor is of"):
        RingViews(Bytes(1024)).tensors_of(BucketLayout(0, 512, (layout,)))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("nbytes", [4, 8], ids=["good", "refused"])
def test_the_collector_rests_meanwhile_and_is_then_as_it_was(enabled: bool, nbytes: int) -> None:
    layouts = [TensorLayout(f"t{number}", "float32", (1,), 0, 4) for number in range(5000)]
    bucket = BucketLayout(0, 512, (*layouts, TensorLayout("last", "float32", (1,), 0, nbytes)))
    views = RingViews(Bytes(1024))
    collections: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        collections.append(phase)

    gc.collect()
    if not enabled:
        gc.disable()
    gc.callbacks.append(note)
    try:
        with contextlib.suppress(ProtocolError):
            views.tensors_of(bucket)
        gc.callbacks.remove(note)
        assert gc.isenabled() == enabled
        assert collections.count("start") <= 1  # the one that waited until the end
    finally:
        gc.enable()
