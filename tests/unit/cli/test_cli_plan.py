from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckpt_engine.checkpoint import split_checkpoint
from ckpt_engine.cli.plan import metas_from_headers
from ckpt_engine.parameter_server import ParameterServer
from ckpt_engine.planning.plan import make_plan

Cli = Callable[..., Any]


@pytest.mark.parametrize("slot_nbytes", [1024, 4096, 2**20])
def test_same_buckets_as_a_real_update(checkpoint: Path, slot_nbytes: int) -> None:
    with ParameterServer(rank=0, world_size=1, device="cpu") as ps:
        ps.register_checkpoint("c", files=split_checkpoint(checkpoint, 0, 1))
        ps.gather_metas("c", timeout=30)
        real = make_plan("c", ps.get_metas(), slot_nbytes=slot_nbytes, slot_count=3, budget=2**30)
    dry = make_plan(
        "c", metas_from_headers(checkpoint, 1), slot_nbytes=slot_nbytes, slot_count=3, budget=2**30
    )
    assert dry.ring == real.ring
    assert dry.buckets == real.buckets


def test_every_rank_holds_its_share(checkpoint: Path) -> None:
    metas = metas_from_headers(checkpoint, 3)
    assert sorted(metas) == [0, 1, 2]
    held = [{tensor.name for buffer in m.buffers for tensor in buffer.tensors} for m in metas.values()]
    assert held == [{"a.weight", "a.bias"}, {"b.weight", "b[red]"}, set()]


def test_json(cli: Cli, checkpoint: Path) -> None:
    done = cli("plan", checkpoint, "--world-size", 2, "--slot-mib", 4 / 1024, "--slot-count", 4, "--json")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert (plan["slots"], plan["slot_bytes"], plan["ring_bytes"]) == (3, 4096, 12288)
    assert sorted(plan["owners"]) == ["0", "1"]
    assert sorted(name for bucket in plan["buckets"] for name in bucket["tensors"]) == [
        "a.bias",
        "a.weight",
        "b.weight",
        "b[red]",
    ]


