"""Every byte of every kind of tensor reaches every worker, through real ranks, workers, sockets and files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.integration.conftest import torchrun
from tests.support import bits
from tests.support.worker import digest

SEED = 20261125
SHARDS = 3
FP8_AND_FRIENDS = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "int8", "int64", "bool")

Digests = dict[str, str]


@pytest.fixture(scope="module")
def expected() -> dict[str, Digests]:
    tensors = {"files": bits.make(SEED), "tensors": bits.in_memory(SEED)}
    return {way: {name: digest(t.detach()) for name, t in held.items()} for way, held in tensors.items()}


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """What each rank's worker held after each update."""
    size: int = request.param
    out = tmp_path_factory.mktemp("bits")
    write_files(out / "files")
    with tempfile.TemporaryDirectory(prefix="ce-", dir="/tmp") as sockets:
        torchrun(
            size,
            "tests.support.bits",
            str(out),
            str(SEED),
            timeout=240,
            PS_MAX_BUCKET_SIZE_GB=bits.MAX_BUCKET_GB,
            CKPT_ENGINE_SOCKET_DIR=sockets,
            GLOO_SOCKET_IFNAME="lo",
        )
        yield [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(size)]


def write_files(directory: Path) -> None:
    directory.mkdir()
    tensors = bits.make(SEED)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        shard = {name: tensors[name] for name in names[number::SHARDS]}
        save_file(shard, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("way", ["files", "tensors"])
def test_every_worker_has_every_byte(ranks: list[Any], expected: dict[str, Digests], way: str) -> None:
    for rank, seen in enumerate(ranks):
        digests = seen[way]["digests"]
        assert digests.keys() == expected[way].keys(), f"seed {SEED}, rank {rank}"
        wrong = [name for name, value in expected[way].items() if digests[name] != value]
        assert not wrong, f"seed {SEED}, rank {rank}"


@pytest.mark.parametrize("way", ["files", "tensors"])
def test_the_tensors_were_as_odd_as_they_were_meant(
    ranks: list[Any], expected: dict[str, Digests], way: str
) -> None:
    """So that the test before cannot pass for want of them."""
    names = expected[way].keys()
    for dtype in FP8_AND_FRIENDS:
        assert {f"{dtype}.{shape}" for shape in ("scalar", "0", "3x0x5", "257")} <= names
    assert sum(name.startswith("small.") for name in names) == 5000
    assert {f"any.{name}" for name in bits.NAMES} <= names
    assert max(ord(letter) for name in names for letter in name) == 0x10FFFF
    largest_bucket = int(float(bits.MAX_BUCKET_GB) * 2**30)
    assert largest_bucket < bits.LARGE_NBYTES / 5
    for seen in ranks:
        assert seen[way]["tensors"] == len(names)
        # Half a MiB a slot, and more only because three tensors are larger than three slots.
        assert bits.LARGE_NBYTES <= seen[way]["ring_nbytes"] <= bits.LARGE_NBYTES + largest_bucket
        assert seen[way]["buckets"] > 3


def test_the_second_update_changed_every_tensor_that_has_bytes(expected: dict[str, Digests]) -> None:
    """So that no byte of the first one can pass for one of the second."""
    same = {name for name, value in expected["files"].items() if expected["tensors"][name] == value}
    # One of a few bytes may be the same by chance.
    assert not [name for name in same if name.startswith(("any.", "large.")) or name.endswith(".257")]
