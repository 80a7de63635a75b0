"""Whole updates on the stand-in for NPUs: ranks, workers, handles and errors cross real process borders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.engines.ascend.conftest import FAKE_NPU_SMI, IP, STUB
from tests.engines.ascend.npu_checkpoint_for_tests import checkpoint
from tests.integration.conftest import torchrun
from tests.support.traces import check_committed, updates_in
from tests.support.worker import digest

SEED = 20261124
AN_ERROR_IS_PROMPT_SECONDS = 30.0
"""Below the update's timeout and every deadline; far above what a loaded machine needs."""


@dataclass(frozen=True)
class World:
    kind: str
    first: dict[str, str]
    second: dict[str, str]
    ranks: list[dict[str, Any]]
    trace_dir: Path

    def results(self, scenario: str) -> list[dict[str, Any]]:
        return [rank[scenario] for rank in self.ranks]


def make_checkpoint(directory: Path, seed: int) -> dict[str, str]:
    """Two shards, so that every rank owns a part."""
    tensors = checkpoint(seed)
    directory.mkdir()
    names = sorted(tensors)
    weight_map = {}
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[number::2]}, directory / file)
        weight_map |= dict.fromkeys(names[number::2], file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return {name: digest(tensor) for name, tensor in tensors.items()}


WORLDS: dict[str, dict[str, str]] = {
    # NPUs of their own, named by logic ids, since npu-smi shows the host's pids; hccl between them.
    "two": {"FAKE_NPU_SMI_SCENARIO": "a2_privileged_hostpid"},
    # The same, through vllm-ascend's communicator and the extension for all of vLLM's devices.
    "stateless": {
        "FAKE_NPU_SMI_SCENARIO": "a2_privileged_hostpid",
        "CKPT_ENGINE_CUSTOM_DIST": "vllm_hccl",
        "HCCL_EXEC_TIMEOUT": "30",  # more than a broadcast takes on a loaded machine
        "TEST_EXTENSION": "vllm",
    },
    # One NPU for both: gloo through host memory; keys by environment.
    "shared": {"FAKE_NPU_SMI_SCENARIO": "dcmi_fail", "FAKE_NPU_COUNT": "1", "TEST_SHARED_NPU": "1"},
    # A container that has NPU 5: there the worker finds its pid, and the parameter server its logic id.
    "lone": {
        "FAKE_NPU_SMI_SCENARIO": "a2_container_npu5",
        "FAKE_NPU_COUNT": "1",
        "TEST_SAMPLE_PID": "812",
        "TEST_WORKER_DEVICE": "1",
        "TEST_EXTENSION": "vllm",
    },
}


@pytest.fixture(scope="module", params=list(WORLDS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    kind = request.param
    out = tmp_path_factory.mktemp(f"npu-{kind}")
    machine = f"{os.getpid()}-{kind}"
    first, second = make_checkpoint(out / "first", SEED), make_checkpoint(out / "second", SEED + 1)
    size = 1 if kind == "lone" else 2
    try:
        output = torchrun(
            size,
            "tests.engines.ascend.npu_rank_for_tests",
            *map(str, (out, out / "first", out / "second")),
            timeout=240,
            PATH=f"{FAKE_NPU_SMI}{os.pathsep}{os.environ['PATH']}",
            PYTHONPATH=os.pathsep.join(filter(None, [str(STUB), os.environ.get("PYTHONPATH")])),
            CKPT_ENGINE_HOST_ID=IP,
            CKPT_ENGINE_SLOT_MIB="0.25",
            CKPT_ENGINE_SOCKET_DIR=str(out / "s"),
            CKPT_ENGINE_TRACE_DIR=str(out / "traces"),
            GLOO_SOCKET_IFNAME="lo",
            FAKE_NPU_MACHINE=machine,
            VLLM_ASCEND_ENABLE_NZ="0",
            **WORLDS[kind],
        )
    finally:
        for file in Path("/dev/shm").glob(f"fake-npu-{machine}-*"):
            file.unlink()
    (out / "output.txt").write_text(output)
    ranks = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(size)]
    yield World(kind, first, second, ranks, out / "traces")


GOOD = ("first", "second", "kept", "kept again", "kept no more")
GOOD += ("after identity", "after raise", "after not asked", "after killed")
SECOND = ("second", "kept again", "after identity", "after not asked")


@pytest.mark.parametrize("scenario", GOOD)
def test_every_worker_holds_the_checkpoints_bits(world: World, scenario: str) -> None:
    """Through fused parameters and transposed experts, with copies that are done late, in small slots."""
    for entry in world.results(scenario):
        assert entry["error"] is None, entry["message"]
        assert entry["buckets"] > 6, "the checkpoint must not fit the ring at once"
        assert entry["worker"]["status"]["outcome"] == "committed"
        assert entry["worker"]["state"]["weights"] == "serving"
        assert entry["worker"]["digests"] == (world.second if scenario in SECOND else world.first)
        assert entry["worker"]["in_place"], "captured graphs would read the old weights"


def test_traces_tell_when_streams_did_what(world: World) -> None:
    """Copies are enqueued, and done late: the spans are of the streams, not of the calls."""
    check_committed(updates_in(world.trace_dir)[0])


@pytest.mark.parametrize("scenario", [*GOOD[:2], "kept no more", *GOOD[5:]])
def test_nothing_stays_taken_on_the_device(world: World, scenario: str) -> None:
    assert [entry["free"] for entry in world.results(scenario)] == [
        entry["free"] for entry in world.results("first")
    ]


@pytest.mark.parametrize("scenario", ["identity", "raise", "not asked"])
def test_a_failed_update_leaves_nothing_on_the_device(world: World, scenario: str) -> None:
    """torch_npu would keep a ring for a reader that never came."""
    assert [entry["free"] for entry in world.results(scenario)] == [
        entry["free"] for entry in world.results("first")
    ]


def test_a_worker_that_cannot_be_identified_ends_the_update_on_every_rank(world: World) -> None:
    if world.kind == "shared":
        pytest.skip("the keys come from the environment here: npu-smi is not asked")
    entries = world.results("identity")
    for entry in entries:
        assert entry["error"] == "UpdateError"
        assert entry["record"] == entries[0]["record"], "every rank must report the same cause"
        assert entry["record"]["error_type"] == "IdentityError"
        assert "dcmi module initialize failed. ret is -8005" in entry["message"]
        assert "CKPT_ENGINE_DEVICE_UUID" in entry["message"]
        assert entry["seconds"] < AN_ERROR_IS_PROMPT_SECONDS


def test_a_workers_error_names_the_bucket_on_every_rank(world: World) -> None:
    for entry in world.results("raise"):
        assert entry["error"] == "UpdateError"
        assert "injected in bucket 2" in entry["message"]
        assert entry["record"]["bucket"] == 2
        assert entry["record"]["rank"] == len(world.ranks) - 1
        assert entry["worker"]["status"]["outcome"] == "failed"
        assert entry["worker"]["state"]["weights"] == "incomplete"


def test_a_killed_worker_ends_the_update_on_every_rank(world: World) -> None:
    for entry in world.results("killed"):
        # The parameter server sees its end, or the engine does and says so: whoever comes first.
        assert entry["error"] in ("PeerLost", "UpdateError")
        assert "died or closed its connection" in entry["message"] or "lost its worker" in entry["message"]
        assert entry["seconds"] < AN_ERROR_IS_PROMPT_SECONDS


def test_both_sides_found_the_same_key(world: World) -> None:
    keys = {
        "two": [f"NPU-{IP}-0", f"NPU-{IP}-1"],
        "stateless": [f"NPU-{IP}-0", f"NPU-{IP}-1"],
        "shared": ["NPU-test-0", "NPU-test-1"],
        "lone": [f"NPU-{IP}-5"],
    }
    assert [rank["uuid"] for rank in world.ranks] == keys[world.kind]
    assert [entry["worker"]["status"]["device"] for entry in world.results("first")] == keys[world.kind]


def test_a_communicator_that_is_needed_no_more_is_destroyed(world: World) -> None:
    """hccl keeps its memory and its port else: after an update that failed, and when all is over."""
    if world.kind != "stateless":
        pytest.skip("torch_npu's groups end by themselves")
    for rank in world.ranks:
        entries = {name: entry for name, entry in rank.items() if isinstance(entry, dict)}
        assert {name: entry["communicators"] for name, entry in entries.items()} == {
            name: 0 if entry["error"] else 1 for name, entry in entries.items()
        }
        assert rank["communicators"] == 0


def test_the_groups_are_those_that_were_asked_for(world: World) -> None:
    kinds = {"two": "HcclCollectives", "stateless": "VllmHcclCollectives", "shared": "GlooCollectives"}
    for scenario in GOOD:
        for entry in world.results(scenario):
            assert entry["group"] == kinds.get(world.kind)