def test_the_environment_s_slots(cli: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_ENGINE_SLOT_MIB", str(2 / 1024))
    monkeypatch.setenv("CKPT_ENGINE_SLOT_COUNT", "5")
    plan = json.loads(cli("plan", checkpoint, "--world-size", 1, "--json").stdout)
    assert (plan["slot_bytes"], plan["slots"]) == (2048, 5)


def test_table_and_its_end(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({f"layer.{i:02}": torch.ones(256) for i in range(30)}, file)
    args = ("plan", file, "--world-size", 2, "--slot-mib", 1 / 1024)
    done = cli(*args)
    assert done.exit_code == 0, done.output
    assert "30 tensors, 30.00 KiB, in 30 buckets to 2 ranks" in done.stdout
    assert "3 slots of 1.00 KiB" in done.stdout
    assert "layer.19" in done.stdout
    assert "layer.20" not in done.stdout
    assert "10 more buckets" in done.stdout
    assert "layer.29" in cli(*args, "--all").stdout


def test_too_little_memory(cli: Cli, checkpoint: Path) -> None:
    done = cli("plan", checkpoint, "--world-size", 1, "--free-memory-gib", 4096 / 2**30)
    assert done.exit_code == 1
    assert "error: the largest tensor takes 8192 bytes, but an update may use only 3686 bytes" in done.stderr


def test_a_lying_file(cli: Cli, lying_file: Path) -> None:
    done = cli("plan", lying_file, "--world-size", 2)
    assert done.exit_code == 1
    assert str(lying_file) in done.stderr


def test_a_tensor_twice_on_one_rank(cli: Cli, checkpoint: Path) -> None:
    save_file({"a.bias": torch.ones(1)}, checkpoint / "three.safetensors")
    done = cli("plan", checkpoint, "--world-size", 1)
    assert done.exit_code == 1
    assert "tensor 'a.bias' is there twice" in done.stderr


@pytest.mark.parametrize(
    "option", [("--slot-mib", 0), ("--slot-mib", "nan"), ("--slot-count", 0), ("--free-memory-gib", "inf")]
)
def test_bad_sizes(cli: Cli, checkpoint: Path, option: tuple[str, object]) -> None:
    assert cli("plan", checkpoint, "--world-size", 1, *option).exit_code == 2


def test_a_described_cluster_is_predicted(cli: Cli, tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "cluster.json"
    described = {
        "name": "two",
        "ranks_per_host": 2,
        "rates": {"h2d": 1, "reload": 1},
        "checkpoint": {"gb": 0.001, "tensors": 10},
    }
    file.write_text(json.dumps(described))
    found = json.loads(cli("plan", "--cluster", file, "--json").output)
    assert found["predicted"]["stages"]["buckets"] > 0
    assert found["tensors"] == 10
    result = cli("plan", checkpoint, "--cluster", file)
    assert result.exit_code == 0, result.output
    assert "two, 2 ranks" in result.output
    for bad in (("--cluster", file, "--world-size", 3), (checkpoint,), ("--world-size", 2)):
        assert cli("plan", *bad).exit_code == 2


def test_joins_are_predicted(cli: Cli, tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "cluster.json"
    described = {
        "name": "new",
        "figures": "made up",
        "measured": 7.5,
        "ranks_per_host": 2,
        "rates": {"h2d": 1, "reload": 1},
        "checkpoint": {"gb": 0.001, "tensors": 10},
        "p2p": {"nic": 1, "nics": 2},
        "owners": {"ranks_per_host": 3, "nics": 3},
    }
    file.write_text(json.dumps(described))
    found = json.loads(cli("plan", "--cluster", file, "--joiners", 5, "--json").output)
    assert [row["joiners"] for row in found["joins"]] == [1, 2, 4, 5]
    assert set(found["predicted"]["assigned"]) == {"rounds", "balanced"}
    assert {bucket["receiver"] for bucket in found["buckets"]} == {0, 1}
    assert sorted(found["owners"]) == ["0", "1", "2"]
    result = cli("plan", checkpoint, "--cluster", file, "--joiners", 1)
    assert result.exit_code == 0, result.output
    assert "2 ranks join 3 by P2P" in result.output
    assert "by the model, 7.500 s were measured" in result.output
    assert "the model's figures: made up" in result.output
    assert cli("plan", checkpoint, "--world-size", 2, "--joiners", 2).exit_code == 2
    assert cli("plan", "--cluster", file, "--world-size", 2, "--joiners", 2).exit_code == 2
    del described["p2p"]
    file.write_text(json.dumps(described))
    result = cli("plan", "--cluster", file, "--joiners", 2)
    assert result.exit_code == 1
    assert "[p2p] table" in result.stderr


def test_an_update_of_some_ranks_is_predicted(cli: Cli, tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "cluster.json"
    described = {
        "name": "fleet",
        "hosts": 2,
        "ranks_per_host": 2,
        "rates": {"h2d": 1, "reload": 1},
        "checkpoint": {"gb": 0.001, "tensors": 12},
        "p2p": {"nic": 1, "nics": 2},
    }
    file.write_text(json.dumps(described))
    found = json.loads(cli("plan", "--cluster", file, "--ranks", "0-1", "--json").output)
    assert found["predicted"]["prediction"]["stages"]["buckets"] > 0
    assert {bucket["receiver"] for bucket in found["buckets"]} == {None, 0, 1}
    assert sorted(found["owners"]) == ["0", "1", "2", "3"]
    result = cli("plan", checkpoint, "--cluster", file, "--ranks", "0,2-3")
    assert result.exit_code == 0, result.output
    assert "3 ranks, which read by P2P what the other 1 hold" in result.output
    for bad in ("", "x", "3-1", "-1", "0-", "0-99999999999"):
        assert cli("plan", "--cluster", file, "--ranks", bad).exit_code == 2, bad
    assert cli("plan", "--cluster", file, "--ranks", "0", "--joiners", 2).exit_code == 2
    assert cli("plan", checkpoint, "--world-size", 2, "--ranks", "0").exit_code == 2
    result = cli("plan", "--cluster", file, "--ranks", "4")
    assert result.exit_code == 1
    assert "rank 4 is none of the cluster's" in result.stderr
