"""What `tests/integration/test_bits.py` sends, by CUDA IPC: every dtype, odd names, large and small ones."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.conftest import torchrun
from tests.integration.test_bits import (
    SEED,
    expected,
    test_every_worker_has_every_byte,
    test_the_tensors_were_as_odd_as_they_were_meant,
    write_files,
)
from tests.support import bits

__all__ = [
    "expected",
    "test_every_worker_has_every_byte",
    "test_the_tensors_were_as_odd_as_they_were_meant",
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    out = tmp_path_factory.mktemp("bits")
    write_files(out / "files")
    with tempfile.TemporaryDirectory(prefix="ce-", dir="/tmp") as sockets:
        torchrun(
            1,
            "tests.support.bits",
            str(out),
            str(SEED),
            timeout=240,
            TEST_DEVICE="cuda",
            CKPT_ENGINE_DEVICE_UUID="GPU-alone",
            PS_MAX_BUCKET_SIZE_GB=bits.MAX_BUCKET_GB,
            CKPT_ENGINE_SOCKET_DIR=sockets,
        )
        yield [json.loads((out / "rank-0.json").read_text())]
