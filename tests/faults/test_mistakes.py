"""Mistakes of callers, files that lie, and exceptions: every rank gets to know, and the next update works.

Nobody dies of any of them, so all share one launch. Ranks and workers are real processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reports_for_fault_tests import MISTAKE_SECONDS
from safetensors.torch import save_file
from world_for_fault_tests import Fault, World, Worlds, failed_alike

from ckpt_engine.checkpoint.safetensors_header import MAX_HEADER_NBYTES
from tests.support.steered import Answer

BUCKET = 9


@pytest.fixture
def world(worlds: Worlds) -> World:
    return worlds(2, 1)


def fails(world: World, fault: str) -> dict[int, Answer]:
    """What all ranks say of what they were just told to do."""
    return world.reported(fault, world.started(), MISTAKE_SECONDS, world.alive)


def works_at_once(world: World, seed: int) -> None:
    world.put_in_place(seed)
    world.nothing_is_left()


def of_rank_1(answers: dict[int, Answer], error: str, text: str) -> dict[str, Any]:
    """The record that rank 0 has of a mistake which rank 1 raised as what it is."""
    assert answers[1]["error"] == error, answers[1]
    assert text in answers[1]["message"]
    record: dict[str, Any] = answers[0]["record"]
    assert answers[0]["error"] == "UpdateError"
    assert (record["rank"], record["error_type"]) == (1, error)
    assert text in record["message"]
    return record


# Arguments


@pytest.mark.parametrize("ranks", [[0, 2], [-1]], ids=["too high", "negative"])
def test_ranks_out_of_range_are_refused(world: World, ranks: list[int]) -> None:
    seed = world.new_checkpoint()
    world.start(ranks=ranks)
    for answer in fails(world, "ranks out of range").values():
        assert answer["error"] == "ConfigError"
        assert f"ranks={ranks}: must be from 0 to 1" in answer["message"]
    works_at_once(world, seed)


def test_ranks_out_of_range_on_one_rank_are_known_to_all(world: World) -> None:
    seed = world.new_checkpoint()
    world.start(ranks=lambda rank: [0, 1, 7] if rank == 1 else None)
    of_rank_1(fails(world, "ranks out of range on one rank"), "ConfigError", "must be from 0 to 1")
    works_at_once(world, seed)


def test_a_name_registered_twice_is_refused_and_the_first_stays(world: World) -> None:
    seed = world.new_checkpoint()
    world.fleet.tell("register", world.alive, name="a", kind="layers", seed=seed + 1, parts=[0], of=1)
    for answer in fails(world, "a checkpoint's name twice").values():
        assert answer["error"] == "CheckpointExistsError"
        assert "'a' is registered already" in answer["message"]
    works_at_once(world, seed)


# Files and tensors


def broken_files(directory: Path, kind: str) -> tuple[list[str], str, list[str]]:
    """Files of which one lies, the error, and what it says."""
    one, other = str(directory / "one.safetensors"), str(directory / "other.safetensors")
    save_file({"twice": torch.ones(3), "once": torch.ones(1)}, one)
    if kind == "a name in two files":
        save_file({"twice": torch.zeros(3)}, other)
        return [one, other], "CheckpointFormatError", ["'twice'", one, other]
    header, nbytes = LIES[kind]
    with open(other, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + nbytes)
    return [one, other], "CheckpointFormatError", [other]


def header_of(**entries: tuple[str, list[int], list[int]]) -> bytes:
    return json.dumps(
        {
            name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            for name, (dtype, shape, offsets) in entries.items()
        }
    ).encode()


LIES: dict[str, tuple[bytes, int]] = {
    "offsets past the end": (header_of(w=("F32", [1000], [0, 4000])), 3996),
    "overlapping tensors": (header_of(v=("U8", [4], [0, 4]), w=("U8", [4], [2, 6])), 6),
    "a negative size": (header_of(w=("U8", [-4], [0, 4])), 4),
    "negative offsets": (header_of(w=("U8", [4], [-4, 0])), 4),
    "a header over the limit": (b"{" + b" " * MAX_HEADER_NBYTES + b"}", 0),
    "bad JSON": (b'{"w": ', 0),
    "a name twice": (b'{"w": {}, "w": {}}', 0),
    "an unknown dtype": (header_of(w=("U9", [4], [0, 4])), 4),
}


@pytest.mark.parametrize("kind", ["a name in two files", *LIES])
def test_files_that_lie_are_known_to_all(world: World, tmp_path: Path, kind: str) -> None:
    """One rank's; the other finds out when they gather, instead of waiting."""
    seed = world.new_checkpoint()
    files, error, texts = broken_files(tmp_path, kind)
    answers = world.answers_to("register_files", name="b", files=lambda rank: files if rank == 1 else [])
    assert (answers[0]["error"], answers[1]["error"]) == (None, error)
    assert all(text in answers[1]["message"] for text in texts)
    world.fleet.tell("gather", world.alive, name="b")
    record = failed_alike(fails(world, kind))
    assert (record["rank"], record["stage"], record["error_type"]) == (1, "register", error)
    assert all(text in record["message"] for text in texts)
    world.ask("unregister", name="b")
    works_at_once(world, seed)


