"""The integration tests' world on a GPU, and what only a GPU can show. Skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import World, broken_engine, launch

__all__ = ["broken_engine"]

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr == "gpu" and not torch.cuda.is_available():
        pytest.exit("`-m gpu` asks for tests on a CUDA device, and none is here", returncode=3)
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(
    scope="session",
    params=[(1, 1, ""), (2, 1, ""), (1, 1, "expandable_segments:True"), (2, 2, ""), (4, 4, "")],
    ids=["1", "2-on-one-gpu", "1-expandable-segments", "2-on-2-gpus", "4-on-4-gpus"],
)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, broken_engine: str
) -> Iterator[World]:
    size, gpus, allocator = request.param
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"{torch.cuda.device_count()} CUDA device here, and this needs {gpus}")
    world = launch(
        tmp_path_factory.mktemp("world"),
        size,
        1,
        broken_engine,
        TEST_DEVICE="cuda",
        TEST_GPUS=str(gpus),
        PYTORCH_CUDA_ALLOC_CONF=allocator,
    )
    yield world
    shutil.rmtree(world.socket_dir, ignore_errors=True)
