"""Registering tensors that are on the GPU: right bytes, from several streams, at the bus's speed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from ckpt_engine.checkpoint import CheckpointRegistry
from ckpt_engine.devices import make_device
from ckpt_engine.settings import load_settings

GiB = 2**30


@pytest.fixture
def registry() -> Iterator[CheckpointRegistry]:
    registry = CheckpointRegistry(pinner=make_device("cuda", load_settings(), 0).pinner)
    yield registry
    registry.close()


def held(registry: CheckpointRegistry, name: str) -> dict[str, torch.Tensor]:
    checkpoint = registry.get(name)
    return {
        tensor.name: checkpoint.view(index, tensor.offset, tensor.nbytes)
        .view(getattr(torch, tensor.dtype))
        .view(tensor.shape)
        for index, buffer in enumerate(checkpoint.buffers)
        for tensor in buffer.tensors
    }


def test_every_kind_of_tensor(registry: CheckpointRegistry) -> None:
    generator = torch.Generator("cuda").manual_seed(7)
    base = torch.randn(300, 70_000, device="cuda", generator=generator)
    tensors = {
        "contiguous": base,
        "transposed": base.T,
        "strided": base[::3, 1::2],
        "small": base[0, 0],
        "empty": base[:0],
        "bfloat16": base.bfloat16(),
        "float8": base.to(torch.float8_e4m3fn),
        "bool": base > 0,
        "expanded": base[0].expand(5, -1),
        "parameter": torch.nn.Parameter(base[:3]),
        "cpu": base[:7].cpu(),
    }
    progress: list[int] = []
    registry.register("c", named_tensors=tensors, on_progress=lambda done, _: progress.append(done))
    for name, tensor in held(registry, "c").items():
        expected = tensors[name].detach().cpu().reshape(-1).view(torch.uint8)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected), name
    assert progress == sorted(progress)
    assert progress[-1] == registry.get("c").nbytes


def test_what_is_being_computed_is_awaited(registry: CheckpointRegistry) -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor = torch.zeros(1 << 26, device="cuda")
        torch.cuda._sleep(200_000_000)
        tensor.fill_(3)
        registry.register("c", named_tensors={"t": tensor})
    assert bool((held(registry, "c")["t"] == 3).all())


def test_into_a_kept_arena_it_is_as_fast_as_the_bus(registry: CheckpointRegistry) -> None:
    """Beside one copy of all of it, from the device into the same pinned memory; the best of each."""
    tensors = {f"t{i}": torch.randn(GiB // 16, device="cuda").bfloat16() for i in range(16)}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    whole = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    ours, alone = [], []
    for _ in range(4):
        begin = time.perf_counter()
        registry.register("c", named_tensors=tensors, use_shared_memory_pool=True)
        ours.append(time.perf_counter() - begin)
        target = registry.get("c").arena.view(0, nbytes)
        begin = time.perf_counter()
        target.copy_(whole, non_blocking=True)
        torch.cuda.synchronize()
        alone.append(time.perf_counter() - begin)
        registry.unregister("c")
    speeds = f"{nbytes / min(ours[1:]) / 1e9:.1f} GB/s; the copy alone {nbytes / min(alone) / 1e9:.1f} GB/s"
    assert min(ours[1:]) <= min(alone) / 0.8, speeds