def test_a_tensor_on_two_ranks_is_named_by_all(world: World) -> None:
    seed = world.new_checkpoint()
    world.ask("register", name="b", kind="layers", seed=seed, parts=[0], of=2)
    world.ask("gather", name="b")
    world.start(name="b")
    record = failed_alike(fails(world, "a tensor on two ranks"))
    assert (record["stage"], record["error_type"]) == ("begin", "PlanError")
    assert "tensor 'layers.00.bias' is held by rank 0 and by rank 1" in record["message"]
    world.ask("unregister", name="b")
    works_at_once(world, seed)


# Metas


def test_a_share_that_was_not_gathered_again_is_known_to_all(world: World) -> None:
    seed = world.new_checkpoint()
    world.fleet.ask("unregister", [1], name="a")
    share = {"name": "a", "kind": "layers", "seed": seed + 1, "parts": [1], "of": 2}
    assert world.fleet.ask("register", [1], **share)[1]["error"] is None
    world.start()
    record = of_rank_1(
        fails(world, "a share not gathered again"), "UnknownCheckpointError", "call gather_metas first"
    )
    assert (record["stage"], record["device"]) == ("begin", world.fleet.device(1))
    works_at_once(world, world.new_checkpoint())


def test_ranks_that_gathered_different_metas_do_not_move_a_byte(world: World) -> None:
    seed = world.new_checkpoint()
    assert world.fleet.ask("forge", [1], name="a")[1]["error"] is None
    world.start()
    answers = fails(world, "different metas")
    record = failed_alike(answers)
    assert (record["stage"], record["error_type"]) == ("begin", "ProtocolError")
    assert "have gathered different metas: call gather_metas on all ranks" in record["message"]
    assert [answer["touched"] for answer in answers.values()] == [False, False]
    world.gather("a")
    works_at_once(world, seed)


def metas(kind: str) -> str:
    """Another fleet's, in which one thing is wrong."""
    tensor = {"name": "w", "dtype": "float32", "shape": [4], "offset": 0, "nbytes": 16}
    buffer: dict[str, Any] = {"address": 4096, "nbytes": 16, "tensors": [tensor]}
    rank = {"rank": 0, "host": "h", "host_ip": "10.0.0.1", "device_uuid": "CPU-h-0", "epoch": "1"}
    if kind == "sizes do not fit":
        tensor["nbytes"] = 12
    elif kind == "tensors overlap":
        buffer |= {"nbytes": 32, "tensors": [tensor, tensor | {"name": "v", "offset": 8}]}
    elif kind == "a buffer is too small":
        buffer["nbytes"] = 15
    else:
        rank["rank"] = 1
    return json.dumps({"0": rank | {"buffers": [buffer]}})


@pytest.mark.parametrize(
    "kind", ["sizes do not fit", "tensors overlap", "a buffer is too small", "another rank's"]
)
def test_metas_that_do_not_fit_are_refused_and_change_nothing(world: World, kind: str) -> None:
    seed = world.new_checkpoint()
    before = world.answers_to("state")
    world.fleet.tell("load_metas", world.alive, texts=[metas(kind)])
    for answer in fails(world, "metas that do not fit").values():
        assert answer["error"] == "CheckpointFormatError"
    after = world.answers_to("state")
    assert [answer["metas"] for answer in after.values()] == [answer["metas"] for answer in before.values()]
    works_at_once(world, seed)


# Exceptions


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        ({"act": "raise", "at": "bucket", "bucket": BUCKET}, "buckets"),
        ({"act": "raise", "at": "post_hook"}, "post_hook"),
    ],
)
def test_after_an_exception_in_an_engine_the_next_update_works(
    world: World, fault: Fault, stage: str
) -> None:
    seed, victim = world.new_checkpoint(), world.last
    worker = world.fleet.worker(victim)
    world.start(worker_faults={victim: fault})
    record = failed_alike(
        world.reported(
            f"an engine raises ({fault['at']})", worker.happened("fault"), MISTAKE_SECONDS, world.alive
        )
    )
    assert (record["rank"], record["device"]) == (victim, world.fleet.device(victim))
    assert (record["stage"], record["error_type"]) == (stage, "RuntimeError")
    assert f"injected in {fault['at']}" in record["message"]
    assert "steered_worker.py" in record["traceback"]
    assert record["bucket"] == fault.get("bucket")
    assert len(record["tensors"]) == (2 if stage == "buckets" else 0)
    works_at_once(world, seed)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("at", "stage"), [("request", "request"), ("buckets", "buckets")])
def test_after_an_exception_in_a_rank_the_next_update_works(
    world: World, victim: int, at: str, stage: str
) -> None:
    seed = world.new_checkpoint()
    world.start({victim: {"act": "raise", "at": at}})
    when = world.fleet.ranks[victim].happened("fault")
    record = failed_alike(world.reported(f"a rank raises ({at})", when, MISTAKE_SECONDS, world.alive))
    assert (record["rank"], record["device"]) == (victim, world.fleet.device(victim))
    assert (record["stage"], record["error_type"]) == (stage, "RuntimeError")
    assert "injected in" in record["message"]
    assert "steered_rank.py" in record["traceback"]
    assert (record["bucket"] is not None) == bool(record["tensors"]) == (at == "buckets")
    works_at_once(world, seed)
