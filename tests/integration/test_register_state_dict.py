"""State dicts of trainers, sharded or not, become shares: real ranks, FSDP2, DTensors, gloo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ROOT, free_port, torchrun
from tests.support.state_dicts import BUCKET_NBYTES

SIZE = 4
GOOD = (
    *(f"fsdp {step}" for step in range(3)),
    "fsdp tied",
    "cast of some",
    "placements",
    "fsdp of tp",
    "tp in replicas",
    "plain, alike on all",
    "plain, on rank 0",
    "stages",
    "after that",
)
REFUSED = {
    # scenario: the error, what it says; whether it is the last rank's alone, of which the others hear
    "meta": ("CheckpointError", r"is on the meta device: .*to_empty", True),
    "no tensor": ("ConfigError", r"'extra' is a bytes, not a torch.Tensor: leave it out \(rename", True),
    "no mapping": ("ConfigError", r"state_dict is a list: give a mapping", True),
    "one name for two": ("ConfigError", r"rename gives '.*' and '.*' the same name, 'all'", False),
    "other shapes": (
        "CheckpointError",
        r"'w' has float32 \(2,\) on rank 0, and float32 \(3,\) on rank 3",
        False,
    ),
    "FSDP1": ("CheckpointError", r"'w' is a ShardedTensor, as FSDP1 makes them: use fully_shard", False),
    "odd shards": (
        "CheckpointError",
        r"'w': this rank's shard has shape \(3, 3\), and \(2, 3\) by its",
        True,
    ),
    "missing shard": (
        "CheckpointError",
        r"is sharded over ranks \(0, 1, 2, 3\) on rank 0, but rank 3",
        False,
    ),
    "bad dtype": ("ConfigError", r"dtype=torch.int8 for 'embed.weight': give a floating-point", False),
    "other dtypes": ("CheckpointError", r"has bfloat16 .* on rank 0, and float16 .* on rank 3", False),
    "other buckets": ("UpdateError", r"bucket_nbytes=1001", False),
    "in the middle": ("ValueError", r"no more of this", True),
    "name taken": ("CheckpointExistsError", r"'step' is registered already", True),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """Scenario -> what happened, by rank."""
    out = tmp_path_factory.mktemp("state-dicts")
    with tempfile.TemporaryDirectory(prefix="ce-", dir="/tmp") as sockets:
        environment = {"CKPT_ENGINE_SOCKET_DIR": sockets, "GLOO_SOCKET_IFNAME": "lo"}
        output = torchrun(SIZE, "tests.support.state_dicts", str(out), timeout=240, **environment)
        (out / "output.txt").write_text(output)
        yield [
            json.loads((out / f"rank-{rank}.json").read_text()) | {"output": output} for rank in range(SIZE)
        ]
        assert list(Path(sockets).iterdir()) == []


@pytest.mark.parametrize("scenario", GOOD)
def test_every_tensor_is_whole_on_one_rank(ranks: list[dict[str, Any]], scenario: str) -> None:
    results = [rank[scenario] for rank in ranks]
    assert [result["error"] for result in results] == [None] * SIZE, results
    held: dict[str, str] = {}
    for result in results:
        assert not held.keys() & result["held"].keys()
        held |= result["held"]
    assert held == results[0]["expected"]


@pytest.mark.parametrize("scenario", ["fsdp 0", "placements", "fsdp of tp", "plain, alike on all"])
def test_shares_are_about_equal(ranks: list[dict[str, Any]], scenario: str) -> None:
    nbytes = [rank[scenario]["nbytes"] for rank in ranks]
    assert max(nbytes) - min(nbytes) <= 2 * ranks[0][scenario]["largest"], nbytes


@pytest.mark.parametrize("scenario", GOOD)
def test_no_rank_ever_has_much_more(ranks: list[dict[str, Any]], scenario: str) -> None:
    """What travels at a time is bounded, however large the model is."""
    for rank in ranks:
        # Shards in what travels begin at multiples of 16 bytes.
        most = max(BUCKET_NBYTES, rank[scenario]["largest"]) * 1.5
        assert rank[scenario]["travelled"] <= most
    shards_travel = any(rank[scenario]["travelled"] for rank in ranks)
    assert shards_travel == (scenario not in ("plain, alike on all", "plain, on rank 0", "stages"))


def test_kept_memory_is_refilled_in_place(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        steps = [rank[f"fsdp {step}"] for step in range(3)]
        assert len({step["address"] for step in steps}) == 1
        assert len({step["epoch"] for step in steps}) == 3
        assert [step["held"].keys() for step in steps] == [steps[0]["held"].keys()] * 3
        assert steps[0]["held"] != steps[1]["held"] != steps[2]["held"]


def test_tied_tensors_are_said_once(ranks: list[dict[str, Any]]) -> None:
    said = "'embed.weight', 'head.weight' are tied (the same memory)"
    assert ranks[0]["output"].count(said) == SIZE


@pytest.mark.parametrize("scenario", REFUSED)
def test_what_cannot_be_taken_is_said_on_every_rank(ranks: list[dict[str, Any]], scenario: str) -> None:
    kind, message, lasts = REFUSED[scenario]
    *others, last = [rank[scenario] for rank in ranks]
    for result in (*others, last):
        # Where several see it, who is first tells the others.
        assert result["error"] in {kind, "UpdateError"}, result
        assert re.search(message, result["message"], re.DOTALL), result
    if lasts:
        assert last["error"] == kind
        assert {(other["record"]["rank"], other["record"]["error_type"]) for other in others} == {
            (SIZE - 1, kind)
        }


@pytest.mark.parametrize("scenario", [*GOOD, *REFUSED])
def test_the_trainers_own_group_is_as_it_was(ranks: list[dict[str, Any]], scenario: str) -> None:
    assert [rank[scenario]["default_group"] for rank in ranks] == [sum(range(1, SIZE + 1))] * SIZE


def test_a_rank_that_dies_meanwhile_is_named_at_once(tmp_path: Path) -> None:
    """Not at the deadline, of a minute; no other rank has anything registered."""
    with tempfile.TemporaryDirectory(prefix="ce-", dir="/tmp") as sockets:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
            "CKPT_ENGINE_SOCKET_DIR": sockets,
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.support.state_dicts", str(tmp_path), "lose"],
                cwd=ROOT,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(3)
        ]
        try:
            outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0, 9], outputs
    for number in range(2):
        said = json.loads((tmp_path / f"rank-{number}.json").read_text())
        assert said["error"] == "PeerLost", said
        assert "rank 2" in said["message"]
        assert said["names"] == []
        assert said["seconds"] < 40
